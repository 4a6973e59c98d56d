"""Rules that say from a token's routing weights how many of its experts run. Pure functions, no state.

`weights` is always `[tokens, k]`, each row from the largest to the smallest routing weight; the answer is int64 `[tokens]` in 1..k: a
token runs that many of its experts, the first ones. Every rule compares weights of one token with each other, so that it does not matter
whether the model renormalises or scales them.

ODP is the rule of MC (Huang et al., ICLR 2025, arXiv 2410.06270), stated there for k = 2 and generalised here; the importance of a token is
its eq. for I_j with the attention that a token *receives*, which is a sum over queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import UsageError


def keep_first(weights: Tensor, keep: int | Tensor) -> Tensor:
    """`keep` experts for every token (at most k): a plain smaller k."""
    tokens, k = weights.shape
    return torch.as_tensor(keep, dtype=torch.int64, device=weights.device).clamp(max=k).expand(tokens)


def keep_share(weights: Tensor, share: float | Tensor) -> Tensor:
    """Top-p: as few experts as together hold `share` of the token's routing weight."""
    wide = _wide(weights)
    held = wide.cumsum(-1) / wide.sum(-1, keepdim=True)
    return 1 + (held[:, :-1] < share).sum(-1)


def keep_ratio(weights: Tensor, thresholds: Tensor) -> Tensor:
    """ODP: expert j runs while `w_j / w_1 >= thresholds[j - 2]`; the first that falls below ends it.

    thresholds: `[k - 1]`. With k = 2 this is the paper's rule: the second expert is dropped when `w_2 / w_1 < mu`.
    """
    wide = _wide(weights)
    passed = wide[:, 1:] >= thresholds.to(wide) * wide[:, :1]
    return 1 + passed.long().cumprod(-1).sum(-1)


def _wide(weights: Tensor) -> Tensor:
    """At least float32: sums and ratios in bfloat16 would move a threshold by a percent."""
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def median_ratios(weights: Tensor) -> Tensor:
    """ODP's mu: the medians of `w_j / w_1` for j = 2..k over calibration tokens, float32 `[k - 1]`."""
    wide = _wide(weights)
    return (wide[:, 1:] / wide[:, :1]).float().median(0).values


def received_attention(attention: Tensor) -> Tensor:
    """The attention that a token receives, on average from itself and the queries after it, over all heads.

    attention: `[batch, heads, queries, keys]`, rows that sum to 1; the last `queries` keys are the queries themselves (those before them
    come from a cache). Returns float32 `[batch, queries]`: `sum_{i >= j} A[i, j] / (L - j)` with j from 0.

    A sum over keys in its place, as in the released code, is 1 for every token and says nothing.
    """
    queries = attention.shape[-2]
    own = attention[..., -queries:]
    total = own.float().mean(1).tril().sum(-2)  # a bidirectional mask would also let earlier tokens look: they do not count
    after = torch.arange(queries, 0, -1, device=total.device)
    return total / after


def importance(hidden: Tensor, received: Tensor) -> Tensor:
    """I_j = ||t_j||_1 times the attention that it receives. hidden `[batch, length, hidden]`, received `[batch, length]`."""
    return hidden.float().abs().sum(-1) * received


def most_important(values: Tensor, share: float) -> Tensor:
    """The `floor(share * length)` most important tokens of each sequence, bool; values `[batch, length]`. The earlier one on a tie."""
    count = int(share * values.shape[-1])
    first = values.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, first, True)


def check_target(target: float, k: int) -> None:
    """Raise UsageError for a share of a token's k experts that no routing can meet: each token runs at least one."""
    if not 1 / k <= target <= 1:
        raise UsageError(
            f"target_activation {target:g} cannot be met: each token runs at least one of its {k} experts, so it lies between "
            f"{1 / k:.3g} and 1"
        )
