"""From checkpoint to search results with the commands a user types, offline. `make demo` runs it.

The checkpoint is made here and its weights are random: the demo shows that everything runs, not that it finds anything.
Pages are this project's own texts, set as a PDF, and PDFs that the system's documentation packages brought.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from random_checkpoint import make_checkpoint

PROJECT = Path(__file__).resolve().parents[1]
DEMO = PROJECT / ".demo"
TEXTS = ("README.md", "docs/design.md", "LICENSE")
SYSTEM_DOCUMENTS = Path("/usr/share/doc")
MAX_BYTES = 1_000_000
LINES_PER_PAGE = 62
QUERIES = ("grant of patent license", "how is a bundle verified", "rotary positions of latent slots")


def set_page(lines: list[str]) -> Image.Image:
    """A page of A4 at 96 dpi."""
    page = Image.new("RGB", (794, 1123), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for row, line in enumerate(lines):
        draw.text((48, 48 + 16 * row), line[:110], fill="black", font=font)
    return page


def set_pdf(text: Path, out: Path) -> None:
    lines = text.read_text(encoding="utf-8").splitlines()
    pages = [set_page(lines[start : start + LINES_PER_PAGE]) for start in range(0, len(lines), LINES_PER_PAGE)]
    pages[0].save(out, format="PDF", save_all=True, append_images=pages[1:])


def collect_pages(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TEXTS:
        set_pdf(PROJECT / name, folder / f"{Path(name).stem.lower()}.pdf")
    found = sorted(path for path in SYSTEM_DOCUMENTS.glob("*/*.pdf") if path.stat().st_size < MAX_BYTES)
    return [folder, *found[:3]]


def run(*arguments: str | Path) -> None:
    command = ["cembed", *map(str, arguments)]
    shown = [part.replace(f"{PROJECT}/", "") for part in command]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    subprocess.run([str(Path(sys.executable).with_name("cembed")), *command[1:]], check=True)


def main() -> None:
    checkpoint, bundle, vectors = DEMO / "checkpoint", DEMO / "bundle", DEMO / "pages.npz"
    if not (checkpoint / "config.json").exists():
        make_checkpoint(checkpoint, "qwen2-vl", "causal", "tiny")
    print("A tiny Qwen2-VL checkpoint with random weights: everything below runs, but the ranks mean nothing.")
    run("export", "--backbone", "qwen2-vl", "--model", checkpoint, "--out", bundle, "--force")
    run("verify", bundle)
    run("embed", bundle, *collect_pages(DEMO / "pages"), "--out", vectors, "--force")
    for query in QUERIES:
        run("search", vectors, query, "--bundle", bundle, "--top", "3")
    print("\nRandom weights, so ranks that mean nothing; the bundle, the vectors and the pages are in .demo.")


if __name__ == "__main__":
    main()
