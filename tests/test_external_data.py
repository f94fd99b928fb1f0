"""A graph names files for its tensors' data: only those that the manifest gives it, and within their bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import libcembed
import onnx
import pytest
from libcembed import CallError, Library
from manifests import read, told
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from cembed.runtime import Bundle, CembedError, Embedder
from cembed.runtime.bundle.external_data import check_external_data
from cembed.runtime.bundle.manifest_file import write_manifest
from cembed.runtime.engines.quiet import ort as onnxruntime

Place = Callable[[ModelProto, TensorProto], object]
Entries = list[tuple[str, str]]
GOOD: Entries = [("location", "text.data"), ("offset", "64"), ("length", "16")]


@pytest.fixture(scope="module")
def bundle(causal_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose text.onnx tests write anew."""
    root = Path(shutil.copytree(causal_bundle, tmp_path_factory.mktemp("external") / "bundle"))
    (root.parent / "secret.bin").write_bytes(bytes(1 << 20))
    return root


@pytest.fixture(scope="module")
def model(causal_bundle: Path) -> bytes:
    return (causal_bundle / "text.onnx").read_bytes()


def put_graph(root: Path, content: bytes) -> None:
    """Replaces text.onnx, with its size and sha256 in the manifest."""
    (root / "text.onnx").write_bytes(content)
    raw = read(root)
    raw["files"]["text.onnx"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(root, json.dumps(raw))


def external(entries: Entries) -> TensorProto:
    tensor = TensorProto(name="hostile", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)
    return tensor


def node(name: str, attribute: AttributeProto) -> NodeProto:
    return NodeProto(op_type=name, output=["hostile"], attribute=[attribute])


def attribute(**values: object) -> AttributeProto:
    return AttributeProto(name="value", **values)  # type: ignore[arg-type]


def body(tensor: TensorProto) -> GraphProto:
    return GraphProto(name="body", initializer=[tensor])


def within(tensor: TensorProto, depth: int) -> GraphProto:
    """A body in a body, and so on."""
    graph = body(tensor)
    for _ in range(depth):
        graph = GraphProto(name="body", node=[node("If", attribute(type=AttributeProto.GRAPH, g=graph))])
    return graph


def sparse(tensor: TensorProto, part: str) -> SparseTensorProto:
    return SparseTensorProto(**{part: tensor}, dims=[4])  # type: ignore[arg-type]


def in_function(model: ModelProto, *nodes: NodeProto, attributes: list[AttributeProto] | None = None) -> None:
    function = helper.make_function("cembed", "f", [], [], list(nodes), [])
    function.attribute_proto.extend(attributes or [])
    model.functions.append(function)


def a(kind: int, **values: object) -> AttributeProto:
    return attribute(type=kind, **values)


PLACES: dict[str, Place] = {
    "initializer": lambda m, t: m.graph.initializer.append(t),
    "constant": lambda m, t: m.graph.node.append(node("Constant", a(AttributeProto.TENSOR, t=t))),
    "tensors": lambda m, t: m.graph.node.append(node("X", a(AttributeProto.TENSORS, tensors=[t]))),
    "if": lambda m, t: m.graph.node.append(node("If", a(AttributeProto.GRAPH, g=body(t)))),
    "deep": lambda m, t: m.graph.node.append(node("Loop", a(AttributeProto.GRAPH, g=within(t, 5)))),
    "graphs": lambda m, t: m.graph.node.append(node("X", a(AttributeProto.GRAPHS, graphs=[body(t)]))),
    "sparse values": lambda m, t: m.graph.sparse_initializer.append(sparse(t, "values")),
    "sparse indices": lambda m, t: m.graph.sparse_initializer.append(sparse(t, "indices")),
    "sparse attribute": lambda m, t: m.graph.node.append(
        node("Constant", a(AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse(t, "values")))
    ),
    "sparse attributes": lambda m, t: m.graph.node.append(
        node("X", a(AttributeProto.SPARSE_TENSORS, sparse_tensors=[sparse(t, "indices")]))
    ),
    "function": lambda m, t: in_function(m, node("Constant", a(AttributeProto.TENSOR, t=t))),
    "function default": lambda m, t: in_function(m, attributes=[a(AttributeProto.TENSOR, t=t)]),
    "training": lambda m, t: m.training_info.add().initialization.initializer.append(t),
    "training algorithm": lambda m, t: m.training_info.add().algorithm.node.append(
        node("Constant", a(AttributeProto.TENSOR, t=t))
    ),
}

LOCATIONS = [
    "/etc/passwd",
    "../secret.bin",
    "../bundle/text.data",
    "./text.data",
    "sub/text.data",
    "tokenizer.json",
    "vision.data",
    "text.onnx",
    "text.data\0",
    "TEXT.DATA",
    "",
    ".",
    "file:text.data",
    "*/_ORT_MEM_ADDR_/*",
]
NUMBERS = ["-1", "-0", "+1", "", " 1", "1 ", "1e3", "0x10", "1.0", "９", "9" * 18, "9" * 19, "9" * 40]  # noqa: RUF001
ENTRIES: list[Entries] = [
    *([("location", location), *GOOD[1:]] for location in LOCATIONS),
    *([GOOD[0], ("offset", number)] for number in NUMBERS),
    *([GOOD[0], ("length", number)] for number in NUMBERS),
    [GOOD[0], ("offset", "{size}"), ("length", "1")],
    [GOOD[0], ("offset", "{size+1}")],
    [GOOD[0], ("length", "{size+1}")],
    [*GOOD, GOOD[0]],
    [*GOOD, ("location", "../secret.bin")],
    [("location", "../secret.bin"), *GOOD],
    [*GOOD, ("basepath", "/")],
    [*GOOD, ("", "")],
    [("location\0", "text.data")],
]


def made(model: bytes, place: Place, entries: Entries, size: int) -> bytes:
    proto = onnx.load_model_from_string(model)
    texts = {"{size}": str(size), "{size+1}": str(size + 1)}
    place(proto, external([(key, texts.get(value, value)) for key, value in entries]))
    return bytes(proto.SerializeToString())


def about_data(message: str | None) -> str | None:
    """None where the data of tensors was let be: what else a graph holds is looked at after that, and is refused."""
    return None if message and "is no graph of a bundle" in message else message


def refused_by_python(root: Path) -> str | None:
    return about_data(told(lambda: Bundle(root).graph_path("text")))


def refused_by_c(library: Library, root: Path) -> str | None:
    """The message, where the library did not give the graph to its engine."""
    opened = library.open(root)
    try:
        opened.embed_query("total")
    except CallError as error:
        return about_data(error.message) if error.status == libcembed.BUNDLE else None
    finally:
        opened.close()
    return None


def refused_by_both(library: Library, root: Path) -> list[str | None]:
    return [refused_by_python(root), refused_by_c(library, root)]


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_is_found_wherever_it_is(library: Library, bundle: Path, model: bytes, place: str) -> None:
    size = Bundle(bundle).manifest.files["text.data"].size
    for location in ("../secret.bin", str(bundle.parent / "secret.bin")):
        put_graph(bundle, made(model, PLACES[place], [("location", location), *GOOD[1:]], size))
        for message in refused_by_both(library, bundle):
            assert message is not None, location
            assert location in message
    put_graph(bundle, made(model, PLACES[place], GOOD, size))
    assert refused_by_both(library, bundle) == [None, None]


@pytest.mark.parametrize("number", range(len(ENTRIES)))
def test_data_is_in_the_files_of_the_graph_only(library: Library, bundle: Path, model: bytes, number: int) -> None:
    size = Bundle(bundle).manifest.files["text.data"].size
    put_graph(bundle, made(model, PLACES["initializer"], ENTRIES[number], size))
    for message in refused_by_both(library, bundle):
        assert message is not None, ENTRIES[number]
        assert "text.onnx is no ONNX file to open" in message


@pytest.mark.parametrize(
    "entries",
    [
        GOOD,
        GOOD[:1],
        GOOD[1:],
        [*GOOD, ("checksum", "abc")],
        [GOOD[0], ("offset", "{size}"), ("length", "0")],
        GOOD[::-1],
        [],
    ],
)
def test_data_within_the_files_is_let_be(library: Library, bundle: Path, model: bytes, entries: Entries) -> None:
    """So is a tensor that names no file at all: an engine finds no data for it."""
    size = Bundle(bundle).manifest.files["text.data"].size
    put_graph(bundle, made(model, PLACES["constant"], entries, size))
    assert refused_by_both(library, bundle) == [None, None]


def test_no_engine_sees_a_graph_that_was_refused(bundle: Path, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the engine was asked")

    put_graph(bundle, made(model, PLACES["if"], [("location", "../secret.bin")], 0))
    monkeypatch.setattr(onnxruntime, "InferenceSession", never)
    with pytest.raises(CembedError, match=r"\.\./secret\.bin"):
        Embedder.load(bundle, verify=False).embed_query("total")


# The wire format: what a reader of protocol buffers might see otherwise.


def field(number: int, content: bytes, kind: int = 2) -> bytes:
    return varint(number << 3 | kind) + (varint(len(content)) + content if kind == 2 else content)


def varint(value: int, size: int = 0) -> bytes:
    """In `size` bytes at least, which may be more than it takes."""
    parts = [value & 127]
    while value := value >> 7:
        parts.append(value & 127)
    parts += [0] * (size - len(parts))
    return bytes([*(part | 128 for part in parts[:-1]), parts[-1]])


def entry(key: bytes, value: bytes) -> bytes:
    return field(13, field(1, key) + field(2, value))


SECRET = entry(b"location", b"../secret.bin")
HERE = entry(b"location", b"text.data")
TENSOR = field(5, SECRET)  # an initializer of a graph
ATTRIBUTE = field(5, SECRET)
DEEP = SECRET
for _ in range(60):
    DEEP = field(1, field(5, field(6, DEEP)))  # a node with an attribute with a graph

WIRE: dict[str, tuple[bytes, bool]] = {
    # name: the file, and whether it is refused
    "plain": (field(7, TENSOR), True),
    "long tag": (varint(7 << 3 | 2, 5) + varint(len(TENSOR)) + TENSOR, True),
    "long length": (varint(7 << 3 | 2) + varint(len(TENSOR), 9) + TENSOR, True),
    "long tag in an entry": (
        field(7, field(5, field(13, varint(10, 3) + varint(8, 3) + b"location" + SECRET[-15:]))),
        True,
    ),
    "after unknown fields": (
        field(99, b"x") + field(98, b"12345678", 1) + field(97, b"1234", 5) + field(7, TENSOR),
        True,
    ),
    "after a number": (field(1, varint(2**64 - 1), 0) + field(7, TENSOR), True),
    "two graphs": (field(7, field(5, HERE)) + field(7, field(5, HERE)), True),
    "two tensors of an attribute": (field(7, field(1, field(5, field(5, HERE) + field(5, HERE)))), True),
    "two keys of an entry": (field(7, field(5, field(13, field(1, b"location") * 2 + field(2, b"text.data")))), True),
    "nested deep": (field(7, DEEP), True),
    "a group": (varint(7 << 3 | 3) + TENSOR + varint(7 << 3 | 4), True),
    "the other wire type": (field(7, TENSOR) + varint(9 << 3 | 6), True),
    "field zero": (field(0, b"x") + field(7, b""), True),
    "a tag of 33 bits": (varint(1 << 33 | 58) + varint(len(TENSOR)) + TENSOR, True),
    "a number without end": (field(7, b"") + b"\xff" * 12, True),
    "cut off": (field(7, TENSOR)[:-1], True),
    "longer than the file": (varint(7 << 3 | 2) + varint(2**40) + TENSOR, True),
    "no more than a tag": (b"\x3a", True),
    "cut in a fixed number": (field(7, b"") + varint(98 << 3 | 1) + b"1234", True),
    "empty": (b"", True),
    "text": (b"#!/bin/sh\n", True),
    "a context of compiled code": (field(7, field(1, field(4, b"EPContext"))), True),
    "good": (field(7, field(5, HERE)), False),
    "the word in a name": (field(7, field(5, field(8, b"location")) + field(2, b"location")), False),
    "as a number": (field(7, field(5, varint(13 << 3) + varint(5))), False),
    "nothing in it": (field(7, b""), False),
}


@pytest.mark.parametrize("name", WIRE)
def test_the_wire_format_is_read_as_engines_do_or_refused(library: Library, bundle: Path, name: str) -> None:
    content, refused = WIRE[name]
    put_graph(bundle, content)
    assert [message is not None for message in refused_by_both(library, bundle)] == [refused] * 2


def test_both_say_the_same_of_a_graph_with_changed_bytes(library: Library, bundle: Path, model: bytes) -> None:
    outcomes = set()
    for place in range(3, len(model), 149):
        content = bytearray(model)
        content[place] ^= 1 << place % 8
        put_graph(bundle, bytes(content))
        python, c = refused_by_both(library, bundle)
        assert (python is None) == (c is None), (place, python, c)
        outcomes.add(python is None)
    assert outcomes == {True, False}


def test_graphs_of_every_bundle_pass(bundle_of: Callable[[str], Path]) -> None:
    for name in ("causalqwen2_5", "causalpali"):
        opened = Bundle(bundle_of(name))
        assert [opened.graph_path(graph).name for graph in opened.manifest.graphs]


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda path: path.unlink() or path.symlink_to("x"), lambda path: path.unlink() or path.mkdir()],
)
def test_only_a_plain_file_is_looked_into(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"")
    damage(path)
    assert "graph.onnx" in (told(lambda: check_external_data(path, {})) or "")
