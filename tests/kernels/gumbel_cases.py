"""What the tests of the soft mask's kernels share: cases, and whether the C++ kernel must be there."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from compress_kernels.gumbel import stream_key
from compress_kernels.native import native
from maskllm.gumbel import Parametrization, logit_width
from maskllm.patterns import Pattern

PATTERNS = [Pattern(1, 4), Pattern(2, 4), Pattern(2, 8), Pattern(4, 8)]
BOTH: tuple[Parametrization, ...] = ("patterns", "scores")
KEY = stream_key(5, 6, 7)
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


def need_kernel() -> None:
    """Without a compiler the kernel may be missing and the test is skipped; with one, that is a failure."""
    found = native("gumbel")
    if found.library is None:
        assert COMPILER is None, f"there is a compiler, but {found.reason}"
        pytest.skip(found.reason)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(pattern: Pattern, parametrization: Parametrization, groups: int, spread: float = 0.02) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weight, upstream gradient), float32."""
    logits = numbers(groups, logit_width(pattern, parametrization), seed=groups) * spread
    return logits, numbers(groups, pattern.m, seed=groups + 1), numbers(groups, pattern.m, seed=groups + 2)


def close(mine: Tensor, exact: Tensor, tolerance: float, scale: float = 1.0) -> None:
    """Within `tolerance` of every number, or of `scale`: the size of the terms where they cancel."""
    assert mine.shape == exact.shape
    torch.testing.assert_close(mine.double(), exact.double(), rtol=tolerance, atol=tolerance * scale)
