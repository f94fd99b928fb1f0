"""A tokenizer.json looked through before the `tokenizers` library reads it: kinds of steps and expressions that
checkpoints of the supported backbones have, and sizes.

Vocabulary and merges, nearly all of a file, are not parsed: as the library writes it, what is before them and what is
after them are JSON once they are cut out, and between them is nothing but texts and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

from cembed.runtime.bundle.schema import parse, shown
from cembed.runtime.errors import CembedError

MAX_SMALL = 1 << 22  # bytes of a tokenizer that is parsed as a whole
MAX_PARTS = 1 << 22  # bytes without vocabulary and merges: 16,384 added tokens take 3 MB
MAX_ENTRIES = 1 << 21  # tokens and halves of merges; Gemma 3 has 1.3 million
MAX_VALUES = 1 << 19  # beside those
MAX_ADDED = 1 << 14  # added tokens; Gemma 3 has 6,415
MAX_TOKEN = 1 << 10  # characters of an added token
MAX_STEPS = 4  # of a sequence
MAX_GROWTH = 8  # characters for one, by all Replace steps together
MAX_PATTERN = 512
FIELDS = ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
          "decoder", "model")  # fmt: skip
DECODERS = ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")
POST_PROCESSORS = ("ByteLevel", "TemplateProcessing")
_VOCAB = re.compile(rb'"vocab"\s*:\s*\{')
_MERGES = re.compile(rb'\}\s*,\s*"merges"\s*:\s*\[')
_END = re.compile(rb"\]\s*\}\s*\}\s*\Z")
_QUICK = re.compile(r"[^*+]*([*+](!|[^*+][*+])?)?")
_CHUNK = 1 << 20
_NO_STRUCTURE = b" \t\r\n0123456789,:"

Json = Mapping[str, Any]


def check_tokenizer(content: bytes, what: str) -> None:
    """Raises CembedError for what no tokenizer of a bundle has."""
    try:
        _check(parts_of(content))
    except CembedError as error:
        raise CembedError(f"{what}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CembedError(f"{what} is not a tokenizer: {type(error).__name__} {error!s:.80}") from error


def parts_of(content: bytes) -> Json:
    """All but the vocabulary and the merges, which are empty here."""
    first, last = _VOCAB.search(content), _END.search(content, max(0, len(content) - 64))
    cut = None
    if first and content.count(b",") > MAX_ENTRIES and count_entries(content) > MAX_ENTRIES:
        raise CembedError(f"it has more than {MAX_ENTRIES} tokens and merges")
    if first and last and is_plain(content[first.end() : last.start()]):
        cut = content[: first.end()] + b'},"merges":[' + content[last.start() :]
    if cut is None and len(content) > MAX_SMALL:
        raise CembedError("it is not laid out as the tokenizers library does, with the model's vocab and merges last")
    if cut is not None and len(cut) > MAX_PARTS:
        raise CembedError(f"it has {len(cut)} bytes without its vocabulary: {MAX_PARTS} are the most")
    found: Json = parse((content if cut is None else cut).decode("utf-8"), "it")
    if cut is not None and (list(found)[-1] != "model" or list(found["model"])[-2:] != ["vocab", "merges"]):
        raise CembedError("it has a vocab and merges that are not the model's")
    return found


def is_plain(middle: bytes) -> bool:
    """Whether what is between `"vocab": {` and the end of the merges has the names `merges` and tokens only, and no
    values but numbers: so no field of the model can hide there."""
    without = middle.replace(rb"\\", b"").replace(rb"\"", b"")
    structure = b"".join(part.translate(None, _NO_STRUCTURE) for part in _outside(without))
    pairs = structure[2:]
    return structure[:2] == b"}[" and pairs == b"[]" * (len(pairs) // 2) and _MERGES.search(without) is not None


def count_entries(content: bytes) -> int:
    """Commas that are not in texts."""
    return sum(part.count(b",") for part in _outside(content.replace(rb"\\", b"").replace(rb"\"", b"")))


def _outside(text: bytes) -> Iterator[bytes]:
    """What is outside of texts, of JSON without escaped quotes."""
    inside = 0
    for at in range(0, len(text), _CHUNK):
        parts = text[at : at + _CHUNK].split(b'"')
        yield b"".join(parts[inside::2])
        inside ^= len(parts) - 1 & 1


def _check(found: Json) -> None:
    if unknown := found.keys() - set(FIELDS):
        raise CembedError(f"it has the field {shown(min(unknown))}, there are {', '.join(FIELDS)}")
    tokens = found.get("added_tokens", [])
    if len(tokens) > MAX_ADDED:
        raise CembedError(f"it has {len(tokens)} added tokens: {MAX_ADDED} are the most")
    if longest := max((len(token["content"]) for token in tokens), default=0) // (MAX_TOKEN + 1):
        raise CembedError(f"an added token has over {longest * MAX_TOKEN} characters: {MAX_TOKEN} are the most")
    model = found["model"]
    if model.get("type", "BPE") != "BPE":
        raise CembedError(f"its model is {shown(model['type'])}: BPE is supported")
    growth = prod(_growth(step) for step in _steps(found.get("normalizer"), "normalizers"))
    if growth > MAX_GROWTH:
        raise CembedError(f"its normalizer makes {growth} characters of one: {MAX_GROWTH} are the most")
    for step in _steps(found.get("pre_tokenizer"), "pretokenizers"):
        _of_kind(PRE_TOKENIZERS, step, "pre-tokenizer")(step)
    for name, part, kinds in (("decoder", "decoders", DECODERS), ("post_processor", "processors", POST_PROCESSORS)):
        for step in _steps(found.get(name), part):
            _of_kind(dict.fromkeys(kinds, len), step, name)


def _steps(component: Any, part: str) -> list[Json]:
    """The steps of a component: itself, or those of a sequence."""
    if component is None:
        return []
    steps = component[part] if component["type"] == "Sequence" else [component]
    if len(steps) > MAX_STEPS:
        raise CembedError(f"it has {len(steps)} {part}: {MAX_STEPS} are the most")
    return list(steps)


def _of_kind(kinds: Mapping[str, Callable[[Any], Any]], step: Json, what: str) -> Callable[[Any], Any]:
    if step["type"] not in kinds:
        raise CembedError(f"it has the {what} {shown(step['type'])}, supported are {', '.join(kinds)}")
    return kinds[step["type"]]


def _growth(step: Json) -> int:
    """Characters that a step of the normalizer makes of one at most."""
    growth: int = _of_kind(NORMALIZERS, step, "normalizer")(step)
    return growth


def _replacement(step: Json) -> int:
    pattern = step["pattern"].get("String", "")
    if not pattern:
        raise CembedError("its normalizer replaces by an expression: only a text is supported")
    return max(1, -(-len(step["content"]) // len(pattern)))


def _check_split(step: Json) -> None:
    if "Regex" in step["pattern"]:
        check_expression(step["pattern"]["Regex"])


NORMALIZERS: Mapping[str, Callable[[Any], int]] = {"NFC": lambda _: 1, "Replace": _replacement}
PRE_TOKENIZERS: Mapping[str, Callable[[Any], object]] = {
    "ByteLevel": len,
    "Digits": len,
    "Split": _check_split,
}


def check_expression(pattern: str) -> None:
    """Raises CembedError for an expression that can take long on some text: repetitions in groups, or with more behind
    them than one other repetition or a look ahead, and references back. What is left is quadratic at worst.

    >>> check_expression(r"(?i:'s|'t)|[^\\r\\n\\p{L}]?\\p{L}+|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")
    >>> check_expression("(a+)+b")
    Traceback (most recent call last):
    cembed.runtime.errors.CembedError: its expression '(a+)+b' repeats a group, which may never end
    """
    plain = re.sub(r"\\[pP]\{\^?\w+\}|\\[^0-9kgKGRX]", "x", pattern)
    plain = re.sub(r"\[(?:[^\[\]])*\]", "x", plain)
    wrong = {
        f"is longer than {MAX_PATTERN}": len(pattern) > MAX_PATTERN,
        "repeats a group, which may never end": re.search(r"\)[*+?{]", plain) is not None,
        "has more than a small subset of the syntax": re.search(r"[\\\[\]{}]|\(\?(?!i:|:|!x\))|[*+?]{2}", plain)
        is not None,
        "has a repetition that more than another one, or a look ahead, comes after": not _is_quick(plain),
    }
    if why := next((why for why, is_so in wrong.items() if is_so), None):
        raise CembedError(f"its expression {shown(pattern)} {why}")


def _is_quick(plain: str) -> bool:
    """Whether no text makes an expression go back over more than one repetition, whose end is tried again."""
    flat = plain.replace("(?!x)", "!")
    in_groups = any(sign in "*+" and _depth(flat[:i]) for i, sign in enumerate(flat))
    return not in_groups and all(_QUICK.fullmatch(one.strip("()")) for one in flat.split("|"))


def _depth(beginning: str) -> int:
    return beginning.count("(") - beginning.count(")")
