"""Quantisation grids: what the codes of a matrix mean, and how scale and zero of every group are chosen.

A matrix `[N, K]` is cut along K, the dimension a product sums over, into groups of `group_size` (the last one may be shorter).
Every group of every row has its own scale s and zero z, and a code c in 0 .. 2^bits - 1 stands for

    value = (c - z) * s        computed in float32 from s and z as they are stored.

The four kinds of grid differ in z alone:

    symmetric    z = 2^(bits-1), not stored. s may be negative, which turns the lopsided range [-2^(bits-1), 2^(bits-1) - 1] round.
    asymmetric   z an integer in 0 .. 2^bits - 1, stored as uint8.
    float        z any number, stored beside s in the same dtype.
    midrise      z = (2^bits - 1) / 2, not stored: levels at odd multiples of s/2 and none at zero. With one bit these are the
                 sign of the weight and one magnitude a group, as in XNOR-Net (Rastegari et al., arXiv 1603.05279, section 3.1).

Zero itself is a level of the first two only; those can hold pruned weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import CompressError, UsageError

Kind = Literal["symmetric", "asymmetric", "float", "midrise"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Shares of the full range that the clip search tries. Two bits want about 0.6 of a Gaussian group's range, eight bits all of it.
_SHARES = tuple(0.3 + 0.7 * i / 28 for i in range(29))
_END_SHARES = tuple(i / 12 for i in range(13))
_FIT_ROUNDS = 4  # alternations of codes and scale after the search; more change the error by less than 0.1 %


@dataclass(frozen=True)
class Grid:
    """The grid of one matrix. Raises UsageError for impossible values.

    bits: 1 to 8. group_size: weights along K that share scale and zero, at least 1. kind: see the module. dtype: of the stored
    scale (and of a float zero), float16 or bfloat16.
    """

    bits: int
    group_size: int = 128
    kind: Kind = "float"
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"a grid has 1 to 8 bits, not {self.bits}")
        if self.group_size < 1:
            raise UsageError(f"the group size is {self.group_size}; it must be at least 1")
        if self.kind not in KINDS:
            raise UsageError(f"{self.kind!r} is no kind of grid; one of {', '.join(KINDS)}")
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise UsageError(f"scales are stored in float16 or bfloat16, not {self.dtype}")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a level of every group, whatever its scale."""
        return self.kind in ("symmetric", "asymmetric")

    @property
    def fixed_zero(self) -> float | None:
        """The zero that all groups share, or None where each stores its own."""
        return {"symmetric": float(1 << (self.bits - 1)), "midrise": self.top / 2}.get(self.kind)

    @property
    def zero_bits(self) -> int:
        """Bits that the zero of one group takes on disk: none when it is fixed, `bits` for an integer, 16 for a float."""
        return {"asymmetric": self.bits, "float": 16}.get(self.kind, 0)

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` weights."""
        return math.ceil(columns / self.group_size)

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes of the levels nearest to `values`: float32 integers. All three broadcast; halves go to the even code."""
        inverse = torch.where(scale == 0, 0.0, 1 / scale)  # a group of scale 0 holds zeros, whatever its codes
        return (values * inverse + zero).round_().clamp_(0, self.top)

    def stored(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero, float32, rounded to what the checkpoint will hold."""
        scale = scale.to(self.dtype).float()
        if self.kind == "float":
            zero = zero.to(self.dtype).float()
        elif self.kind == "asymmetric":
            zero = zero.round().clamp(0, self.top)
        return scale, zero


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised matrix.

    codes: uint8 `[N, K]`. scale: `grid.dtype` `[N, G]`, G groups a row. zero: `[N, G]`, uint8 for an asymmetric grid and
    `grid.dtype` for a float one, None for the others.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(code - zero) * scale`, computed in float32 and rounded once to `dtype`: `[N, K]`."""
        columns = self.codes.shape[1]
        scale, zero = (spread(part, self.grid.group_size, columns) for part in self.parameters())
        return ((self.codes.float() - zero) * scale).to(dtype)

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every group, both float32 `[N, G]`, with a fixed zero filled in."""
        scale = self.scale.float()
        fixed = self.grid.fixed_zero
        if fixed is not None:
            return scale, torch.full_like(scale, fixed)
        assert self.zero is not None
        return scale, self.zero.float()

    @property
    def bits_per_weight(self) -> float:
        """Bits that codes, scales and zeros take in a checkpoint, over N*K: rows of codes are padded to whole bytes."""
        rows, columns = self.codes.shape
        row = 8 * math.ceil(columns * self.grid.bits / 8) + self.grid.groups(columns) * (16 + self.grid.zero_bits)
        return row / columns if rows else 0.0


