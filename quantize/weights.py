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
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_COLUMNS = 4096  # outputs worked on at once: bounds the memory


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


def per_channel(weight: Floats, largest: int = 127) -> Quantised:
    """Eight bits, one scale for each output, symmetric.

    >>> per_channel(np.array([[1.0, -4.0], [0.5, 2.0]], np.float32)).levels.tolist()
    [[127, -127], [64, 64]]
    """
    scales = nonzero(np.abs(weight).max(axis=0) / largest)
    return Quantised(np.rint(weight / scales).astype(np.int8), scales)


def seven_bits(weight: Floats) -> Quantised:
    """`per_channel` with levels up to 63: two products with 8-bit activations fit into the 16 bits that CPUs without
    VNNI add them in, so that every CPU gives the same vectors."""
    return per_channel(weight, 63)


def four_bits(weight: Floats) -> Quantised:
    """Four bits in blocks of 32 inputs. The scale of a block is the one of a few with the least squared error.

    The component that is largest in size lies at level -8, the only one of that size.

    >>> four_bits(np.linspace(-1, 1, 32, dtype=np.float32)[:, None]).scales.shape
    (1, 1)
    """
    parts = [four_bit_columns(weight[:, start : start + _COLUMNS]) for start in range(0, weight.shape[1], _COLUMNS)]
    levels = np.concatenate([part[0] for part in parts], axis=1)
    return Quantised(levels, np.concatenate([part[1] for part in parts], axis=1), BLOCK)


def four_bit_columns(weight: Floats) -> tuple[Ints, Floats]:
    blocks = weight.reshape(-1, BLOCK, weight.shape[1])  # G 32 O
    place = np.abs(blocks).argmax(axis=1, keepdims=True)
    extreme = np.take_along_axis(blocks, place, axis=1)
    best: Floats | None = None
    scales = np.empty_like(extreme)
    for shrink in _SHRINKS:
        tried = np.where(extreme == 0, 1, extreme * np.float32(-shrink / 8)).astype(np.float32)
        error = np.square(blocks - np.rint(blocks / tried).clip(-8, 7) * tried).sum(axis=1, keepdims=True)
        better = np.ones_like(error, bool) if best is None else error < best
        scales = np.where(better, tried, scales)
        best = error if best is None else np.minimum(error, best)
    levels = np.rint(blocks / scales).clip(-8, 7).astype(np.int8)
    return levels.reshape(weight.shape), scales[:, 0]


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


@dataclass(frozen=True)
class Range:
    """Eight-bit levels: value = (level - zero_point) * scale."""

    scale: float
    zero_point: int

    @classmethod
    def of(cls, low: float, high: float) -> Range:
        """Zero is one of the levels.

        >>> Range.of(-1.0, 4.1)
        Range(scale=0.02, zero_point=50)
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max(high - low, 1e-12) / 255
        return cls(scale, round(-low / scale))

    def error(self, values: Floats) -> float:
        """Mean squared error of values that are stored so."""
        levels = np.clip(np.rint(values / self.scale) + self.zero_point, 0, 255)
        return float(np.square((levels - self.zero_point) * self.scale - values).mean())


@dataclass(frozen=True)
class Scheme:
    """`activations`: what the weight is multiplied with is quantised too, to eight bits."""

    quantise: Callable[[Floats], Quantised]
    bits: int
    block: int = 0
    activations: bool = False


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(per_channel, 8),
    "int4": Scheme(four_bits, 4, BLOCK),
    "w8a8": Scheme(seven_bits, 8, activations=True),
}
