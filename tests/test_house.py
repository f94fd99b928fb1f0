"""The arrows between the rooms: who may import whom, and no way back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import BACKBONE_OF, GOLDEN

from cembed.export.backbones import module_name
from cembed.export.choices import BACKBONES
from cembed.runtime.scoring.storage import STORAGE

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "cembed": "cembed",
    "export": "cembed.export",
    "quantize": "cembed.quantize",
    "runtime": "cembed.runtime",
    "scale": "cembed.scale",
    "serve": "cembed.serve",
}
"""Folders of the tree, and what they are imported as."""
MAY_IMPORT = {
    "cembed": {"cembed.export", "cembed.quantize", "cembed.runtime", "cembed.scale", "cembed.serve"},
    "cembed.export": {"cembed.runtime"},
    "cembed.quantize": {"cembed.runtime"},
    "cembed.runtime": set[str](),
    "cembed.scale": {"cembed.runtime"},
    "cembed.serve": {"cembed.runtime"},
}
FLOORS = {
    "bundle": set[str](),
    "pages": set[str](),
    "engines": {"bundle"},
    "scoring": {"bundle"},
    "embed": {"bundle", "pages", "engines"},
    "index": {"bundle", "scoring"},
}
"""The packages of the runtime, and what each stands on beside the ground."""
GROUND = {"errors", "finite", "disk", "plain_files", "compiled", "landlock", "seccomp"}
ROOF = {"updates", "writer", "verify", "evaluate", "page_vectors", "plotting", "tuning", "intake"}
"""Modules of the runtime by themselves: nothing below the roof imports it."""


def name_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([ROOMS[folder], *(part for part in rest if part != "__init__")])


@cache
def modules() -> dict[str, Path]:
    files = (path for folder in ROOMS for path in (ROOT / folder).rglob("*.py"))
    return {name_of(path): path for path in files if not any(part.is_symlink() for part in path.parents)}


def imports(name: str, path: Path) -> Iterator[str]:
    """Modules of ours that a module names anywhere: at its top, in a function, or for its types."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in named:
            found = full if full in modules() else full.rpartition(".")[0]
            if found in modules() and found != name:
                yield found


@cache
def edges() -> frozenset[tuple[str, str]]:
    return frozenset((name, to) for name, path in modules().items() for to in imports(name, path))


def room(name: str) -> str:
    return max((room for room in ROOMS.values() if f"{name}.".startswith(f"{room}.")), key=len)


def floor(name: str) -> str:
    return name.removeprefix("cembed.runtime.").split(".")[0]


def test_rooms_import_only_what_stands_below() -> None:
    wrong = {(a, b) for a, b in edges() if room(a) != room(b) and room(b) not in MAY_IMPORT[room(a)]}
    # Choices are plain tuples without torch; the version is the package's own.
    assert {(a, b) for a, b in wrong if b != "cembed"} == set()


def test_floors_of_the_runtime_import_only_what_stands_below() -> None:
    inside = {(a, b) for a, b in edges() if room(a) == room(b) == "cembed.runtime" and "cembed.runtime" not in (a, b)}
    below = {**dict.fromkeys(GROUND, GROUND), **{name: to | GROUND | {name} for name, to in FLOORS.items()}}
    assert {(a, b) for a, b in inside if floor(a) not in ROOF and floor(b) not in below[floor(a)]} == set()


def test_every_module_of_the_runtime_has_its_place() -> None:
    places = {floor(name) for name in modules() if room(name) == "cembed.runtime"} - {"cembed"}
    assert places == FLOORS.keys() | GROUND | ROOF


def circle(left: set[tuple[str, str]]) -> list[str]:
    """The modules of one circle among edges each of whose ends imports and is imported."""
    path, now = list[str](), max(a for a, _ in left)
    while now not in path:
        path.append(now)
        now = min(b for a, b in left if a == now)
    return path[path.index(now) :]


@pytest.mark.parametrize("known", [True, False])
def test_no_module_is_imported_by_what_it_imports(known: bool) -> None:
    """Peels off modules that import nothing that is left; what remains when none can be peeled is a circle."""
    left = {(a, b) for a, b in edges() if b not in ROOMS.values()}
    if not known:
        left |= {("cembed.runtime.errors", "cembed.runtime.verify")}  # a circle, to see that it is found
    while left and (free := {b for _, b in left} - {a for a, _ in left}):
        left = {(a, b) for a, b in left if b not in free}
    while left and (free := {a for a, _ in left} - {b for _, b in left}):
        left = {(a, b) for a, b in left if a not in free}
    assert (left == set()) == known, circle(left)


def strings(path: Path) -> set[str]:
    """The strings of a module, its docstrings too."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_backbone_touches_what_the_design_says(backbone: str) -> None:
    """No other module has its name; what it needs of them is said in its own."""
    own = f"cembed.export.{module_name(backbone)}"
    naming = {name for name, path in modules().items() if strings(path) & {backbone, module_name(backbone)}}
    assert naming == {own, "cembed.export.choices"}
    assert backbone in BACKBONE_OF.values()
    folders = {path.name for path in GOLDEN.iterdir() if path.is_dir()}
    assert set(BACKBONE_OF) == folders
    assert f"`{backbone}`" in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    adding = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("## Adding")[2]
    assert all(
        place in adding for place in ("export/NAME.py", "export/choices.py", "tests/golden", "tests/conftest.py")
    )


def test_storage_types_are_named_by_their_table_and_by_defaults() -> None:
    naming = {name for name, path in modules().items() if strings(path) & (STORAGE.keys() - {"f16", "f32"})}
    tags = {"cembed.runtime.pages.tiff.tags"}  # numpy's name of a type
    assert naming - tags == {"cembed.runtime.scoring.storage", "cembed.runtime.index.index"}
