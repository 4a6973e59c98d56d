"""The loss through a frozen output head, some tokens at a time, so that no array of all tokens times the vocabulary exists.

At 4,096 tokens and a vocabulary of 128,256 the logits of the masked network, those of its teacher and their gradient take 3 GiB in
bfloat16; hidden states and their gradient take 64 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress_kernels.loss import token_loss
from maskllm.errors import MaskError

CHUNK = 1 << 24  # logits of each of student, teacher and gradient that exist at once: 32 MiB in bfloat16


def find_head(model: nn.Module) -> nn.Linear | None:
    """The output head of `model` when it is a plain, frozen linear layer, else None (a head with a mask of its own is not)."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    plain = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    return head if plain else None


@contextmanager
def without_head(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within it the head returns the hidden states that enter it. Yields the list of those, by call.

    What the network returns as logits then *is* the last of them, unless it does more to logits than the head does (scales or caps them).
    """
    entered: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        entered.append(hidden)
        return hidden

    own = vars(head).get("forward")
    head.__dict__["forward"] = forward
    try:
        yield entered
    finally:
        del head.__dict__["forward"]
        if own is not None:
            head.__dict__["forward"] = own


def head_loss(
    student: Tensor,
    teacher: Tensor | None,
    head: nn.Linear,
    dtype: torch.dtype,
    input_ids: Tensor,
    *,
    ce_weight: float,
    kl_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `maskllm.objective.token_loss` gives for `head(student)` and `head(teacher)`: (loss, cross-entropy, KL).

    student, teacher: the hidden states that enter the head, `[batch, length, hidden]`; teacher is needed when `kl_weight` > 0.
    dtype: of the products with the head. input_ids: int64 `[batch, length]`. Only `student` gets a gradient.
    """
    if kl_weight and teacher is None:
        raise MaskError("distillation needs the teacher's hidden states; give them or set its weight to 0")
    flat = student[:, :-1].flatten(0, 1)
    goal = teacher[:, :-1].flatten(0, 1) if teacher is not None else None
    weight = head.weight.detach().to(dtype)
    bias = head.bias.detach().to(dtype) if head.bias is not None else None
    return _HeadLoss.apply(flat, goal, weight, bias, input_ids[:, 1:].flatten(), ce_weight, kl_weight)


class _HeadLoss(torch.autograd.Function):
    """The gradient with respect to the hidden states, `dL/dlogits @ weight`, is made in the forward pass and is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ce_weight: float,
        kl_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, rows = student.shape[0], max(1, CHUNK // weight.shape[0])
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        ce = torch.zeros((), dtype=torch.float32, device=student.device)
        kl = torch.zeros_like(ce)
        for a in range(0, tokens, rows):
            part = slice(a, min(tokens, a + rows))
            z = functional.linear(student[part].to(weight.dtype), weight, bias)  # [rows, vocabulary]
            q = functional.linear(teacher[part].to(weight.dtype), weight, bias) if teacher is not None else None
            ce_sum, kl_sum, g = token_loss(z, q, labels[part], ce_weight, kl_weight, grad is not None)
            ce += ce_sum
            kl += kl_sum
            if grad is not None and g is not None:
                grad[part] = (g @ weight).mul_((part.stop - a) / tokens)  # g is that of the mean over these rows
        ctx.grad = grad
        ce, kl = ce / tokens, kl / tokens
        ctx.mark_non_differentiable(ce, kl)
        return ce_weight * ce + kl_weight * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None  # freed as soon as it is used
        return (grad * grads[0] if grad is not None else None, *[None] * 6)