def spread(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """`[N, G]` -> `[N, columns]`: every column gets the entry of its group."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


def make(grid: Grid, codes: Tensor, scale: Tensor, zero: Tensor) -> Quantized:
    """Put float32 codes `[N, K]`, scale and zero `[N, G]` (both already rounded by `Grid.stored`) into their storage types.

    Raises CompressError for a scale or zero that its dtype cannot hold.
    """
    kept = {"asymmetric": torch.uint8, "float": grid.dtype}.get(grid.kind)
    result = Quantized(codes.to(torch.uint8), scale.to(grid.dtype), None if kept is None else zero.to(kept), grid)
    if not all(bool(part.isfinite().all()) for part in result.parameters()):
        raise CompressError(f"a scale does not fit {grid.dtype}: the weights are too large for it; store scales as bfloat16")
    return result


def check_matrix(weight: Tensor, what: str = "the weight") -> None:
    """Raise CompressError unless `weight` is a matrix `[N, K]` of finite numbers with at least one row and column."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise CompressError(f"{what} has the shape {list(weight.shape)}; quantisation takes a matrix [out, in] that is not empty")
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise CompressError(f"{what} holds {bad} values that are NaN or infinite; a model with such weights cannot be quantised")


def quantize(weight: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Quantized:
    """Round every weight `[N, K]` to the nearest level of its group. scale, zero: `[N, G]` float32, as `fit` gives them."""
    columns = weight.shape[1]
    wide = (spread(part, grid.group_size, columns) for part in (scale, zero))
    return make(grid, grid.nearest(weight.float(), *wide), scale, zero)


@torch.no_grad()
def fit(weight: Tensor, grid: Grid, importance: Tensor | None = None, *, search: bool = True) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group: `[N, G]` float32 each, rounded as they will be stored.

    Minimises `sum_j importance_j * (w_j - q_j)^2` in every group: a search over 29 widths of the range, 0.3 to 1 of it, then
    alternately the nearest codes and the least-squares scale and zero for these codes, each step kept only where it helps.
    importance: `[K]` or `[N, K]`, at least 0; None is 1 everywhere. The diagonal of a layer's Hessian makes the sum its
    output error but for the products of different columns. search=False: plain min-max, the full range (for one bit, midrise,
    the mean magnitude). Raises CompressError for a weight that is not finite.
    """
    check_matrix(weight)
    w = _grouped(weight.float(), grid.group_size, "edge")  # [N, G, g]
    if importance is None:
        importance = torch.ones(1, weight.shape[1], device=weight.device)
    h = _grouped(importance.float().expand(weight.shape[0], -1), grid.group_size, "zero")
    best = _Best(grid, w, h)
    for scale, zero in ranges(grid, w, _SHARES if search else (1.0,)):
        best.offer(scale, zero)
    best.check()
    if search and grid.fixed_zero is None:
        _move_ends(grid, w, best)
    if search or (grid.bits == 1 and grid.kind == "midrise"):
        for _ in range(_FIT_ROUNDS if search else 1):
            best.offer(*_least_squares(grid, w, h, *best.parameters()))
    scale, zero = best.parameters()
    return scale.squeeze(-1), zero.squeeze(-1)


class _Best:
    """The parameters of least error so far, group by group."""

    def __init__(self, grid: Grid, w: Tensor, h: Tensor) -> None:
        self._grid, self._w, self._h = grid, w, h
        shape = (*w.shape[:2], 1)
        self._error = torch.full(shape, torch.inf, device=w.device)
        self._scale, self._zero = torch.zeros(shape, device=w.device), torch.zeros(shape, device=w.device)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take `[N, G, 1]` parameters where, rounded as stored, they give a smaller error."""
        scale, zero = self._grid.stored(scale, zero)
        gap = (self._grid.nearest(self._w, scale, zero) - zero) * scale - self._w
        error = (self._h * gap.square_()).sum(-1, keepdim=True)
        better = error < self._error  # false for NaN
        self._error = torch.where(better, error, self._error)
        self._scale, self._zero = torch.where(better, scale, self._scale), torch.where(better, zero, self._zero)

    def parameters(self) -> tuple[Tensor, Tensor]:
        return self._scale, self._zero

    def check(self) -> None:
        """Raise CompressError where no candidate so far was a finite number."""
        if not bool(self._error.isfinite().all()):
            raise CompressError(f"the weights are too large for scales in {self._grid.dtype}; store scales as bfloat16")


def _grouped(x: Tensor, size: int, pad: Literal["edge", "zero"]) -> Tensor:
    """`[N, K]` -> `[N, G, size]`; a short last group is filled with its last entry, or with zeros."""
    missing = -x.shape[1] % size
    if missing and pad == "edge":
        x = torch.cat([x, x[:, -1:].expand(-1, missing)], dim=1)
    elif missing:
        x = functional.pad(x, (0, missing))
    return x.reshape(len(x), -1, size)


def ranges(grid: Grid, w: Tensor, shares: tuple[float, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Scale and zero, `[N, G, 1]` each, for every share of the range of `w` `[N, G, g]`. The range always includes 0."""
    low, high = w.amin(-1, keepdim=True).clamp_max(0), w.amax(-1, keepdim=True).clamp_min(0)
    reach = torch.maximum(-low, high)
    fixed = grid.fixed_zero
    for share in shares:
        if fixed is None:
            scale = (high - low) * (share / grid.top)
            yield scale, torch.where(scale == 0, 0.0, -low * share / scale)
            continue
        zero = torch.full_like(reach, fixed)
        if grid.kind == "midrise":
            yield reach * (2 * share / grid.top), zero
        else:  # at the full share nothing is clipped on the shorter side
            scale = reach * (share / max(1, fixed - 1))
            yield scale, zero
            yield -scale, zero


def _move_ends(grid: Grid, w: Tensor, best: _Best) -> None:
    """Clip search for both ends of the range apart, from the best common share on: first the lower end, then the upper, twice."""
    low, high = w.amin(-1, keepdim=True).clamp_max(0), w.amax(-1, keepdim=True).clamp_min(0)
    for lower in (True, False) * 2:
        scale, zero = best.parameters()
        bottom, top = -zero * scale, (grid.top - zero) * scale
        for share in _END_SHARES:
            new_bottom, new_top = (low * share, top) if lower else (bottom, high * share)
            new = (new_top - new_bottom) / grid.top
            best.offer(new, ratio(-new_bottom, new, torch.zeros_like(new)))


def _least_squares(grid: Grid, w: Tensor, h: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The scale (and the zero, where it is a free number) of least error for the nearest codes of `scale` and `zero`."""
    codes = grid.nearest(w, scale, zero)
    if grid.kind != "float":
        level = codes - zero
        return ratio((h * level * w).sum(-1, keepdim=True), (h * level.square()).sum(-1, keepdim=True), scale), zero
    total = h.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    mean_c, mean_w = (h * codes).sum(-1, keepdim=True) / total, (h * w).sum(-1, keepdim=True) / total
    centred = codes - mean_c
    new = ratio((h * centred * w).sum(-1, keepdim=True), (h * centred.square()).sum(-1, keepdim=True), scale)
    return new, torch.where(new == 0, zero, mean_c - mean_w / new)


def ratio(above: Tensor, below: Tensor, otherwise: Tensor) -> Tensor:
    """`above / below`, and `otherwise` where `below` is 0."""
    return torch.where(below == 0, otherwise, above / torch.where(below == 0, 1.0, below))
