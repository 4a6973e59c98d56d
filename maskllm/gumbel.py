"""From logits to masks: the differentiable soft mask, the hard mask it ends in, and the schedules of temperature and scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compress_kernels.gumbel import Draw, masked_weight, masked_weight_backward
from maskllm.errors import MaskError
from maskllm.patterns import Pattern

Parametrization = Literal["patterns", "scores"]
Curve = Literal["linear", "exponential", "cosine", "constant"]

_HARD_CHUNK = 1 << 17  # groups decided at once, so that the candidates' logits stay in cache


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end` over the run.

    `linear` is the paper's; `exponential` moves by a constant factor a step (both ends > 0), so that a temperature spends as many
    steps between 4 and 1 as between 1 and 0.25.
    """

    start: float
    end: float
    curve: Curve = "linear"

    def __post_init__(self) -> None:
        if self.curve == "exponential" and not (self.start > 0 and self.end > 0):
            raise MaskError(f"an exponential schedule needs two positive ends, not {self.start} -> {self.end}")

    def at(self, progress: float) -> float:
        """The value at `progress` in [0, 1]: 0 is the first step, 1 the last."""
        progress = min(max(progress, 0.0), 1.0)
        if self.curve == "constant":
            return self.start
        if self.curve == "exponential":
            return self.start * (self.end / self.start) ** progress
        if self.curve == "cosine":
            return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.start + (self.end - self.start) * progress


class _SoftMask(torch.autograd.Function):
    """Logits `[..., K/M, W]` and weight `[..., K]` -> (masked weight, its squared norm). Saves both and the draw's counter, and no mask.

    Arrays are flattened in here, where autograd does not keep account of it: several hundred weights a step make that count.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        weight: Tensor,
        table: Tensor,
        n: int,
        scores: bool,
        draw: Draw,
        out_dtype: torch.dtype,
        want_norm: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, weight, table)
        ctx.n, ctx.scores, ctx.draw, ctx.want_norm = n, scores, draw, want_norm
        ctx.set_materialize_grads(False)
        groups = weight.reshape(-1, table.shape[1])
        out, norm = masked_weight(logits.reshape(-1, logits.shape[-1]), groups, table, scores, draw, out_dtype, want_norm, n=n)
        return out.view(weight.shape), norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, weight, table = ctx.saved_tensors
        grad, grad_norm = grads[0], grads[1] if ctx.want_norm else None
        if grad is None and grad_norm is None:
            return (None,) * 8
        m = table.shape[1]
        out = masked_weight_backward(
            grad.reshape(-1, m) if grad is not None else None,
            grad_norm,
            logits.reshape(-1, logits.shape[-1]),
            weight.reshape(-1, m),
            table,
            ctx.scores,
            ctx.draw,
            n=ctx.n,
        )
        return (out.view(logits.shape), *(None,) * 7)


def soft_masked_weight(
    logits: Tensor,
    weight: Tensor,
    pattern: Pattern,
    parametrization: Parametrization,
    draw: Draw,
    *,
    table: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    want_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Multiply a frozen weight by a mask drawn from its logits; gradients reach the logits only.

    logits: float `[..., K/M, C]` (patterns) or `[..., K/M, M]` (scores). weight: `[..., K]`, grouped along its last dimension.
    table: `pattern.candidates()` as float on the right device, to save making it again. out_dtype: the weight's by default.
    Returns the masked weight `[..., K]` and the scalar `sum(w'^2)` (0 unless `want_norm`), both differentiable.
    """
    width = logit_width(pattern, parametrization)
    if logits.shape != (*weight.shape[:-1], weight.shape[-1] // pattern.m, width):
        raise MaskError(
            f"logits {tuple(logits.shape)} do not belong to a weight {tuple(weight.shape)} with {pattern} {parametrization}"
        )
    if table is None:
        table = pattern.candidates().to(weight.device, torch.float32)
    return _SoftMask.apply(
        logits, weight.detach(), table, pattern.n, parametrization == "scores", draw, out_dtype or weight.dtype, want_norm
    )


def logit_width(pattern: Pattern, parametrization: Parametrization) -> int:
    """Learned numbers a group: C(M, N) for `patterns`, M for `scores`."""
    return pattern.count if parametrization == "patterns" else pattern.m


@torch.no_grad()
def hard_mask(logits: Tensor, pattern: Pattern, parametrization: Parametrization) -> Tensor:
    """The most probable mask: logits `[..., K/M, C or M]` -> bool `[..., K]`. On a tie the candidate of lower index."""
    table = pattern.candidates().to(logits.device)
    groups = logits.reshape(-1, logits.shape[-1])
    out = torch.empty((groups.shape[0], pattern.m), dtype=torch.bool, device=logits.device)
    for start in range(0, groups.shape[0], _HARD_CHUNK):
        part = groups[start : start + _HARD_CHUNK]
        part = part.to(torch.promote_types(part.dtype, torch.float32))  # two bfloat16 scores summed in bfloat16 would tie
        best = part.argmax(-1) if parametrization == "patterns" else torch.mm(table.to(part.dtype), part.t()).argmax(0)
        out[start : start + _HARD_CHUNK] = table[best]
    return out.view(*logits.shape[:-2], logits.shape[-2] * pattern.m)


@torch.no_grad()
def prior_logits(
    mask: Tensor,
    pattern: Pattern,
    parametrization: Parametrization,
    *,
    strength: float,
    std: float,
    noise: bool,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Initial logits that favour a known mask (paper eq. 9-10): `pi += (<M0, S_k> - mean) * std * strength`.

    mask: bool `[..., K]`, exactly N of M. strength: the paper's alpha (3). std: standard deviation of the initial logits (0.01).
    noise=True draws N(0, std) first, as the paper does; the prior is then the argmax of only about 94 % of the groups at strength 3.
    noise=False starts from zero, and the argmax is the prior exactly.
    Returns float32 `[..., K/M, C]` or, for scores, `[..., K/M, M]`: a kept weight's score is `std * strength * (1 - N/M)`, a
    pruned one's `-std * strength * N/M`, which gives the same candidate logits.
    """
    pattern.check_divides(mask.shape[-1], "prior mask")
    groups = mask.unflatten(-1, (-1, pattern.m)).float()  # [..., K/M, M]
    if parametrization == "patterns":
        overlap = groups @ pattern.candidates().to(groups).t()  # <M0, S_k>: [..., K/M, C]
        lean = overlap - pattern.n**2 / pattern.m  # its mean over the candidates
    else:
        lean = groups - pattern.n / pattern.m
    lean *= strength * std
    if noise:
        # Noise on scores is scaled so that candidate logits have the spread `std` they have in the other parametrisation.
        spread = std if parametrization == "patterns" else std / math.sqrt(pattern.n)
        lean += torch.empty_like(lean).normal_(0, spread, generator=generator)
    return lean
