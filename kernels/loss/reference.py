"""Cross-entropy and distillation of rows of logits with their gradient, in torch: the definition, and the form for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22  # logits handled at once: 16 MiB of float32 a temporary, whatever the vocabulary


def token_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, ce_weight: float, kl_weight: float, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of cross-entropy and KL(teacher || student) over the rows with a label, in nats, and the gradient of the weighted mean.

    student, teacher: logits `[rows, vocabulary]`. labels: int64 `[rows]`, -1 for a row that does not count. For student logits z,
    teacher probabilities q and label t of one row, with p = softmax(z),

        ce = -log p_t,   kl = sum_v q_v (log q_v - log p_v),   d(a ce + b kl)/dz = a (p - onehot_t) + b (p - q).

    Returns (ce_sum, kl_sum, grad); grad `[rows, vocabulary]` in the student's dtype is that of `(a ce_sum + b kl_sum) / counted rows`,
    None unless wanted; kl_sum is 0 without a teacher.
    """
    rows, vocabulary = student.shape
    counted = labels >= 0
    scale = counted.sum().clamp_min(1)
    wide = torch.promote_types(student.dtype, torch.float32)
    grad = torch.empty_like(student) if want_grad else None
    ce_sum = torch.zeros((), dtype=wide, device=student.device)
    kl_sum = torch.zeros_like(ce_sum)
    step = max(1, _CHUNK // vocabulary)
    for a in range(0, rows, step):
        here = counted[a : a + step].unsqueeze(1)
        target = labels[a : a + step].clamp_min(0).unsqueeze(1)
        log_p = torch.log_softmax(student[a : a + step].to(wide), -1)
        ce_sum -= log_p.gather(1, target).masked_fill(~here, 0).sum()
        log_q = None
        if teacher is not None:
            log_q = torch.log_softmax(teacher[a : a + step].to(wide), -1)
            q = log_q.exp()
            # A token that both mask out (-inf - -inf) adds nothing: its q is 0.
            kl_sum += torch.sum((log_q - log_p).mul_(q).masked_fill_(q == 0, 0).masked_fill_(~here, 0))
        if grad is not None:
            g = log_p.exp_().mul_(ce_weight + kl_weight)
            if log_q is not None:
                g -= q.mul_(kl_weight)
            if ce_weight:
                g.scatter_add_(1, target, torch.full_like(target, -ce_weight, dtype=g.dtype))
            grad[a : a + step] = g.div_(scale).masked_fill_(~here, 0)
    return ce_sum, kl_sum, grad
