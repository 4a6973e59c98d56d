"""The multiple-choice knapsack: from every unit one candidate, total size within a capacity, total cost least.

    min  sum_ij c_ij x_ij    s.t.  sum_ij s_ij x_ij <= capacity,   sum_j x_ij = 1 for every i,   x_ij in {0, 1},
         and for every rule (R, J, m):  sum_{i in R} sum_{j in J_i} x_ij >= m

`Solution.method` says which of these ways led to the result.

*Convex hulls.* Without rules the linear relaxation needs no simplex. Dualise the capacity with a price p >= 0 per unit of size:

    L(p) = sum_i min_j (c_ij + p s_ij) - p capacity

is a lower bound for every p, and its maximum over p is the optimum of the relaxation. Only candidates on the lower convex hull of
a unit's (size, cost) points are ever chosen; walking all hulls at once from the smallest candidates, steepest descent first,
until the capacity is used up gives the maximising price (Sinha and Zoltners 1979; Zemel 1980). At most one unit is then
fractional; it is rounded down, and what is left of the capacity is spent on the savings that still fit.

*Core.* The units whose choice is in doubt are enumerated by dynamic programming (core.py), which proves the optimum where its
limits of effort allow and otherwise a better bound.

*Rules.* Where that solution obeys the rules it is the optimum with them too. Otherwise the cheapest changes that satisfy them
(least reduced cost) are fixed and the rest is solved again; the bound then counts what the rules cost at least. What is not
within the wanted gap by then and has at most HIGHS_CANDIDATES candidates is solved by HiGHS, as is everything when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.moe.core import ROUNDING, improve
from compress.moe.highs import Floats, Integers, Programme, Rule

FILL_STEPS = 100
HIGHS_CANDIDATES = 5_000
REPAIR_ROUNDS = 8


@dataclass(frozen=True)
class Solution:
    """choice [n]: the candidate of every unit. bound: the greatest lower bound proven. lp_bound: that of the linear relaxation
    (without the rules, unless HiGHS solved the whole programme). method: how it was found."""

    choice: Integers
    objective: float
    bound: float
    lp_bound: float
    method: str

    @property
    def gap(self) -> float:
        """The distance to the bound as a fraction of the objective."""
        return gap_of(self.objective, self.bound)


def solve(
    cost: Floats, size: Integers, capacity: int, rules: Sequence[Rule] = (), gap: float = 0.0, highs: bool = False
) -> Solution | None:
    """Solve the programme; None when no solution was found, which is certain to be so only when there is none (see `smallest`).

    cost [n, m] float64, infinite where a unit has fewer than m candidates; size [n, m] int64. gap: stop once the objective is
    within this fraction of the bound; 0 asks for a proven optimum. highs: solve the whole programme with HiGHS.
    """
    if highs:
        return _solve_with_highs(cost, size, capacity, rules, gap)
    free = _Relaxation.of(cost, size, capacity)
    if free is None:
        return None
    if obeys(rules, free.rounded):
        found = free.solution(gap)
        if obeys(rules, found.choice):
            return found
    large = np.count_nonzero(np.isfinite(cost)) > HIGHS_CANDIDATES
    repaired = _repair(free, rules, gap if large else math.inf)
    if repaired is not None and (large or repaired.gap <= gap):
        return repaired
    return _better(repaired, _solve_with_highs(cost, size, capacity, rules, gap, repaired))


def obeys(rules: Sequence[Rule], choice: Integers) -> bool:
    """Whether a choice satisfies all rules."""
    return all(_lacking(rule, choice) == 0 for rule in rules)


def _lacking(rule: Rule, choice: Integers) -> int:
    return max(rule.count - int(np.count_nonzero(rule.mask[np.arange(len(rule.rows)), choice[rule.rows]])), 0)


def smallest(cost: Floats, size: Integers, rules: Sequence[Rule] = ()) -> int | None:
    """The least total size there is under the rules, the capacity left aside; None when the rules contradict each other."""
    choice: Integers = np.where(np.isfinite(cost), size, np.iinfo(np.int64).max).argmin(axis=1)
    if not obeys(rules, choice):
        rows, columns = np.nonzero(np.isfinite(cost))
        sizes = size[rows, columns]
        found, _ = Programme(rows, columns, sizes.astype(np.float64), sizes, None, rules).solve()
        if found is None:
            return None
        choice = found
    return int(_pick(size, choice).sum())


def gap_of(objective: float, bound: float) -> float:
    """The distance to the bound as a fraction of the objective, 0 below rounding; infinite when the objective alone is zero."""
    distance = objective - bound
    if distance <= ROUNDING * abs(objective):
        return 0.0
    return distance / abs(objective) if objective else math.inf


def _pick(values: NDArray, choice: Integers) -> NDArray:
    return values[np.arange(len(choice)), choice]


def _total(cost: Floats, choice: Integers) -> float:
    return math.fsum(_pick(cost, choice))


@dataclass(frozen=True)
class _Relaxation:
    """The solved linear relaxation without rules. start [n]: its solution, the fractional unit rounded down; rounded [n]: the same,
    filled up to the capacity. reduced [n, m]: reduced costs."""

    cost: Floats
    size: Integers
    capacity: int
    start: Integers
    rounded: Integers
    price: float
    lp_bound: float
    reduced: Floats

    @classmethod
    def of(cls, cost: Floats, size: Integers, capacity: int) -> _Relaxation | None:
        """None where even the smallest candidates exceed the capacity."""
        walked = _walk_hulls(cost, size, capacity)
        if walked is None:
            return None
        price, start = walked
        lp_bound, reduced = _dual(cost, size, capacity, price)
        return cls(cost, size, capacity, start, _filled(cost, size, capacity, start), price, lp_bound, reduced)

    def solution(self, gap: float) -> Solution:
        """The rounded solution; where that is not within `gap`, the best of the core."""
        choice, bound, method = self.rounded, self.lp_bound, "convex hulls"
        objective = _total(self.cost, choice)
        if gap_of(objective, bound) > gap:
            args = (self.start, self.reduced, self.price, self.lp_bound)
            choice, bound = improve(self.cost, self.size, self.capacity, *args, choice)
            objective = _total(self.cost, choice)
            method = "convex hulls, core by dynamic programming"
        return Solution(choice, objective, min(bound, objective), min(self.lp_bound, objective), method)


def _dual(cost: Floats, size: Integers, capacity: int, price: float) -> tuple[float, Floats]:
    """L(price), and the reduced costs."""
    priced = cost + price * size
    least = priced.min(axis=1)
    return math.fsum(least) - price * capacity, priced - least[:, None]


def _filled(cost: Floats, size: Integers, capacity: int, choice: Integers) -> Integers:
    """Spend what rounding left over: the largest saving that still fits, again and again."""
    choice = choice.copy()
    left = capacity - int(_pick(size, choice).sum())
    for _ in range(FILL_STEPS):
        growth = size - _pick(size, choice)[:, None]
        saving = np.where(growth <= left, _pick(cost, choice)[:, None] - cost, 0.0)
        row, column = np.unravel_index(int(saving.argmax()), saving.shape)
        if saving[row, column] <= 0:
            break
        choice[row] = column
        left -= int(growth[row, column])
    return choice


def _walk_hulls(cost: Floats, size: Integers, capacity: int) -> tuple[float, Integers] | None:
    """The price that maximises L, and the relaxation's solution with the fractional unit rounded down."""
    present = np.isfinite(cost)
    least = np.where(present, size, np.iinfo(np.int64).max).min(axis=1)
    start: Integers = np.where(present & (size == least[:, None]), cost, np.inf).argmin(axis=1)
    left = capacity - int(least.sum())
    if left < 0:
        return None
    # All hulls at once, a vertex a round.
    at, steepest, rows = start.copy(), np.full(len(cost), np.inf), np.arange(len(cost))
    rounds: list[tuple[Integers, Integers]] = []
    slopes, growths = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    while len(rows):
        growth = size[rows] - size[rows, at[rows]][:, None]
        saving = cost[rows, at[rows]][:, None] - cost[rows]
        slope = np.where((growth > 0) & (saving > 0), saving / np.maximum(growth, 1), 0.0)
        best = slope.max(axis=1)
        rows, growth, slope, best = (array[best > 0] for array in (rows, growth, slope, best))
        column = np.where(slope == best[:, None], growth, -1).argmax(axis=1)  # of collinear vertices the farthest
        steepest[rows] = np.minimum(steepest[rows], best)  # rounding errors must not reverse the order within a unit
        at[rows] = column
        slopes.append(steepest[rows])
        growths.append(np.take_along_axis(growth, column[:, None], axis=1)[:, 0])
        rounds.append((rows, column))
    slope = np.concatenate(slopes)
    order = np.argsort(-slope, kind="stable")  # stable: a unit's earlier vertex stays before its later one
    number = int(np.searchsorted(np.cumsum(np.concatenate(growths)[order]), left, side="right"))
    taken = np.zeros(len(slope), dtype=bool)
    taken[order[:number]] = True
    first = 0
    for rows, column in rounds:
        here = taken[first : first + len(rows)]
        start[rows[here]] = column[here]
        first += len(rows)
    return (float(slope[order[number]]) if number < len(slope) else 0.0), start


