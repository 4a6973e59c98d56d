"""Cross-entropy and distillation over rows of logits: C++ on the CPU, torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from compress_kernels.loss import cpu, reference

__all__ = ["token_loss"]


def token_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, ce_weight: float, kl_weight: float, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`reference.token_loss` in its fastest form for these tensors. Same arguments and results; float32 sums to rounding."""
    if cpu.supported(student, teacher):
        ce, kl, grad = cpu.token_loss(student, teacher, labels, ce_weight, kl_weight, want_grad)
        return torch.tensor(ce, dtype=torch.float32), torch.tensor(kl, dtype=torch.float32), grad
    return reference.token_loss(student, teacher, labels, ce_weight, kl_weight, want_grad)
