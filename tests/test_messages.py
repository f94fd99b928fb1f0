"""What a person reads: no types of Python, and one wording for one thing."""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import cembed

from cembed.options import require_packages
from cembed.runtime.bundle import schema
from cembed.runtime.bundle.manifest import Manifest
from cembed.runtime.embed.pooling import pool_tokens
from cembed.runtime.engines.cuda import MODULES, load_api
from cembed.runtime.errors import CembedError
from cembed.runtime.evaluate import require_ir_measures
from cembed.runtime.plotting import picture

VALUES: tuple[Any, ...] = (None, True, -1, 1.5, 1e400, "xyz", [], [1, "a", None], {}, {"a": {}})
COMMANDS = (
    "export",
    "quantize",
    "inspect",
    "verify",
    "sign",
    "embed",
    "search",
    "eval",
    "build-engine",
    "bench maxsim",
)
UPDATES = ("deploy", "rollback", "versions", "bundle diff", "bundle apply")
INDEX = ("add", "remove", "compact", "verify", "stats")


def fields_of(kind: Any, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    """Every field of a dataclass and of those in it, with its kind."""
    if isinstance(kind, type) and is_dataclass(kind) and kind not in seen:
        seen.add(kind)
        for name, inner in schema.kinds_of(kind).items():
            yield f"{kind.__name__}.{name}", inner
            yield from fields_of(inner, seen)
    for part in typing.get_args(kind):
        yield from fields_of(part, seen)


def refusal(kind: Any, value: Any, where: str) -> str:
    """What is said of a value, if it is not of this kind."""
    try:
        schema.decode(kind, value, where)
    except CembedError as error:
        return str(error)
    return ""


def test_no_wrong_manifest_is_explained_in_python() -> None:
    fields = dict(fields_of(Manifest, set()))
    assert len(fields) > 80
    said = {refusal(kind, value, where) for where, kind in fields.items() for value in VALUES}
    assert "Side.num_vectors is 'xyz', the schema has a whole number or null" in said
    words = ("<class", "typing.", "Literal", "Annotated", "NoneType", "types.")
    assert [line for line in said if any(word in line for word in words)] == []


@pytest.mark.parametrize("command", [*COMMANDS, *UPDATES, *(f"index {name}" for name in INDEX)])
def test_no_help_shows_a_type_of_python(command: str) -> None:
    shown = cembed(*command.split(), "--help").out
    assert not [word for word in ("<class", "typing.", "Literal[", "NoneType", "Optional[") if word in shown]


def draw(tmp_path: Path) -> None:
    with picture(tmp_path / "x.png", 1, (1, 1)):
        pass


EXTRAS: dict[str, tuple[tuple[str, ...], Callable[[Path], Any]]] = {
    "pool_factor needs scipy: {pool}": (
        ("scipy.cluster.hierarchy",),
        lambda _: pool_tokens(np.eye(4, dtype=np.float32), 2),
    ),
    "a picture needs matplotlib: {eval}": (("matplotlib",), draw),
    "eval needs ir-measures: {eval}": (("ir_measures",), lambda _: require_ir_measures()),
    "GPU memory needs cuda-python: {gpu}": (MODULES, lambda _: load_api()),
    "export needs nothing_at_all: {export}": ((), lambda _: require_packages("export", "json", "nothing_at_all")),
}


@pytest.mark.parametrize("said", EXTRAS)
def test_a_missing_extra_is_told_in_one_way(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, call = EXTRAS[said]
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    what, _, extra = said.rstrip("}").partition(": {")
    with pytest.raises(CembedError) as raised:
        call(tmp_path)
    assert str(raised.value) == f"{what}: install cembed's extra '{extra}' (pip install 'cembed[{extra}]')"


def test_a_package_that_is_there_but_broken_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To install it again would not help."""
    (tmp_path / "ir_measures.py").write_text("raise ImportError('libstdc++.so.6: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ir_measures", raising=False)
    with pytest.raises(CembedError) as raised:
        require_ir_measures()
    assert str(raised.value) == (
        "eval needs ir-measures, which is installed but cannot be loaded: "
        "libstdc++.so.6: cannot open\\nshared object file"
    )
