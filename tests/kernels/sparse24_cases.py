"""What the tests of the compiled 2:4 kernels share: whether they are built, their levels, and how close a result has to be."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from compress_kernels.native import native
from compress_kernels.sparse24 import Activation, Packed24, cpu, unpack
from compress_kernels.sparse24.reference import quantize_activations

COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
# Each level uses other kernels: plain C++, AVX2, AVX-512 on fp32, with bf16 and int8 instructions, with tiles.
LEVELS = [cpu.FEATURES[:n] for n in (0, 1, 2, 4, 5)]


def need_kernel() -> None:
    """Without a compiler the kernels may be missing and the test is skipped; with one, that is a failure."""
    found = native("sparse24")
    if found.library is None:
        assert COMPILER is None, f"there is a compiler, but {found.reason}"
        pytest.skip(found.reason)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_product(y: Tensor, x: Tensor, packed: Packed24, bias: Tensor | None, activation: Activation) -> None:
    """fp32 y against float64: within 1e-5 of the magnitudes that were added."""
    weight = unpack(packed, torch.float32).double()
    if activation == "int8":
        q, scale = quantize_activations(x)
        x = q.double() * scale.double()
    terms = x.double().abs() @ weight.abs().T
    exact = x.double() @ weight.T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    assert y.dtype == torch.float32
    assert y.shape == exact.shape
    assert not y.isnan().any()
    assert bool(((y - exact).abs() <= 1e-5 * terms).all()), float(((y - exact).abs() / terms.clamp_min(1e-30)).max())
