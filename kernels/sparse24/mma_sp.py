"""The 2:4 product for 4 to 64 tokens on a GPU: sparse tensor cores through the instruction `mma.sp` (compute capability 8.0 and up).

`mma.sp.m16n8k32` multiplies a sparse 16 x 32 tile A, given as its 16 x 16 kept values and their codes, with a dense 32 x 8 tile B. The
sparse operand is always A, so weights are A, eight tokens are the columns of B, and the product is W x^T. A warp walks along 64 columns
of K at a time with two instructions (i = 0, 1), for TILES tiles of 16 rows and BATCHES of 8 tokens; the warps of a program take turns
along K and add their sums at the end.

The order of K inside a product is free as long as A, its codes and B agree. It is chosen so that weights are read in place: the four
lanes of a quad (t = 0..3) that hold a row each take 16 consecutive columns of it, eight values or 16 bytes, and instruction i uses the
groups 2i and 2i+1 of these four. Only the codes are reordered, once a weight (`lane_words`: as many bytes as they have now): lane t
takes group t of the four lanes' columns, so that one register serves both instructions, i = 0 with selector 0 (codes from lanes 0 and
1 of each quad) and i = 1 with selector 1 (lanes 2 and 3).

Fragments are as the PTX ISA documents them ("Matrix fragments for sparse mma.m16n8k32"), with g = lane / 4 and t = lane % 4:
A register r holds the kept two of four columns, row g + 8 (r % 2), group t of the first 16 columns (r < 2) or of the last 16; B register j
rows 8j + 2t and the next, column g; C register r row g + 8 (r / 2), column 2t + r % 2; the codes of a word are four of row g in the low
half and four of row g + 8 in the high half, lane 2i for the first 16 columns and lane 2i + 1 for the last.

Checked without a GPU: compiled ahead of time for compute capabilities 8.0, 9.0 and 10.0, and the compiled PTX executed by an emulator
of these fragments against reference.py (tests/kernels/test_sparse24_mma.py). No GPU has run it yet; tests/gpu is for the first one that does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compress_kernels.sparse24.triton import reduce_parts

MAX_BATCH = 64
BLOCK = 64  # columns of K a warp takes at once
ROWS = 16  # of a tile
_PROGRAMS = 256
_MAX_SPLIT = 8


@dataclass(frozen=True)
class Config:
    """How work is cut: tiles of 16 rows of a program, and its warps, which share them and split K."""

    tiles: int
    warps: int

    def holds(self, batch: int) -> bool:
        """Whether the sums of `batch` tokens stay in registers: eight a thread for each tile and eight tokens, 128 at most."""
        return self.tiles * _eights(batch) <= 16


CONFIGS = (Config(1, 4), Config(2, 4), Config(4, 4))


def _eights(batch: int) -> int:
    """Tiles of eight tokens, rounded up to a power of two."""
    return triton.next_power_of_2(triton.cdiv(batch, 8))


def lane_words(meta: Tensor, k: int) -> Tensor:
    """Plain codes uint8 `[N, K/8]` -> the words that lanes hand to `mma.sp`: int32 `[K/64, ceil(N/16), 32]`, on the same device.

    Rows past N get the code 0100, which is legal.
    """
    n = meta.shape[0]
    tiles = triton.cdiv(n, ROWS)
    codes = torch.stack([meta & 15, meta >> 4], dim=2).view(n, k // 4)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, tiles * ROWS - n), value=0b0100).int()
    # [tile, half (row g or g + 8), g, block, quad lane that holds the columns, group of its columns = lane t that holds the code]
    codes = codes.view(tiles, 2, 8, k // BLOCK, 4, 4).permute(3, 0, 2, 5, 1, 4)  # [block, tile, g, t, half, quad lane]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=meta.device).view(2, 4)
    return (codes << shifts).sum((4, 5), dtype=torch.int32).view(k // BLOCK, tiles, 32)


def assembly(kind: str) -> str:
    """The two instructions on operands of eight registers each: $0.. sums out, $8.. A, $16.. B, $24 codes (repeated), $32.. sums in.

    A is in the order of its load, `[row half][group]`; B and the sums are `[i][register]`.
    """
    lines = []
    for i in range(2):
        a = [8 + 4 * (r % 2) + 2 * i + r // 2 for r in range(4)]
        groups = [range(4 * i, 4 * i + 4), a, range(16 + 4 * i, 20 + 4 * i), range(32 + 4 * i, 36 + 4 * i)]
        d, a_text, b, c = ("{" + ", ".join(f"${number}" for number in group) + "}" for group in groups)
        opcode = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32"
        lines.append(f"{opcode} {d}, {a_text}, {b}, {c}, $24, 0x{i};")
    return "\n".join(lines)


# `inline_asm_elementwise` on explicit layouts hands over a thread's registers in their order, eight of each operand; `gl.inline_asm`
# says so in its contract, but needs Triton 3.9, and torch 2.13 comes with 3.7. The test that executes the compiled PTX would notice.
_ASM_BF16 = gl.constexpr(assembly("bf16"))
_ASM_F16 = gl.constexpr(assembly("f16"))
# "&": the first instruction's results are written before the second one's operands are read.
_CONSTRAINTS = gl.constexpr(",".join(["=&f"] * 8 + ["r"] * 24 + ["f"] * 8))


@gluon.jit
def mma_sp_kernel(x, values, words, bias, out, n, k, batch, split, BF16: gl.constexpr, TILES: gl.constexpr, BATCHES: gl.constexpr,
                  WARPS: gl.constexpr, HAS_BIAS: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """out `[batch, n]`, or with PARTIAL the sums of each part of K, fp32 `[split, batch, n]`. Grid: TILES tiles of rows, parts of K.

    x int32 `[batch, k/2]` and values int32 `[n, k/4]` are words of two numbers; words as of `lane_words`.
    """
    # [tile, eight tokens, lane of all warps, eight registers]
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 1, 32, 1], [1, 1, WARPS, 1], [3, 2, 1, 0])
    tile = gl.arange(0, TILES, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[:, None, None, None]
    tokens = gl.arange(0, BATCHES, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[None, :, None, None]
    thread = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))[None, None, :, None]
    e = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))[None, None, None, :]
    lane = thread % 32
    g = lane // 4
    t = lane % 4

    tile_count = (n + 15) // 16
    # Pointers are made of what a lane fixes, then the block, then what the register fixes, which the assembler folds into the load.
    row = (gl.program_id(0) * TILES + tile) * 16 + g + e // 4 * 8  # A: [row half][group]
    a_lane = values + row.to(gl.int64) * (k // 4) + 4 * t
    token = tokens * 8 + g
    # B, register j = 2s + h of instruction i: of quad lane t / 2 + 2h its group 2i + s, columns 2 (t % 2) and the next; e = 4i + j.
    b_lane = x + token * (k // 2) + (8 * (t // 2) + t % 2)

    # The codes, one register a lane: in `layout` the compiler would load it once for each of the eight.
    single: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [1, 1, 32, 1], [1, 1, WARPS, 1], [3, 2, 1, 0])
    code_tile = gl.program_id(0) * TILES + gl.convert_layout(tile, single)
    code_thread = gl.convert_layout(thread, single)
    code_pointer = words + code_tile * 32 + code_thread % 32

    sums = gl.zeros([TILES, BATCHES, 32 * WARPS, 8], gl.float32, layout=layout)
    blocks = k // 64
    for first in range(gl.program_id(1) * WARPS, blocks, split * WARPS):
        block = first + thread // 32
        here = block < blocks
        a = gl.load(a_lane + block * 16 + e % 4, mask=here & (row < n), other=0)
        code_block = first + code_thread // 32
        code_here = (code_block < blocks) & (code_tile < tile_count)
        codes = gl.load(code_pointer + code_block * (tile_count * 32), mask=code_here, other=0x44444444)
        codes = gl.convert_layout(codes, layout)
        b = gl.load(b_lane + block * 32 + (16 * (e % 2) + 2 * (e // 2)), mask=here & (token < batch), other=0)
        if BF16:
            sums = gl.inline_asm_elementwise(_ASM_BF16, _CONSTRAINTS, [a, b, codes, sums], dtype=gl.float32, is_pure=True, pack=8)
        else:
            sums = gl.inline_asm_elementwise(_ASM_F16, _CONSTRAINTS, [a, b, codes, sums], dtype=gl.float32, is_pure=True, pack=8)

    # Add the two instructions' sums, then those of the warps: [tile, eight tokens, lane, four registers of C].
    total = gl.sum(gl.reshape(sums, [TILES, BATCHES, WARPS, 32, 2, 4]), axis=4)
    total = gl.sum(total, axis=2)
    final: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 1, 32, 1], [1, WARPS, 1, 1], [3, 2, 1, 0])
    total = gl.convert_layout(total, final)
    tile = gl.arange(0, TILES, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, final))))[:, None, None, None]
    tokens = gl.arange(0, BATCHES, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, final))))[None, :, None, None]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, final))))[None, None, :, None]
    r = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, final))))[None, None, None, :]
    row = (tile + gl.program_id(0) * TILES) * 16 + lane // 4 + r // 2 * 8
    token = tokens * 8 + lane % 4 * 2 + r % 2
    inside = (row < n) & (token < batch)
    if PARTIAL:
        gl.store(out + (gl.program_id(1) * batch + token) * n + row, total, mask=inside)
    else:
        if HAS_BIAS:
            total += gl.load(bias + row, mask=inside, other=0.0).to(gl.float32)
        gl.store(out + token * n + row, total.to(out.dtype.element_ty), mask=inside)


def supported(batch: int, k: int, x_dtype: torch.dtype, value_dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether `linear` takes this case: up to 64 tokens, bf16 or fp16 on both sides, K a multiple of 64, compute capability 8.0 and up."""
    types = x_dtype == value_dtype and x_dtype in (torch.bfloat16, torch.float16)
    return 1 <= batch <= MAX_BATCH and k % BLOCK == 0 and types and capability >= (8, 0)


