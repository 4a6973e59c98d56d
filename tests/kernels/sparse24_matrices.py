"""Random 2:4 matrices for the tests of the GPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from compress_kernels.sparse24.packing import Packed24, pack


def random_24(n: int, k: int, seed: int = 0) -> Tensor:
    """fp32 `[n, k]` with two non-zeros in every group of four, at random places."""
    generator = torch.Generator().manual_seed(1000 * n + k + seed)
    weight = torch.randn(n, k, generator=generator)
    pruned = torch.rand(n, k // 4, 4, generator=generator).argsort(-1)[..., :2]
    weight.view(n, k // 4, 4).scatter_(-1, pruned, 0.0)
    return weight


def random_packed(n: int, k: int, value_dtype: torch.dtype) -> Packed24:
    """The same, packed with values of a type."""
    return pack(random_24(n, k), value_dtype)
