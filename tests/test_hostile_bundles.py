"""A hostile bundle can do nothing but be refused: in one line, quickly, in little memory, before an engine runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import exports
import hostile
import pytest
from hostile import CASES, Json
from libcembed import Library
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from cembed.runtime import Bundle, CembedError
from cembed.runtime.bundle.graph_rules import OPERATORS
from cembed.runtime.bundle.tokenizer_check import check_expression, check_tokenizer, is_plain

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def roots(causal_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A hostile bundle of each kind."""
    folder = tmp_path_factory.mktemp("hostile")
    made = {}
    for number, (name, change) in enumerate(CASES.items()):
        made[name] = Path(shutil.copytree(causal_bundle, folder / str(number)))
        change(made[name])
    return made


def outcomes(roots: dict[str, Path], library: str = "", onnxruntime: str = "") -> dict[str, Json]:
    """What happened to each bundle, in a process of its own."""
    command = [sys.executable, HERE / "hostile.py", library, onnxruntime, *roots.values()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(zip(roots, map(json.loads, done.stdout.splitlines()), strict=True))


def check(found: dict[str, Json], kind: str) -> None:
    assert {name: said for name, said in found.items() if said["kind"] != kind} == {}
    assert [name for name, said in found.items() if "ONNX Runtime" in said["message"]] == []  # it was not asked
    many = {name: said for name, said in found.items() if "\n" in said["message"] or len(said["message"]) > 800}
    assert many == {}
    slow = {name: said for name, said in found.items() if said["seconds"] > hostile.SECONDS}
    large = {name: said for name, said in found.items() if said["memory"] > hostile.MEMORY}
    assert slow == large == {}


def test_python_refuses_all_before_an_engine_runs(roots: dict[str, Path]) -> None:
    assert len(CASES) >= 60
    check(outcomes(roots), "CembedError")


def test_the_library_refuses_all_before_an_engine_runs(
    roots: dict[str, Path], built: Path, onnxruntime_library: Path
) -> None:
    found = outcomes(roots, str(built / "libcembed.so"), str(onnxruntime_library))
    check(found, "CallError")


def test_the_bundle_that_they_were_made_from_is_opened(causal_bundle: Path) -> None:
    said = outcomes({"good": causal_bundle})["good"]
    assert "an engine was asked" in said["message"], said


def test_the_library_opens_what_exporters_make(library: Library, bundle_of: Callable[[str], Path]) -> None:
    for name in ("causalqwen2_5", "causalpali"):
        bundle = library.open(bundle_of(name))
        assert len(bundle.embed_query("total")) == 4
        bundle.close()


def test_operators_of_exports_are_those_that_are_allowed(bundle_of: Callable[[str], Path]) -> None:
    """An exporter that emits another is told here: add it to OPERATORS of runtime/bundle/graph_rules.py, say in GROWTH
    what it gives of constants alone if it has any, and write runtime/native/lib/manifest_schema.h anew."""
    for name in ("causalqwen2_5", "colpali", "colmodernvbert"):
        bundle = Bundle(bundle_of(name))
        assert set(exports.operators(bundle.root)) <= set(OPERATORS)
        for graph in bundle.manifest.graphs:
            bundle.graph_path(graph)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    ],
)
def test_expressions_of_the_supported_backbones_are_allowed(pattern: str) -> None:
    """And none takes long, whatever it is given."""
    check_expression(pattern)
    split = Split(Regex(pattern), "isolated")
    began = time.process_time()
    for text in ("a", " ", "\n", "!", "a ", " \n", "1", "'", "\n!", "a!"):
        split.pre_tokenize_str(text * (8192 // len(text)) + "x")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "pattern", ["(?i:a+)a+x", "a+a+x", "a*a*a*", "a+(?!b)a+", "(?i:a|b+)x", "((a)+)", "a+b+(?!c)", r"\s+\s+\S", "a+x"]
)
def test_expressions_that_may_take_long_are_refused(pattern: str) -> None:
    with pytest.raises(CembedError, match="its expression"):
        check_expression(pattern)


@pytest.mark.parametrize(
    ("middle", "plain"),
    [
        (b'"a":0,"b":1},"merges":["a b"', True),
        (b'"a\\"":0,"\\\\":1},"merges":[["a","b"]', True),
        (b'"a":0},"dropout":1,"merges":[', False),
        (b'"a":0},"dropout":0.5,"merges":[', False),
        (b'"a":0},"merges":[],"dropout":1,"x":[', False),
        (b'"a":{"b":1}},"merges":[', False),
        (b'"a,":{"b":1},"merges":[],"x":{"c":1},"merges":[', False),
        (b'"a":true},"merges":[', False),
        (b'"},\\"merges\\":[":0},"x":1,"merges":[', False),
    ],
)
def test_nothing_hides_between_tokens(middle: bytes, plain: bool) -> None:
    assert is_plain(middle) == plain


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{}", b'{"model":1}', b'{"model":{"type":"BPE"},"added_tokens":3}', b"\xff", b"null"):
        with pytest.raises(CembedError, match=r"^tokenizer"):
            check_tokenizer(content, "tokenizer")
