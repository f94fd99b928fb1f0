"""Tokenizers of a bundle: what makes the library end the process, or draw lots, is refused before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN

from cembed.runtime.bundle.prompts import load_tokenizer
from cembed.runtime.errors import CembedError

Json = dict[str, Any]
FILES = sorted(GOLDEN.glob("*/tokenizer.json"))
ENDS_THE_PROCESS = {"vocab": {"a": 0, "é": 2, "aé": 3}, "merges": ["a é"]}


def written(path: Path, **model: Any) -> str:
    content = json.loads(FILES[0].read_text(encoding="utf-8"))
    content["model"] |= model
    text = json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_those_of_checkpoints_are_loaded(file: Path) -> None:
    assert load_tokenizer(file).get_vocab_size() > 0


def test_a_token_may_be_called_like_a_field(tmp_path: Path) -> None:
    vocabulary = {"dropout": 0, "continuing_subword_prefix": 1, "\\u0064": 2}
    written(tmp_path / "x", vocab=vocabulary, merges=[], unk_token=None)
    assert vocabulary.items() <= load_tokenizer(tmp_path / "x").get_vocab().items()


@pytest.mark.parametrize(
    "fields",
    [
        {"continuing_subword_prefix": "x"},
        {"continuing_subword_prefix": "x", **ENDS_THE_PROCESS},
        {"continuing_subword_prefix": "##", "type": "WordPiece"},
        {"dropout": 0.5},
    ],
)
@pytest.mark.parametrize(
    "hidden",
    [
        lambda text: text,
        lambda text: text.replace('"continuing', '"\\u0063ontinuing').replace('"dropout', '"\\u0064ropout'),
        lambda text: text.replace("_prefix", "_pr\\u0065fix").replace('"dropout', '"dro\\u0070out'),
        lambda text: text.replace('": ', '"\n : \t'),
    ],
    ids=["plain", "first letter", "later letter", "blanks"],
)
def test_those_that_end_the_process_are_refused(tmp_path: Path, fields: Json, hidden: Callable[[str], str]) -> None:
    text = written(tmp_path / "x", **fields)
    (tmp_path / "x").write_text(hidden(text), encoding="utf-8")
    with pytest.raises(CembedError, match=r"x: a model with (continuing_subword_prefix|dropout) .* is not supported"):
        load_tokenizer(tmp_path / "x")


def test_a_field_that_is_there_twice(tmp_path: Path) -> None:
    """The library would take the first one."""
    text = written(tmp_path / "x", continuing_subword_prefix="x", **ENDS_THE_PROCESS)
    twice = text.replace(
        '"continuing_subword_prefix": "x"', '"continuing_subword_prefix": "x", "continuing_subword_prefix": null'
    )
    assert twice != text
    (tmp_path / "x").write_text(twice, encoding="utf-8")
    with pytest.raises(CembedError, match="twice"):
        load_tokenizer(tmp_path / "x")


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    for content in (b"", b"{}", b"[]", b'"\\u0064"', b"\xff", b'{"model": ["dropout"]}'):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CembedError, match=r"x is not a tokenizer|x is not JSON"):
            load_tokenizer(tmp_path / "x")
    with pytest.raises(CembedError, match="gone is not a tokenizer"):
        load_tokenizer(tmp_path / "gone")
