"""Writes corpus/, small inputs that are taken: python tests/fuzz/seeds.py. The same bytes each time."""

from __future__ import annotations

import base64
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import files  # noqa: E402
import fuzz_index  # noqa: E402
import pdf_files  # noqa: E402
from PIL import Image  # noqa: E402

from cembed.runtime.bundle.vectors import VectorFile  # noqa: E402
from cembed.runtime.embed.state_files import write_state  # noqa: E402
from cembed.runtime.index.records import Record, read_log  # noqa: E402

SAMPLE = HERE.parents[1] / "samples" / "bundle" / "manifest.json"
POSITIONS, VECTORS = 7, 2
PNG = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
Seeds = Iterator[tuple[str, bytes]]


def of_manifest() -> Seeds:
    yield "causal", SAMPLE.read_bytes()


def of_vectors() -> Seeds:
    rows = [np.eye(3, 4, dtype=np.float32), np.ones((2, 4), np.float32)]
    made = VectorFile.of(rows, ["a.png", "b.pdf"], [1, 2], files.BUNDLE, ["", "doubtful"])
    with tempfile.TemporaryDirectory() as folder:
        for kind, suffix in ((b"n", ".npz"), (b"s", ".safetensors")):
            path = Path(folder) / f"v{suffix}"
            made.save(path)
            yield suffix[1:], kind + path.read_bytes()
        with np.load(Path(folder) / "v.npz") as arrays:
            yield "members", b"m" + b"".join(files.MEMBER + as_npy(arrays[name]) for name in files.MEMBERS)


def as_npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def of_state() -> Seeds:
    schema = files.schema()
    codes = {"F32": np.float32, "F16": np.float16, "I64": np.int64}
    signature = schema.signature(POSITIONS, VECTORS)
    arrays = {name: np.zeros(shape, codes[code]) for name, (code, shape) in signature.items()}
    prompt = POSITIONS - schema.side("query").num_slots(VECTORS)
    arrays["prompt_end"] += schema.manifest.positions.first + prompt - 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.safetensors"
        write_state(path, files.BUNDLE, "query", arrays)
        yield "query", path.read_bytes()


def of_log() -> Seeds:
    """With sums of the fuzzer's seed."""
    name, content = next((n, bytearray(c)) for n, c in fuzz_index.template().items() if n.endswith(".log"))
    for offset, length in fuzz_index.split(content):
        fuzz_index.seal(content, offset, length, files.SEED)
    yield Path(name).suffix[1:], bytes(content)


def of_commit() -> Seeds:
    """The records of that."""
    ((_, log),) = of_log()
    with files.written(log, ".log") as path, path.open("rb") as file:
        records = [part for part in read_log(file.fileno(), files.SEED, 0, 1) if isinstance(part, Record)]
    for number, record in enumerate(record for record in records if record.payload):
        header = record.header
        yield str(number), bytes([header.kind, header.pages, header.removed]) + record.payload


def of_body() -> Seeds:
    uri = "data:image/png;base64," + base64.b64encode(saved("PNG")).decode()
    part = {"type": "image_url", "image_url": {"url": uri}}
    said = [{"role": "user", "content": [{"type": "text", "text": "total"}, part]}]
    yield "texts", b"e" + encoded({"input": ["total", {"image": uri}], "encoding_format": "base64", "num_vectors": 4})
    yield "messages", b"e" + encoded({"messages": said, "dimensions": 64})
    yield "rerank", b"r" + encoded({"query": "total", "documents": [uri, "7", {"content": [part]}], "top_n": 2})
    yield "score", b"s" + encoded({"queries": "total", "documents": [uri, {"image": uri}]})
    yield "cohere", b"c" + encoded({"input_type": "search_query", "texts": ["total"], "output_dimension": 64})
    tail = b"\5\0\0\0total"
    text = {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(tail)}}
    image = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [[uri.partition(",")[2]]]}
    asked = encoded({"id": "1", "inputs": [image, text], "outputs": [{"name": "vectors"}]})
    yield "kserve", b"k%d\n" % len(asked) + asked + tail
    yield "refused_header", b"k" + b"9" * 4301 + b"\n" + asked  # more digits than Python reads
    yield "metadata", b"o" + encoded({"year": 2026, "kind": "invoice"})
    yield "where", b"oyear=2026\nkind=invoice"


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def of_page() -> Seeds:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        yield kind.lower(), saved(kind)
    yield "progressive", saved("JPEG", progressive=True)
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for name in ("none", "lzw", "packbits"):
        yield f"tiff_{name}", saved("TIFF", picture=Image.fromarray(pixels), compression=TIFF[name])
    yield "pdf", pdf_files.page(b"1 0 0 rg 5 5 20 20 re f", resources=b"", box=b"0 0 40 40")


TIFF = {"none": None, "lzw": "tiff_lzw", "packbits": "packbits"}


def saved(kind: str, picture: Image.Image = PNG, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def main() -> None:
    for name in ("manifest", "vectors", "state", "log", "commit", "body", "page"):
        folder = files.CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for title, content in globals()[f"of_{name}"]():
            (folder / title).write_bytes(content)


if __name__ == "__main__":
    main()