def linear(x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, config: Config = CONFIGS[0]) -> Tensor:
    """y `[batch, N]` = x `[batch, K]` W^T + bias, for what `supported` takes; sums in fp32.

    values `[N, K/2]` as in `packing.Packed24`, words of `lane_words`, bias `[N]` or None, all contiguous and on 16-byte boundaries.
    A pruned weight does not see its activation, so that a NaN there does not reach that output.
    """
    batch, k = x.shape
    n = values.shape[0]
    out = torch.empty(batch, n, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(n, ROWS * config.tiles)
    split, steps = 1, triton.cdiv(k // BLOCK, config.warps)
    while blocks * split < _PROGRAMS and split < _MAX_SPLIT and 2 * split <= steps:
        split *= 2
    target = out if split == 1 else torch.empty(split, batch, n, device=x.device)
    constants = {
        "BF16": x.dtype == torch.bfloat16,
        "TILES": config.tiles,
        "BATCHES": _eights(batch),
    }
    flags = {"WARPS": config.warps, "HAS_BIAS": bias is not None, "PARTIAL": split > 1}
    some_bias = out if bias is None else bias  # a kernel argument must be some tensor
    pairs, value_pairs = x.view(torch.int32), values.view(torch.int32)
    mma_sp_kernel[(blocks, split)](
        pairs, value_pairs, words, some_bias, target, n, k, batch, split, num_warps=config.warps, **constants, **flags
    )
    return out if split == 1 else reduce_parts(target, None, bias, out)
