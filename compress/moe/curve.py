"""The trade-off curve: predicted cost against size, over a range of budgets."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from compress.errors import UsageError
from compress.moe.allocate import Allocation, Budget
from compress.moe.modes import Options, allocate_experts, expert_units
from compress.moe.statistics import ExpertStatistics

BUDGETS = 20


def trade_off(
    statistics: ExpertStatistics, options: Options, budgets: int = BUDGETS, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Allocations at `budgets` average bits, evenly spaced from the narrowest width to the widest.

    The series are the mode of `options`, pmq's allocations (with its published exponents) unless that is the mode, and all
    experts at one width. The costs of all of them are those of the mode. A point has budget, average_bits, cost, gap, and nbytes
    where known; where a budget admits nothing, the reason under `infeasible` instead. `notes` says which series is missing and
    why.
    """
    units = [unit for layer in expert_units(statistics, options).values() for unit in layer]
    cost = {(unit.name, candidate.bits): candidate.cost for unit in units for candidate in unit.candidates}
    widths = sorted({candidate.bits for candidate in units[0].candidates})
    modes, notes = {options.mode: options}, []
    if options.mode != "pmq":
        pmq = replace(options, mode="pmq")
        try:
            expert_units(statistics, pmq)
            modes["pmq"] = pmq
        except UsageError as error:
            notes.append(f"no curve for pmq: {error}")

    def point(budget: float, made: Allocation) -> dict[str, Any]:
        total = math.fsum(cost[name, candidate.bits] for name, candidate in made.chosen.items())
        return {"budget": budget, "average_bits": made.average_bits, "cost": total, "gap": made.gap, "nbytes": made.nbytes}

    series: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
    done = 0
    for budget in np.linspace(widths[0], widths[-1], budgets).tolist():
        for name, its_options in modes.items():
            try:
                series[name].append(point(budget, allocate_experts(statistics, Budget(budget), its_options)))
            except UsageError as error:
                series[name].append({"budget": budget, "infeasible": str(error)})
            done += 1
            if progress is not None:
                progress(done, budgets * len(modes))
    each = [statistics.expert_bytes(b) for b in widths]
    series["uniform"] = [
        {
            "budget": b,
            "average_bits": b,
            "cost": math.fsum(cost[unit.name, b] for unit in units),
            "nbytes": None if size is None else size * len(units),
        }
        for b, size in zip(widths, each, strict=True)
    ]
    return {"mode": options.mode, "bits": widths, "series": series, "notes": notes}


def draw(curve: dict[str, Any]) -> bytes:
    """The picture of a trade-off curve, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, points), style in zip(
        curve["series"].items(), (("o-", "#0b7a4b"), ("s--", "#1c2430"), ("x", "#9fb0c3")), strict=False
    ):
        feasible = [p for p in points if "cost" in p]
        style = ("x", "#9fb0c3") if name == "uniform" else style
        axes.plot(
            [p["average_bits"] for p in feasible],
            [p["cost"] for p in feasible],
            style[0],
            color=style[1],
            markersize=4,
            label=name,
        )
    costs = [p["cost"] for points in curve["series"].values() for p in points if "cost" in p]
    if min(costs) > 0 and max(costs) > 8 * min(costs):
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("average bits of the experts (codes alone)")
    axes.set_ylabel(f"predicted cost ({curve['mode']})")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
