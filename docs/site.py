"""Hooks of mkdocs: README.md is the site's first page, and the other pages that lie outside docs/ are in it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    **{path: path for path in sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("samples/*/README.md"))},
}
"""Pages of the site, and the files they are made of."""


def on_files(files: Files, config: Any) -> Files:
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted(path for page in OUTSIDE.values() for path in (ROOT / page).parent.glob("*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them: a page keeps its folder, but for docs/, which is the site's root."""
    depth = page.file.src_uri.count("/")
    up = "../" * depth
    if page.file.src_uri in OUTSIDE:
        moved = markdown.replace(f"]({up}docs/", f"]({up}").replace(f"]({up}README.md", f"]({up}index.md")
        return moved.replace("](CONTRIBUTING.md", "](contributing.md")
    return markdown.replace("](../samples/", "](samples/").replace("](../CONTRIBUTING.md", "](contributing.md")
