"""The kinds of pages. A kind draws itself on a canvas and says what could be asked about what it drew.

A question is a template's text and its keys: the words that a page must bear, all of them, to be relevant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import words
from canvas import Canvas, shade
from fonts import faces
from words import Split

PORTRAIT, LANDSCAPE, SQUARE, SLIP = (336, 448), (448, 336), (336, 336), (224, 448)
Size = tuple[int, int]


@dataclass(frozen=True)
class Question:
    text: str
    keys: tuple[str, ...]


def ask(random: Random, templates: str, **facts: str) -> Question:
    """One of the templates (separated by |) with the facts that it names as keys."""
    template = random.choice(templates.split("|"))
    used = [value for name, value in facts.items() if f"{{{name}}}" in template]
    text = template.format(**facts)
    if random.random() < 0.5:
        text = text.lower()
    return Question(text, tuple(word.lower() for value in used for word in value.split()))


def invoice(page: Canvas, random: Random, split: Split) -> list[Question]:
    seller, buyer, number = words.company(random, split), words.person(random, split), str(random.randint(1000, 99999))
    page.heading(random.choice(("Invoice", "Invoice", "Bill", "Order", "Quote")), align=random.choice((0, 0.5, 1)))
    page.line(seller, align=random.choice((0, 1)))
    page.row(f"No. {number}", words.date(random))
    page.line(f"{random.choice(('Bill to', 'Customer', 'For', 'Sold to'))}: {buyer}")
    page.rule()
    items = [(words.product(random, split), words.price(random)) for _ in range(random.randint(2, 5))]
    for name, cost in items:
        page.row(name, cost)
    page.rule()
    page.row("Total", words.price(random))
    item, cost = random.choice(items)
    return [
        ask(random, "invoice from {seller} to {buyer}|what did {buyer} buy from {seller}|{seller} bill for {buyer}",
            seller=seller, buyer=buyer),
        ask(random, "{item} bought by {buyer}|price of the {item} for {buyer}|{buyer} {item}", item=item, buyer=buyer),
        ask(random, "{item} sold by {seller}|how much is the {item} at {seller}", item=item, seller=seller),
        ask(random, "{item} for {cost}|{item} that costs {cost}", item=item, cost=cost),
        ask(random, "number {number} of {seller}|{seller} no. {number}", number=number, seller=seller),
    ]  # fmt: skip


def receipt(page: Canvas, random: Random, split: Split) -> list[Question]:
    shop, city = words.company(random, split), random.choice(words.CITIES)
    page.heading(shop, 1.25, align=0.5)
    page.line(f"{city}, {words.date(random)}", align=0.5)
    page.rule()
    things = words.product if random.random() < 0.6 else words.dish
    items = [(things(random, split), words.price(random)) for _ in range(random.randint(2, 6))]
    for name, cost in items:
        page.row(name, cost)
    page.rule()
    page.row(random.choice(("TOTAL", "Total", "Sum", "To pay")), words.price(random))
    page.line(random.choice(("Thank you!", "Paid by card", "Paid in cash", "Please come again")), align=0.5)
    (first, cost), (second, _) = random.sample(items, 2)
    return [
        ask(random, "receipt from {shop} with {item}|{item} bought at {shop}|{shop} {item}", shop=shop, item=first),
        ask(random, "receipt for {item} and {other}|{item}, {other}", item=first, other=second),
        ask(random, "{item} at {cost}|receipt: {item} {cost}", item=first, cost=cost),
        ask(random, "receipt of {shop} in {city}|{shop} {city}", shop=shop, city=city),
    ]


def form(page: Canvas, random: Random, split: Split) -> list[Question]:
    title, name = words.event(random, split), words.person(random, split)
    employer, city, road = words.company(random, split), random.choice(words.CITIES), words.street(random)
    purpose = random.choice(("Registration", "Application", "Permission", "Request"))
    page.heading(f"{purpose}: {title}", 1.3)
    rows = [("Name", name), ("Address", road), ("City", city), ("Employer", employer), ("Born", words.date(random)),
            ("Phone", str(random.randint(10**6, 10**8))), ("Department", random.choice(words.DEPARTMENTS))]  # fmt: skip
    fixed, others = rows[:2] + rows[3:4], rows[2:3] + rows[4:]
    chosen = fixed + random.sample(others, random.randint(1, 4))
    random.shuffle(chosen)
    boxed = random.random() < 0.5
    for label, value in chosen:
        if page.room < 2 * page.style.size:
            break
        top = page.y
        page.line(label, size=max(11, page.style.size - 3), gap=1.1 if boxed else 0.001, ink=page.style.accent)
        page.line(
            value,
            x=page.style.margin + (4 if boxed else page.inner * 0.36),
            width=page.inner * (0.97 if boxed else 0.64),
        )
        if boxed:
            page.pen.rectangle(
                (page.style.margin - 2, top - 1, page.width - page.style.margin, page.y - 2), outline=page.style.accent
            )
            page.space(0.3)
    return [
        ask(random, "form filled in by {name}|{name} {title}|{name} signs up for the {title}", name=name, title=title),
        ask(random, "{title} form of {name}|who of {employer} joins the {title}",
            name=name, title=title, employer=employer),
        ask(random, "{name} works at {employer}|employee {name} of {employer}", name=name, employer=employer),
        ask(random, "{name} who lives at {road}|address {road}", name=name, road=road),
    ]  # fmt: skip


def table(page: Canvas, random: Random, split: Split) -> list[Question]:
    title, year = words.topic(random, split), str(random.randint(1995, 2029))
    page.heading(f"{title.capitalize()} {year}", 1.3)
    by_city = random.random() < 0.6
    labels = (
        random.sample(words.CITIES, random.randint(4, 9))
        if by_city
        else random.sample(words.DEPARTMENTS, random.randint(4, 8))
    )
    columns = random.randint(1, 3)
    shown = []
    for index, label in enumerate(labels):
        if page.room < 1.5 * page.style.size:
            break
        if index % 2 and page.style.size % 2:
            page.pen.line(
                (page.style.margin, page.y - 2, page.width - page.style.margin, page.y - 2), fill=page.style.accent
            )
        numbers = [str(random.randint(1, 9999)) for _ in range(columns)]
        top = page.y
        page.line(label, width=page.inner * 0.5)
        bottom = page.y
        for column, number in enumerate(numbers):
            page.y = top
            page.line(
                number,
                x=page.style.margin + page.inner * (0.5 + 0.5 * column / columns),
                width=page.inner * 0.48 / columns,
                align=1,
            )
        page.y = bottom
        shown.append((label, numbers[0]))
    (label, number), (other, _) = random.sample(shown, 2)
    return [
        ask(random, "{title} in {year}|table of {title} {year}", title=title, year=year),
        ask(random, "{title} for {label}|{label} {title}", title=title, label=label),
        ask(
            random, "{title} of {label} and {other}|{label} and {other}: {title}", title=title, label=label, other=other
        ),
        ask(random, "where {title} were {number}|{number} {title} {label}", title=title, number=number, label=label),
    ]


def chart(page: Canvas, random: Random, split: Split) -> list[Question]:
    title, place = words.topic(random, split), random.choice(words.CITIES)
    page.heading(f"{title.capitalize()} in {place}", 1.25, align=random.choice((0, 0.5)))
    labels = (
        random.sample(words.MONTHS, 5)
        if random.random() < 0.4
        else random.sample([a.lower() for a in words.SUBJECTS], random.randint(3, 6))
    )
    values = [random.randint(5, 100) for _ in labels]
    top, height = page.y + 4, (page.room - 12) / len(labels)
    size = min(page.style.size, max(12, int(height * 0.6)))
    shown = []
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        page.y = top + index * height
        if page.room < size:
            break
        left = page.style.margin + page.inner * 0.4
        right = left + page.inner * 0.45 * value / 100
        fill = (
            page.style.accent
            if random.random() < 0.7
            else (random.randint(0, 255), random.randint(0, 255), random.randint(0, 255))
        )
        page.pen.rectangle((left, page.y, right, page.y + height * 0.7), fill=fill)
        page.text(right + 5, page.y + height * 0.1, str(value), page.style.body, size)
        page.line(label, size=size, width=page.inner * 0.38, align=random.choice((0.0, 1.0)))
        shown.append(label)
    label, other = random.sample(shown, 2)
    return [
        ask(random, "chart of {title} in {place}|{place}: {title}", title=title, place=place),
        ask(random, "{title} by {label} and {other}|bars for {label} and {other} under {title}",
            title=title, label=label, other=other),
        ask(random, "{place} {label} {other}|{label} and {other} in {place}", place=place, label=label, other=other),
    ]  # fmt: skip


def slide(page: Canvas, random: Random, split: Split) -> list[Question]:
    title, speaker = words.topic(random, split), words.person(random, split)
    page.heading(title.capitalize(), 1.6, align=random.choice((0, 0.5)))
    page.space(0.4)
    firm, points = words.company(random, split), []
    for _ in range(random.randint(2, 4)):
        point = f"{random.choice(words.VERBS).capitalize()} {words.topic(random, split)}"
        if page.room < 4 * page.style.size:
            break
        page.paragraph(f"{random.choice('-*•')} {point}", size=page.style.size + 1)
        points.append(point)
    page.y = max(page.y, page.height - 2.2 * page.style.size)
    page.row(speaker, firm)
    point = random.choice(points)
    return [
        ask(
            random,
            "slide on {title} by {speaker}|{speaker} talks about {title}|{title}, {speaker}",
            title=title,
            speaker=speaker,
        ),
        ask(random, "{firm} slide about {title}|{title} at {firm}", firm=firm, title=title),
        ask(random, "{point} and {title}|who {point} for {firm}", point=point, title=title, firm=firm),
    ]


def notice(page: Canvas, random: Random, split: Split) -> list[Question]:
    what, place, who = words.event(random, split), random.choice(words.CITIES), words.person(random, split)
    when, room = words.date(random), str(random.randint(1, 999))
    page.space(random.uniform(0, 2))
    page.heading(random.choice(("Notice", "Attention", "Welcome", "Join us", "Please note")), 1.2, align=0.5)
    page.heading(what, 1.8, align=0.5)
    page.space(0.5)
    for text in random.sample((place, when, f"Room {room}"), random.randint(2, 3)):
        page.line(text, size=page.style.size + 3, align=0.5)
    page.space(0.5)
    page.line(f"{random.choice(('Contact', 'Ask', 'Host', 'Tickets'))}: {who}", align=0.5)
    day, month, year = when.split()
    return [
        ask(random, "{what} organised by {who}|{who} hosts the {what}|{what} {who}", what=what, who=who),
        ask(random, "notice about the {what} with {who}|whom to ask about the {what}: {who}", what=what, who=who),
        ask(
            random, "{what} on {day} {month} {year}|{what}, {month} {year}", what=what, day=day, month=month, year=year
        ),
    ]


def article(page: Canvas, random: Random, split: Split) -> list[Question]:
    what, place, writer = words.topic(random, split), random.choice(words.CITIES), words.person(random, split)
    verb = random.choice(words.VERBS)
    page.heading(f"{place} {verb} {what}", 1.4)
    page.line(f"{random.choice(('By', 'From', 'Report:'))} {writer}")
    columns = random.choice((1, 2, 2)) if page.width > 250 else 1
    top, gutter = page.y, 12
    width = (page.inner - gutter * (columns - 1)) / columns
    body = max(12, page.style.size - 2)
    for column in range(columns):
        page.y = top
        text = " ".join(words.sentence(random) for _ in range(5))
        page.paragraph(text, x=page.style.margin + column * (width + gutter), width=width, size=body)
    return [
        ask(random, "article by {writer} on {what}|{writer} writes about {what}", writer=writer, what=what),
        ask(random, "{place} {verb} {what}|news: {place} {verb} {what}", place=place, verb=verb, what=what),
        ask(random, "{writer} reports from {place}|{place}, {writer}", writer=writer, place=place),
    ]


def recipe(page: Canvas, random: Random, split: Split) -> list[Question]:
    title, cook = words.dish(random, split), words.person(random, split)
    page.heading(title, 1.5)
    page.line(f"{random.choice(('Recipe of', 'Cooked by', 'From'))} {cook}")
    page.rule()
    parts = random.sample([dish for dish in words.DISHES if dish not in title], random.randint(3, 6))
    shown = []
    for part in parts:
        if page.room < 1.5 * page.style.size:
            break
        page.row(part, f"{random.randint(1, 900)} {random.choice(('g', 'ml', 'cups', 'pieces'))}")
        shown.append(part)
    if page.room > 4 * page.style.size:
        way = random.choice(("Boil", "Bake", "Fry", "Steam"))
        page.paragraph(f"{way} for {random.randint(5, 90)} minutes. {words.sentence(random)}")
    part, other = random.sample(shown, 2)
    return [
        ask(random, "recipe for {title} by {cook}|how does {cook} make {title}", title=title, cook=cook),
        ask(random, "{title} with {part} and {other}|{title}, {part}, {other}", title=title, part=part, other=other),
    ]


def letter(page: Canvas, random: Random, split: Split) -> list[Question]:
    sender, reader, what = words.company(random, split), words.person(random, split), words.event(random, split)
    page.line(sender, align=1)
    page.line(words.date(random), align=1)
    page.space(1)
    page.line(f"Dear {reader},")
    page.space(0.3)
    page.line(f"Subject: {what}", face=page.style.heading)
    page.paragraph(" ".join(words.sentence(random) for _ in range(3)), bottom=page.height - 4 * page.style.size)
    page.space(0.5)
    signer = words.person(random, split)
    page.line("Yours sincerely")
    page.line(signer)
    return [
        ask(random, "letter to {reader} about the {what}|{what}: letter for {reader}", reader=reader, what=what),
        ask(random, "letter from {sender} to {reader}|what {sender} wrote to {reader}", sender=sender, reader=reader),
        ask(random, "letter signed by {signer} on the {what}|{signer} {what}", signer=signer, what=what),
    ]


def label(page: Canvas, random: Random, split: Split) -> list[Question]:
    sender, reader, content = words.company(random, split), words.person(random, split), words.product(random, split)
    road, city = words.street(random), random.choice(words.CITIES)
    page.pen.rectangle((4, 4, page.width - 5, page.height - 5), outline=page.style.ink, width=2)
    page.line("From", size=12, ink=page.style.accent)
    page.line(sender)
    page.rule()
    page.line("Ship to", size=12, ink=page.style.accent)
    for text in (reader, road, city):
        page.line(text, size=page.style.size + 4, face=page.style.heading)
    page.rule()
    page.row(content, f"{random.randint(1, 40)} kg")
    for x in range(page.style.margin, page.width - page.style.margin, 4):
        if random.random() < 0.6 and page.room > 20:
            page.pen.rectangle(
                (x, page.y + 4, x + random.randint(0, 2), min(page.height - 10, page.y + 54)), fill=page.style.ink
            )
    return [
        ask(
            random, "parcel for {reader} with a {content}|{content} shipped to {reader}", reader=reader, content=content
        ),
        ask(random, "parcel from {sender} to {reader}|{sender} ships to {reader}", sender=sender, reader=reader),
        ask(random, "shipment to {road} in {city}|{city}, {road}", road=road, city=city),
    ]


def menu(page: Canvas, random: Random, split: Split) -> list[Question]:
    owner = words.person(random, split)
    page.heading(f"{random.choice(('Chez', 'Bistro', 'Cafe', 'Tavern'))} {owner}", 1.5, align=0.5)
    page.space(0.5)
    shown = []
    for _ in range(random.randint(3, 6)):
        if page.room < 2.5 * page.style.size:
            break
        name, cost = words.dish(random, split), words.price(random)
        page.line(name, align=0.5, gap=1.1)
        page.line(cost, align=0.5, ink=page.style.accent)
        shown.append((name, cost))
    (name, cost), (other, _) = random.sample(shown, 2)
    return [
        ask(random, "{name} at {owner}|menu of {owner} with {name}", name=name, owner=owner),
        ask(random, "menu with {name} and {other}|{name}, {other}", name=name, other=other),
        ask(random, "{name} for {cost}|{name} {cost}", name=name, cost=cost),
    ]


def collage(page: Canvas, random: Random, split: Split) -> list[Question]:
    """Facts and filler anywhere, in any size, order and arrangement: what keeps a model from relying on the layouts."""
    facts = [random.choice(FACTS)(random, split) for _ in range(random.randint(5, 14))]
    todo, inner, density = list(facts), page.inner, random.choice((0.0, 0.2, 0.5))
    while todo and page.room > 2 * page.style.size:
        page.space(random.choice((0, 0, 0.3, 1, 2)))
        if random.random() < 0.12:
            page.rule()
        if random.random() < density:
            page.paragraph(words.sentence(random), size=max(12, page.style.size - random.randint(0, 3)))
        elif random.random() < 0.35 and len(todo) > 1:
            share, top = random.uniform(0.35, 0.65), page.y
            place(page, random, todo.pop(), 0, inner * share - 4)
            bottom, page.y = page.y, top
            place(page, random, todo.pop(), inner * share + 4, inner * (1 - share))
            page.y = max(bottom, page.y)
        else:
            indent = random.choice((0, 0, 0, random.uniform(0, 0.3))) * inner
            place(page, random, todo.pop(), indent, inner - indent)
    return [ask_about(random, facts) for _ in range(4)]


def place(page: Canvas, random: Random, fact: str, indent: float, width: float) -> None:
    """A fact in a style of its own, often with a label before, above or below it."""
    left, top, size = page.style.margin + indent, page.y, page.style.size
    label = random.choice((*words.LABELS, words.made_up_name(random)))
    label, where = (
        random.choice(("", "", "", label, label.lower(), label + ":")),
        random.choice(("before", "above", "below")),
    )
    text = random.choice((fact, fact, fact.capitalize(), fact.title(), fact.upper()))
    text += random.choice(("", "", "", ",", ".", "!"))
    align, small = random.choice((0, 0, 0.5, 1)), max(11, size - random.randint(0, 4))
    if label and where == "above":
        page.line(label, x=left, width=width, size=small, align=align, gap=1.15, ink=page.style.accent)
    page.paragraph(
        f"{label} {text}" if label and where == "before" else text,
        x=left,
        width=width,
        size=round(size * random.choice((0.85, 1, 1, 1.25, 1.6))),
        face=random.choice((page.style.heading, page.style.body)),
        ink=random.choice((page.style.ink, page.style.ink, page.style.accent)),
        align=align,
    )
    if label and where == "below":
        page.line(label, x=left, width=width, size=small, align=align, gap=1.15)
    if random.random() < 0.15:
        page.pen.rectangle((left - 3, top - 2, left + width + 2, max(top, page.y)), outline=page.style.accent)
        page.space(0.3)


def ask_about(random: Random, facts: list[str]) -> Question:
    """One to three facts of a page among words that mean nothing."""
    chosen = random.sample(facts, random.choice((1, 2, 2, 2, 2, 3)))

    def noise() -> str:
        return random.choice(
            (random.choice(words.ASKING), random.choice(words.ASKING), words.made_up_name(random), "", "")
        )

    text = " ".join(f"{noise()} {noise()} {fact}" for fact in chosen)
    text = " ".join(f"{text} {noise()}".split())
    keys = tuple(dict.fromkeys(word.lower() for fact in chosen for word in fact.split()))
    return Question(text.lower() if random.random() < 0.5 else text, keys)


FACTS: tuple[Callable[[Random, Split], str], ...] = (
    words.person, words.person, words.company, words.company, words.product, words.product, words.event, words.topic,
    words.dish, words.dish,
    lambda random, split: f"{words.product(random, split)} {words.price(random)}",
    lambda random, split: f"{words.dish(random, split)} {words.price(random)}",
    lambda random, split: words.street(random),
    lambda random, split: words.date(random),
    lambda random, split: f"{words.street(random)} {random.choice(words.CITIES)}",
    lambda random, split: f"{random.choice(words.CITIES)} {random.randint(1, 9999)}",
)  # fmt: skip


def wall(page: Canvas, random: Random, split: Split) -> list[Question]:
    """A page full of words in many faces and sizes, asked nothing: what reading is learned from."""
    known = faces(False)
    page.y = random.uniform(0, 12)
    while page.room > 14:
        face, size, x, top, lowest = random.choice(known), random.randint(12, 24), random.uniform(0, 24), page.y, page.y
        ink = shade(random, 0, 90) if sum(page.style.paper) > 380 else shade(random, 170, 255)
        while x < page.width - 30:
            text = random.choice(WALL)(random, split)
            text = random.choice((text, text, text.lower(), text.capitalize(), text.upper()))
            page.text(x, top, text, face, size, ink)
            x += face.width(text, size) + size * random.uniform(0.25, 1.5)
            lowest = max(lowest, top + size * random.uniform(1.05, 1.5))
        page.y = lowest
    return [Question("wall", ())]


WALL: tuple[Callable[[Random, Split], str], ...] = (
    words.person, words.company, words.product, words.topic, words.event, words.dish,
    lambda random, split: words.price(random),
    lambda random, split: words.street(random),
    lambda random, split: words.date(random),
    lambda random, split: random.choice(words.VERBS),
    lambda random, split: random.choice(words.CITIES),
    lambda random, split: random.choice(words.DEPARTMENTS),
)  # fmt: skip
Layout = Callable[[Canvas, Random, Split], list[Question]]
TRAINED: dict[Layout, tuple[Size, ...]] = {
    invoice: (PORTRAIT, SQUARE),
    receipt: (SLIP, PORTRAIT),
    form: (PORTRAIT, LANDSCAPE),
    table: (PORTRAIT, SQUARE, LANDSCAPE),
    chart: (LANDSCAPE, SQUARE),
    slide: (LANDSCAPE,),
    notice: (PORTRAIT, SQUARE, SLIP),
    article: (PORTRAIT, LANDSCAPE, SLIP),
    recipe: (PORTRAIT, SQUARE, SLIP),
}
COLLAGES: dict[Layout, tuple[Size, ...]] = {collage: (PORTRAIT, LANDSCAPE, SQUARE, SLIP)}
HELD_OUT: dict[Layout, tuple[Size, ...]] = {letter: (PORTRAIT,), label: (SQUARE, LANDSCAPE), menu: (PORTRAIT, SLIP)}
WALLS: dict[Layout, tuple[Size, ...]] = {wall: (PORTRAIT, LANDSCAPE, SQUARE, SLIP)}
