"""Soft N:M masks on a GPU: logits -> masked weight, and back, each in one pass over memory; operation and noise are those of reference.py.

A program takes some groups: it reads their logits and weights once, draws the noise of its element numbers, and keeps the candidates'
probabilities in registers. Nothing is saved between forward and backward but the logits and the draw.

Checked without a GPU: in Triton's interpreter against reference.py, and compiled ahead of time for compute capabilities 8.0, 9.0 and
10.0. No GPU has run it yet; tests/gpu is for the first one that does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_kernels.gumbel.reference import Draw, stream_key

TILE = 4096  # candidates times weights of the groups of one program: 32 numbers a thread
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supported(logits: Tensor, weight: Tensor, table: Tensor, out_dtype: torch.dtype | None = None) -> bool:
    """Whether the kernels take this case: CUDA, floating-point types of 16 and 32 bits, M a power of two.

    In Triton's interpreter (TRITON_INTERPRET=1 in the environment before triton is imported) tensors are on the CPU instead.
    """
    device = "cpu" if triton.knobs.runtime.interpret else "cuda"
    m = table.shape[1]
    return (
        {logits.device.type, weight.device.type, table.device.type} == {device}
        and logits.dtype in _DTYPES
        and weight.dtype in _DTYPES
        and (out_dtype is None or out_dtype in _DTYPES)
        and m & (m - 1) == 0
    )


@triton.jit
def _mix(x):
    """The 32-bit finaliser of the noise, on uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _stream_keys(stream_low, stream_high, high):
    """The two 32-bit keys of elements number `high * 2^32` and on: the second round of `stream_key`, whose first the host has done."""
    stream = (stream_high.to(tl.uint32).to(tl.uint64) << 32) | stream_low.to(tl.uint32).to(tl.uint64)
    x = (stream ^ high.to(tl.uint64)) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def _gumbel(element, first, stream_low, stream_high):
    """Elements of the Gumbel stream: int64 `element`, all of them at or after `first` and less than 2^32 later."""
    high = first >> 32
    key0, key1 = _stream_keys(stream_low, stream_high, high)
    next0, next1 = _stream_keys(stream_low, stream_high, high + 1)
    same = (element >> 32) == high
    x = _mix(element.to(tl.uint32) ^ tl.where(same, key0, next0))
    x = _mix(x + tl.where(same, key1, next1)) >> 9
    return -tl.log(-tl.log((x.to(tl.float32) + 0.5) * 1.1920928955078125e-07))  # 2^-23


