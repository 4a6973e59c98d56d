"""The 2:4 product for one to four tokens on a GPU, and unpacking: Triton kernels that read packed values and plain codes as they are stored.

`gemv`: at this size a product takes as long as its weights take to arrive. A program owns a few rows and walks along K. One thread takes words
of four values and the byte of their two codes, which cover eight columns; it holds the eight activations of these columns in registers
for all its rows, and a code selects which of four each value meets. Nothing is exchanged between threads before the sums are done.
Where there are too few rows for all multiprocessors K is split too, and the parts are added in a fixed order.

Checked without a GPU: in Triton's interpreter against reference.py, and compiled ahead of time for compute capabilities 8.0, 9.0 and
10.0. No GPU has run it yet; tests/gpu is for the first one that does.
"""

# ruff: noqa: RUF005  Triton concatenates tuples but has no starred items.
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BATCH = 4
PROGRAMS = 2048  # K is split until there are as many
MAX_SPLIT = 16
_REDUCE = 256  # rows of a program of `reduce_kernel`
_UNPACK = 512  # words of a program of `unpack_kernel`
_WORDS = {torch.bfloat16: torch.int64, torch.float16: torch.int64, torch.int8: torch.int32}  # the integer that holds four values


@dataclass(frozen=True)
class Config:
    """How work is cut: rows of a program, its warps. A thread takes two words of each row at a time."""

    rows: int
    warps: int


CONFIGS = (Config(4, 1), Config(2, 2), Config(4, 4))  # the first where nothing was measured


