"""The Triton 2:4 kernels in the interpreter against reference.py; test_sparse24_triton.py runs this file with TRITON_INTERPRET=1."""

# ruff: noqa: E402  The environment is looked at before triton is imported.
from __future__ import annotations

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/kernels/test_sparse24_triton.py, which starts this file"

import pytest
import torch
from sparse24_matrices import random_packed

from compress_kernels.sparse24 import triton as kernels
from compress_kernels.sparse24.packing import unpack
from compress_kernels.sparse24.reference import linear
from compress_kernels.sparse24.triton import Config

FP16, BF16, INT8 = torch.float16, torch.bfloat16, torch.int8


@pytest.mark.parametrize(
    ("value_dtype", "x_dtype", "batch", "n", "k", "config"),
    [
        (BF16, FP16, 1, 9, 24, Config(4, 1)),  # fewer words than a step, rows that do not fill a program
        (FP16, FP16, 2, 4, 512, Config(4, 1)),  # exactly one step
        (INT8, FP16, 3, 7, 1032, Config(2, 2)),  # a last step of one word
        (FP16, BF16, 4, 3, 520, Config(4, 1)),
        (BF16, BF16, 1, 1, 8, Config(4, 4)),
        (INT8, BF16, 4, 5, 40, Config(2, 2)),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemv_is_the_reference(value_dtype, x_dtype, batch, n, k, config, with_bias):
    packed = random_packed(n, k, value_dtype)
    x = torch.randn(batch, k).to(x_dtype)
    bias = torch.randn(n).to(x_dtype) if with_bias else None
    assert kernels.supported(batch, k, x_dtype, value_dtype)
    found = kernels.gemv(x, *packed, bias, config).float()
    wanted = linear(x, packed, bias, out_dtype=torch.float32)
    # The interpreter cuts bf16 results off where a GPU rounds them.
    unit = 2.0**-11 if x_dtype == FP16 else 2.0**-7
    assert found.shape == (batch, n)
    assert bool(((found - wanted).abs() <= 1.01 * unit * wanted.abs() + 1e-4).all())


@pytest.mark.parametrize("value_dtype", [BF16, INT8])
def test_a_split_along_k_adds_up(value_dtype, monkeypatch):
    packed = random_packed(6, 2056, value_dtype)
    x, bias = torch.randn(2, 2056).to(FP16), torch.randn(6)
    assert kernels.parts(2, 5) == 4
    whole = linear(x, packed, bias, out_dtype=torch.float32)
    torch.testing.assert_close(kernels.gemv(x, *packed, bias).float(), whole, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    assert kernels.parts(2, 5) == 1
    torch.testing.assert_close(kernels.gemv(x, *packed, bias).float(), whole, rtol=1e-3, atol=1e-3)


def test_every_code_and_every_place_of_a_value():
    # Row r keeps two of four in the r-th way; x counts, so that each product tells which column was read.
    codes = torch.tensor([0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110], dtype=torch.uint8)
    meta = (codes | codes << 4)[:, None].repeat(1, 2)
    values = torch.tensor([1.0, 16.0] * 4).repeat(6, 1).to(FP16)
    x = torch.arange(16.0).to(FP16)[None]
    found = kernels.gemv(x, values, meta, None, None)[0]
    for code, y in zip(codes.tolist(), found.tolist(), strict=True):
        assert y == sum(4 * group + (code & 3) + 16 * (4 * group + (code >> 2)) for group in range(4))


def test_pruned_weights_do_not_see_their_activation():
    packed = random_packed(4, 64, FP16)
    x = torch.randn(1, 64).to(FP16)
    kept = unpack(packed) != 0
    x[0, 5] = torch.nan
    found = kernels.gemv(x, *packed, None)[0]
    assert torch.equal(found.isnan(), kept[:, 5])


@pytest.mark.parametrize(("n", "k"), [(3, 8), (5, 1040)])
@pytest.mark.parametrize(("value_dtype", "dtype"), [(BF16, BF16), (FP16, FP16), (INT8, FP16), (INT8, BF16)])
def test_unpack_is_the_reference(n, k, value_dtype, dtype):
    packed = random_packed(n, k, value_dtype)
    assert kernels.can_unpack(k, value_dtype, dtype)
    found, wanted = kernels.unpack(*packed, dtype), unpack(packed, dtype)
    if (value_dtype, dtype) == (INT8, BF16):  # rounded, which the interpreter does not
        torch.testing.assert_close(found, wanted, rtol=2.0**-7, atol=0)
    else:
        assert torch.equal(found, wanted)


def test_what_is_supported():
    assert not kernels.supported(5, 64, BF16, BF16)
    assert not kernels.supported(1, 60, BF16, BF16)
    assert not kernels.supported(1, 64, torch.float32, BF16)
    assert not kernels.supported(1, 64, BF16, torch.float32)
    assert not kernels.can_unpack(64, FP16, BF16)
    assert not kernels.can_unpack(60, FP16, FP16)
