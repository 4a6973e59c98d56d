"""`mma.sp` without a GPU: fragments and codes against torch's packer, and the compiled kernel executed by an emulator of PTX."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from ptx_emulator import LEGAL_CODES, launch, mma_sp_m16n8k32, to_float
from sparse24_matrices import random_24, random_packed
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from compress_kernels.sparse24.packing import pack
from compress_kernels.sparse24.reference import linear

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from triton_aot import CAPABILITIES, compile_kernel, disassemble

from compress_kernels.sparse24 import mma_sp

BF16, FP16 = torch.bfloat16, torch.float16


def numpy_of(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """The same memory, as an array of integers."""
    return tensor.view(dtype).numpy()


# --- the emulator, against torch's packer, whose order of codes is that of the registers


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("tile", [0, 1])
def test_emulated_instruction_multiplies_what_torchs_packer_packed(dtype, tile):
    """A 32 x 32 matrix packed by torch holds two tiles: its words belong to the lanes as they are, the second tile by selector 1."""
    weight, x = random_24(32, 32).to(dtype), torch.randn(8, 32).to(dtype)
    kept, codes = sparse_semi_structured_from_dense_cutlass(weight)
    kept, words = (
        numpy_of(kept, torch.int16).astype(np.uint16),
        numpy_of(codes.contiguous().view(-1), torch.int32).astype(np.uint32),
    )
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    pairs = kept.view(np.uint32).reshape(32, 8)  # the kept two of each group of four columns
    rows = 16 * tile + g
    a = np.stack([pairs[rows, t], pairs[rows + 8, t], pairs[rows, t + 4], pairs[rows + 8, t + 4]], 1)
    columns = numpy_of(x, torch.int16).astype(np.uint16).view(np.uint32).reshape(8, 16)  # pairs of rows of B, for each column
    b = np.stack([columns[g, 4 * j + t] for j in range(4)], 1)
    d = mma_sp_m16n8k32(a, b, np.ones((32, 4), np.float32), words, tile, "bf16" if dtype == BF16 else "f16")
    wanted = (weight.float()[16 * tile : 16 * tile + 16] @ x.float().t() + 1).numpy()
    i = np.arange(4)[None]
    np.testing.assert_allclose(d, wanted[g[:, None] + 8 * (i // 2), 2 * t[:, None] + i % 2], rtol=1e-5, atol=1e-5)


def test_emulator_refuses_illegal_metadata():
    a, c = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.float32)
    mma_sp_m16n8k32(a, a, c, np.full(32, 0x4444EEEE, np.uint32), 0, "bf16")
    for code in set(range(16)) - set(LEGAL_CODES):
        with pytest.raises(AssertionError, match="not legal"):
            mma_sp_m16n8k32(a, a, c, np.full(32, 0x44444440 | code, np.uint32), 0, "bf16")


def test_emulated_numbers():
    assert to_float(np.array([0x3F80, 0xC040], np.uint16), "bf16").tolist() == [1.0, -3.0]
    assert to_float(np.array([0x3C00, 0xC200], np.uint16), "f16").tolist() == [1.0, -3.0]


# --- the codes in our order of K


def logical_columns() -> Tensor:
    """The column of K behind each of the 64 columns of the two instructions on a block: instruction i, its columns 4t + j and 16 + 4t + j."""
    i, half, t, j = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (2, 2, 4, 4)), indexing="ij"))
    return 16 * t + 4 * (2 * i + half) + j


@pytest.mark.parametrize(("n", "k"), [(32, 64), (96, 320)])
def test_lane_words_are_torchs_codes_of_the_matrix_in_our_order(n, k):
    weight = random_24(n, k)
    words = mma_sp.lane_words(pack(weight).meta, k)
    assert words.shape == (k // 64, n // 16, 32)
    permuted = weight.view(n, k // 64, 64)[:, :, logical_columns()].reshape(n, k).to(BF16)
    _, codes = sparse_semi_structured_from_dense_cutlass(permuted)
    torchs = codes.contiguous().view(-1).view(torch.int32).view(k // 32, n // 32, 32)  # [32 columns, two tiles, lane]
    for tile in range(n // 16):
        for lane in range(32):
            g, t = lane // 4, lane % 4
            source = torchs[t // 2 :: 2, tile // 2, 4 * g + 2 * (tile % 2) + t % 2]
            assert torch.equal(words[:, tile, lane], source), (tile, lane)


def test_lane_words_lane_by_lane():
    packed = random_packed(24, 128, BF16)  # half a tile is missing
    codes = torch.stack([packed.meta & 15, packed.meta >> 4], 2).view(24, 32)
    words = mma_sp.lane_words(packed.meta, 128).long() & 0xFFFFFFFF
    assert words.shape == (2, 2, 32)
    for block, tile, lane in np.ndindex(2, 2, 32):
        for half in range(2):
            row = 16 * tile + lane // 4 + 8 * half
            for quad in range(4):
                wanted = int(codes[row, 16 * block + 4 * quad + lane % 4]) if row < 24 else 0b0100
                assert int(words[block, tile, lane]) >> (16 * half + 4 * quad) & 15 == wanted


# --- the compiled kernel


def compile_mma(capability: int, dtype: torch.dtype, tiles: int, batches: int, warps: int, partial: bool, bias: bool):
    kind = "bf16" if dtype == BF16 else "fp16"
    types = {"x": "*i32", "values": "*i32", "words": "*i32", "bias": f"*{kind}", "out": "*fp32" if partial else f"*{kind}"}
    shape = {"BF16": dtype == BF16, "TILES": tiles, "BATCHES": batches, "WARPS": warps}
    constants = {**shape, "HAS_BIAS": bias, "PARTIAL": partial}
    return compile_kernel(mma_sp.mma_sp_kernel, capability, types, constants, ("k",), warps).asm


@pytest.mark.parametrize(
    ("capability", "dtype", "n", "k", "batch", "tiles", "warps", "split"),
    [
        (80, BF16, 16, 64, 8, 1, 1, 1),  # one block
        (80, FP16, 24, 192, 5, 1, 4, 1),  # half a tile, three blocks for four warps, tokens that do not fill B
        (80, BF16, 40, 192, 13, 2, 2, 2),  # two tiles of which one is past the end, sixteen tokens, parts of K
        (90, FP16, 40, 192, 13, 2, 2, 1),
        (90, BF16, 17, 320, 4, 1, 4, 2),
        (90, BF16, 64, 64, 25, 4, 1, 1),  # four tiles and thirty-two tokens
        (100, FP16, 24, 192, 5, 1, 4, 1),
        (100, BF16, 40, 192, 13, 2, 2, 2),
    ],
)
def test_compiled_kernel_emulated_is_the_reference(capability, dtype, n, k, batch, tiles, warps, split):
    packed = random_packed(n, k, dtype)
    x, bias = torch.randn(batch, k).to(dtype), torch.randn(n).to(dtype)
    partial = split > 1
    out = torch.full((split, batch, n) if partial else (batch, n), torch.nan, dtype=torch.float32 if partial else dtype)
    batches = 1 << (-(-batch // 8) - 1).bit_length()
    ptx = compile_mma(capability, dtype, tiles, batches, warps, partial, not partial)["ptx"]
    arrays = [numpy_of(x, torch.int32), numpy_of(packed.values, torch.int32), mma_sp.lane_words(packed.meta, k).numpy()]
    arrays += [numpy_of(bias, torch.int16), numpy_of(out, torch.int32 if partial else torch.int16)]
    launch(ptx, 32 * warps, (-(-n // (16 * tiles)), split), [*arrays, n, k, batch, split])
    found = out.sum(0) if partial else out.float()
    wanted = linear(x, packed, None if partial else bias, out_dtype=torch.float32)
    unit = 1e-6 if partial else {BF16: 2.0**-8, FP16: 2.0**-11}[dtype]  # rounded to nearest
    assert bool(((found - wanted).abs() <= 1.01 * unit * wanted.abs() + 2e-5).all())


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_machine_code_has_the_sparse_instruction_and_wide_loads(capability, dtype, tmp_path):
    asm = compile_mma(capability, dtype, 2, 2, 4, False, True)
    kind = "bf16" if dtype == BF16 else "f16"
    pattern = rf"^\s*mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.{kind}\.{kind}\.f32"
    assert len(re.findall(pattern, asm["ptx"], re.M)) == 2 * 2 * 2  # instructions, tiles, eights of tokens
    machine = disassemble(asm["cubin"], tmp_path)
    assert len(re.findall(r"\bHMMA\.SP\.16832\.F32", machine)) == 8
    assert len(re.findall(r"\bLDG\.E\.128\b", machine)) == 4  # two halves of each tile: 16 bytes of weights a lane


@pytest.mark.parametrize(("config", "batch"), [(mma_sp.CONFIGS[1], 64), (mma_sp.CONFIGS[2], 32), (mma_sp.CONFIGS[2], 64)])
def test_sums_stay_in_registers(config, batch, tmp_path):
    machine = disassemble(compile_mma(90, BF16, config.tiles, batch // 8, config.warps, False, True)["cubin"], tmp_path)
    assert machine.count("HMMA.SP.16832") == 2 * config.tiles * batch // 8
    spills = len(re.findall(r"\b(?:LDL|STL)\b", machine))  # loads and stores of local memory; an address or two does no harm
    assert (spills <= 4) == config.holds(batch)


def test_largest_batch_has_a_configuration():
    assert any(config.holds(mma_sp.MAX_BATCH) for config in mma_sp.CONFIGS)
    assert not mma_sp.CONFIGS[2].holds(33)


def test_what_is_supported():
    assert mma_sp.supported(64, 128, BF16, BF16, (8, 0))
    assert not mma_sp.supported(65, 128, BF16, BF16, (9, 0))
    assert not mma_sp.supported(8, 96, BF16, BF16, (9, 0))
    assert not mma_sp.supported(8, 128, BF16, FP16, (9, 0))
    assert not mma_sp.supported(8, 128, torch.float32, torch.float32, (9, 0))
    assert not mma_sp.supported(8, 128, BF16, BF16, (7, 5))
