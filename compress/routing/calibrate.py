"""Measure how many experts run, and set a decision's one free number so that a target share of them does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.recipe_routing import RoutingMethod
from compress.routing.decisions import Decision, FirstRule, RatioRule, ShareRule, make_decision
from compress.routing.gate import Routing
from compress.routing.mixtures import Mixture, Seen
from compress.routing.router import TopAnyRouter
from compress.routing.rules import check_target, median_ratios
from compress.walk import evaluating

TOLERANCE = 5e-4  # the search ends when the activation is this close to the target
ATTEMPTS = 30  # passes over the text; it takes about ten
_WIDEST = 1e3  # scores of slots beyond this are no scores of a trained router


@torch.no_grad()
def experts_per_token(model: nn.Module, routing: Routing, batches: Sequence[Tensor]) -> dict[str, float]:
    """Experts that a token runs on average, by mixture, on token ids int64 `[batch, length]`."""
    with evaluating(model), routing.counting() as counts:
        for batch in batches:
            model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
    return {name: mean_experts(count) for name, count in counts.items()}


def mean_experts(counts: Tensor) -> float:
    """Counts of tokens by number of experts, `[k + 1]` -> experts a token."""
    return float((counts * torch.arange(len(counts))).sum() / counts.sum())


def activation(mixtures: Sequence[Mixture], experts: Mapping[str, float]) -> float:
    """The share of the routed experts that run, over all mixtures together: 1 is the unpruned model."""
    return sum(experts[m.name] for m in mixtures) / sum(m.top_k for m in mixtures)


def medians(seen: Mapping[str, Seen]) -> dict[str, Tensor]:
    """ODP's thresholds by mixture, float32 `[k - 1]`."""
    return {name: median_ratios(found.weights) for name, found in seen.items()}


def rule_decisions(
    method: RoutingMethod, mixtures: Sequence[Mixture], seen: Mapping[str, Seen], keep: int | None
) -> dict[str, Decision]:
    """The decisions of a training-free rule, before any target: odp with the medians themselves, top-p with the whole weight, top-k with `keep`."""
    decisions = {mixture.name: make_decision(method, mixture) for mixture in mixtures}
    for name, threshold in medians(seen).items():
        decision = decisions[name]
        if isinstance(decision, RatioRule):
            decision.thresholds.copy_(threshold)
        elif isinstance(decision, FirstRule) and keep is not None:
            decision.keep.fill_(keep)
    return decisions


def meet_target(
    model: nn.Module,
    routing: Routing,
    batches: Sequence[Tensor],
    target: float,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Set one number, the same in all layers, so that the share `target` of the routed experts runs on `batches`; returns the share met.

    otp: what is added to the scores of all slots. odp: what multiplies the medians. top-p: the share of routing weight. Found by search
    on the model as it runs, since what one layer drops changes what the next one sees. Raises UsageError for a target that no routing can
    meet, and CompressError when the target lies in a jump of the rule (tokens that are all alike).
    """
    for mixture in routing.mixtures:
        check_target(target, mixture.top_k)
    decisions = [gate.decision for gate in routing.gates]
    first = decisions[0]
    adjust: Callable[[float], None]
    if isinstance(first, TopAnyRouter):
        low, high, adjust = -1.0, 1.0, functools.partial(_set_offset, decisions)
    elif isinstance(first, RatioRule):
        low, high, adjust = _multipliers(decisions)
    elif isinstance(first, ShareRule):
        low, high, adjust = 0.0, 1.0, functools.partial(_set_share, decisions)
    else:
        raise CompressError(f"method {routing.method} has nothing to calibrate")

    passes = 0

    def excess(value: float) -> float:
        nonlocal passes
        adjust(value)
        found = activation(routing.mixtures, experts_per_token(model, routing, batches))
        passes += 1
        if progress is not None:
            progress(passes, found)
        return found - target

    found = target + _find_zero(excess, low, high, isinstance(first, TopAnyRouter))
    if abs(found - target) > 0.01:
        raise CompressError(
            f"no setting runs {target:.1%} of the experts on the calibration text; the nearest one runs {found:.1%}"
        )
    return found


def _find_zero(excess: Callable[[float], float], low: float, high: float, widen: bool) -> float:
    """Search for the zero of a function that never falls and may jump, by false position between a tenth and nine tenths of the bracket.

    widen: the ends are a guess, to be moved apart until they enclose the zero. Returns the excess at the last value tried.
    """
    at_low, at_high = excess(low), excess(high)
    while widen and at_low > TOLERANCE and high - low < _WIDEST:
        low, high, at_high = low - 2 * (high - low), low, at_low
        at_low = excess(low)
    while widen and at_high < -TOLERANCE and high - low < _WIDEST:
        low, high, at_low = high, high + 2 * (high - low), at_high
        at_high = excess(high)
    last = at_high
    for attempt in range(ATTEMPTS):
        if abs(last) <= TOLERANCE:
            break
        share = at_low / (at_low - at_high) if attempt % 3 < 2 and at_low < 0 < at_high else 0.5
        middle = low + min(max(share, 0.1), 0.9) * (high - low)
        last = excess(middle)
        if last < 0:
            low, at_low = middle, last
        else:
            high, at_high = middle, last
    return last


def _set_offset(decisions: Sequence[Decision], value: float) -> None:
    for decision in decisions:
        assert isinstance(decision, TopAnyRouter)
        decision.offset.fill_(value)


def _multipliers(decisions: Sequence[Decision]) -> tuple[float, float, Callable[[float], None]]:
    """More experts with a smaller multiplier. Searched as -m in [-high, 0]: ratios are at most 1, so 1 / the least median drops them all."""
    bases = [decision.thresholds.clone() for decision in decisions if isinstance(decision, RatioRule)]
    least = min(float(base[base > 0].min()) if bool((base > 0).any()) else 1.0 for base in bases)

    def adjust(value: float) -> None:
        for decision, base in zip(decisions, bases, strict=True):
            assert isinstance(decision, RatioRule)
            decision.thresholds.copy_(-value * base)

    return -1.01 / least, 0.0, adjust


def _set_share(decisions: Sequence[Decision], value: float) -> None:
    for decision in decisions:
        assert isinstance(decision, ShareRule)
        decision.share.fill_(value)
