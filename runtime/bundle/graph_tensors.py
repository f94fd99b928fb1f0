"""Which tensors of a graph are what: state that goes from step to step, and what every position is fed.

Code asks here, and knows no names: a backbone that keeps something else adds a row to `STATES`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cembed.runtime.bundle.manifest import Graph, Tensor

EMBEDS = "inputs_embeds"
ROW_AXES = ("batch_size", "sequence_length")


@dataclass(frozen=True)
class State:
    """Inputs that begin with `past` and outputs that begin with `present` are one state; `grows`: a row a position, on
    its third axis."""

    past: str
    present: str
    grows: bool


STATES = (
    State("past_key_values.", "present.", grows=True),
    State("past_states.", "present_states.", grows=False),
)


def state_of(name: str) -> State | None:
    """What kind of state an input or output is, if it is one."""
    return next((state for state in STATES if name.startswith((state.past, state.present))), None)


def grows(name: str) -> bool:
    """Whether a state has a row a position; one of fixed size is replaced by each.

    >>> grows("past_key_values.3.key"), grows("past_states.0.recurrent"), grows("present_states.0.conv")
    (True, False, False)
    """
    state = state_of(name)
    assert state is not None, f"{name = } is no state"
    return state.grows


def is_past(name: str) -> bool:
    return name.startswith(tuple(state.past for state in STATES))


def is_present(name: str) -> bool:
    """
    >>> is_present("present.0.key"), is_present("slot_states")
    (True, False)
    """
    return name.startswith(tuple(state.present for state in STATES))


def present_of(past: str) -> str:
    """
    >>> present_of("past_key_values.0.key")
    'present.0.key'
    """
    state = next(state for state in STATES if past.startswith(state.past))
    return state.present + past.removeprefix(state.past)


def past_of(present: str) -> str:
    """
    >>> past_of("present.0.key")
    'past_key_values.0.key'
    """
    state = next(state for state in STATES if present.startswith(state.present))
    return state.past + present.removeprefix(state.present)


def state_tensors(graph: Graph) -> tuple[Tensor, ...]:
    """The inputs that hold what earlier positions left."""
    return tuple(tensor for tensor in graph.inputs if is_past(tensor.name))


def row_tensors(graph: Graph) -> tuple[Tensor, ...]:
    """The inputs of which every position has a row, the embeddings first; the vision graph gives what of them belongs
    to visual tokens, side by side."""
    rows = [tensor for tensor in graph.inputs if tensor.shape[:2] == ROW_AXES and tensor.dtype == "float32"]
    return tuple(sorted(rows, key=lambda tensor: tensor.name != EMBEDS))


def row_width(tensor: Tensor) -> int:
    """Numbers of one row: a graph's rows have two axes and a width."""
    width = tensor.shape[2]
    assert isinstance(width, int)
    return width