@triton.jit
def _epilogue(total, scale, bias, row, inside, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums of some rows, fp32 with the rows along the last dimension, times their scale plus their bias."""
    if HAS_SCALE:
        total *= tl.load(scale + row, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _four(word, KIND: tl.constexpr):
    """The four numbers of a word, as fp32: int64 words of bf16 or fp16, int32 words of int8."""
    numbers = ()
    for j in tl.static_range(4):
        if KIND == "int8":
            numbers = numbers + (((word << (24 - 8 * j)) >> 24).to(tl.float32),)
        elif KIND == "bf16":
            numbers = numbers + (((word >> (16 * j)).to(tl.int32) << 16).to(tl.float32, bitcast=True),)
        else:
            numbers = numbers + ((word >> (16 * j)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
    return numbers


@triton.jit
def _select(four, index):
    """four[index] where index is 0..3, thread by thread."""
    odd = (index & 1) != 0
    return tl.where((index & 2) != 0, tl.where(odd, four[3], four[2]), tl.where(odd, four[1], four[0]))


@triton.jit
def gemv_kernel(x, values, meta, scale, bias, out, n, k, split, B: tl.constexpr, X: tl.constexpr, W: tl.constexpr,
                HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """out `[B, n]`, or with PARTIAL the sums of each part of K, fp32 `[split, B, n]`. Grid: row blocks, parts of K.

    x int64 `[B, k/4]` and values `[n, k/8]` are words of four numbers, of the kinds X and W; meta uint8 `[n, k/8]`.
    """
    words = k // 8
    first = tl.program_id(0) * ROWS
    totals = ()
    for _ in tl.static_range(ROWS * B):
        totals = totals + (tl.zeros([STEP], tl.float32),)
    for step in range(tl.program_id(1), tl.cdiv(words, STEP), split):
        i = step * STEP + tl.arange(0, STEP)
        here = i < words
        activations = ()  # [B][2] of four each
        for b in tl.static_range(B):
            for half in tl.static_range(2):
                word = tl.load(x + b * (k // 4) + 2 * i + half, mask=here, other=0)
                activations = activations + (_four(word, X),)
        sums = ()
        for r in tl.static_range(ROWS):
            row = tl.minimum(first + r, n - 1).to(tl.int64)  # past the end: the last row once more, and not stored
            w = _four(tl.load(values + row * words + i, mask=here, other=0), W)
            code = tl.load(meta + row * words + i, mask=here, other=0).to(tl.int32)
            for b in tl.static_range(B):
                total = totals[r * B + b]
                for j in tl.static_range(4):
                    total += w[j] * _select(activations[2 * b + j // 2], code >> (2 * j))
                sums = sums + (total,)
        totals = sums
    for r in tl.static_range(ROWS):
        row = first + r
        for b in tl.static_range(B):
            total = tl.sum(totals[r * B + b], axis=0)
            if PARTIAL:
                tl.store(out + (tl.program_id(1) * B + b) * n + row, total, mask=row < n)
            else:
                total = _epilogue(total, scale, bias, row, row < n, HAS_SCALE, HAS_BIAS)
                tl.store(out + b * n + row, total.to(out.dtype.element_ty), mask=row < n)


@triton.jit
def reduce_kernel(partial, scale, bias, out, n, split, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts `[split, batch, n]` in their order, apply scale and bias: out `[batch, n]`. Grid: row blocks, batch."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    token = tl.program_id(1)
    batch = tl.num_programs(1)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(split):
        total += tl.load(partial + (part * batch + token) * n + row, mask=inside, other=0.0)
    total = _epilogue(total, scale, bias, row, inside, HAS_SCALE, HAS_BIAS)
    tl.store(out + token * n + row, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def unpack_kernel(values, meta, scale, out, words, row_words, W: tl.constexpr, BF16: tl.constexpr, STEP: tl.constexpr):
    """Words of four values (of the kind W) and bytes of two codes -> dense int64 words of four 16-bit numbers, two for each byte.

    int8 values are multiplied by the scale of their row, of `row_words` words, and rounded to bf16 or fp16.
    """
    i = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    here = i < words
    word = tl.load(values + i, mask=here, other=0)
    code = tl.load(meta + i, mask=here, other=0).to(tl.int64)
    if W == "int8":
        row_scale = tl.load(scale + i // row_words, mask=here, other=0.0)
    for h in tl.static_range(2):
        dense = tl.zeros([STEP], tl.int64)
        for j in tl.static_range(2):
            if W == "int8":
                number = ((word << (24 - 16 * h - 8 * j)) >> 24).to(tl.float32) * row_scale
                if BF16:
                    bits = number.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int64)
                else:
                    bits = number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int64)
            else:
                bits = word >> (32 * h + 16 * j)
            dense |= (bits & 0xFFFF) << (16 * ((code >> (4 * h + 2 * j)) & 3))
        tl.store(out + 2 * i + h, dense, mask=here)


def reduce_parts(partial: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor) -> Tensor:
    """fp32 `[split, batch, N]` -> `out` `[batch, N]`: the sum over the parts, times scale `[N]`, plus bias `[N]`."""
    split, batch, n = partial.shape
    flags = {"HAS_SCALE": scale is not None, "HAS_BIAS": bias is not None}
    grid = (triton.cdiv(n, _REDUCE), batch)
    reduce_kernel[grid](
        partial, partial if scale is None else scale, partial if bias is None else bias, out, n, split, BLOCK=_REDUCE, **flags
    )
    return out


def parts(programs: int, steps: int) -> int:
    """Into how many parts K is split: a power of two that brings `programs` to PROGRAMS, at most MAX_SPLIT and one step a part."""
    split = 1
    while programs * split < PROGRAMS and split < MAX_SPLIT and 2 * split <= steps:
        split *= 2
    return split


def supported(batch: int, k: int, x_dtype: torch.dtype, value_dtype: torch.dtype) -> bool:
    """Whether `gemv` takes this case: 1 to 4 tokens of bf16 or fp16; bf16, fp16 or int8 values; K a multiple of 8."""
    return 1 <= batch <= MAX_BATCH and k % 8 == 0 and x_dtype in (torch.bfloat16, torch.float16) and value_dtype in _WORDS


def gemv(
    x: Tensor, values: Tensor, meta: Tensor, scale: Tensor | None, bias: Tensor | None, config: Config = CONFIGS[0]
) -> Tensor:
    """y `[batch, N]` in the dtype of x = x `[batch, K]` W^T * scale + bias, for what `supported` takes.

    values `[N, K/2]`, meta uint8 `[N, K/8]` and scale fp32 `[N]` or None as in `packing.Packed24`, bias `[N]` or None, all contiguous.
    Products of values as they are stored with activations as they are, sums in fp32. A pruned weight does not see its activation, so
    that a NaN there does not reach that output.
    """
    batch, k = x.shape
    n = values.shape[0]
    out = torch.empty(batch, n, dtype=x.dtype, device=x.device)
    step = 64 * config.warps
    blocks = triton.cdiv(n, config.rows)
    split = parts(blocks, triton.cdiv(k // 8, step))
    target = out if split == 1 else torch.empty(split, batch, n, device=x.device)
    kinds = {"X": _kind(x.dtype), "W": _kind(values.dtype)}
    flags = {"HAS_SCALE": scale is not None, "HAS_BIAS": bias is not None, "PARTIAL": split > 1}
    # A kernel argument must be some tensor, also where the kernel does not read it.
    words, word_values = x.view(torch.int64), values.view(_WORDS[values.dtype])
    some_scale, some_bias = (out if scale is None else scale), (out if bias is None else bias)
    gemv_kernel[(blocks, split)](
        words, word_values, meta, some_scale, some_bias, target, n, k, split,
        B=batch, ROWS=config.rows, STEP=step, num_warps=config.warps, **kinds, **flags,
    )  # fmt: skip
    return out if split == 1 else reduce_parts(target, scale, bias, out)


def _kind(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}[dtype]


def can_unpack(k: int, value_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether `unpack` takes this case: 16-bit values to their own type, int8 values to bf16 or fp16; K a multiple of 8."""
    return k % 8 == 0 and dtype in (torch.bfloat16, torch.float16) and value_dtype in (dtype, torch.int8)


def unpack(values: Tensor, meta: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The dense matrix `[N, K]` in `dtype`, for what `can_unpack` takes; it trusts the codes (see `packing.check`)."""
    n, kept = values.shape
    out = torch.empty(n, 2 * kept, dtype=dtype, device=values.device)
    words = n * kept // 4
    word_values, word_out = values.view(_WORDS[values.dtype]), out.view(torch.int64)
    constants = {"W": _kind(values.dtype), "BF16": dtype == torch.bfloat16, "STEP": _UNPACK}
    some_scale = out if scale is None else scale  # a kernel argument must be some tensor
    unpack_kernel[(triton.cdiv(words, _UNPACK),)](word_values, meta, some_scale, word_out, words, kept // 4, **constants)
    return out