@triton.jit
def _tile(logits, table, groups, first_group, stream_low, stream_high, kappa, tau, C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr,
          SCORES: tl.constexpr, NOISE: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """The groups of this program `[1, G]` (int64), the candidates `[CP, M]` of 0 and 1, and the probabilities y `[CP, G]`; fp32."""
    start = tl.program_id(0).to(tl.int64) * G
    group = (start + tl.arange(0, G))[None, :]
    inside = group < groups
    j = tl.arange(0, M)[:, None]
    c = tl.arange(0, CP)[:, None]
    real = c < C  # candidates are padded to CP, a power of two
    chosen = tl.load(table + c * M + tl.arange(0, M)[None, :], mask=real, other=0.0).to(tl.float32)
    if SCORES:
        scores = tl.load(logits + group * M + j, mask=inside, other=0.0).to(tl.float32)
        z = tl.sum(scores[None, :, :] * chosen[:, :, None], axis=1)
    else:
        z = tl.load(logits + group * C + c, mask=inside & real, other=0.0).to(tl.float32)
    z *= kappa
    if NOISE:
        first = (start + first_group) * C
        z += _gumbel(first + (tl.arange(0, G)[None, :] * C + c), first, stream_low, stream_high)
    z = tl.where(real, z / tau, float("-inf"))
    y = tl.exp(z - tl.max(z, axis=0)[None, :])
    return group, chosen, y / tl.sum(y, axis=0)[None, :]


@triton.jit
def _mask_of(y, chosen, CP: tl.constexpr, HARD: tl.constexpr):
    """y `[CP, G]` -> mask `[M, G]`: the expected candidate, or with HARD the most probable one, on a tie that of lower index."""
    if HARD:
        y = (tl.arange(0, CP)[:, None] == tl.argmax(y, axis=0)[None, :]).to(tl.float32)
    return tl.sum(y[:, None, :] * chosen[:, :, None], axis=0)


@triton.jit(do_not_specialize=["groups", "first_group", "stream_low", "stream_high", "kappa", "tau"])
def forward_kernel(logits, weight, table, out, norms, groups, first_group, stream_low, stream_high, kappa, tau, C: tl.constexpr,
                   CP: tl.constexpr, M: tl.constexpr, SCORES: tl.constexpr, NOISE: tl.constexpr, HARD: tl.constexpr, NORM: tl.constexpr,
                   G: tl.constexpr):  # fmt: skip
    group, chosen, y = _tile(logits, table, groups, first_group, stream_low, stream_high, kappa, tau, C, CP, M, SCORES, NOISE, G)
    place = group * M + tl.arange(0, M)[:, None]
    product = _mask_of(y, chosen, CP, HARD) * tl.load(weight + place, mask=group < groups, other=0.0).to(tl.float32)
    tl.store(out + place, product.to(out.dtype.element_ty), mask=group < groups)
    if NORM:
        tl.store(norms + tl.program_id(0), tl.sum(tl.sum(product * product, axis=0), axis=0))


@triton.jit(do_not_specialize=["groups", "first_group", "stream_low", "stream_high", "kappa", "tau"])
def backward_kernel(grad, grad_norm, logits, weight, table, out, groups, first_group, stream_low, stream_high, kappa, tau, C: tl.constexpr,
                    CP: tl.constexpr, M: tl.constexpr, SCORES: tl.constexpr, NOISE: tl.constexpr, HARD: tl.constexpr, GRAD: tl.constexpr,
                    NORM: tl.constexpr, G: tl.constexpr):  # fmt: skip
    group, chosen, y = _tile(logits, table, groups, first_group, stream_low, stream_high, kappa, tau, C, CP, M, SCORES, NOISE, G)
    inside = group < groups
    place = group * M + tl.arange(0, M)[:, None]
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.zeros([M, G], tl.float32)
    if GRAD:
        upstream += tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        upstream += 2 * tl.load(grad_norm).to(tl.float32) * (_mask_of(y, chosen, CP, HARD) * w)
    dy = tl.sum((upstream * w)[None, :, :] * chosen[:, :, None], axis=1)  # [CP, G]
    dz = y * (dy - tl.sum(y * dy, axis=0)[None, :]) * (kappa / tau)
    if SCORES:
        ds = tl.sum(dz[:, None, :] * chosen[:, :, None], axis=0)
        tl.store(out + place, ds.to(out.dtype.element_ty), mask=inside)
    else:
        c = tl.arange(0, CP)[:, None]
        tl.store(out + group * C + c, dz.to(out.dtype.element_ty), mask=inside & (c < C))


def tile_groups(candidates: int, m: int) -> int:
    """Groups of one program: a power of two, so that G * CP * M is TILE, or 1 group where that alone is more."""
    return max(1, TILE // (triton.next_power_of_2(candidates) * m))


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _arguments(weight: Tensor, table: Tensor, scores: bool, draw: Draw, first_group: int) -> tuple[tuple[int], dict[str, object]]:
    """The grid, and what both kernels take by name."""
    candidates, m = table.shape
    size = tile_groups(candidates, m)
    stream = 0 if draw.noise_key is None else stream_key(draw.noise_key)
    constants = {"C": candidates, "CP": triton.next_power_of_2(candidates), "M": m, "G": size}
    switches = {"SCORES": scores, "NOISE": draw.noise_key is not None, "HARD": draw.hard}
    numbers = {"groups": weight.shape[0], "first_group": first_group, "kappa": float(draw.kappa), "tau": float(draw.tau)}
    halves = {"stream_low": _signed(stream), "stream_high": _signed(stream >> 32)}
    return (triton.cdiv(weight.shape[0], size),), {**constants, **switches, **numbers, **halves}


def masked_weight(
    logits: Tensor,
    weight: Tensor,
    table: Tensor,
    scores: bool,
    draw: Draw,
    out_dtype: torch.dtype,
    want_norm: bool,
    first_group: int = 0,
) -> tuple[Tensor, Tensor]:
    """`reference.masked_weight`. logits `[G, C]` or `[G, M]`, weight `[G, M]` and table `[C, M]` as `supported` takes them.

    first_group: the number of the first group in the noise stream, for a weight that is part of a larger one.
    Returns w' `[G, M]` in `out_dtype` and the fp32 scalar `sum(w'^2)`, whose partial sums are added in an order that does not vary.
    """
    out = torch.empty(weight.shape, dtype=out_dtype, device=weight.device)
    if weight.shape[0] == 0:
        return out, torch.zeros((), device=weight.device)
    grid, arguments = _arguments(weight, table, scores, draw, first_group)
    norms = torch.empty(grid if want_norm else 0, device=weight.device)
    table = table.to(torch.float32).contiguous()
    forward_kernel[grid](logits.contiguous(), weight.contiguous(), table, out, norms, NORM=want_norm, **arguments)
    return out, norms.sum()


def masked_weight_backward(
    grad: Tensor | None,
    grad_norm: Tensor | None,
    logits: Tensor,
    weight: Tensor,
    table: Tensor,
    scores: bool,
    draw: Draw,
    first_group: int = 0,
) -> Tensor:
    """`reference.masked_weight_backward`: dL/dlogits, of the logits' shape and dtype; either gradient may be None."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if weight.shape[0] == 0:
        return out
    grid, arguments = _arguments(weight, table, scores, draw, first_group)
    present = {"GRAD": grad is not None, "NORM": grad_norm is not None}
    # A kernel argument must be some tensor, also where the kernel does not read it.
    grad = weight if grad is None else grad.contiguous()
    grad_norm = weight if grad_norm is None else grad_norm
    table = table.to(torch.float32).contiguous()
    backward_kernel[grid](grad, grad_norm, logits.contiguous(), weight.contiguous(), table, out, **present, **arguments)
    return out
