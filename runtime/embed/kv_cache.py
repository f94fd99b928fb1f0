"""What layers keep of a prompt and its slots: keys and values, or states, in buffers whose size never changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cembed.runtime.bundle.graph_tensors import grows
from cembed.runtime.bundle.manifest import Tensor
from cembed.runtime.embed.positions import IntArray
from cembed.runtime.engines.session import Array
from cembed.runtime.errors import CembedError


class StaticKVCache:
    """One buffer [1, kv_heads, capacity, head_dim] for the keys and one for the values of each layer, or its states.

    An engine reads and writes caches in place, and has states twice: one to read, one to write. `length` positions are
    filled.
    """

    def __init__(self, inputs: Sequence[Tensor], capacity: int) -> None:
        """`inputs` are the graph's past_key_values tensors; their axis `capacity` gets `capacity` positions.

        Graphs for TensorRT have a number there: raises CembedError if that is less.
        """
        fixed = next(tensor.shape[2] for tensor in inputs if grows(tensor.name))
        if isinstance(fixed, int) and fixed < capacity:
            raise CembedError(f"{capacity} positions are needed, the bundle's cache has {fixed}: ask for fewer vectors")
        self.capacity, self.length = fixed if isinstance(fixed, int) else capacity, 0
        sizes = {"batch_size": 1, "capacity": capacity}
        self.buffers: dict[str, Array] = {
            tensor.name: np.zeros(
                [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape], tensor.dtype
            )
            for tensor in inputs
        }

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes * (1 if grows(name) else 2) for name, buffer in self.buffers.items())

    def filled(self) -> dict[str, Array]:
        """The filled part of each cache, and whole states."""
        return {name: np.ascontiguousarray(self._part(name, self.length)) for name in self.buffers}

    def fill(self, arrays: Mapping[str, Array], length: int) -> None:
        """Takes over what `filled` gave of a cache with `length` positions, which fit."""
        for name in self.buffers:
            self._part(name, length)[...] = arrays[name]
        self.length = length

    def _part(self, name: str, length: int) -> Array:
        return self.buffers[name][:, :, :length] if grows(name) else self.buffers[name]

    @contextlib.contextmanager
    def without(self, rows: IntArray) -> Iterator[None]:
        """In the block it is as if the filled positions `rows` had never been there; after it all is as it was before.

        Keys are turned to their positions before they are kept, so attention does not depend on the order of rows: the
        last n take the places of the n that go. Only for caches without states of fixed size.
        """
        end, left = self.length, self.length - len(rows)
        holes, moved = rows[rows < left], np.setdiff1d(np.arange(left, end), rows)
        saved = {name: (buffer[:, :, holes], buffer[:, :, left:end].copy()) for name, buffer in self.buffers.items()}
        for name, buffer in self.buffers.items():
            assert grows(name), f"{name = } has no rows"
            buffer[:, :, holes] = buffer[:, :, moved]
        self.length = left
        try:
            yield
        finally:
            for name, buffer in self.buffers.items():
                buffer[:, :, holes], buffer[:, :, left:end] = saved[name]
            self.length = end

    def require(self, positions: int) -> int:
        """Where the next `positions` positions start. Raises CembedError if they do not fit."""
        if self.length + positions > self.capacity:
            raise CembedError(
                f"the cache has a capacity of {self.capacity} positions and holds {self.length}: "
                f"{positions} more do not fit"
            )
        return self.length
