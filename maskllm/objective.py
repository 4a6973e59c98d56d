"""What a mask is learned for: next-token cross-entropy, distillation from the dense network, and the paper's weight regulariser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compress_kernels.loss import token_loss as kernel
from maskllm.errors import MaskError
from maskllm.parametrization import WeightMask


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy and KL with their gradient, all made in the forward pass (`compress_kernels.loss`).

    Autograd through log_softmax would hold five arrays of the logits' size; this holds one.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, ce_weight: float, kl_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = student.shape[0]
        ce, kl, ctx.grad = kernel(student, teacher, labels, ce_weight, kl_weight, ctx.needs_input_grad[0])
        ce, kl = ce / tokens, kl / tokens
        ctx.mark_non_differentiable(ce, kl)
        return ce_weight * ce + kl_weight * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None  # freed as soon as it is used
        return grad * grads[0] if grad is not None else None, None, None, None, None


def token_loss(
    student: Tensor, teacher: Tensor | None, input_ids: Tensor, *, ce_weight: float, kl_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss over the predicted tokens of a batch: `ce_weight * cross-entropy + kl_weight * KL(teacher || student)`, in nats.

    student, teacher: logits `[batch, length, vocabulary]`, any floating dtype; teacher is needed when `kl_weight` > 0.
    input_ids: int64 `[batch, length]`; token i is predicted from position i - 1. Only `student` gets a gradient.
    Returns (loss, cross-entropy, KL); the last two are for the record. KL is 0 without a teacher.
    """
    if kl_weight and teacher is None:
        raise MaskError("distillation needs the teacher's logits; give them or set its weight to 0")
    flat = student[:, :-1].flatten(0, 1)
    goal = teacher[:, :-1].flatten(0, 1) if teacher is not None else None
    return _TokenLoss.apply(flat, goal, input_ids[:, 1:].flatten(), ce_weight, kl_weight)


def weight_regulariser(masks: Iterable[WeightMask]) -> Tensor:
    """`sum_i ||W_i * M_i||^2` over all masked weights of the last forward pass: the paper's eq. 8, a sum and not a mean.

    Subtracted from the loss it rewards masks that keep large weights, which keeps the gradients of the logits from vanishing.
    """
    norms = [m.squared_norm for m in masks if m.squared_norm is not None]
    if not norms:
        raise MaskError("no mask recorded its squared norm: run a forward pass with `state.penalised` set")
    return torch.stack([n.to(norms[0].device) for n in norms]).sum()
