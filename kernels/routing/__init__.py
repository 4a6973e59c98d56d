"""How many experts each token runs: C++ on the CPU, where decoding would spend longer on twenty small operations than on an expert; torch
elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from compress_kernels.routing import cpu, reference
from compress_kernels.routing.reference import Router

__all__ = ["Router", "count_experts"]


def count_experts(hidden: Tensor, weights: Tensor, experts: Tensor, router: Router) -> Tensor:
    """`reference.count_experts` in its fastest form for these tensors. Same arguments and results; logits to rounding of float64."""
    if not torch.compiler.is_compiling() and cpu.supported(hidden, weights, router):
        return cpu.count_experts(hidden, weights, experts, router)
    return reference.count_experts(hidden, weights, experts, router)
