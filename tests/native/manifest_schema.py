"""Writes manifest_schema.h: the tables that both languages check a bundle by, from where Python has them.

    python tests/native/manifest_schema.py > runtime/native/lib/manifest_schema.h

Kinds are str, int, number, bool, axis (int or str), file, words and sha256, =one|of|these, the name of a class, [kind]
for a list, [kind*n] for one of n, {kind:kind} for an object with any names; null fits where a ? follows. The range of a
field is that of the numbers in it.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple

from cembed.runtime.bundle import (
    contract,
    external_data,
    graph_rules,
    graph_tensors,
    image_processing,
    manifest,
    tokenizer_check,
)
from cembed.runtime.bundle.schema import Range, Text, kinds_of, plain, required_fields

NUMBERS = ("MAX_MANIFEST", "MAX_PICTURE", "MAX_TOKENIZER", "MAX_VECTOR", "MAX_DEEPSTACK")


GRAPH_NUMBERS = ("MAX_GRAPH", "MAX_NODES", "MAX_TENSORS", "MAX_BODIES", "MAX_ATTRIBUTE", "MAX_AXES", "MAX_AXIS",
                 "MAX_SIZED", "MAX_NUMBERS", "UNKNOWN_AXIS", "FOLDED_SHARE", "FOLDED_MORE", "BLOCK")  # fmt: skip
TOKENIZER_NUMBERS = ("MAX_ENTRIES", "MAX_VALUES", "MAX_ADDED", "MAX_TOKEN", "MAX_GROWTH")


def kind_text(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return args[1].name if isinstance(args[1], Text) else kind_text(args[0])
    if origin in (types.UnionType, typing.Union):
        rest = [part for part in args if part is not types.NoneType]
        text = kind_text(rest[0]) if len(rest) == 1 else {(int, str): "axis"}[tuple(map(plain, rest))]
        return text + "?" * (len(rest) < len(args))
    if origin is tuple:
        return f"[{kind_text(args[0])}]" if args[-1] is Ellipsis else f"[{kind_text(args[0])}*{len(args)}]"
    if origin is Mapping:
        return f"{{{kind_text(args[0])}:{kind_text(args[1])}}}"
    if origin is Literal:
        return f"={'|'.join(map(str, args))}"
    return kind.__name__ if is_dataclass(kind) else {str: "str", int: "int", float: "number", bool: "bool"}[kind]


def limits(kind: Any) -> set[Range | None]:
    """The ranges of all numbers in a kind; None is a number without one."""
    if typing.get_origin(kind) is Annotated:
        return {part for part in typing.get_args(kind)[1:] if isinstance(part, Range)}
    if kind in (int, float):
        return {None}
    if typing.get_origin(kind) is Literal:
        return set()
    return {found for part in typing.get_args(kind) for found in limits(part)}


def classes(kind: Any) -> Iterator[type]:
    """The dataclasses within a kind, itself first."""
    if isinstance(kind, type) and is_dataclass(kind):
        yield kind
        for inner in kinds_of(kind).values():
            yield from classes(inner)
    for inner in typing.get_args(kind):
        yield from classes(inner)


class FieldRow(NamedTuple):
    """A field of a dataclass: its kind, whether it has no default, and the range of the numbers in it."""

    owner: str
    name: str
    kind: str
    required: bool
    least: float
    most: float


def field_rows() -> Iterator[FieldRow]:
    for owner in dict.fromkeys(classes(manifest.Manifest)):
        required, kinds = required_fields(owner), kinds_of(owner)
        for field in fields(typing.cast(Any, owner)):
            found = limits(kinds[field.name])
            assert None not in found, f"{owner.__name__}.{field.name} has no range"
            assert len(found) <= 1, f"{owner.__name__}.{field.name} has several ranges"
            least, most = next(((limit.least, limit.most) for limit in found if limit), (0, 0))
            kind = kind_text(kinds[field.name])
            yield FieldRow(owner.__name__, field.name, kind, field.name in required, least, most)


def table(kind: str, name: str, rows: Iterable[str]) -> str:
    return f"constexpr {kind} {name}[] = {{\n" + "".join(f"    {row},\n" for row in rows) + "};\n"


def print_graph_rules() -> None:
    """What graphs and tokenizers may hold: graph_rules.py, tokenizer_check.py."""
    for module, names in ((graph_rules, GRAPH_NUMBERS), (tokenizer_check, TOKENIZER_NUMBERS)):
        for name in names:
            print(f"constexpr int64_t {name} = {vars(module)[name]};")
    print("\nstruct Bits {\n    int64_t type, bits;\n};\n")
    print("struct Type {\n    const char *name;\n    int64_t number;\n};\n")
    print("struct Growth {\n    const char *name, *how;\n};\n")
    for name in ("DOMAINS", "OPERATORS", "KEEPS"):
        print(table("const char *const", name, map(json.dumps, vars(graph_rules)[name])))
    messages = graph_rules.FIELDS.items()
    rows = (f'{{"{name}", {field}, "{kind}"}}' for name, known in messages for field, kind in known.items())
    print(table("Inner", "GRAPH_FIELDS", rows))
    print(table("Bits", "GRAPH_BITS", (f"{{{kind}, {bits}}}" for kind, bits in graph_rules.BITS.items())))
    print(table("Type", "GRAPH_TYPES", (f'{{"{name}", {kind}}}' for name, kind in graph_rules.TYPES.items())))
    print(table("Growth", "GROWTH", (f'{{"{name}", "{how}"}}' for name, how in graph_rules.GROWTH.items())))


def main() -> None:
    print("// Written by tests/native/manifest_schema.py from runtime/bundle: do not edit.")
    print("#pragma once\n\n#include <cstdint>\n\nnamespace cembed::schema {\n")
    print("// What a kind is: tests/native/manifest_schema.py. TENSORS and MESSAGES: where they come from.")
    print("struct Field {\n    const char *owner, *name, *kind;\n    bool required;\n    double least, most;\n};\n")
    print("struct Inner {\n    const char *message;\n    uint32_t field;\n    const char *inner;\n};\n")
    print("struct State {\n    const char *past, *present;\n    bool grows;\n};\n")
    print(f"constexpr int VERSION = {manifest.SCHEMA_VERSION}, OLDEST = {manifest.OLDEST_SCHEMA};")
    print(f'constexpr const char *MANIFEST = "{manifest.MANIFEST}", *DIGEST = "{manifest.DIGEST}",')
    print(f'                     *SIGNATURES = "{manifest.SIGNATURES}";')
    for name in NUMBERS:
        print(f"constexpr int64_t {name} = {getattr(manifest, name)};")
    print(f"constexpr int64_t MAX_TILES = {image_processing.MAX_TILES};")
    print(
        f"constexpr int64_t MAX_ONNX = {external_data.MAX_ONNX};\nconstexpr int MAX_DEPTH = {external_data.MAX_DEPTH};"
    )
    print(f"constexpr const char *FORBIDDEN = {json.dumps(external_data.FORBIDDEN)};\n")
    print(table("Field", "FIELDS", (f"{{{', '.join(map(json.dumps, row))}}}" for row in field_rows())))
    print(table("const char *const", "ORDER", map(json.dumps, contract.ORDER)))
    print(table("const char *const", "TENSORS", map(json.dumps, contract.TENSORS)))
    states = (json.dumps(astuple(state))[1:-1] for state in graph_tensors.STATES)
    print(table("State", "STATES", (f"{{{row}}}" for row in states)))
    messages = external_data.MESSAGES.items()
    rows = (f'{{"{name}", {field}, "{inner}"}}' for name, known in messages for field, inner in known.items())
    print(table("Inner", "MESSAGES", rows))
    print(table("const char *const", "DATA_KEYS", map(json.dumps, external_data.KEYS)))
    print_graph_rules()
    print("}  // namespace cembed::schema")


if __name__ == "__main__":
    main()
