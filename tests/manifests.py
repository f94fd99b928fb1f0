"""Manifests for tests: changed in one place, of every field, of the schema before, and read by both languages."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from libcembed import CallError, Library

from cembed.runtime import Bundle, CembedError
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST
from cembed.runtime.bundle.manifest_file import digest_line, write_manifest

Json = dict[str, Any]
Place = tuple[str | int, ...]


def read(root: Path) -> Json:
    raw: Json = json.loads((root / MANIFEST).read_text())
    return raw


def put(root: Path, content: bytes) -> None:
    """Any bytes as a manifest, with their digest."""
    (root / MANIFEST).write_bytes(content)
    (root / DIGEST).write_bytes(digest_line(content))


def make_old(root: Path) -> str:
    """Makes schema 1 of a bundle; returns its hash."""
    raw = read(root) | {"schema_version": 1}
    (root / MANIFEST).write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (root / DIGEST).unlink()
    return hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest()


def places(value: Any, way: Place = ()) -> Iterator[Place]:
    """The way to every value of a manifest but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*way, key)
        yield from places(item, (*way, key))


def at(raw: Any, place: Place) -> Any:
    for key in place:
        raw = raw[key]
    return raw


def changed(raw: Json, place: Place, value: Any) -> Json:
    """A copy with another value in one place."""
    made = copy.deepcopy(raw)
    at(made, place[:-1])[place[-1]] = value
    return made


def name_of(place: Place) -> str:
    """The field that a message must name."""
    return str(next(key for key in reversed(place) if isinstance(key, str)))


def python_refuses(root: Path) -> str | None:
    """The message, None if the bundle is opened. Anything else that is raised fails the test."""
    return told(lambda: Bundle(root))


def library_refuses(library: Library, root: Path) -> str | None:
    return told(lambda: library.open(root).close())


def told(action: Callable[[], object]) -> str | None:
    message = None
    try:
        action()
    except CembedError as error:
        message = str(error)
    except CallError as error:
        message = error.message
    assert "\n" not in (message or "")
    return message


def make_full(source: Path, to: Path) -> Path:
    """A bundle whose manifest has every field there is. It can be opened, and computes nonsense."""
    root, raw = Path(shutil.copytree(source, to)), read(source)
    rows, width = raw["token_embeddings"]["rows"], raw["hidden_size"]
    for name, size in (("token_embeddings.bin", rows * width), ("scales.bin", rows * 4), ("slots.bin", 7 * width * 4)):
        (root / name).write_bytes(bytes(size))
        raw["files"][name] = {"size": size, "sha256": hashlib.sha256(bytes(size)).hexdigest()}
    raw["token_embeddings"] |= {"dtype": "int8", "scales": "scales.bin"}
    raw["slot_embeddings"] = {"file": "slots.bin", "dtype": "float32", "rows": 7, "scales": None}
    raw["document"] |= {"slots": "learned", "slot_rows": [0, 7], "nested_budgets": [1, 4], "latent_token_id": 3}
    raw["document"] |= {"first_vector": "slot", "unread_slots": 1, "num_vectors": 6}
    tiles = {"side": 56, "longest_edge": 224, "tile": "{row}{column}{image}", "row_end": "", "page": "{image}"}
    raw["image"] |= {"resize": "tiles", "min_pixels": 56**2, "max_pixels": 17 * 56**2}
    raw["image"]["tiles"] = tiles | {"alone": "{image}"}
    raw["image"]["skip_blank"] = False
    damage = {"layer": "text/layers.0.mlp", "weights": ["w"], "min_cosine": 0.99, "score_error": 0.01}
    comparison = {"pages": 12, "queries": 12, "min_cosine": 0.99, "p1_cosine": 0.99, "median_cosine": 1.0}
    comparison |= {"score_error": 0.01, "top5_overlap": 1.0, "ms_per_page": [2.0, 1.0], "bytes": [2, 1]}
    raw["quantisation"] = {
        "weights": "int8",
        "embeddings": "int8",
        "rounding": "nearest",
        "source": "0" * 64,
        "schemes": {"w": "int8"},
        "kept": ["k"],
        "comparison": comparison | {"ndcg5": [0.9, 0.8]},
        "sensitivity": [damage],
        "rows": False,
    }
    write_manifest(root, json.dumps(raw))
    return root