def _repair(free: _Relaxation, rules: Sequence[Rule], gap: float) -> Solution | None:
    """Fix the cheapest changes that satisfy the rules and solve for the rest; None where that does not succeed.

    Twice over: what the rules take from the capacity raises its price, and with it changes which changes are the cheapest.
    """
    best, dual = None, (free.lp_bound, free.reduced)
    bound = _bound_with_rules(dual, rules)
    for _ in range(2):
        relaxation = _fixed_up(free, rules, dual[1])
        if relaxation is None:
            break
        if best is None or _total(free.cost, relaxation.rounded) < _total(free.cost, best.rounded):
            best = relaxation
        dual = _dual(free.cost, free.size, free.capacity, relaxation.price)
        bound = max(bound, _bound_with_rules(dual, rules))
    if best is None:
        return None
    found = best.solution(math.inf)
    if gap_of(found.objective, bound) > gap:
        improved = best.solution(gap)
        found = improved if obeys(rules, improved.choice) else found
    objective = found.objective
    return Solution(
        found.choice, objective, min(bound, objective), min(free.lp_bound, objective), f"{found.method}, rules repaired"
    )


def _fixed_up(free: _Relaxation, rules: Sequence[Rule], reduced: Floats) -> _Relaxation | None:
    cost, relaxation = free.cost.copy(), free
    for _ in range(REPAIR_ROUNDS):
        if obeys(rules, relaxation.rounded):
            return relaxation
        for rule in rules:
            if _lacking(rule, relaxation.rounded):
                _fix(cost, rule, relaxation.rounded, reduced)
        again = _Relaxation.of(cost, free.size, free.capacity)
        if again is None:
            return None
        relaxation = again
    return None


