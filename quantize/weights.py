"""Weights as integers and scales. A weight is [inputs, outputs], as a MatMul takes it; I inputs, O outputs, G blocks.

A new storage type is a row of `SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int8]
BLOCK = 32
FLOAT = "float"
DAMPING = 0.01  # of the mean diagonal: GPTQ's own
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class Quantised:
    """`levels` int8 [I, O] times `scales`: [O], or [I / block, O] where there is a block."""

    levels: Ints
    scales: Floats
    block: int = 0

    def restore(self) -> Floats:
        scales = np.repeat(self.scales, self.block, axis=0) if self.block else self.scales
        restored: Floats = self.levels * scales
        return restored


@dataclass(frozen=True)
class Scheme:
    """Levels from `low` to `high`, with a scale [O] for each output, or for `block` inputs of each.

    `activations`: what the weight is multiplied with is quantised too, to eight bits in a range found beforehand;
    `rows`: to eight bits in the range of each row, where a whole page is computed by ONNX Runtime. `finer` is the
    scheme that layers get which this one damages.
    """

    bits: int
    low: int
    high: int
    scales: Callable[[Floats], Floats]
    finer: str
    block: int = 0
    activations: bool = False
    rows: bool = False

    def quantise(self, weight: Floats, inputs: Floats | None = None) -> Quantised:
        """The nearest levels; with `inputs` [N, I] of the weight, those that change its outputs for them the least.

        >>> SCHEMES["int8"].quantise(np.array([[1.0, -4.0], [0.5, 2.0]], np.float32)).levels.tolist()
        [[127, -127], [64, 64]]
        """
        feedback = None if inputs is None else Feedback.of(inputs)
        rest = weight if feedback is None else weight.copy()
        levels = np.empty(weight.shape, np.int8)
        found = [] if self.block else [self.scales(weight)]
        for start in range(0, len(weight), BLOCK):
            rows = slice(start, start + BLOCK)
            if self.block:
                found.append(self.scales(rest[rows]))
            if feedback is None:
                levels[rows] = self.nearest(rest[rows], found[-1])
            else:
                levels[rows] = feedback.round(rest, start, lambda row: self.nearest(row, found[-1]), found[-1])
        return Quantised(levels, np.stack(found) if self.block else found[0], self.block)

    def nearest(self, weight: Floats, scales: Floats) -> Ints:
        return np.rint(weight / scales).clip(self.low, self.high).astype(np.int8)


@dataclass(frozen=True)
class Feedback:
    """GPTQ (arXiv 2210.17323, section 3): the error of a row moves to the rows not rounded yet, in the measure in which
    their inputs stand in for its own. `factor` [I, I] is the upper Cholesky factor of the inputs' inverse Gram matrix.
    """

    factor: Floats

    @classmethod
    def of(cls, inputs: Floats) -> Feedback:
        gram = (inputs.T @ inputs).astype(np.float64)
        gram[np.diag_indices_from(gram)] += max(DAMPING * float(np.trace(gram)) / len(gram), 1e-12)
        return cls(np.linalg.cholesky(np.linalg.inv(gram)).T.astype(np.float32))

    def round(self, rest: Floats, start: int, nearest: Callable[[Floats], Ints], scales: Floats) -> Ints:
        """The levels of BLOCK rows of `rest` from `start`; all rows from there on take their errors."""
        block = rest[start : start + BLOCK]
        stop = start + len(block)
        levels, errors = np.empty(block.shape, np.int8), np.empty_like(block)
        for index, row in enumerate(block):
            factors = self.factor[start + index, start + index : stop]
            levels[index] = nearest(row)
            errors[index] = (row - levels[index] * scales) / factors[0]
            block[index + 1 :] -= factors[1:, None] * errors[index]
        rest[stop:] -= self.factor[start:stop, stop:].T @ errors
        return levels


def widest(largest: int) -> Callable[[Floats], Floats]:
    """Scales [O] that reach the largest component of each output."""
    return lambda weight: nonzero(np.abs(weight).max(axis=0) / largest)


def least_error(block: Floats) -> Floats:
    """Of a few scales [O] for four bits, those with the least squared error; the component that is largest in size lies
    at level -8, the only one of that size, or beyond."""
    extreme = np.take_along_axis(block, np.abs(block).argmax(axis=0)[None], axis=0)[0]
    tried = [np.where(extreme == 0, 1, extreme * np.float32(-shrink / 8)).astype(np.float32) for shrink in _SHRINKS]
    errors = [np.square(block - np.rint(block / scales).clip(-8, 7) * scales).sum(axis=0) for scales in tried]
    return np.take_along_axis(np.stack(tried), np.argmin(errors, axis=0)[None], axis=0)[0]


def nonzero(scales: Floats) -> Floats:
    """Ones where a channel is all zero, which any scale stores exactly."""
    return np.where(scales == 0, 1, scales).astype(np.float32)


def pack_nibbles(levels: Ints) -> NDArray[np.uint8]:
    """Two levels a byte, the first in the low half, as ONNX stores INT4.

    >>> pack_nibbles(np.array([1, -1, 7, -8], np.int8)).tolist()
    [241, 135]
    """
    flat = np.zeros(levels.size + levels.size % 2, np.uint8)
    flat[: levels.size] = levels.reshape(-1).astype(np.uint8) & 15
    return np.bitwise_or(flat[0::2], np.left_shift(flat[1::2], 4), dtype=np.uint8)


def pack_blocks(levels: Ints) -> NDArray[np.uint8]:
    """[O, I / BLOCK, BLOCK / 2]: the levels of a weight [I, O] output by output, eight added, as ONNX Runtime's
    MatMulNBits takes them.

    >>> packed = pack_blocks(np.array([[1], [-8]] * 16, np.int8))
    >>> packed.shape, packed[0, 0, :2]
    ((1, 1, 16), array([9, 9], dtype=uint8))
    """
    above = (levels.T + np.int8(8)).reshape(levels.shape[1], -1, BLOCK)
    return pack_nibbles(above).reshape(*above.shape[:2], BLOCK // 2)


@dataclass(frozen=True)
class ByteRange:
    """Eight-bit levels from `low` up: value = (level - zero_point) * scale."""

    scale: float
    zero_point: int
    low: int = 0

    @classmethod
    def of(cls, low: float, high: float, symmetric: bool = False) -> ByteRange:
        """Zero is one of the levels; `symmetric` makes them signed with zero in the middle, all that TensorRT takes.

        >>> ByteRange.of(-1.0, 191 / 64), ByteRange.of(-1.0, 127 / 64, symmetric=True)
        (ByteRange(scale=0.015625, zero_point=64, low=0), ByteRange(scale=0.015625, zero_point=0, low=-128))
        """
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric:
            return cls(max(-low, high, 1e-12) / 127, 0, -128)
        scale = max(high - low, 1e-12) / 255
        return cls(scale, round(-low / scale))

    def error(self, values: Floats) -> float:
        """Mean squared error of values that are stored so."""
        levels = np.clip(np.rint(values / self.scale) + self.zero_point, self.low, self.low + 255)
        return float(np.square((levels - self.zero_point) * self.scale - values).mean())


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(8, -127, 127, widest(127), FLOAT, rows=True),
    "int4": Scheme(4, -8, 7, least_error, "int8", block=BLOCK),
    # Levels up to 63: two products with 8-bit activations fit into the 16 bits that CPUs without VNNI add them in, so
    # that every CPU gives the same vectors.
    "w8a8": Scheme(8, -63, 63, widest(63), "int8", activations=True),
}
