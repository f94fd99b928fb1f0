"""What the sample model is trained on. Letters: B pages, A questions, Q query vectors, K document vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import BLANK, NONE, OTHER
from torch import Tensor

BLANK_WEIGHT = 0.15
NESTED = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))
"""Query and document budgets that are trained together (MetaEmbed, arXiv 2509.18095)."""


def reading(logits: Tensor, cells: Tensor) -> Tensor:
    """The character in each cell of each visual token, known because the page was drawn: logits [B, V, C * N]."""
    classes = OTHER + 1
    weight = torch.ones(classes)
    weight[BLANK] = BLANK_WEIGHT
    return F.cross_entropy(logits.float().view(-1, classes), cells.flatten(), weight=weight, ignore_index=NONE)


def spelling(hidden: Tensor, table: Tensor, pieces: Tensor, scale: Tensor) -> Tensor:
    """The tokens of the words that end in a visual token, from its hidden state [B, V, H]; pieces [B, V, n]."""
    ends = (pieces != NONE).any(-1)
    hidden, pieces = hidden[ends], pieces[ends]
    logits = scale.exp() * (F.normalize(hidden, dim=-1) @ F.normalize(table, dim=-1).T).float()
    found = pieces != NONE
    picked = logits.log_softmax(-1).gather(1, pieces.clamp(min=0))
    return -(picked * found).sum() / found.sum()


def naming(vectors: Tensor, table: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
    """Some vector of [B, K, H] names each of the tokens [B, n]: cross-entropy over the largest cosine of each token.

    The wrong answers are the tokens of the other rows.
    """
    found = tokens != NONE
    candidates, places = torch.unique(tokens.clamp(min=0), return_inverse=True)
    cosines = vectors.to(table.dtype) @ F.normalize(table[candidates], dim=-1).T  # B K candidates
    logits = scale.exp() * cosines.amax(1).float()
    picked = logits.log_softmax(-1).gather(1, places)
    return -(picked * found).sum() / found.sum()


def interactions(queries: Tensor, documents: Tensor) -> Tensor:
    """Cosines [A queries, B pages, Q, K]."""
    return torch.einsum("aqd,bkd->abqk", queries, documents)


def pages_of(scores: Tensor) -> Tensor:
    """The page [A] that each question is about: as many questions a page, page by page, of scores [A, B]."""
    return torch.arange(scores.shape[1]).repeat_interleave(len(scores) // scores.shape[1])


def contrast(scores: Tensor, scale: Tensor) -> Tensor:
    """Each question finds its page, and each page its questions: scores [A, B]."""
    logits, right = scale.exp() * scores, pages_of(scores)
    found = logits.log_softmax(0)[torch.arange(len(scores)), right]
    return (F.cross_entropy(logits, right) - found.mean()) / 2


def late_interaction(cosines: Tensor, lengths: Tensor) -> Tensor:
    """MaxSim, as a mean over the query's `lengths` [A] vectors: [A queries, B pages]."""
    return cosines.amax(-1).sum(-1) / lengths[:, None]


def margins(cosines: Tensor) -> Tensor:
    """CausalEmbed's iterative margin (arXiv 2601.21262): what each further vector adds to the score of the right page,
    against what it adds to the score of the hardest wrong one."""
    gained = cosines.cummax(-1).values.mean(2)  # B B K
    gained = torch.diff(gained, dim=-1, prepend=torch.zeros_like(gained[..., :1]))
    scores = late_interaction(cosines, torch.ones(len(cosines)))
    rows, right = torch.arange(len(scores)), pages_of(scores)
    wrong = scores.index_put((rows, right), torch.tensor(-torch.inf)).argmax(1)
    return gained[rows, wrong].mean() - gained[rows, right].mean()


def diversity(queries: Tensor) -> Tensor:
    """Squared cosine between two vectors of a query, on average over the pairs [B, Q, D]."""
    cosines = queries @ queries.transpose(1, 2)
    count = queries.shape[1]
    return (cosines.square().sum((1, 2)) - count).mean() / (count * (count - 1))
