"""Exact improvement of a rounded relaxation: dynamic programming over the units whose choice is in doubt.

Pisinger's expanding core (A minimal algorithm for the multiple-choice knapsack problem, EJOR 83, 1995). Start from the choice
that is cheapest at the relaxation's price. Units join one by one, those first whose second-best candidate is nearly as good
(least reduced cost). A state is what the units so far were changed to: its size and its cost. One state dominates another that is
neither smaller nor cheaper. A state of reduced cost r leads to no solution below lp_bound + r, so it is dropped once that is no
better than the best solution known, and the search ends when the next unit's reduced cost alone says the same: then the best
solution is optimal.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Limits of effort. They are counts, not times, so that a result does not depend on the machine; what they cut off is in the bound.
MAX_STATES = 100_000
MAX_WORK = 20_000_000  # states made, over all units
ROUNDING = 1e-12  # a relative difference in cost below this is the floating point's, not the problem's


def improve(
    cost: Floats,
    size: Integers,
    capacity: int,
    start: Integers,
    reduced: Floats,
    price: float,
    lp_bound: float,
    incumbent: Integers,
) -> tuple[Integers, float]:
    """The best choice found, and a lower bound on the cost of every choice within the capacity.

    start [n]: the choice of least reduced cost; reduced [n, m]: c_ij + price s_ij less its least over j, infinite where there is no
    candidate; incumbent [n]: a choice within the capacity.
    """
    everyone = np.arange(len(cost))
    start_cost = math.fsum(cost[everyone, start])
    upper = math.fsum(cost[everyone, incumbent])
    others = reduced.copy()
    others[everyone, start] = np.inf
    nearest = others.min(axis=1)
    doubtful = np.flatnonzero(nearest < upper - lp_bound)
    doubtful = doubtful[np.argsort(nearest[doubtful], kind="stable")]
    ahead = np.append(nearest[doubtful[1:]], np.inf)  # any further change costs at least that of the next unit
    # States: size above the capacity, cost above that of `start`, and the last change that led here (a row of `trail`).
    excess = np.array([int(size[everyone, start].sum()) - capacity])
    extra, last = np.zeros(1), np.array([-1])
    trail = _Trail()
    best, cut, work = -1, math.inf, 0
    for unit, further in zip(doubtful.tolist(), ahead.tolist(), strict=True):
        margin = upper - lp_bound
        if not len(excess) or nearest[unit] >= margin or margin <= ROUNDING * abs(upper):
            break
        if work > MAX_WORK:
            cut = min(cut, float(nearest[unit]))
            break
        columns = np.flatnonzero(others[unit] < margin)
        grown = (excess + (size[unit, columns] - size[unit, start[unit]])[:, None]).ravel()
        raised = (extra + (cost[unit, columns] - cost[unit, start[unit]])[:, None]).ravel()
        work += len(grown)
        sizes, costs = np.concatenate([excess, grown]), np.concatenate([extra, raised])
        reduced_costs = costs + price * sizes + (start_cost - lp_bound)
        kept = np.flatnonzero(reduced_costs < margin)
        kept = kept[np.argsort(sizes[kept], kind="stable")]  # a merge: the states are sorted, and so are their copies
        kept = kept[np.append(True, costs[kept[1:]] < np.minimum.accumulate(costs[kept])[:-1])] if len(kept) else kept
        kept = kept[np.append(sizes[kept[1:]] != sizes[kept[:-1]], True)] if len(kept) else kept
        # Larger states are cheaper now, or they would be dominated: the last one within the capacity is the best of them.
        fits = int(np.searchsorted(sizes[kept], 0, side="right")) - 1
        improved = fits >= 0 and start_cost + costs[kept[fits]] < upper
        reached = kept[fits] if improved else -1
        upper = start_cost + float(costs[reached]) if improved else upper
        open_ = reduced_costs[kept] + further < upper - lp_bound
        if int(open_.sum()) > MAX_STATES:
            by_cost = np.argsort(np.where(open_, reduced_costs[kept], np.inf), kind="stable")
            cut = min(cut, float(reduced_costs[kept[by_cost[MAX_STATES]]]) + further)
            open_[by_cost[MAX_STATES:]] = False
        if improved:
            open_[fits] = True
        kept = kept[open_]
        source, changed = kept % len(excess), kept >= len(excess)
        last = last[source]
        last[changed] = trail.add(last[changed], unit, columns[kept[changed] // len(excess) - 1])
        best = int(last[np.flatnonzero(kept == reached)[0]]) if improved else best
        excess, extra = sizes[kept], costs[kept]
    choice = trail.follow(best, start) if best >= 0 else incumbent
    return choice, min(upper, lp_bound + cut)


class _Trail:
    """Changes (unit, column), each with the change before it: what a state remembers of its way."""

    def __init__(self) -> None:
        self._before: list[Integers] = []
        self._columns: list[Integers] = []
        self._units: list[int] = []
        self._length = 0

    def add(self, before: Integers, unit: int, columns: Integers) -> Integers:
        """Record one change of `unit` for every entry; their row numbers."""
        self._before.append(before)
        self._columns.append(columns)
        self._units.append(unit)
        self._length += len(before)
        return np.arange(self._length - len(before), self._length)

    def follow(self, row: int, start: Integers) -> Integers:
        """The choice that the changes up to `row` make of `start`."""
        before, columns = np.concatenate(self._before), np.concatenate(self._columns)
        units = np.repeat(self._units, [len(b) for b in self._before])
        choice = start.copy()
        while row >= 0:
            choice[units[row]] = columns[row]
            row = int(before[row])
        return choice
