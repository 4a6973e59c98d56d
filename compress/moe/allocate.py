"""Which candidate each unit gets: least summed cost within a budget, under floors, ceilings and rules.

The programme is a multiple-choice knapsack (knapsack.py). The result carries its certificate: the greatest lower bound that was
proven, and the distance to it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compress.errors import CompressError, UsageError
from compress.moe.highs import Floats, Integers, Rule
from compress.moe.knapsack import gap_of, smallest, solve
from compress.moe.units import Budget, Candidate, Unit, candidate_bytes

__all__ = ["Allocation", "AtLeast", "Budget", "Candidate", "Limit", "Unit", "allocate", "candidate_bytes"]


@dataclass(frozen=True)
class Limit:
    """The units that a glob matches get at least `floor` and at most `ceiling` bits."""

    pattern: str
    floor: int | None = None
    ceiling: int | None = None

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in (("floor", self.floor), ("ceiling", self.ceiling)) if value is not None]
        return f"{' and '.join(parts)} bits for {self.pattern!r}"


@dataclass(frozen=True)
class AtLeast:
    """Of the units that a glob matches at least `count` get exactly `bits` bits."""

    pattern: str
    bits: int
    count: int = 1

    def __str__(self) -> str:
        return f"at least {self.count} of {self.pattern!r} at {self.bits} bits"


@dataclass(frozen=True)
class Allocation:
    """The candidate of every unit by name, in the order of the units, and how good it is known to be.

    objective: summed cost. bound: the greatest lower bound on any solution's cost that was proven; lp_bound: that of the linear
    relaxation. average_bits: codes alone. nbytes: with everything a candidate takes, None where not known. method: which solver ran.
    """

    chosen: dict[str, Candidate]
    objective: float
    bound: float
    lp_bound: float
    average_bits: float
    nbytes: int | None
    seconds: float
    method: str

    @property
    def gap(self) -> float:
        """(objective - bound) / |objective|: 0 is a proven optimum, up to the rounding of floating point."""
        return gap_of(self.objective, self.bound)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the choice itself."""
        names = ("objective", "bound", "lp_bound", "gap", "average_bits", "nbytes", "seconds", "method")
        return {name: getattr(self, name) for name in names}


def allocate(
    units: Sequence[Unit],
    budget: Budget,
    *,
    limits: Sequence[Limit] = (),
    protect: Sequence[str] = (),
    rules: Sequence[AtLeast] = (),
    gap: float = 0.0,
    solver: Literal["auto", "highs"] = "auto",
) -> Allocation:
    """Choose a candidate for each unit.

    protect: globs of units that get their widest candidate, whatever that costs the others. gap: stop once the summed cost is within
    this fraction of the bound; 0 asks for a proven optimum, which limits of effort may deny: the gap of the result tells. solver:
    auto takes the fastest way (knapsack.py); highs solves the whole programme with HiGHS.

    Raises UsageError for a pattern that matches no unit, for limits or rules that contradict each other, and for a budget below the
    smallest possible size, which it names.
    """
    began = time.perf_counter()
    _check(units, budget)
    cost, size = _tables(units, budget)
    bits = _bits(units, cost.shape[1])
    _apply_limits(units, cost, bits, limits, protect)
    found_rules = [_rule(units, cost, bits, rule) for rule in rules]
    weights = sum(unit.weights for unit in units)
    capacity = budget.capacity(weights)
    solution = solve(cost, size, capacity, found_rules, gap, solver == "highs")
    if solution is None:
        raise _why_infeasible(
            cost, size, budget, capacity, weights, rules, found_rules, [*map(str, limits), *map(_protected, protect)]
        )
    chosen = {unit.name: unit.candidates[j] for unit, j in zip(units, solution.choice.tolist(), strict=True)}
    nbytes = [candidate.nbytes for candidate in chosen.values()]
    return Allocation(
        chosen,
        solution.objective,
        solution.bound,
        solution.lp_bound,
        sum(unit.weights * chosen[unit.name].bits for unit in units) / weights,
        None if None in nbytes else sum(n for n in nbytes if n is not None),
        time.perf_counter() - began,
        solution.method,
    )


def _check(units: Sequence[Unit], budget: Budget) -> None:
    if not units:
        raise UsageError("there is nothing to allocate bits to: no units")
    if len({unit.name for unit in units}) < len(units):
        raise UsageError("two units have the same name; each needs its own")
    if not 0 < budget.limit < float("inf"):
        raise UsageError(f"a budget of {budget.limit} {budget.measure} makes no sense; it must be positive and finite")
    for unit in units:
        if not unit.candidates or unit.weights < 1:
            raise UsageError(
                f"{unit.name} has {len(unit.candidates)} candidates and {unit.weights} weights; it needs at least one of each"
            )


