"""What the documents say is what the program does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN

PROJECT = Path(__file__).resolve().parents[1]
README = PROJECT / "README.md"
DOCUMENTS = sorted(
    path.relative_to(PROJECT).as_posix()
    for folder in (".", "docs", "samples/*")
    for path in PROJECT.glob(f"{folder}/*.md")
)


def test_help_texts_are_current() -> None:
    subprocess.run([sys.executable, PROJECT / "docs" / "help.py", "--check"], check=True)


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Links, anchors and docstrings: mkdocs is strict."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path / "site"]
    built = subprocess.run(command, cwd=PROJECT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=False)
    assert built.returncode == 0
    for page in ("index.html", "api/index.html", "samples/cpp/index.html"):
        assert "<h1" in (tmp_path / "site" / page).read_text()


def test_the_table_of_what_fits_is_current() -> None:
    folder = PROJECT / "samples" / "jetson"
    table = subprocess.run([sys.executable, folder / "memory.py"], check=True, capture_output=True, text=True).stdout
    assert table in (folder / "README.md").read_text()


def test_the_python_of_the_documents_runs(causal_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = r"<!-- run by tests/test_docs.py -->\n```python\n(.*?)```"
    (first,), (documents, second, third, fourth) = (
        re.findall(block, page.read_text(), re.DOTALL) for page in (README, PROJECT / "docs" / "deploy.md")
    )
    shutil.copytree(causal_bundle, tmp_path / "bundle")
    shutil.copy(GOLDEN / "colqwen2" / "page.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(first, names)
    assert getattr(names["scores"], "shape", None) == (1, 1)
    (tmp_path / "scans").mkdir()
    shutil.copy(GOLDEN / "colqwen2" / "page.png", tmp_path / "scans")
    exec(documents, names)
    assert names["shapes"] == {("scans/page.png", 1): (8, 96)}
    exec(second, names)
    assert getattr(names["fine"], "shape", (0, 0))[0] == 32
    exec(third, names)
    assert [hit.id for hit in getattr(names["found"], "hits", ())] == ["page.png#1"]
    exec(fourth, names)
    assert (tmp_path / "explained.png").stat().st_size


def test_the_documented_test_command_is_what_ci_runs() -> None:
    assert "make test" in README.read_text()
    assert "\nmake test\n" in (PROJECT / ".ci" / "run").read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_within_the_project_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", (PROJECT / document).read_text()):
        assert (PROJECT / document).parent.joinpath(target).exists(), target


def test_tests_that_security_names_are_there() -> None:
    """By their whole names, or by how they begin where `…` follows."""
    text = (PROJECT / "docs" / "security.md").read_text()
    there = {
        name
        for path in (PROJECT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+…?)(?:\[[^`]*\])?`", text))
    assert len(named) > 50
    assert not {name for name in named if name not in there and not name.endswith("…")}
    assert not {name for name in named if name.endswith("…") and not any(t.startswith(name[:-1]) for t in there)}
    assert not {file for file in re.findall(r"tests/[\w/]+\.py", text) if not (PROJECT / file).is_file()}
