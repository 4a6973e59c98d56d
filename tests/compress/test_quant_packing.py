"""Packed codes against bit strings, all codes there are, and the bytes compressed-tensors 0.20.0 writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.quantize.gptq import rtn
from compress.quantize.grid import Grid
from compress.quantize.packing import from_compressed_tensors, pack, packed_bytes, to_compressed_tensors, unpack

# `pack_to_int32` of compressed-tensors 0.20.0 on `codes(2, 24, bits, 7) - 2^(bits-1)`.
GOLDEN = {
    1: [[7456540], [9320675]],
    2: [[-803405360, 7425], [-1882653553, 51452]],
    3: [[1561351744, -788175872, 5], [351257663, 1325155326, 225]],
    4: [[210055424, -1316978251, 20286469], [1945938039, 687339564, 2024600444]],
    5: [[273777664, 67597699, 806705265, 8414812], [-557506329, 2006998204, -855862721, 12203215]],
    6: [
        [84676608, 383074498, 740176034, -974993387, 49684],
        [-869760569, -2003018445, 1217394622, -1929430564, 56966],
    ],
    7: [
        [1348485120, -1793052608, -1023080371, 810915589, -2070388965, 96],
        [-1052638329, 472796280, -76158447, -203643615, -1596928004, 110],
    ],
    8: [
        [50397184, 269223941, 673258261, 1262565424, 2020368469, -1331588219],
        [168298247, 387125004, 791159324, 1380466487, 2138269532, -1213687156],
    ],
}
# The same function with packed_dim=0 on `codes(24, 2, bits, 5) - 2^(bits-1)`: zero points.
GOLDEN_ZEROS = {
    2: [[-454761244, -454761244], [58596, 58596]],
    3: [[-1468477784, -1468477784], [-827819826, -827819826], [120, 120]],
    4: [[1049950800, 1049950800], [-1239649576, -1239649576], [1049950800, 1049950800]],
}


def codes(rows: int, columns: int, bits: int, step: int) -> Tensor:
    table = [[(i * i // 3 + step * r) % (1 << bits) for i in range(columns)] for r in range(rows)]
    return torch.tensor(table, dtype=torch.uint8)


def draw(rows: int, columns: int, bits: int) -> Tensor:
    return torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.data())
def test_packed_bytes_are_the_bit_string(bits: int, data: st.DataObject) -> None:
    row = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=40))
    stream = "".join(f"{code:0{bits}b}"[::-1] for code in row)
    stream += "0" * (-len(stream) % 8)
    expected = [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]
    packed = pack(torch.tensor([row], dtype=torch.uint8), bits)
    assert packed.tolist() == [expected]
    assert packed.shape[1] == packed_bytes(len(row), bits)
    assert unpack(packed, bits, len(row)).tolist() == [row]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_pair_of_codes_at_every_place_comes_back(bits: int) -> None:
    every = torch.cartesian_prod(torch.arange(1 << bits), torch.arange(1 << bits)).to(torch.uint8)  # [4^bits, 2]
    for lead in range(8):
        rows = torch.cat([torch.full((len(every), lead), (1 << bits) - 1, dtype=torch.uint8), every], dim=1)
        assert torch.equal(unpack(pack(rows, bits), bits, lead + 2), rows)


def test_three_bits_take_three_bytes_for_eight_codes() -> None:
    assert pack(torch.arange(8, dtype=torch.uint8)[None], 3).tolist() == [[0b10001000, 0b11000110, 0b11111010]]


def test_leading_dimensions_are_kept() -> None:
    stack = draw(6, 13, 3).view(2, 3, 13)
    assert pack(stack, 3).shape == (2, 3, 5)
    assert torch.equal(unpack(pack(stack, 3), 3, 13), stack)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "float", "midrise"])
def test_packed_equals_fake_quantised_bit_for_bit(bits: int, kind: str) -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    found = rtn(weight, Grid(bits, 32, kind))  # type: ignore[arg-type]
    stored = pack(found.codes, bits)
    scale, zero = (part.repeat_interleave(32, 1)[:, :70] for part in found.parameters())
    again = (unpack(stored, bits, 70).float() - zero) * scale
    assert torch.equal(again, found.dequantize())
    total = 8 * (stored.numel() + found.scale.numel() * 2)
    if kind == "float":
        total += 16 * found.scale.numel()
    elif kind == "asymmetric":
        total += bits * found.scale.numel()
    assert total / weight.numel() == pytest.approx(found.bits_per_weight)


def test_unsound_codes_are_refused() -> None:
    with pytest.raises(CompressError, match="code 4 does not fit into 2 bits"):
        pack(torch.tensor([[1, 4]], dtype=torch.uint8), 2)
    with pytest.raises(CompressError, match="uint8"):
        pack(torch.tensor([[1, 3]]), 2)
    with pytest.raises(UsageError, match="1 to 8"):
        pack(torch.zeros(1, 1, dtype=torch.uint8), 9)
    with pytest.raises(CompressError, match="take 5 bytes"):
        unpack(torch.zeros(1, 4, dtype=torch.uint8), 3, 12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_those_of_compressed_tensors(bits: int) -> None:
    weight = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    found = rtn(weight, Grid(bits, 8, "symmetric"))
    found.codes.copy_(codes(2, 24, bits, 7))
    tensors = to_compressed_tensors(found)
    assert tensors["weight_packed"].dtype == torch.int32
    assert tensors["weight_packed"].tolist() == GOLDEN[bits]
    assert tensors["weight_shape"].tolist() == [2, 24]
    assert tensors["weight_shape"].dtype == torch.int64
    assert torch.equal(tensors["weight_scale"], found.scale)
    assert set(tensors) == {"weight_packed", "weight_scale", "weight_shape"}


@pytest.mark.parametrize("bits", GOLDEN_ZEROS)
def test_zero_points_are_those_of_compressed_tensors(bits: int) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    found = rtn(weight, Grid(bits, 32, "asymmetric"))
    assert found.zero is not None
    found.zero.copy_(codes(24, 2, bits, 5))
    assert to_compressed_tensors(found)["weight_zero_point"].tolist() == GOLDEN_ZEROS[bits]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compressed_tensors_round_trip(bits: int, kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(bits))
    found = rtn(weight, Grid(bits, 32, kind, dtype))  # type: ignore[arg-type]
    tensors = to_compressed_tensors(found)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    again = from_compressed_tensors(tensors, bits, 32)
    assert again.grid == found.grid
    assert torch.equal(again.dequantize(), found.dequantize())


def test_what_compressed_tensors_cannot_hold_is_refused() -> None:
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    for kind in ("float", "midrise"):
        with pytest.raises(UsageError, match=f"this one is {kind}"):
            to_compressed_tensors(rtn(weight, Grid(2, 8, kind)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="16 does not divide the 24"):
        to_compressed_tensors(rtn(weight, Grid(2, 16, "symmetric")))


def test_damaged_tensors_are_refused() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    good = to_compressed_tensors(rtn(weight, Grid(3, 32, "asymmetric")))
    for key, words in (
        ("weight_packed", "int32 words"),
        ("weight_scale", "weight_scale is"),
        ("weight_zero_point", "int32 words|zeros for"),
    ):
        with pytest.raises(CompressError, match=words):
            from_compressed_tensors({**good, key: good[key][:-1, :1]}, 3, 32)
    with pytest.raises(CompressError, match="39 rows"):
        from_compressed_tensors({**good, "weight_packed": good["weight_packed"][:39]}, 3, 32)
