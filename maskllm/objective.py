"""What a mask is learned for: next-token cross-entropy, distillation from the dense network, and the paper's weight regulariser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from maskllm.errors import MaskError
from maskllm.parametrization import WeightMask

_CHUNK = 1 << 22  # logits handled at once: 16 MiB of float32 a temporary, whatever the vocabulary


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy and KL in one sweep over the logits, with the gradient made in the same sweep.

    For student logits z, teacher probabilities q and label t of one token, with p = softmax(z),

        ce = -log p_t,   kl = sum_v q_v (log q_v - log p_v),   d(a ce + b kl)/dz = a (p - onehot_t) + b (p - q).

    Autograd through log_softmax would hold five arrays of the logits' size; this holds one.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, ce_weight: float, kl_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocabulary = student.shape
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        ce_sum = torch.zeros((), dtype=torch.float32, device=student.device)
        kl_sum = torch.zeros_like(ce_sum)
        rows = max(1, _CHUNK // vocabulary)
        for a in range(0, tokens, rows):
            log_p = torch.log_softmax(student[a : a + rows].float(), -1)
            target = labels[a : a + rows].unsqueeze(1)
            ce_sum -= log_p.gather(1, target).sum()
            log_q = None
            if teacher is not None:
                log_q = torch.log_softmax(teacher[a : a + rows].float(), -1)
                q = log_q.exp()
                # A token that both mask out (-inf - -inf) adds nothing: its q is 0.
                kl_sum += torch.sum((log_q - log_p).mul_(q).masked_fill_(q == 0, 0))
            if grad is not None:
                g = log_p.exp_().mul_(ce_weight + kl_weight)
                if log_q is not None:
                    g -= q.mul_(kl_weight)
                if ce_weight:
                    g.scatter_add_(1, target, torch.full_like(target, -ce_weight, dtype=g.dtype))
                grad[a : a + rows] = g.div_(tokens)
        ctx.grad = grad
        ce, kl = ce_sum / tokens, kl_sum / tokens
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
