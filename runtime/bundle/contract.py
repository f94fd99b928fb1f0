"""What the fields of a manifest must have to do with each other, once each is right by itself.

`ORDER` and `TENSORS` are tables for the C library too: `tests/native/manifest_schema.py` writes them there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isqrt
from operator import attrgetter

from cembed.runtime.bundle.graph_rules import MAX_GRAPH
from cembed.runtime.bundle.graph_tensors import grows, is_past, is_present, past_of
from cembed.runtime.bundle.image_processing import MAX_TILES, ImageProcessing, Tiles
from cembed.runtime.bundle.manifest import (
    MAX_DEEPSTACK,
    MAX_PICTURE,
    MAX_TOKENIZER,
    MAX_VECTOR,
    EmbeddingTable,
    Graph,
    Manifest,
    Side,
    Tensor,
)
from cembed.runtime.bundle.schema import shown
from cembed.runtime.errors import CembedError

ORDER = (
    "image.min_pixels <= image.max_pixels",
    "image_token_id < token_embeddings.rows",
    "document.latent_token_id < token_embeddings.rows",
    "query.latent_token_id < token_embeddings.rows",
    "document.num_vectors <= max_sequence_length",
    "query.num_vectors <= max_sequence_length",
)
"""Numbers of which the first is at most the second, or below it; one that is null is let be."""

TENSORS = (
    "vision in pixel_values - float32 batch_size num_patches|=image.max_pixels =image.patch_size",
    "vision in patch_positions ? int64 num_patches 2",
    "vision in patch_fractions ?fractions float32 num_patches 2",
    "vision in window_index ?windows int64 num_windows =image.window_size",
    "vision in window_restore ?windows int64 num_patches",
    "vision out image_features - float32 batch_size num_visual_tokens =image_features",
    "text in inputs_embeds - float32 batch_size sequence_length =hidden_size",
    "text in position_ids - int64 =positions.axes batch_size sequence_length",
    "text in slot_indices - int64 batch_size num_vectors",
    "text in prompt_length ? int64 1",
    "text in deepstack_embeds ?deepstack float32 batch_size sequence_length =deepstack",
    "text out slot_states - float32 batch_size num_vectors =dim",
    "text_step in inputs_embeds - float32 batch_size sequence_length =hidden_size",
    "text_step in position_ids - int64 =positions.axes batch_size sequence_length",
    "text_step in slot_indices - int64 batch_size num_vectors",
    "text_step in cache_position - int64 batch_size",
    "text_step in deepstack_embeds ?deepstack float32 batch_size sequence_length =deepstack",
    "text_step in past_key_values.#.key - float32|float16 batch_size * capacity|* *",
    "text_step in past_key_values.#.value - float32|float16 batch_size * capacity|* *",
    "text_step in past_states.#.conv ?states float32 batch_size * *",
    "text_step in past_states.#.recurrent ?states float32 batch_size * * *",
    "text_step out slot_states - float32 batch_size num_vectors =dim",
    "text_step out hidden_states ? float32 batch_size num_vectors =hidden_size",
    "text_step out present.#.key - float32|float16 batch_size * capacity|* *",
    "text_step out present.#.value - float32|float16 batch_size * capacity|* *",
    "text_step out present_states.#.conv ?states float32 batch_size * *",
    "text_step out present_states.#.recurrent ?states float32 batch_size * * *",
)
"""Graph, direction, name (# is a number), whether it must be there, types, and axes.

It must with `-`; tensors with the same `?` are there together or not at all. An axis is a name, a number, `*` for any
number, or `=` for the number that `axis_numbers` gives from the field named; `|` stands between what may be there. The
first output is the first in its graph too.
"""

DEEPSTACK = "deepstack_embeds"
ITEM_SIZES = {"float32": 4, "float16": 2, "int8": 1}


def check_contract(manifest: Manifest) -> None:
    """Raises CembedError that names the fields which do not fit each other."""
    check_scales(manifest)
    check_files(manifest)
    check_sizes(manifest)
    for rule in ORDER:
        check_order(manifest, rule)
    check_image(manifest.image)
    check_side(manifest, "document", manifest.document, "{image}")
    check_side(manifest, "query", manifest.query, "{text}")
    check_graphs(manifest)
    if manifest.image.skip_blank and not manifest.reads_parts:
        raise CembedError("image.skip_blank is true: the vision graph takes whole pages only")


def check_files(manifest: Manifest) -> None:
    """The files that fields name must be those that are listed: one that is not named is never verified."""
    m = manifest
    tables = tables_of(m).values()
    named = {m.tokenizer, m.self_test.image, m.self_test.vectors, *(table.file for table in tables)}
    named |= {table.scales for table in tables if table.scales}
    named |= {name for graph in m.graphs.values() for name in (graph.file, *graph.data)}
    if different := sorted(named ^ m.files.keys()):
        raise CembedError(f"the manifest lists {', '.join(different)} but does not use it, or the reverse")
    check_limit(m, m.tokenizer, "tokenizer", MAX_TOKENIZER)
    check_limit(m, m.self_test.image, "picture", MAX_PICTURE)
    for graph in m.graphs.values():
        check_limit(m, graph.file, "graph", MAX_GRAPH)


def check_limit(manifest: Manifest, name: str, what: str, limit: int) -> None:
    """Before a file is hashed, or read at all."""
    if (size := manifest.files[name].size) > limit:
        raise CembedError(f"{name} has {size} bytes, more than any {what}: {limit}")


def tables_of(manifest: Manifest) -> dict[str, EmbeddingTable]:
    tables = {"token_embeddings": manifest.token_embeddings, "slot_embeddings": manifest.slot_embeddings}
    return {name: table for name, table in tables.items() if table is not None}


def check_scales(manifest: Manifest) -> None:
    for name, table in tables_of(manifest).items():
        if (table.dtype == "int8") != bool(table.scales):
            given = f"{name} has dtype {table.dtype}, scales {table.scales}"
            raise CembedError(f"{given}: tables of int8, and no others, have scales")


def check_sizes(manifest: Manifest) -> None:
    """Tables have the bytes that their rows take."""
    for name, table in tables_of(manifest).items():
        check_size(manifest, table.file, f"{name}.rows", (table.rows, manifest.hidden_size), table.dtype)
        if table.scales:
            check_size(manifest, table.scales, f"{name}.rows", (table.rows, 1), "float32")


def check_size(manifest: Manifest, file: str, rows: str, shape: tuple[int, int], dtype: str) -> None:
    size, expected = manifest.files[file].size, shape[0] * shape[1] * ITEM_SIZES[dtype]
    if size != expected:
        what = f"{rows} {shape[0]} of {shape[1]} (hidden_size, 1 for scales) in {dtype} take {expected}"
        raise CembedError(f"{file} has {size} bytes: {what}")


def check_order(manifest: Manifest, rule: str) -> None:
    names = rule.split()
    first, second = (attrgetter(name)(manifest) for name in names[::2])
    if first is not None and not (first <= second if names[1] == "<=" else first < second):
        raise CembedError(f"{names[0]} is {first}, which is not {names[1]} {names[2]}, {second}")


def check_image(image: ImageProcessing) -> None:
    side = isqrt(image.max_pixels)
    if image.factor**2 > image.max_pixels:
        raise CembedError(f"image.max_pixels is {image.max_pixels}: a visual token has {image.factor} squared")
    if image.window_size % image.factor:
        raise CembedError(f"image.window_size is {image.window_size}, no multiple of a visual token's {image.factor}")
    if image.resize == "fixed" and (side**2 != image.max_pixels or side % image.factor):
        raise CembedError(f"image.max_pixels is {image.max_pixels}, no square of visual tokens of {image.factor}")
    if (image.resize == "tiles") != (image.tiles is not None):
        raise CembedError(f"image.tiles is {'missing' if image.tiles is None else 'there'}, but resize {image.resize}")
    if image.tiles is not None:
        check_tiles(image, image.tiles)


def check_tiles(image: ImageProcessing, tiles: Tiles) -> None:
    if tiles.side % image.factor or tiles.side % 2:
        raise CembedError(
            f"image.tiles.side is {tiles.side}, no even multiple of patch_size * merge_size, {image.factor}"
        )
    if image.min_pixels != tiles.side**2 or image.max_pixels > MAX_TILES * tiles.side**2:
        limits = f"min_pixels {image.min_pixels} and max_pixels {image.max_pixels}"
        raise CembedError(f"image has {limits}: they are 1 to {MAX_TILES} tiles of side {tiles.side}")
    for name, text, images in (
        ("tile", tiles.tile, 1),
        ("row_end", tiles.row_end, 0),
        ("page", tiles.page, 1),
        ("alone", tiles.alone, 1),
    ):
        if text.count("{image}") != images:
            raise CembedError(f"image.tiles.{name} is {shown(text)}: it must contain {{image}} {images} times")


def check_side(manifest: Manifest, name: str, side: Side, placeholder: str) -> None:
    if side.prompt.count(placeholder) != 1:
        raise CembedError(f"{name}.prompt is {shown(side.prompt)}: it must contain {placeholder} exactly once")
    if side.vector_dim(manifest.dim) > MAX_VECTOR:
        raise CembedError(f"{name}.num_vectors is {side.num_vectors}: vectors of so many states have over {MAX_VECTOR}")
    rows = manifest.slot_embeddings.rows if manifest.slot_embeddings else 0
    if side.slot_rows and sum(side.slot_rows) > rows:
        raise CembedError(f"{name}.slot_rows are {list(side.slot_rows)}, beyond the {rows} rows of slot_embeddings")


def check_graphs(manifest: Manifest) -> None:
    """There are those that each side runs on, and no others; their tensors are what the runtime feeds and takes."""
    graphs, known = manifest.graphs, {line.split()[0] for line in TENSORS}
    sides = (manifest.document, manifest.query)
    needed = {"vision"} | {"text_step" if side.slots == "feedback" else "text" for side in sides}
    for problem, names in (("no", needed - graphs.keys()), ("an unknown", graphs.keys() - known)):
        if names:
            raise CembedError(f"graphs has {problem} graph {', '.join(sorted(map(shown, names)))}")
    numbers = axis_numbers(manifest)
    for name, graph in graphs.items():
        if not graph.file.endswith(".onnx"):
            raise CembedError(f"graphs.{name}.file is {graph.file}: a graph is a file *.onnx")
        check_tensors(f"graphs.{name}.inputs", rows_of(name, "in"), graph.inputs, numbers)
        check_tensors(f"graphs.{name}.outputs", rows_of(name, "out"), graph.outputs, numbers)
    check_rows(manifest)
    if "text_step" in graphs:
        check_step(manifest, graphs["text_step"])


def check_rows(manifest: Manifest) -> None:
    """Both text graphs are fed the same for each position."""
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "vision"}
    takers = {name for name, graph in graphs.items() if any(tensor.name == DEEPSTACK for tensor in graph.inputs)}
    if takers and (others := graphs.keys() - takers):
        raise CembedError(f"graphs.{min(others)}.inputs: {DEEPSTACK} is missing, which {min(takers)} has")


def axis_numbers(manifest: Manifest) -> dict[str, int]:
    """What stands for `=FIELD` in `TENSORS`; patches are a number where images have one size."""
    image, deepstack = manifest.image, deepstack_width(manifest)
    return {
        "deepstack": deepstack,
        "image_features": manifest.hidden_size + deepstack,
        "hidden_size": manifest.hidden_size,
        "dim": manifest.dim,
        "positions.axes": manifest.positions.axes,
        "image.max_pixels": image.input_patches or 0,
        "image.patch_size": 3 * image.patch_size**2,
        "image.window_size": (image.window_size // image.factor * image.merge_size) ** 2,
    }


def deepstack_width(manifest: Manifest) -> int:
    """Of what the decoder's first layers take of images, side by side: a multiple of hidden_size."""
    inputs = (tensor for graph in manifest.graphs.values() for tensor in graph.inputs if tensor.name == DEEPSTACK)
    widths = [tensor.shape[-1] for tensor in inputs if tensor.shape]
    widest = max((width for width in widths if isinstance(width, int)), default=0)
    return min(widest // manifest.hidden_size, MAX_DEEPSTACK) * manifest.hidden_size


@dataclass(frozen=True)
class Row:
    """A line of `TENSORS`."""

    name: str
    group: str
    dtypes: str
    axes: tuple[str, ...]

    def names(self, tensor: Tensor) -> bool:
        return re.fullmatch(re.escape(self.name).replace(r"\#", "[0-9]+"), tensor.name) is not None

    def fits(self, tensor: Tensor, numbers: Mapping[str, int]) -> bool:
        if tensor.dtype not in self.dtypes.split("|") or len(tensor.shape) != len(self.axes):
            return False
        pairs = zip(tensor.shape, self.axes, strict=True)
        return all(any(is_axis(size, part, numbers) for part in axis.split("|")) for size, axis in pairs)


def rows_of(graph: str, direction: str) -> list[Row]:
    """The lines for a graph's inputs (`in`) or outputs (`out`)."""
    lines = [line.split()[2:] for line in TENSORS if line.startswith(f"{graph} {direction} ")]
    return [Row(name, group, dtypes, tuple(axes)) for name, group, dtypes, *axes in lines]


def is_axis(size: int | str, needed: str, numbers: Mapping[str, int]) -> bool:
    """
    >>> is_axis("capacity", "capacity", {}), is_axis(7, "*", {}), is_axis(7, "=dim", {"dim": 7}), is_axis(7, "8", {})
    (True, True, True, False)
    """
    if isinstance(size, str):
        return size == needed
    return needed in ("*", str(size)) or (needed[0] == "=" and numbers[needed[1:]] == size)


def check_tensors(where: str, rows: Sequence[Row], tensors: Sequence[Tensor], numbers: Mapping[str, int]) -> None:
    """Each tensor is of one of `rows`, none is there twice, those that must be are, the first output in front."""
    found = [row_of(where, rows, tensor, numbers) for tensor in tensors]
    names = [tensor.name for tensor in tensors]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CembedError(f"{where}: {twice} is there twice")
    if absent := next(missing_rows(rows, found), None):
        raise CembedError(f"{where}: {absent.name} is missing")
    if where.endswith("outputs") and found[0] != rows[0]:
        raise CembedError(f"{where}: {rows[0].name} must be the first")


def row_of(where: str, rows: Sequence[Row], tensor: Tensor, numbers: Mapping[str, int]) -> Row:
    row = next((row for row in rows if row.names(tensor)), None)
    if row is None:
        raise CembedError(f"{where}: unknown {shown(tensor.name)}, there are {', '.join(row.name for row in rows)}")
    if not row.fits(tensor, numbers):
        given = f"{shown(tensor.dtype)} [{', '.join(map(shown, tensor.shape[:8]))}]"
        needed = ", ".join(f"{numbers[axis[1:]]} {axis}" if axis[0] == "=" else axis for axis in row.axes)
        raise CembedError(f"{where}: {tensor.name} is {given}: {row.dtypes} [{needed}] is needed")
    return row


def missing_rows(rows: Sequence[Row], found: Sequence[Row]) -> Iterator[Row]:
    for group, members in groupby(rows, lambda row: row.group):
        if group == "-" or any(row.group == group for row in found):
            yield from (row for row in members if row not in found)


def check_step(manifest: Manifest, graph: Graph) -> None:
    """Each past has its present, all hold the same positions, and there is what a feedback slot is fed."""
    past = {tensor.name: (tensor.dtype, *tensor.shape) for tensor in graph.inputs if is_past(tensor.name)}
    present = {past_of(t.name): (t.dtype, *t.shape) for t in graph.outputs if is_present(t.name)}
    if different := sorted(name for name in past.keys() | present.keys() if past.get(name) != present.get(name)):
        raise CembedError(f"graphs.text_step: {different[0]} and its present are not alike")
    if len({tensor[3] for name, tensor in past.items() if grows(name)}) > 1:
        raise CembedError("graphs.text_step: past_key_values hold different numbers of positions")
    if manifest.dim != manifest.hidden_size and all(tensor.name != "hidden_states" for tensor in graph.outputs):
        raise CembedError(
            f"graphs.text_step.outputs: hidden_states is missing, as dim {manifest.dim} is a projection's"
        )
