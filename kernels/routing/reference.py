"""How many experts a token runs, by the learned router of top-any routing: the definition, in torch, and the form for GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6  # of the RMS norm
LEAST_WEIGHT = 1e-6  # a routing weight below counts as this before its logarithm is taken


class Router(NamedTuple):
    """The numbers of a router, float64, standardisation of its features folded in.

    project `[r, H]`; mix `[r + k - 1, k]`; shift `[r + k - 1]`; read `[k - 1, r]`; significance `[E]`; offset `[]`. The first r rows of mix and
    shift belong to the hidden layer, the others to the scores.
    """

    project: Tensor
    mix: Tensor
    shift: Tensor
    read: Tensor
    significance: Tensor
    offset: Tensor


def count_experts(hidden: Tensor, weights: Tensor, experts: Tensor, router: Router) -> Tensor:
    """The most probable number of experts, int64 `[tokens]` in 1..k; the larger one on a tie.

    hidden: `[tokens, H]`. weights: `[tokens, k]`, each row from the largest to the smallest. experts: int64 `[tokens, k]`, in that order.

        n = hidden / sqrt(mean(hidden^2) + eps);    [a; b] = mix log(weights) + shift
        s = read silu(project n + a) + b + significance[experts 2..k] + offset;    logit_j = s_2 + ... + s_j,  logit_1 = 0

    All of it in float64 whatever the model's type: the order in which a product is summed, which may depend on the number of tokens, then
    moves a logit by less than 1e-12, so that it does not decide.
    """
    dtype = router.project.dtype
    rank, k = router.read.shape[1], weights.shape[1]
    wide = hidden.to(dtype)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    mixed = functional.linear(weights.to(dtype).clamp_min(LEAST_WEIGHT).log(), router.mix, router.shift)
    inner = functional.silu(functional.linear(wide, router.project) * inverse + mixed[:, :rank])
    scores = functional.linear(inner, router.read) + mixed[:, rank:] + router.significance[experts[:, 1:]] + router.offset
    best = scores.cumsum(-1).flip(-1).max(-1)
    return torch.where(best.values >= 0, k - best.indices, 1)
