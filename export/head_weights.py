"""The head of an export: the one asked for, or what the weights say; and whether its learned rows can be its own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from cembed.export.checkpoint import Checkpoint
from cembed.export.heads import HEADS, Head, HeadSide
from cembed.runtime.errors import CembedError

DOCUMENT, QUERY = SLOT_TABLES = ("slot_embeddings.document", "slot_embeddings.query")
JOINT = "prompt_embed_tokens.weight"
"""The one table of MetaEmbed's public code: the query's rows, then the document's, all fed after every input. A query
reads the first, which see none of the others; a document the last, which see the query's."""
WEIGHT, BIAS = "custom_text_proj.weight", "custom_text_proj.bias"
METAEMBED_ROWS = {DOCUMENT: 64, QUERY: 16}


@dataclass(frozen=True)
class Rows:
    """Rows of a bundle's slot table that are fed on one side; the first `unread` of them give no vector."""

    first: int
    count: int
    unread: int = 0


@dataclass(frozen=True)
class SlotTables:
    """The weights that a bundle's slot table is put together from, and what each side is fed of it."""

    names: tuple[str, ...]
    document: Rows | None
    query: Rows | None


def named_head(name: str | None, checkpoint: Checkpoint) -> tuple[str, Head]:
    """A head by name, or by what the weights say. Raises CembedError if they do not fit it, or fit several."""
    if name is None:
        name = "metaembed" if JOINT in checkpoint else None
    if name is None:
        if any(table in checkpoint for table in SLOT_TABLES):
            raise CembedError("the checkpoint has learned slot rows: say --head metaembed (no pooling) or --head btoks")
        name = "colbert" if WEIGHT in checkpoint else "causal"
    if name == "colbert" and WEIGHT not in checkpoint:
        raise CembedError(f"{checkpoint.root} has no custom_text_proj: it is no ColBERT-style one, use --head causal")
    return name, HEADS[name]


def slot_tables(checkpoint: Checkpoint, head: Head, named: str | None, hidden_size: int) -> SlotTables:
    """The learned rows that the head's sides need.

    `named` is the head's name if it is one of `HEADS`. Raises CembedError: a table that is missing, has another width,
    or another number of rows than the head was trained with.
    """
    learned = tuple(side.slots == "learned" for side in (head.document, head.query))
    if any(learned) and JOINT in checkpoint:
        return joint_table(check_table(checkpoint, JOINT, hidden_size), head)
    sides = dict(zip(SLOT_TABLES, (head.document, head.query), strict=True))
    rows = {name: check_table(checkpoint, name, hidden_size) for name, side in sides.items() if side.slots == "learned"}
    for name, count in rows.items():
        check_rows(name, count, sides[name], named)
    if rows == METAEMBED_ROWS and all(side.pooling == "none" for side in sides.values()):
        warn_of_metaembed()
    document = Rows(0, rows[DOCUMENT]) if DOCUMENT in rows else None
    query = Rows(rows.get(DOCUMENT, 0), rows[QUERY]) if QUERY in rows else None
    return SlotTables(tuple(rows), document, query)


def joint_table(rows: int, head: Head) -> SlotTables:
    """Of MetaEmbed's layout. Raises CembedError if the rows are not those of the sides' largest budgets together."""
    sides = (head.document, head.query)
    if any(side.slots != "learned" or not side.nested_budgets for side in sides):
        raise CembedError(f"{JOINT} is for heads with learned slots and nested_budgets on both sides: --head metaembed")
    document, query = (max(side.nested_budgets) for side in sides)
    if document + query != rows:
        raise CembedError(
            f"{JOINT} has {rows} rows: {query} of queries and {document} of documents are needed, or a --head-spec "
            "with the nested_budgets that it was trained with"
        )
    return SlotTables((JOINT,), Rows(0, rows, query), Rows(0, query))


def check_table(checkpoint: Checkpoint, name: str, hidden_size: int) -> int:
    """The number of its rows. Raises CembedError: no such table, or of another shape than [rows, hidden_size]."""
    if name not in checkpoint:
        raise CembedError(f"this head needs {name} [slots, hidden]: give it with --head-weights FILE.safetensors")
    shape = checkpoint.shape(name)
    if len(shape) != 2 or shape[0] < 1 or shape[1] != hidden_size:
        raise CembedError(f"{name} has shape {shape}: [slots, {hidden_size}] is needed")
    return shape[0]


def check_rows(name: str, rows: int, side: HeadSide, named: str | None) -> None:
    """Raises CembedError if rows cannot be those that a side was trained with at its nested budgets."""
    vectors, budgets = rows + (side.first_vector == "prompt_end"), side.nested_budgets
    if budgets and (vectors not in budgets if named else vectors < max(budgets)):
        known = f"one of {', '.join(map(str, budgets))}" if named else f"{max(budgets)} or more"
        raise CembedError(
            f"{name} has {rows} rows, for {vectors} vectors: {named or 'this head'} is trained with {known}; "
            "describe another head with --head-spec"
        )


def warn_of_metaembed() -> None:
    """Nothing in two tables says how they were trained, but their numbers of rows may."""
    warnings.warn(
        "64 document and 16 query rows: here each side's rows come right after its prompt; if they are "
        "MetaEmbed's table split by side, whose documents' rows come after the queries', the vectors of documents are "
        f"wrong: give the whole table as {JOINT}",
        RuntimeWarning,
        stacklevel=2,
    )


def projection_width(checkpoint: Checkpoint, hidden_size: int) -> int | None:
    """The length of projected vectors; None if the checkpoint has no projection."""
    parts = [name for name in (WEIGHT, BIAS) if name in checkpoint]
    if not parts:
        return None
    if len(parts) == 1:
        raise CembedError(f"the checkpoint has {parts[0]} only: a projection is custom_text_proj.weight and .bias")
    bias, weight = checkpoint.shape(BIAS), checkpoint.shape(WEIGHT)
    if len(bias) != 1 or not bias[0]:
        raise CembedError(f"{BIAS} has shape {bias}: [dim] is needed")
    if weight != (bias[0], hidden_size):
        raise CembedError(f"{WEIGHT} has shape {weight}: [{bias[0]}, {hidden_size}] is needed")
    return bias[0]
