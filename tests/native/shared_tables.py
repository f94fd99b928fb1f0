"""Writes the headers with what Python and C++ must agree on, from where Python has it.

    python tests/native/shared_tables.py

runtime/native/storage.h is for the kernels and all above them; runtime/native/lib/shared_tables.h for libcembed: the
limits and texts of an index, of a search, of images, states and engines. `manifest_schema.py` writes what is in a
manifest.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import accumulate
from pathlib import Path

from cembed.runtime.bundle import manifest, trust
from cembed.runtime.embed import blank, embedder, preprocess
from cembed.runtime.engines import build, tensorrt
from cembed.runtime.index import columns, files, reader, records, search, segments
from cembed.runtime.scoring import arrays, kernels
from cembed.runtime.scoring.storage import DOUBLE, STORAGE, Storage, by_exactness

NATIVE = Path(__file__).resolve().parents[2] / "runtime" / "native"
WRITTEN = "Written by tests/native/shared_tables.py from {}: do not edit."
NUMBERS = {
    "an index": (
        (files, ("VERSION", "PLACED_VERSION", "MAX_DIM", "MAX_SEGMENTS", "MAX_SEGMENT", "MAX_CURRENT")),
        (records, ("COMMIT", "CLOSE", "PLACED", "ALIGNMENT", "CONTENT_BYTES", "MAX_PAYLOAD", "MAX_NUMBER")),
        (records, ("MAX_GAPS", "FRAGMENT_BYTES", "MAX_LOG")),
        (segments, ("MAX_ROWS",)),
        (reader, ("ATTEMPTS",)),
    ),
    "a search": (
        (search, ("EXACT_BYTES", "CANDIDATES", "CANDIDATES_EACH", "LAST_CANDIDATES", "LAST_EACH", "LAST_SHARE")),
    ),
    "images, states and engines": (
        (preprocess, ("MAX_ASPECT_RATIO",)),
        (blank, ("FAINTEST", "NOISIEST", "COLOUR", "LEAST")),
        (manifest, ("LEAST_ROOM",)),
        (embedder, ("DEFAULT_STATE_MEMORY",)),
        (tensorrt, ("MAX_CONTEXTS",)),
    ),
}
"""Constants by what they are of, and the modules that have them."""
TEXTS = {"FORMAT": files.FORMAT, "CURRENT": files.CURRENT, "REPAIR": columns.REPAIR}


def enumerator(name: str) -> str:
    return f"MAXSIM_{name.upper()}"


def storage_row(name: str, row: Storage) -> str:
    flags = (row.has_scale, row.signs, row.screens)
    numbers = (row.exactness, row.bits, row.dim_step, row.query_limit or 0)
    return "{" + ", ".join([f'"{name}"', enumerator(name), *map(str, numbers), *(str(f).lower() for f in flags)]) + "}"


def storage_header(rows: Mapping[str, Storage]) -> Iterator[str]:
    """Rows stand by their codes, in whatever order Python has them."""
    ordered = sorted(rows, key=lambda name: rows[name].code)
    codes = [f"{enumerator(name)} = {rows[name].code}" for name in ordered]
    yield f"/* {WRITTEN.format('runtime/scoring')} */"
    yield "#ifndef CEMBED_STORAGE_H\n#define CEMBED_STORAGE_H\n"
    yield f"enum maxsim_storage {{ {', '.join([*codes, f'MAXSIM_F64 = {DOUBLE}'])} }}; /* F64: of arrays only */"
    yield f"\nenum {{ MAXSIM_MOST_ROWS = {arrays.MOST_ROWS} }}; /* of an array */\n"
    yield "#ifdef __cplusplus\nnamespace maxsim {\n"
    yield f"constexpr int LANES = {kernels.LANES};  // in which the terms of a score are added\n"
    yield "// A storage type, as `Storage` of runtime/scoring/storage.py has it; without a query_limit it is 0."
    yield "struct StorageType {\n    const char *name;\n    int code, exactness, bits, dim_step, query_limit;"
    yield "    bool has_scale, signs, screens;\n};\n"
    yield table("StorageType", "STORAGE", (storage_row(name, rows[name]) for name in ordered))
    yield "}  // namespace maxsim\n#endif\n\n#endif"


def table(kind: str, name: str, rows: Iterable[str]) -> str:
    return f"inline constexpr {kind} {name}[] = {{\n" + "".join(f"    {row},\n" for row in rows) + "};\n"


def numbers() -> Iterator[str]:
    for what, modules in NUMBERS.items():
        yield f"// Of {what}."
        for module, names in modules:
            yield from (f"constexpr int64_t {name} = {vars(module)[name]};" for name in names)
        yield ""


def record_header() -> Iterator[str]:
    """Where the fields of a record's header are, and the CRC over them."""
    sizes = [struct.calcsize(f"<{code}") for code in records.HEADER.values()]
    places = zip([*records.HEADER, "own_crc"], accumulate(sizes, initial=0), strict=True)
    yield f"enum RecordHeader : size_t {{ {', '.join(f'AT_{name.upper()} = {place}' for name, place in places)} }};"
    escaped = "".join(f"\\{byte:03o}" for byte in records.MAGIC)
    yield f'constexpr std::string_view MAGIC("{escaped}", {len(records.MAGIC)});'


def library_header() -> Iterator[str]:
    yield f"// {WRITTEN.format('runtime/index, bundle, embed and engines')}"
    yield "#pragma once\n\n#include <cstddef>\n#include <cstdint>\n#include <string_view>\n"
    yield "namespace cembed::shared {\n"
    yield from numbers()
    yield f"constexpr int RETRY_MS = {round(1000 * segments.RETRY_SECONDS)};  // before a log is read again"
    since = "".join(f"{part:02}" for part in (*build.ATTENTION_SINCE, 0)).lstrip("0")
    yield f"constexpr int ATTENTION_SINCE = {since};  // of TensorRT\n"
    yield from record_header()
    yield from (f"constexpr const char *{name} = {json.dumps(text)};" for name, text in TEXTS.items())
    yield ""
    names = ["format", *(field.name for field in fields(files.Current))]
    yield table("std::string_view", "CURRENT_FIELDS", map(json.dumps, names))
    yield "// Of points of a small order, and of keys that anybody signs for."
    yield table("std::string_view", "SMALL_ORDER", map(json.dumps, trust.SMALL_ORDER))
    yield "// Axes of inputs, and what they are filled up to multiples of.\nstruct Bucket {\n    const char *axis;"
    yield "    int64_t step;\n};\n"
    yield table("Bucket", "BUCKETS", (f'{{"{axis}", {step}}}' for axis, step in tensorrt.BUCKETS.items()))
    yield "}  // namespace cembed::shared"


def headers() -> dict[Path, str]:
    """The text of each header, by its path."""
    storage, library = storage_header(STORAGE), library_header()
    texts = {NATIVE / "storage.h": storage, NATIVE / "lib" / "shared_tables.h": library}
    return {path: "\n".join(lines) + "\n" for path, lines in texts.items()}


if __name__ == "__main__":
    assert len({row.code for row in STORAGE.values()} | {DOUBLE}) == len(STORAGE) + 1, "two types have one code"
    assert len(by_exactness()) == len({row.exactness for row in STORAGE.values()}), "two types are equally exact"
    for path, text in headers().items():
        path.write_text(text, encoding="utf-8")
