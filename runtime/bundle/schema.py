"""From JSON to frozen dataclasses, strictly: known fields only, each of its kind, each number within its range.

A field's kind is its annotation. `Annotated[int, Range(1, 8)]` is a number of that range, `Annotated[str, Text(…)]` a
string of that form. `tests/native/manifest_schema.py` writes the same for the C library.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal

from cembed.runtime.errors import CembedError


@dataclass(frozen=True)
class Range:
    """The least and the largest number that is allowed; NaN is outside of every range."""

    least: float
    most: float

    def check(self, value: Any, where: str) -> None:
        if not self.least <= value <= self.most:
            raise CembedError(f"{where} is {shown(value)}, which is out of range: {self.least} to {self.most}")


@dataclass(frozen=True)
class Text:
    """A string that `pattern` matches whole; `name` is what the C library calls this kind."""

    name: str
    what: str
    pattern: str

    def check(self, value: Any, where: str) -> None:
        if re.fullmatch(self.pattern, value) is None:
            raise CembedError(f"{where} is {shown(value)}, which is not {self.what}")


def parse(text: str, what: str) -> Any:
    """JSON as Python objects. Raises CembedError: not JSON, a name that an object has twice, NaN, infinity."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CembedError(f"{what} is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(n for n in names if names.count(n) > 1)!r:.80} twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def shown(value: Any) -> str:
    """A value in a message: short, and never the whole of something nested.

    >>> shown([[1]]), shown("a" * 99)[-4:], shown(1.5)
    ('a list', 'aaaa', '1.5')
    """
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return f"{value!r:.80}"


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, as parsed from JSON, as an object of type `kind`: dataclasses, tuples, mappings, literals, scalars."""
    if is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, where)
    of_kind = _DECODERS.get(typing.get_origin(kind))
    return of_kind(kind, value, where) if of_kind else _decode_scalar(kind, value, where)


def _decode_tuple(kind: Any, value: Any, where: str) -> Any:
    args = typing.get_args(kind)
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis and isinstance(value, list) else list(args)
    if not isinstance(value, list) or len(kinds) != len(value):
        raise _another(kind, value, where)
    return tuple(decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _decode_mapping(kind: Any, value: Any, where: str) -> Any:
    names, values = typing.get_args(kind)
    if not isinstance(value, dict):
        raise _another(kind, value, where)
    return {_decode_name(names, k, where): decode(values, v, f"{where}.{_named(k)}") for k, v in value.items()}


def _decode_literal(kind: Any, value: Any, where: str) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind)):
        raise _another(kind, value, where)
    return value


def _decode_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) in (int, float) and abs(value) < 1e300:  # and so not NaN or infinity
        return float(value)
    if kind not in (bool, int, str) or type(value) is not kind:
        raise _another(kind, value, where)
    if kind is str and not _is_unicode(value):
        raise CembedError(f"{where} is {shown(value)}, which is not UTF-8")
    return value


def _another(kind: Any, value: Any, where: str) -> CembedError:
    return CembedError(f"{where} is {shown(value)}, the schema has {in_words(kind)}")


_WORDS = {
    types.NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def in_words(kind: Any) -> str:
    """A type of the schema in a message.

    >>> in_words(Literal["zero", "continue"]), in_words(tuple[int, int]), in_words(Mapping[str, str])
    ("'zero' or 'continue'", 'a list of 2', 'an object')
    """
    kind = plain(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
    return _WORDS.get(kind, "an object")


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON can spell half of a surrogate pair."""
    return not any("\ud800" <= character < "\ue000" for character in text)


def _decode_annotated(kind: Any, value: Any, where: str) -> Any:
    args = typing.get_args(kind)
    found = decode(args[0], value, where)
    for limit in args[1:]:
        limit.check(value, where)
    return found


def _named(name: str) -> str:
    """A name as it stands in a message, on one line."""
    return name[:80] if name.isprintable() else f"{name!r:.80}"


def _decode_name(kind: Any, name: str, where: str) -> str:
    found: str = decode(kind, name, f"a name in {where}")
    return found


def _decode_union(kind: Any, value: Any, where: str) -> Any:
    kinds = typing.get_args(kind)
    if value is None and types.NoneType in kinds:
        return None
    for each in kinds:
        if type(value) is plain(each):
            return decode(each, value, where)
    others = [each for each in kinds if plain(each) not in (types.NoneType, int, str)]
    if not others:
        raise CembedError(f"{where} is {shown(value)}, the schema has {' or '.join(map(in_words, kinds))}")
    return decode(others[0], value, where)


_DECODERS: Mapping[Any, Callable[[Any, Any, str], Any]] = {
    Annotated: _decode_annotated,
    types.UnionType: _decode_union,
    typing.Union: _decode_union,
    tuple: _decode_tuple,
    Mapping: _decode_mapping,
    Literal: _decode_literal,
}
"""By what `typing.get_origin` gives for a kind."""


def plain(kind: Any) -> Any:
    """A kind without its range."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


@cache
def kinds_of(kind: type) -> dict[str, Any]:
    """The kind of each field of a dataclass, with its range."""
    return typing.get_type_hints(kind, include_extras=True)


def _decode_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise CembedError(f"{where} is {shown(value)}, not an object")
    known = {field.name for field in fields(typing.cast(Any, kind))}
    for problem, names in (("unknown", value.keys() - known), ("missing", required_fields(kind) - value.keys())):
        if names:
            raise CembedError(f"{where} has {problem} fields: {', '.join(sorted(map(_named, names)))}")
    kinds = kinds_of(kind)
    return kind(**{name: decode(kinds[name], item, f"{where}.{name}") for name, item in value.items()})


@cache
def required_fields(kind: type) -> set[str]:
    """The fields of a dataclass that have no default."""
    known = fields(typing.cast(Any, kind))
    return {field.name for field in known if field.default is MISSING and field.default_factory is MISSING}
