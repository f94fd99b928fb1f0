"""The head of an export: the one asked for, or what the weights say; and whether its learned rows can be its own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

from cembed.export.checkpoint import Checkpoint
from cembed.export.heads import HEADS, Head, HeadSide
from cembed.runtime.errors import CembedError

DOCUMENT, QUERY = SLOT_TABLES = ("slot_embeddings.document", "slot_embeddings.query")
WEIGHT, BIAS = "custom_text_proj.weight", "custom_text_proj.bias"
METAEMBED_ROWS = {DOCUMENT: 64, QUERY: 16}
"""Of MetaEmbed's public code, whose one table of both sides cembed cannot read."""
_METAEMBED_TABLE = re.compile(r"^prompt_embed_tokens\b")


def named_head(name: str | None, checkpoint: Checkpoint) -> tuple[str, Head]:
    """A head by name, or by what the weights say. Raises CembedError if they do not fit it, or fit several."""
    if name is None:
        if any(table in checkpoint for table in SLOT_TABLES):
            raise CembedError("the checkpoint has learned slot rows: say --head metaembed (no pooling) or --head btoks")
        name = "colbert" if WEIGHT in checkpoint else "causal"
    if name == "colbert" and WEIGHT not in checkpoint:
        raise CembedError(f"{checkpoint.root} has no custom_text_proj: it is no ColBERT-style one, use --head causal")
    return name, HEADS[name]


def refuse_other_layouts(checkpoint: Checkpoint) -> None:
    """Raises CembedError for slot rows in an order that cembed does not have."""
    if found := sorted(name for name in checkpoint.unused if _METAEMBED_TABLE.search(name)):
        raise CembedError(
            f"{found[0]} {checkpoint.shape(found[0])} is the table of MetaEmbed's public code, where a document's rows "
            "come after the query's: cembed does not have that layout yet, and the table split by side gives other "
            "vectors"
        )


def slot_tables(checkpoint: Checkpoint, head: Head, named: str | None, hidden_size: int) -> dict[str, int]:
    """The tables of learned rows that the head's sides need, and how many rows each has.

    `named` is the head's name if it is one of `HEADS`. Raises CembedError: a table that is missing, has another width,
    or another number of rows than the head was trained with.
    """
    sides = dict(zip(SLOT_TABLES, (head.document, head.query), strict=True))
    learned = {name: side for name, side in sides.items() if side.slots == "learned"}
    for name in learned:
        if name not in checkpoint:
            raise CembedError(f"this head needs {name} [slots, hidden]: give it with --head-weights FILE.safetensors")
    shapes = {name: checkpoint.shape(name) for name in learned}
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[0] < 1 or shape[1] != hidden_size:
            raise CembedError(f"{name} has shape {shape}: [slots, {hidden_size}] is needed")
        check_rows(name, shape[0], learned[name], named)
    rows = {name: shape[0] for name, shape in shapes.items()}
    warn_of_metaembed(rows, learned)
    return rows


def check_rows(name: str, rows: int, side: HeadSide, named: str | None) -> None:
    """Raises CembedError if rows cannot be those that a side was trained with at its nested budgets."""
    vectors, budgets = rows + (side.first_vector == "prompt_end"), side.nested_budgets
    if budgets and (vectors not in budgets if named else vectors < max(budgets)):
        known = f"one of {', '.join(map(str, budgets))}" if named else f"{max(budgets)} or more"
        raise CembedError(
            f"{name} has {rows} rows, for {vectors} vectors: {named or 'this head'} is trained with {known}; "
            "describe another head with --head-spec"
        )


def warn_of_metaembed(rows: Mapping[str, int], sides: Mapping[str, HeadSide]) -> None:
    """Nothing in two tables says how they were trained, but their numbers of rows may."""
    if rows == METAEMBED_ROWS and all(side.pooling == "none" for side in sides.values()):
        warnings.warn(
            "64 document and 16 query rows: here each side's rows come right after its prompt; if they are those of "
            "MetaEmbed's public code, where a document's come after the query's, the vectors of documents are wrong",
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
