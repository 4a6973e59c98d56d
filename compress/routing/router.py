"""The learned router of Online Top-any Pruning (OTP), and its Gumbel-softmax relaxation.

MC# (arXiv 2510.10962) says that a small router a layer chooses among masks over a token's experts and is trained by Gumbel-softmax; its
code was never released, so what follows the idea here is this tool's own. Candidate j of k keeps the first j experts in the order of
routing weight. A slot (one of the token's experts, in that order) has a score, and candidate j has the logit

    logit_j = s_2 + ... + s_j        (logit_1 = 0)

so that one number added to all scores moves every token towards more experts or towards fewer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress_kernels.routing import Router, count_experts
from compress_kernels.routing.reference import EPS, LEAST_WEIGHT


class TopAnyRouter(nn.Module):
    """Decides from a token's hidden state, its routing weights and its experts how many of them run.

        u = silu(P h + Q w + c)          h [H]: hidden state, RMS-normalised and standardised by channel; w [k]: standardised log weights
        s = A u + B w + b + t[experts]   [k - 1], the scores of slots 2..k; t [E]: how much each expert matters

    A, B and t start at 0 and b at a constant, so that every token starts with the same distribution and its most probable candidate is
    all k experts. Computed in the dtype of the parameters whatever the model's is; no token sees another.
    """

    def __init__(self, hidden: int, top_k: int, experts: int, rank: int, keep_all: float = 0.95, seed: int = 0) -> None:
        """keep_all: the probability of candidate k to start with. seed: of P and Q."""
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.hidden, self.top_k, self.experts, self.rank = hidden, top_k, experts, rank
        self.project = nn.Parameter(torch.randn(rank, hidden, generator=draw) / math.sqrt(hidden))  # P
        self.mix = nn.Parameter(torch.randn(rank, top_k, generator=draw) / math.sqrt(top_k))  # Q
        self.shift = nn.Parameter(torch.zeros(rank))  # c
        self.read = nn.Parameter(torch.zeros(top_k - 1, rank))  # A
        self.direct = nn.Parameter(torch.zeros(top_k - 1, top_k))  # B
        self.bias = nn.Parameter(torch.full((top_k - 1,), _even_score(top_k, keep_all)))  # b
        self.significance = nn.Parameter(torch.zeros(experts))  # t
        for name, width in (("hidden", hidden), ("weight", top_k)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_spread", torch.ones(width))
        self.register_buffer("offset", torch.zeros(()))  # added to every score: calibrated so that a target activation is met
        for name in ("project", "mix", "shift"):
            self.register_buffer(f"folded_{name}", torch.empty(0), persistent=False)
        self.folded_project: Tensor
        self.folded_mix: Tensor
        self.folded_shift: Tensor
        self.offset: Tensor
        self.hidden_mean: Tensor
        self.hidden_spread: Tensor
        self.weight_mean: Tensor
        self.weight_spread: Tensor

    @torch.no_grad()
    def standardise(self, hidden: Tensor, weights: Tensor) -> None:
        """Take mean and spread of the features from calibration tokens: hidden `[n, H]`, weights `[n, k]` in falling order."""
        for name, values in (("hidden", _normed(hidden.float())), ("weight", _logs(weights.float()))):
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_spread").copy_(values.std(0, unbiased=False).clamp_min(1e-3))

    def logits(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """hidden `[tokens, H]`; weights `[tokens, k]` in falling order, experts int64 `[tokens, k]` in that order -> `[tokens, k]`."""
        dtype = self.project.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            h = (_normed(hidden.to(dtype)) - self.hidden_mean) / self.hidden_spread
            w = (_logs(weights.to(dtype)) - self.weight_mean) / self.weight_spread
            u = functional.silu(functional.linear(h, self.project, self.shift) + functional.linear(w, self.mix))
            scores = functional.linear(u, self.read, self.bias) + functional.linear(w, self.direct)
            scores = scores + self.significance[experts[:, 1:]] + self.offset
            return functional.pad(scores.cumsum(-1), (1, 0))

    def fold(self) -> None:
        """Make ready for inference: standardisation and constants go into matrices, so that little is left to do for a token.

        The parameters must not change afterwards (`offset` may).
        """
        with torch.no_grad():
            project, mix, direct = (
                self.project / self.hidden_spread,
                self.mix / self.weight_spread,
                self.direct / self.weight_spread,
            )
            shift = self.shift - project @ self.hidden_mean - mix @ self.weight_mean
            self.folded_project = project
            self.folded_mix = torch.cat([mix, direct])
            self.folded_shift = torch.cat([shift, self.bias - direct @ self.weight_mean])

    def forward(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """The number of experts that run, int64 `[tokens]` in 1..k: the most probable candidate, the larger one on a tie. After `fold`."""
        folded = (self.folded_project, self.folded_mix, self.folded_shift)
        return count_experts(hidden, weights, experts, Router(*folded, self.read, self.significance, self.offset))


def relaxed_keep(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """A differentiable mask over the slots, drawn from the candidates' logits: `[tokens, k]` -> `[tokens, k]` in [0, 1].

    noise: Gumbel noise of the same shape, or None for none. `y = softmax((logits + noise) / temperature)`, and slot i has the probability
    `y_i + ... + y_k` that the drawn candidate keeps it.
    """
    y = ((logits if noise is None else logits + noise) / temperature).softmax(-1)
    return _keeps(y)


def straight_through_keep(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """As `relaxed_keep`, but the values are those of the most probable candidate (0 or 1); the gradient is that of the relaxation."""
    soft = relaxed_keep(logits, temperature, noise)
    drawn = logits.shape[-1] - 1 - (logits if noise is None else logits + noise).flip(-1).argmax(-1, keepdim=True)
    hard = (torch.arange(logits.shape[-1], device=logits.device) <= drawn).to(soft.dtype)
    return hard + (soft - soft.detach())  # in this order the value is hard, bit for bit


def expected_share(logits: Tensor) -> Tensor:
    """The share of its experts that a token runs on average, if a candidate is drawn from its logits: `[tokens, k]` -> `[tokens]`."""
    return _keeps(logits.softmax(-1)).mean(-1)


def gumbel_noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise."""
    return torch.empty(shape, dtype=dtype, device=device).exponential_(generator=generator).log_().neg_()


def _keeps(candidates: Tensor) -> Tensor:
    """Probabilities of the candidates -> probability of each slot to run; the first always does."""
    later = candidates[..., 1:].flip(-1).cumsum(-1).flip(-1)
    return torch.cat([torch.ones_like(candidates[..., :1]), later], -1)


def _even_score(k: int, keep_all: float) -> float:
    """The score s that, given to every slot, makes candidate k as probable as `keep_all`: e^{(k-1)s} / sum_j e^{(j-1)s}, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        probability = 1 / sum(math.exp(-middle * j) for j in range(k))
        low, high = (middle, high) if probability < keep_all else (low, middle)
    return high


def _normed(hidden: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)


def _logs(weights: Tensor) -> Tensor:
    return weights.clamp_min(LEAST_WEIGHT).log()
