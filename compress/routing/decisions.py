"""What decides how many experts a token runs, one module a mixture: the rules of `compress.routing.rules` and the learned router alike.

All are called with a token's hidden state `[tokens, H]`, its routing weights in falling order `[tokens, k]` and its experts in that order,
int64 `[tokens, k]`, and return int64 `[tokens]` in 1..k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.recipe_routing import RoutingMethod
from compress.routing import rules
from compress.routing.mixtures import Mixture
from compress.routing.router import TopAnyRouter


class RatioRule(nn.Module):
    """ODP: thresholds on the ratio to the largest routing weight."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.register_buffer("thresholds", torch.zeros(top_k - 1))
        self.thresholds: Tensor

    def forward(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return rules.keep_ratio(weights, self.thresholds)


class ShareRule(nn.Module):
    """Top-p."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("share", torch.ones(()))
        self.share: Tensor

    def forward(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return rules.keep_share(weights, self.share)


class FirstRule(nn.Module):
    """Top-k: the same number for every token."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.register_buffer("keep", torch.tensor(top_k))
        self.keep: Tensor

    def forward(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return rules.keep_first(weights, self.keep)


Decision = TopAnyRouter | RatioRule | ShareRule | FirstRule


def make_decision(method: RoutingMethod, mixture: Mixture, *, rank: int = 32, keep_all: float = 0.95, seed: int = 0) -> Decision:
    """A decision for a mixture that prunes nothing yet. rank, keep_all, seed: of method otp."""
    if method == "otp":
        return TopAnyRouter(mixture.hidden, mixture.top_k, mixture.experts, rank, keep_all, seed)
    if method == "odp":
        return RatioRule(mixture.top_k)
    if method == "top-p":
        return ShareRule()
    if method == "top-k":
        return FirstRule(mixture.top_k)
    raise UsageError(f"there is no routing method {method!r}")