def _tables(units: Sequence[Unit], budget: Budget) -> tuple[Floats, Integers]:
    """Costs [n, m], infinite where a unit has no such candidate, and sizes [n, m]."""
    most = max(len(unit.candidates) for unit in units)
    cost = np.full((len(units), most), np.inf)
    size = np.zeros((len(units), most), dtype=np.int64)
    for i, unit in enumerate(units):
        cost[i, : len(unit.candidates)] = [candidate.cost for candidate in unit.candidates]
        size[i, : len(unit.candidates)] = [budget.size(unit, candidate) for candidate in unit.candidates]
        if not np.isfinite(cost[i, : len(unit.candidates)]).all():
            raise UsageError(f"{unit.name} has a cost that is not finite: {cost[i].tolist()}")
    return cost, size


def _bits(units: Sequence[Unit], most: int) -> Integers:
    """Widths [n, m]; 0 where a unit has no such candidate."""
    bits = np.zeros((len(units), most), dtype=np.int64)
    for i, unit in enumerate(units):
        bits[i, : len(unit.candidates)] = [candidate.bits for candidate in unit.candidates]
    return bits


def matching(names: Sequence[str], pattern: str) -> Integers:
    """Which names a shell glob (`fnmatch`, case counts) matches."""
    match: Callable[[str], object] = re.compile(translate(pattern)).match
    return np.array([i for i, name in enumerate(names) if match(name)], dtype=np.int64)


def _matching(units: Sequence[Unit], pattern: str) -> Integers:
    rows = matching([unit.name for unit in units], pattern)
    if not len(rows):
        raise UsageError(f"the pattern {pattern!r} matches no unit; units are named like {units[0].name}")
    return rows


def _protected(pattern: str) -> str:
    return f"protection of {pattern!r}"


def _apply_limits(units: Sequence[Unit], cost: Floats, bits: Integers, limits: Sequence[Limit], protect: Sequence[str]) -> None:
    """Make the candidates that the limits exclude infinitely dear."""
    widest = bits.max(axis=1)
    excluded: list[tuple[str, Integers, NDArray[np.bool_]]] = []
    for limit in limits:
        rows = _matching(units, limit.pattern)
        low, high = limit.floor or 0, limit.ceiling if limit.ceiling is not None else np.iinfo(np.int64).max
        excluded.append((str(limit), rows, (bits[rows] < low) | (bits[rows] > high)))
    for pattern in protect:
        rows = _matching(units, pattern)
        excluded.append((_protected(pattern), rows, bits[rows] < widest[rows, None]))
    for _, rows, out in excluded:
        cost[rows] = np.where(out, np.inf, cost[rows])
    empty = np.flatnonzero(~np.isfinite(cost).any(axis=1))
    if len(empty):
        i = int(empty[0])
        reasons = [reason for reason, rows, _ in excluded if i in rows]
        offered = ", ".join(map(str, sorted({candidate.bits for candidate in units[i].candidates})))
        raise UsageError(
            f"nothing is left for {units[i].name}, which has candidates of {offered} bits, under {'; '.join(reasons)}"
        )


def _rule(units: Sequence[Unit], cost: Floats, bits: Integers, rule: AtLeast) -> Rule:
    rows = _matching(units, rule.pattern)
    mask = (bits[rows] == rule.bits) & np.isfinite(cost[rows])
    able = int(mask.any(axis=1).sum())
    if able < rule.count:
        raise UsageError(f"the rule '{rule}' cannot be kept: {able} of its {len(rows)} units may have {rule.bits} bits")
    return Rule(rows, mask, rule.count)


def _why_infeasible(
    cost: Floats,
    size: Integers,
    budget: Budget,
    capacity: int,
    weights: int,
    rules: Sequence[AtLeast],
    found_rules: Sequence[Rule],
    limits: Sequence[str],
) -> CompressError:
    """The error for a programme without a solution."""
    least = smallest(cost, size, found_rules)
    if least is None:
        last = next(k for k in range(1, len(rules) + 1) if smallest(cost, size, found_rules[:k]) is None)
        before = ", ".join(f"'{rule}'" for rule in rules[: last - 1])
        return UsageError(f"the rule '{rules[last - 1]}' contradicts those before it: {before}")
    if least <= capacity:
        return CompressError(
            "no solution was found within the solver's limits although there is one; raise the budget a little, or drop a rule"
        )
    under = "; ".join([*limits, *map(str, rules)])
    ways = [
        "raise the budget",
        *(["lower a floor"] if limits else []),
        *(["drop a rule"] if rules else []),
        "offer narrower candidates",
    ]
    return UsageError(
        f"a budget of {budget.say(budget.limit)} is too small: the smallest possible is {budget.say(budget.limit_for(least, weights))}"
        f"{f' under {under}' if under else ''}; {', '.join(ways[:-1])} or {ways[-1]}"
    )
