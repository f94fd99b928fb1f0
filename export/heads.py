"""Heads as data: what is fed into the latent slots of each side, how many there are, and what is made of their states.

A new head is a row of `HEADS`. `--head-spec FILE.json` gives one without a row: {"document": {…}, "query": {…}} with
the fields of `HeadSide`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cembed.export.choices import HEADS as NAMES
from cembed.export.settings import read_json
from cembed.runtime.bundle.manifest import FirstVector, Pooling, SlotKind, SlotPositions
from cembed.runtime.bundle.schema import decode
from cembed.runtime.errors import CembedError

MAX_SPEC = 1 << 20
"""Bytes of a `--head-spec` file."""


@dataclass(frozen=True)
class HeadSide:
    """One side of a head, as in `manifest.Side`; what is None is the backbone's, or for learned slots all rows."""

    slots: SlotKind
    num_vectors: int | None = None
    first_vector: FirstVector = "prompt_end"
    nested_budgets: tuple[int, ...] = ()
    pooling: Pooling = "none"
    prompt: str | None = None
    slot_positions: SlotPositions | None = None


@dataclass(frozen=True)
class Head:
    document: HeadSide
    query: HeadSide


def both(side: HeadSide) -> Head:
    return Head(side, side)


HEADS: Mapping[str, Head] = {
    # CausalEmbed, arXiv 2601.21262, and its released code: one token in all slots.
    "causal": Head(HeadSide("constant", 32), HeadSide("constant", 16)),
    # Latent auto-regression: each slot is fed the last hidden state of the position before it.
    "feedback": Head(HeadSide("feedback", 32), HeadSide("feedback", 16)),
    # MetaEmbed, arXiv 2509.18095: learned tokens, trained in nested groups, in one pass, so positions continue.
    "metaembed": Head(
        HeadSide("learned", None, "slot", (1, 4, 8, 16, 64), slot_positions="continue"),
        HeadSide("learned", None, "slot", (1, 2, 4, 8, 16), slot_positions="continue"),
    ),
    # Bottleneck Tokens, arXiv 2604.11095: learned tokens, pooled into one vector.
    "btoks": both(HeadSide("learned", None, "slot", pooling="mean", slot_positions="continue")),
    # ColPali, arXiv 2407.01449: a projection of every position.
    "colbert": both(HeadSide("all_tokens")),
    # GME (arXiv 2412.16855), Qwen3-VL-Embedding: the state of the last position as the one vector.
    "single": both(HeadSide("all_tokens", pooling="last")),
}
assert tuple(HEADS) == NAMES


def read_head(path: Path) -> Head:
    """The head of a `--head-spec` file. Raises CembedError that names what is wrong in it."""
    head: Head = decode(Head, read_json(path, MAX_SPEC), str(path))
    for name, side in (("document", head.document), ("query", head.query)):
        budgets, prompt = side.nested_budgets, side.prompt or ""
        if any(n < 1 for n in budgets) or list(budgets) != sorted(set(budgets)):
            raise CembedError(f"{path}.{name}.nested_budgets is {list(budgets)!r:.80}: give rising numbers from 1 on")
        if any("\ud800" <= character < "\ue000" for character in prompt):
            raise CembedError(f"{path}.{name}.prompt is not UTF-8")
    return head


def with_budgets(head: Head, document: int | None, query: int | None) -> Head:
    """The head with other numbers of vectors, where they are given."""
    for flag, budget, side in (("--num-vectors", document, head.document), ("--query-vectors", query, head.query)):
        if budget is not None and side.slots == "all_tokens":
            raise CembedError(f"{flag}: this head makes one vector for every token")
    return Head(
        replace(head.document, num_vectors=document or head.document.num_vectors),
        replace(head.query, num_vectors=query or head.query.num_vectors),
    )


def with_pooling(head: Head, pooling: Pooling | None) -> Head:
    """The head with another pooling on both sides."""
    if pooling is None:
        return head
    return Head(replace(head.document, pooling=pooling), replace(head.query, pooling=pooling))