def _fix(cost: Floats, rule: Rule, choice: Integers, reduced: Floats) -> None:
    """Leave nothing but the rule's candidates to those that obey it and to as many others, the cheapest, as it lacks."""
    available = rule.mask & np.isfinite(cost[rule.rows])
    price = np.where(available, reduced[rule.rows], np.inf).min(axis=1)
    obeying = available[np.arange(len(rule.rows)), choice[rule.rows]]
    nearest = np.argsort(np.where(obeying, -1.0, price), kind="stable")[: rule.count]
    nearest = nearest[price[nearest] < np.inf]
    cost[rule.rows[nearest]] = np.where(rule.mask[nearest], cost[rule.rows[nearest]], np.inf)


def _bound_with_rules(dual: tuple[float, Floats], rules: Sequence[Rule]) -> float:
    """L and what the rules add to it: of each the `count` least reduced costs; where rules share candidates, the dearest rule alone."""
    bound, reduced = dual
    added = [float(np.sort(np.where(r.mask, reduced[r.rows], np.inf).min(axis=1))[: r.count].sum()) for r in rules]
    covered = np.zeros(reduced.shape, dtype=np.int64)
    for rule in rules:
        covered[rule.rows] += rule.mask
    return bound + (math.fsum(added) if covered.max() <= 1 else max(added))


def _solve_with_highs(
    cost: Floats, size: Integers, capacity: int, rules: Sequence[Rule], gap: float, known: Solution | None = None
) -> Solution | None:
    rows, columns = np.nonzero(np.isfinite(cost))
    programme = Programme(rows, columns, cost[rows, columns], size[rows, columns], capacity, rules)
    lp_bound = programme.relaxation()
    if lp_bound == math.inf:
        return None
    choice, bound = programme.solve(gap * abs(lp_bound), math.inf if known is None else known.objective)
    if choice is None:
        return None
    objective = _total(cost, choice)
    bound = min(max(bound, lp_bound), objective)
    return Solution(choice, objective, bound, min(lp_bound, bound), f"HiGHS milp on {len(rows):,} candidates")


def _better(repaired: Solution | None, highs: Solution | None) -> Solution | None:
    """The cheaper of two solutions of one programme, with the greater of their bounds."""
    if repaired is None or highs is None:
        return repaired or highs
    best = min(highs, repaired, key=lambda s: s.objective)
    bound = min(max(highs.bound, repaired.bound), best.objective)
    return Solution(best.choice, best.objective, bound, highs.lp_bound, best.method)
