"""Bit allocation for experts from their statistics, by one of three costs.

`pmq` is the allocation of MC (Huang et al., ICLR 2025, arXiv 2410.06270) as its published allocations have it: a
programme a layer,

    min  sum_ij 1000 (phi_i / sum phi)^1 (w_i / sum w)^1.5 eps_ij^1 x_ij
    s.t. sum_ij j x_ij <= floor(k n),   sum_j x_ij = 1,   at least one expert at each of the two greatest widths,

with n experts at k bits on average, phi the selection frequency, w the summed routing weight, eps the quantisation loss. The
paper states exponents 1, 1, 2 and the budget as an equation; the published allocations are those of 1, 1.5, 1 and the inequality.
Where two allocations cost the same, either may come out.

`error` and `fisher` are one programme over all layers. `error`: the sum of squared output errors, quant_loss^2. Only one expert
changes in each measurement; squares add up where the errors of two experts are uncorrelated. The losses of all layers must be on
one scale: where the blocks' outputs grow with depth, divide each layer's by the norm of the residual stream before. `fisher`: the
measured sum of squared gradient times squared change, an estimate of the loss (GEMQ, arXiv 2605.23078), taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.errors import UsageError
from compress.moe.allocate import Allocation, AtLeast, Budget, Candidate, Limit, Unit, allocate, matching
from compress.moe.statistics import ExpertStatistics, LayerStatistics

Floats = NDArray[np.float64]
Mode = Literal["pmq", "error", "fisher"]
PMQ_EXPONENTS = (1.0, 1.5, 1.0)  # of frequency, weight, quantisation loss: the published allocations
PMQ_PAPER_EXPONENTS = (1.0, 1.0, 2.0)


@dataclass(frozen=True)
class Options:
    """How to allocate. bits: candidate widths, those of the statistics by default; the rest as in `allocate`."""

    mode: Mode = "pmq"
    bits: tuple[int, ...] = ()
    exponents: tuple[float, float, float] = PMQ_EXPONENTS
    limits: tuple[Limit, ...] = ()
    protect: tuple[str, ...] = ()
    gap: float = 0.0
    solver: Literal["auto", "highs"] = "auto"


def expert_costs(layer: LayerStatistics, index: int, mode: Mode, exponents: tuple[float, float, float] = PMQ_EXPONENTS) -> Floats:
    """Costs [experts, bits] of a layer. Raises UsageError when the mode needs what was not measured, or sums of zero."""
    if mode == "fisher":
        return _measured(layer.fisher, "fisher", mode)
    loss = _measured(layer.quant_loss, "quant_loss", mode)
    if mode == "error":
        return loss**2
    shares = []
    for name in ("frequency", "weight"):
        values = _measured(getattr(layer, name), name, mode)
        if not values.sum() > 0:
            raise UsageError(f"layer {index}: all its experts have {name} 0, so that pmq cannot weigh them")
        shares.append(values / values.sum())
    alpha, beta, gamma = exponents
    return 1000 * (shares[0] ** alpha * shares[1] ** beta)[:, None] * loss**gamma


def _measured(values: Floats | None, name: str, mode: str) -> Floats:
    if values is None:
        raise UsageError(f"mode {mode} needs {name}, which the statistics do not have")
    return values


def expert_units(statistics: ExpertStatistics, options: Options) -> dict[int, list[Unit]]:
    """The experts as units named `layers.L.experts.E`, by layer. Raises UsageError for widths that were not measured."""
    bits = options.bits or statistics.bits
    missing = sorted(set(bits) - set(statistics.bits))
    if missing:
        raise UsageError(f"no loss was measured at {missing[0]} bits, only at {', '.join(map(str, statistics.bits))}")
    columns = [statistics.bits.index(b) for b in sorted(set(bits))]
    sizes = [statistics.expert_bytes(statistics.bits[j]) for j in columns]
    units = {}
    for index, layer in statistics.layers.items():
        costs = expert_costs(layer, index, options.mode, options.exponents)[:, columns].tolist()
        units[index] = [
            Unit(
                f"layers.{index}.experts.{e}",
                statistics.expert_weights,
                tuple(
                    Candidate(statistics.bits[j], cost, statistics.group_size if nbytes is not None else None, nbytes)
                    for j, cost, nbytes in zip(columns, row, sizes, strict=True)
                ),
            )
            for e, row in enumerate(costs)
        ]
    return units


def allocate_experts(statistics: ExpertStatistics, budget: Budget, options: Options = Options()) -> Allocation:
    """Allocate bits to all experts. Raises UsageError as `allocate` and `expert_units` do, and for pmq with a budget in bytes."""
    by_layer = expert_units(statistics, options)
    if options.mode != "pmq":
        units = [unit for layer in by_layer.values() for unit in layer]
        return allocate(units, budget, limits=options.limits, protect=options.protect, gap=options.gap, solver=options.solver)
    if budget.measure != "average-bits":
        raise UsageError(
            "pmq shares out average bits layer by layer; for a budget in bytes or bits per weight use mode error or fisher"
        )
    names = [unit.name for layer in by_layer.values() for unit in layer]
    for pattern in [*(limit.pattern for limit in options.limits), *options.protect]:
        if not len(matching(names, pattern)):
            raise UsageError(f"the pattern {pattern!r} matches no unit; units are named like {names[0]}")
    return _joined([_pmq_layer(index, units, budget, options) for index, units in by_layer.items()])


def _pmq_layer(index: int, units: Sequence[Unit], budget: Budget, options: Options) -> Allocation:
    names = [unit.name for unit in units]
    widths = sorted({candidate.bits for candidate in units[0].candidates})
    try:
        return allocate(
            units,
            budget,
            limits=[limit for limit in options.limits if len(matching(names, limit.pattern))],
            protect=[pattern for pattern in options.protect if len(matching(names, pattern))],
            rules=[AtLeast(f"layers.{index}.*", bits) for bits in reversed(widths[-2:])],
            gap=options.gap,
            solver=options.solver,
        )
    except UsageError as error:
        raise UsageError(f"layer {index}: {error}") from None


def _joined(layers: Sequence[Allocation]) -> Allocation:
    """The allocations of independent programmes as one: sums, and the bound of the sum is the sum of the bounds."""
    chosen = {name: candidate for layer in layers for name, candidate in layer.chosen.items()}
    experts = [len(layer.chosen) for layer in layers]
    nbytes = [layer.nbytes for layer in layers]
    return Allocation(
        chosen,
        math.fsum(layer.objective for layer in layers),
        math.fsum(layer.bound for layer in layers),
        math.fsum(layer.lp_bound for layer in layers),
        float(np.average([layer.average_bits for layer in layers], weights=experts)),
        None if None in nbytes else sum(n for n in nbytes if n is not None),
        sum(layer.seconds for layer in layers),
        f"a programme a layer: {'; '.join(sorted({layer.method for layer in layers}))}",
    )


def widths_by_layer(statistics: ExpertStatistics, allocation: Allocation) -> dict[int, list[int]]:
    """The chosen widths, expert by expert, of every layer."""
    return {
        index: [allocation.chosen[f"layers.{index}.experts.{e}"].bits for e in range(layer.experts)]
        for index, layer in statistics.layers.items()
    }
