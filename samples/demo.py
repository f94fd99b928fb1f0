"""From the sample model to ranked pages with the commands a user types, offline, and a report to look at.

`make demo` runs it: exports `samples/model`, embeds the sample pages (half of them as one PDF), this project's own
texts as PDF and PDF files that the system's documentation brought, asks the first ten questions of the sample pages,
and writes .demo/report.html, which a browser opens without a server.
"""

from __future__ import annotations

import base64
import html
import io
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cembed.runtime import Embedder, Page, PageReader, VectorFile, maxsim
from cembed.runtime.evaluate import Dataset

PROJECT = Path(__file__).resolve().parents[1]
DEMO = PROJECT / ".demo"
MODEL = PROJECT / "samples" / "model"
SAMPLE_PAGES = PROJECT / "samples" / "pages" / "sample"
TEXTS = ("README.md", "docs/formats.md", "LICENSE")
SYSTEM_DOCUMENTS = Path("/usr/share/doc")
MAX_BYTES = 1_000_000
LINES_PER_PAGE = 62
QUESTIONS, TOP = 10, 4


def set_page(lines: list[str]) -> Image.Image:
    """A page of A4 at 96 dpi."""
    page = Image.new("RGB", (794, 1123), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for row, line in enumerate(lines):
        draw.text((48, 48 + 16 * row), line[:110], fill="black", font=font)
    return page


def save_pdf(pages: list[Image.Image], out: Path) -> None:
    pages[0].save(out, format="PDF", save_all=True, append_images=pages[1:], quality=95)


def set_pdf(text: Path, out: Path) -> None:
    lines = text.read_text(encoding="utf-8").splitlines()
    save_pdf([set_page(lines[start : start + LINES_PER_PAGE]) for start in range(0, len(lines), LINES_PER_PAGE)], out)


def collect_pages(folder: Path) -> dict[tuple[str, int], str]:
    """Fills `folder`; returns the sample page of each file and page number."""
    folder.mkdir(parents=True, exist_ok=True)
    scans, singles = [], {}
    for index, path in enumerate(sorted((SAMPLE_PAGES / "pages").iterdir())):
        if index % 2:
            copy = folder / path.name
            copy.write_bytes(path.read_bytes())
            singles[str(copy), 1] = path.name
        else:
            scans.append(path)
    save_pdf([Image.open(path, formats=("PNG", "JPEG")) for path in scans], folder / "scans.pdf")
    for name in TEXTS:
        set_pdf(PROJECT / name, folder / f"{Path(name).stem.lower()}.pdf")
    return singles | {(str(folder / "scans.pdf"), number): path.name for number, path in enumerate(scans, 1)}


def system_pdfs() -> list[Path]:
    return sorted(path for path in SYSTEM_DOCUMENTS.glob("*/*.pdf") if path.stat().st_size < MAX_BYTES)[:3]


def run(*arguments: str | Path) -> None:
    command = ["cembed", *map(str, arguments)]
    shown = [part.replace(f"{PROJECT}/", "") for part in command]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    subprocess.run([str(Path(sys.executable).with_name("cembed")), *command[1:]], check=True)


@dataclass(frozen=True)
class Answer:
    """A question and its best pages: score, file and page number, whether it is a right one."""

    question: str
    ranked: list[tuple[float, str, int, bool]]


def ask(bundle: Path, vectors: Path, names: dict[tuple[str, int], str]) -> Iterator[Answer]:
    data, content, embedder = Dataset.read(SAMPLE_PAGES), VectorFile.load(vectors), Embedder.load(bundle)
    for query in data.judged()[:QUESTIONS]:
        scores = maxsim(embedder.embed_queries([data.queries[query]]), content.documents())[0]
        ranked = []
        for index in np.argsort(-scores, kind="stable")[:TOP]:
            place = content.paths[index], int(content.pages[index])
            right = data.qrels[query].get(names.get(place, ""), 0) > 0
            ranked.append((float(scores[index]), *place, right))
        yield Answer(data.queries[query], ranked)


def thumbnails(places: set[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Small pictures of pages as data URLs."""
    shown = {}
    with PageReader() as reader:
        for page in reader.read([Path(path) for path in sorted({path for path, _ in places})]):
            if isinstance(page, Page) and (page.path, page.number) in places:
                image, buffer = Image.fromarray(page.image), io.BytesIO()
                image.thumbnail((300, 300))
                image.save(buffer, "JPEG", quality=80)
                data = base64.b64encode(buffer.getvalue()).decode()
                shown[page.path, page.number] = f"data:image/jpeg;base64,{data}"
    return shown


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1320px; padding: 0 1rem; color: #1d2530 }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
.pages { display: flex; gap: 1rem; flex-wrap: wrap }
figure { box-sizing: border-box; width: 300px; margin: 0; padding: .5rem }
figure { border: 2px solid #d9dee5; border-radius: 6px }
figure.right { border-color: #1f8a4c; background: #effaf3 }
img { max-width: 100%; display: block; margin: 0 auto .4rem; box-shadow: 0 0 3px #0004 }
figcaption { font-size: .85rem; color: #47525f; overflow-wrap: anywhere } .score { float: right }
"""


def write_report(answers: list[Answer], pages: int, out: Path) -> None:
    pictures = thumbnails({(path, number) for answer in answers for _, path, number, _ in answer.ranked})
    first = sum(answer.ranked[0][3] for answer in answers)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>cembed demo</title><style>{STYLE}</style>",
        "<h1>Questions to pages that were never turned into text</h1>",
        f"<p>{pages} pages, 32 vectors each, found by the sample model. The page ranked first is right for {first} of "
        f"{len(answers)} questions; right pages have a green frame.</p>",
    ]
    for answer in answers:
        parts.append(f"<h2>{html.escape(answer.question)}</h2><div class=pages>")
        for rank, (score, path, number, right) in enumerate(answer.ranked, 1):
            name = html.escape(f"{Path(path).name}, page {number}")
            parts.append(
                f'<figure class="{"right" if right else "other"}"><img src="{pictures[path, number]}" alt="{name}">'
                f"<figcaption>{rank}. {name} <span class=score>{score:.2f}</span></figcaption></figure>"
            )
        parts.append("</div>")
    out.write_text("\n".join(parts), encoding="utf-8")


def main() -> None:
    bundle, vectors, report = DEMO / "bundle", DEMO / "pages.npz", DEMO / "report.html"
    flags = ("--slot-positions", "continue", "--force")
    run("export", "--backbone", "qwen2.5-vl", "--model", MODEL, "--out", bundle, *flags)
    run("verify", bundle)
    names = collect_pages(DEMO / "pages")
    run("embed", bundle, DEMO / "pages", *system_pdfs(), "--out", vectors, "--force")
    answers = list(ask(bundle, vectors, names))
    run("search", vectors, answers[0].question, "--bundle", bundle, "--top", "3")
    write_report(answers, len(VectorFile.load(vectors)), report)
    for answer in answers:
        _, path, number, right = answer.ranked[0]
        print(f"{'right' if right else 'WRONG'}  {answer.question!r} -> {Path(path).name}, page {number}")
    first = sum(answer.ranked[0][3] for answer in answers)
    print(f"\nThe first page is right for {first} of {len(answers)} questions. Look at {report.relative_to(PROJECT)}.")


if __name__ == "__main__":
    main()
