"""The packed 2:4 format: golden bytes, every pattern of non-zeros, torch's own packer, round trips, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse24_matrices import random_24
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from compress_kernels.sparse24.packing import LEGAL_CODES, Packed24, check, pack, pack_codes, positions, unpack

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = [bits for bits in itertools.product((0.0, 1.0), repeat=4) if sum(bits) <= 2]


def test_golden_bytes() -> None:
    weight = torch.tensor([[1.0, 2, 0, 0, 0, 0, 3, 4, 0, 5, 0, 6], [0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 8]])
    values, meta, scale = pack(weight)
    assert values.tolist() == [[1, 2, 3, 4, 5, 6], [0, 0, 7, 0, 0, 8]]
    assert meta.tolist() == [[0xE4, 0x0D], [0x8E, 0x0E]]  # low nibble first; K/4 is odd, so that the last high nibble is zero
    assert scale is None
    values, meta, scale = pack(weight, torch.int8)
    assert values.tolist() == [[21, 42, 64, 85, 106, 127], [0, 0, 111, 0, 0, 127]]
    assert meta.tolist() == [[0xE4, 0x0D], [0x8E, 0x0E]]
    assert scale is not None
    assert torch.equal(scale, torch.tensor([6.0, 8.0]) / 127)
    assert Packed24(values, meta, scale).nbytes == 12 + 4 + 8


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pattern_in_every_nibble_goes_round(dtype: torch.dtype) -> None:
    groups = torch.tensor(PATTERNS) * torch.tensor([1.5, -2.5, 3.0, -4.0])
    pairs = torch.stack([torch.cat([a, b]) for a, b in itertools.product(groups, repeat=2)]).to(dtype)  # [11 * 11, 8]
    packed = pack(pairs)
    codes = torch.stack([packed.meta & 15, packed.meta >> 4])
    assert set(codes.flatten().tolist()) <= set(LEGAL_CODES)
    assert torch.equal(unpack(packed), pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_those_of_torchs_packer(dtype: torch.dtype) -> None:
    """Its metadata in the order of the tensor core, put back into rows, is ours; groups with fewer non-zeros included."""
    generator = torch.Generator().manual_seed(0)
    weight = random_24(64, 128).to(dtype)
    weight[torch.rand(64, 128, generator=generator) < 0.4] = 0
    values, reordered = sparse_semi_structured_from_dense_cutlass(weight)
    packed = pack(weight)
    assert torch.equal(packed.values, values)
    assert torch.equal(_reordered(packed.meta).view(-1), reordered.view(-1))


def _reordered(meta: torch.Tensor) -> torch.Tensor:
    """Bytes `[m, k/8]` -> int16 words of four codes in CUTLASS's order: rows r of 32 to (r % 8) * 4 + r // 8, crossed pairs, columns of two."""
    words = meta.view(torch.int16)  # [m, k/16]
    rows, columns = words.shape
    out = torch.empty(rows * columns, dtype=torch.int16)
    for r in range(rows):
        for c in range(columns):
            to_row, to_column = r // 32 * 32 + (r % 8) * 4 + (r % 32) // 8, c
            if to_row % 2 == 0 and to_column % 2 == 1:
                to_row, to_column = to_row + 1, to_column - 1
            elif to_row % 2 == 1 and to_column % 2 == 0:
                to_row, to_column = to_row - 1, to_column + 1
            out[to_column // 2 * rows * 2 + to_row * 2 + to_column % 2] = words[r, c]
    return out


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**16), st.sampled_from(FLOATS))
def test_round_trip(rows: int, groups: int, seed: int, dtype: torch.dtype) -> None:
    weight = random_24(rows, 4 * groups, seed).to(dtype)
    packed = pack(weight)
    assert packed.shape == (rows, 4 * groups)
    assert packed.meta.shape == (rows, -(-groups // 2))
    assert torch.equal(unpack(packed), weight)
    check(packed)
    index = positions(packed.meta, 4 * groups)
    codes = (index[..., 0] | index[..., 1] << 2).to(torch.uint8)
    assert torch.equal(pack_codes(codes), packed.meta)


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**16))
def test_int8_is_within_half_a_step(rows: int, groups: int, seed: int) -> None:
    weight = random_24(rows, 4 * groups, seed)
    packed = pack(weight, torch.int8)
    assert packed.scale is not None
    assert bool(((unpack(packed) - weight).abs() <= packed.scale[:, None] * 0.5001).all())
    assert torch.equal(unpack(packed)[weight == 0], torch.zeros(int((weight == 0).sum())))


def test_a_row_of_zeros_and_an_empty_matrix() -> None:
    for dtype in (torch.float32, torch.int8):
        packed = pack(torch.zeros(2, 8), dtype)
        assert torch.equal(unpack(packed), torch.zeros(2, 8))
        assert unpack(pack(torch.zeros(0, 8), dtype)).shape == (0, 8)


def test_large_matrices_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_24(37, 24)
    whole = pack(weight, torch.int8)
    monkeypatch.setattr("compress_kernels.sparse24.packing._CHUNK", 100)
    parts = pack(weight, torch.int8)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(unpack(parts), unpack(whole))
    weight[33, 4:8] = 1
    with pytest.raises(ValueError, match="row 33, group 1"):
        pack(weight)


def test_nan_is_kept_and_minus_zero_is_a_zero() -> None:
    weight = torch.tensor([[torch.nan, -0.0, torch.inf, -0.0]])
    packed = pack(weight)
    assert packed.meta.tolist() == [[0x08]]
    assert torch.equal(unpack(packed).nan_to_num(5.0, posinf=6.0), torch.tensor([[5.0, 0, 6, 0]]))


@pytest.mark.parametrize(
    ("weight", "dtype", "message"),
    [
        (torch.tensor([[0.0] * 4 + [1, 1, 1, 0]]), None, r"row 0, group 1 \(columns 4 to 7\) has more than two non-zeros"),
        (torch.ones(2, 6), None, "multiple of 4"),
        (torch.ones(4), None, "multiple of 4"),
        (torch.ones(2, 4, dtype=torch.int32), None, "floating point"),
        (torch.tensor([[1e5, 0, 0, 0]]), torch.float16, "row 0 has a weight beyond the range"),
        (torch.tensor([[1.0, 0, 0, 0], [torch.inf, 0, 0, 0]]), torch.int8, "row 1 has a NaN or an infinity"),
        (torch.zeros(1, 4), torch.float64, "values are stored as"),
    ],
)
def test_what_cannot_be_packed(weight: torch.Tensor, dtype: torch.dtype | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(weight, dtype)


def test_what_is_not_a_packed_matrix() -> None:
    good = pack(random_24(3, 12), torch.int8)
    bad = [
        (good._replace(meta=good.meta | 0x0F), "row 0: metadata byte 0"),
        (good._replace(meta=good.meta | 0x40), "metadata byte 1"),  # the nibble that no group has
        (good._replace(meta=good.meta[:, :1]), "metadata of a 3 x 12 matrix"),
        (good._replace(scale=None), "if, and only if"),
        (good._replace(scale=torch.ones(2)), "the scale of a matrix of 3 rows"),
        (good._replace(values=good.values.to(torch.int32)), "packed 2:4 values"),
    ]
    for packed, message in bad:
        with pytest.raises(ValueError, match=message):
            unpack(packed)
