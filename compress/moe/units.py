"""What is to be chosen (units and their candidates), what a candidate takes on disk, and the budget that all of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from compress.errors import UsageError

Measure = Literal["average-bits", "bytes", "bits-per-weight"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to quantise a unit. cost: what choosing it is predicted to cost, in any unit, the same for all units; may be negative.
    group_size: weights that share a scale; None where it does not matter or a whole row shares one. nbytes: what it takes on disk with
    scales, zero points and padding (`candidate_bytes`); None where only average bits are counted."""

    bits: int
    cost: float
    group_size: int | None = None
    nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What gets one candidate: an expert, a projection of an expert, a layer. weights: how many weights it has."""

    name: str
    weights: int
    candidates: tuple[Candidate, ...]


def candidate_bytes(
    shape: Sequence[int],
    bits: int,
    group_size: int | None = 128,
    *,
    scale_bits: int = 16,
    zero_bits: int | None = None,
    word_bits: int = 32,
) -> int:
    """Bytes that a matrix takes when it is quantised in groups along its rows.

    shape [..., out, in]; leading dimensions are a stack of such matrices. Each row of codes is padded to whole words
    (`word_bits`; the dense layout of compressed-tensors' pack-quantized). Every row has ceil(in / group_size) groups, one if
    `group_size` is None, each with a scale of `scale_bits` and a zero point of `zero_bits`; the zero points of a column of groups
    are padded to whole words too. zero_bits: 0 for a symmetric grid; by default as wide as the codes, and none at 1 bit, whose
    two levels are symmetric. From 16 bits on there are neither groups nor padding. Raises UsageError for sizes that make no
    sense.
    """
    if len(shape) < 2 or min(shape) < 1 or bits < 1 or (group_size is not None and group_size < 1):
        raise UsageError(
            f"no bytes for shape {list(shape)}, {bits} bits, group size {group_size}: all must be positive, the shape 2-D or more"
        )
    matrices, rows, columns = math.prod(shape[:-2]), shape[-2], shape[-1]
    if bits >= 16:
        return matrices * rows * columns * bits // 8
    zero_bits = (bits if bits > 1 else 0) if zero_bits is None else zero_bits
    groups = 1 if group_size is None else math.ceil(columns / group_size)
    codes = rows * math.ceil(columns * bits / word_bits) * word_bits
    scales = rows * groups * scale_bits
    zeros = groups * math.ceil(rows * zero_bits / word_bits) * word_bits
    return matrices * math.ceil((codes + scales + zeros) / 8)


@dataclass(frozen=True)
class Budget:
    """The most that all chosen candidates may take together.

    average-bits: sum of bits * weights over sum of weights, codes alone, the figure of the papers. bytes: sum of `nbytes`.
    bits-per-weight: 8 * (sum of nbytes + other_bytes) / (sum of weights + other_weights), the whole model with everything that is not
    a unit (attention, embeddings, norms).
    """

    limit: float
    measure: Measure = "average-bits"
    other_weights: int = 0
    other_bytes: int = 0

    def size(self, unit: Unit, candidate: Candidate) -> int:
        """What a candidate takes from the capacity: bits times weights, or bytes. Raises UsageError where its bytes are not known."""
        if self.measure == "average-bits":
            return candidate.bits * unit.weights
        if candidate.nbytes is None:
            raise UsageError(
                f"a budget in {self.measure} needs the bytes of every candidate, and {unit.name} at {candidate.bits} bits has none"
            )
        return candidate.nbytes

    def capacity(self, weights: int) -> int:
        """The limit in the unit of `size`, for units with so many weights together; rounded down, the limit read as a decimal."""
        limit = Fraction(repr(self.limit))
        if self.measure == "average-bits":
            return math.floor(limit * weights)
        if self.measure == "bytes":
            return math.floor(limit)
        return math.floor(limit * (weights + self.other_weights) / 8) - self.other_bytes

    def limit_for(self, capacity: int, weights: int) -> float:
        """The limit that leaves exactly this capacity: the inverse of `capacity`."""
        if self.measure == "average-bits":
            return capacity / weights
        if self.measure == "bytes":
            return capacity
        return 8 * (capacity + self.other_bytes) / (weights + self.other_weights)

    def say(self, limit: float) -> str:
        """A limit of this budget's measure in words."""
        if self.measure == "bytes":
            return f"{math.ceil(limit):,} bytes"
        digits = math.ceil(limit * 10_000) / 10_000  # up, so that the figure is enough when it is given back
        return f"{digits:g} {'average bits' if self.measure == 'average-bits' else 'bits per weight'}"
