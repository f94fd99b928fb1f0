"""What pages are about: word lists, made-up names, and the rule that keeps the splits apart.

Single words are shared by all splits; what is made of them (a person, a product, a title) belongs to one split alone,
by a hash of its text. Made-up names are new words every time, in all splits.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Literal

Split = Literal["train", "validation", "test"]


def read_lists(path: Path) -> dict[str, list[str]]:
    """The lists of words.txt by name: a name and a colon, then words on indented lines."""
    lists: dict[str, list[str]] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            lists[name] += line.split()
        else:
            name = line.rstrip(":")
            lists[name] = []
    return lists


LISTS = read_lists(Path(__file__).with_name("words.txt"))
FIRST = LISTS["first"]
LAST = LISTS["last"]
NOUNS = LISTS["nouns"]
ADJECTIVES = LISTS["adjectives"]
CITIES = LISTS["cities"]
TRADES = LISTS["trades"]
MEASURES = LISTS["measures"]
SUBJECTS = LISTS["subjects"]
EVENTS = LISTS["events"]
DEPARTMENTS = LISTS["departments"]
DISHES = LISTS["dishes"]
VERBS = LISTS["verbs"]
MONTHS = LISTS["months"]
ONSETS = LISTS["onsets"]
NUCLEI = LISTS["nuclei"]
CODAS = LISTS["codas"]
LABELS = LISTS["labels"]
ASKING = LISTS["asking"]


def made_up_name(random: Random) -> str:
    """A name of two or three syllables that hardly anybody bears."""
    middle = "".join(random.choice(ONSETS) + random.choice(NUCLEI) for _ in range(random.choice((1, 1, 2))))
    return (middle + random.choice(ONSETS) + random.choice(NUCLEI) + random.choice(CODAS)).capitalize()


def split_of(text: str) -> Split:
    """The split that a person, product or title belongs to: a tenth each for validation and test."""
    share = zlib.crc32(text.lower().encode()) % 10
    return "validation" if share == 0 else "test" if share == 1 else "train"


def of_split(split: Split, make: Callable[[], str]) -> str:
    """The first that `make` gives of this split."""
    while split_of(text := make()) != split:
        pass
    return text


def person(random: Random, split: Split) -> str:
    def make() -> str:
        surname = made_up_name(random) if random.random() < 0.25 else random.choice(LAST)
        return f"{random.choice(FIRST)} {surname}"

    return of_split(split, make)


def company(random: Random, split: Split) -> str:
    def make() -> str:
        owner = (
            made_up_name(random)
            if random.random() < 0.5
            else random.choice((random.choice(LAST), random.choice(CITIES)))
        )
        return f"{owner} {random.choice(TRADES)}"

    return of_split(split, make)


def product(random: Random, split: Split) -> str:
    return of_split(split, lambda: f"{random.choice(ADJECTIVES)} {random.choice(NOUNS)}")


def topic(random: Random, split: Split) -> str:
    return of_split(split, lambda: f"{random.choice(SUBJECTS)} {random.choice(MEASURES)}")


def event(random: Random, split: Split) -> str:
    return of_split(split, lambda: f"{random.choice(SUBJECTS)} {random.choice(EVENTS)}")


def dish(random: Random, split: Split) -> str:
    return of_split(split, lambda: " ".join(random.sample(DISHES, 2)))


def street(random: Random) -> str:
    kind = random.choice(("Street", "Road", "Lane", "Square", "Avenue"))
    return f"{random.randint(1, 199)} {made_up_name(random)} {kind}"


def price(random: Random) -> str:
    whole = random.choice((random.randint(1, 9), random.randint(10, 99), random.randint(100, 1999)))
    return f"{whole}.{random.randint(0, 99):02}"


def date(random: Random) -> str:
    day, month, year = random.randint(1, 28), random.choice(MONTHS), random.randint(1995, 2029)
    return f"{day} {month} {year}"


def sentence(random: Random) -> str:
    """Filler: grammatical, about nothing."""
    return (
        f"{random.choice(CITIES)} {random.choice(VERBS)} {random.choice(SUBJECTS)} {random.choice(MEASURES)} as "
        f"{random.choice(ADJECTIVES)} {random.choice(NOUNS)} {random.choice(VERBS)} the {random.choice(SUBJECTS)} "
        f"{random.choice(EVENTS)}."
    )
