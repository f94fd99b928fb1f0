"""Latent slots one after the other, over a static cache: `prefill`, and the loop around it.

Letters: A position axes, S positions of the prompt, H hidden, D length of a state.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from cembed.runtime.bundle.manifest import Side, SideName
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.inputs import Prompt
from cembed.runtime.embed.kv_cache import StaticKVCache
from cembed.runtime.embed.positions import IntArray, slot_positions
from cembed.runtime.embed.state_files import write_state
from cembed.runtime.engines.session import Array, Session, StepSession
from cembed.runtime.errors import CembedError


@dataclass(frozen=True)
class Loop:
    """What the slots of pages or queries need: their step, what is fed into slot n ([H]), what rows [n, H] at positions
    [A, n] are as inputs, how states become vectors."""

    bundle: str
    name: SideName
    side: Side
    axes: int
    step: Session
    row: Callable[[int], Array]
    slot: Callable[[Array, IntArray], Prompt]
    finish: Callable[[Array], Vectors]


@dataclass(frozen=True)
class Output:
    """What n positions give: states [n, D], and last hidden states [n, H], which feedback slots are fed."""

    state: Array
    hidden: Array


def prefill(step: StepSession, cache: StaticKVCache, prompt: Prompt, count: int = 1) -> Output:
    """Runs a prompt, or slots; the output is that of the last `count` positions."""
    start = cache.require(len(prompt))
    last = np.arange(len(prompt) - count, len(prompt))[None]
    outputs = step.run(prompt.feeds() | {"cache_position": np.array([start]), "slot_indices": last})
    cache.length = start + len(prompt)
    state = outputs["slot_states"][0]
    return Output(state, outputs["hidden_states"][0] if "hidden_states" in outputs else state)


class LatentState:
    """A prompt that has been run and the slots after it so far: more vectors cost only their own steps.

    Made by `Embedder.start`, `start_query` and `resume`; `close` gives the memory back before the state is dropped.
    A state is for one thread at a time; different states may run in different threads.
    """

    def __init__(self, loop: Loop, cache: StaticKVCache) -> None:
        self.loop, self.side, self.cache = loop, loop.side, cache
        self.states: list[Array] = []  # each [1, D]
        self.prompt_end: IntArray = np.zeros((loop.axes, 1), np.int64)
        self.hidden: Array | None = None
        self._step: StepSession | None = loop.step.bind(cache.buffers)

    @property
    def nbytes(self) -> int:
        """Memory of the cache, in bytes."""
        return self.cache.nbytes

    def start(self, prompt: Prompt) -> LatentState:
        """Runs the prompt, and the slots that give no vector."""
        output = prefill(self._open(), self.cache, prompt)
        self.prompt_end[:] = prompt.positions.max()
        self.hidden = output.hidden
        if self.side.first_vector == "prompt_end":
            self.states.append(output.state)
        for slot in range(self.side.unread_slots):
            self._run_slot(slot)
        return self

    def extend(self, num_vectors: int) -> Vectors:
        """The vectors at a budget of `num_vectors`, pooled and normalised; the prompt is not run again.

        Raises CembedError: more than the bundle makes or the capacity holds, a closed state, NaN from the model.
        """
        self._open()
        self.side.check_budget(num_vectors)
        free = self.cache.capacity - self.cache.length
        if num_vectors > len(self.states) + free:
            raise CembedError(
                f"num_vectors is {num_vectors}: the cache has a capacity of {self.cache.capacity} positions, "
                f"enough for {len(self.states) + free} vectors"
            )
        while len(self.states) < num_vectors:
            self.states.append(self._run_slot(self.side.num_slots(len(self.states))))
        return self.loop.finish(np.concatenate(self.states[:num_vectors]))

    def _run_slot(self, slot: int) -> Array:
        """The state [1, D] of a slot, which becomes the last one of the cache."""
        if self.side.slots == "feedback":
            assert self.hidden is not None
            row = self.hidden[0]
        else:
            row = self.loop.row(slot)
        position = slot_positions(self.prompt_end, slot + 1, self.side.slot_positions)[:, -1:]
        output = prefill(self._open(), self.cache, self.loop.slot(row[None], position))
        self.hidden = output.hidden
        return output.state

    def _open(self) -> StepSession:
        if self._step is None:
            raise CembedError("this state was closed: start a new one")
        return self._step

    def close(self) -> None:
        """Drops the cache; vectors that were handed out stay."""
        self._step = None
        self.cache.buffers.clear()

    def __reduce__(self) -> NoReturn:
        raise CembedError("a LatentState cannot be pickled: save() it, and go on from the file with Embedder.resume()")

    def save(self, path: str | Path) -> None:
        """Writes a `.safetensors` file that `Embedder.resume` goes on from; only the filled part of caches."""
        self._open().pull()
        arrays = self.cache.filled() | {"prompt_end": self.prompt_end, "hidden": np.asarray(self.hidden)}
        arrays |= {"states": np.concatenate(self.states)} if self.states else {}
        write_state(Path(path), self.loop.bundle, self.loop.name, arrays)

    def restore(self, arrays: Mapping[str, Array], positions: int) -> LatentState:
        """Takes the tensors of a `StateFile` over, into a cache that is at least as large."""
        self.cache.fill(arrays, positions)
        self._open().push()
        self.prompt_end[:], self.hidden = arrays["prompt_end"], arrays["hidden"]
        self.states = list(arrays["states"][:, None]) if "states" in arrays else []
        return self


class StateMemory:
    """Bounds the memory of the states that are alive."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._states: weakref.WeakSet[LatentState] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, state: LatentState) -> LatentState:
        """Raises CembedError if `state` does not fit beside those alive."""
        with self._lock:
            others = list(self._states)
            held = sum(other.nbytes for other in others)
            if held + state.nbytes > self.limit:
                raise CembedError(
                    f"a state of {state.nbytes / 2**20:.1f} MiB does not fit: {len(others)} others hold "
                    f"{held / 2**20:.1f} of {self.limit / 2**20:.1f} MiB; close some, or raise state_memory"
                )
            self._states.add(state)
        return state
