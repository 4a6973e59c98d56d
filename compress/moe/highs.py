"""The multiple-choice knapsack with rules as an integer programme for HiGHS, called through `scipy.optimize.milp`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from compress.errors import CompressError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

NODE_LIMIT = 200  # of branch and bound; a count, not a time, so that a result does not depend on the machine


@dataclass(frozen=True)
class Rule:
    """At least `count` of the units in `rows` take one of their candidates that `mask` marks."""

    rows: Integers  # [k]
    mask: NDArray[np.bool_]  # [k, m]
    count: int


class Programme:
    """The programme as HiGHS takes it: one variable a candidate, in numbers that its absolute tolerances (1e-6) suit.

    Costs are counted from each unit's cheapest candidate and scaled so that their ranges add up to 1e6; sizes are counted from each
    unit's smallest and divided by their greatest common divisor.
    """

    def __init__(
        self, rows: Integers, columns: Integers, cost: Floats, size: Integers, capacity: int | None, rules: Sequence[Rule] = ()
    ) -> None:
        self._rows, self._columns = rows, columns
        units, variables = int(rows.max()) + 1, np.arange(len(rows))
        lowest, highest = np.full(units, np.inf), np.full(units, -np.inf)
        np.minimum.at(lowest, rows, cost)
        np.maximum.at(highest, rows, cost)
        self._offset = math.fsum(lowest)
        self._spread = math.fsum(highest - lowest)
        self._scale = 1e6 / self._spread if self._spread else 1.0
        self._cost = (cost - lowest[rows]) * self._scale
        one = csr_array((np.ones(len(rows)), (rows, variables)), shape=(units, len(rows)))
        self._constraints = [LinearConstraint(one, 1, 1)]
        base = np.full(units, np.iinfo(np.int64).max)
        np.minimum.at(base, rows, size)
        growth = size - base[rows]
        step = max(int(np.gcd.reduce(growth)), 1)
        self._growth = growth // step
        self._limited = capacity is not None
        self._left = (capacity - int(base.sum())) // step if capacity is not None else 0
        if rules:
            variable = np.full((units, rules[0].mask.shape[1]), -1)
            variable[rows, columns] = variables
            members = [np.extract(rule.mask, variable[rule.rows]) for rule in rules]
            of_rule = np.repeat(np.arange(len(rules)), [len(m) for m in members])
            matrix = csr_array((np.ones(len(of_rule)), (of_rule, np.concatenate(members))), shape=(len(rules), len(rows)))
            self._constraints.append(LinearConstraint(matrix, [rule.count for rule in rules], np.inf))

    def solve(self, tolerance: float = 0.0, upper: float = math.inf) -> tuple[Integers | None, float]:
        """The columns chosen, unit by unit, or None; and a lower bound on the cost (infinite when infeasible).

        The search may stop within `tolerance` of the optimum, which `upper` is not below, and stops after NODE_LIMIT nodes with what
        it has.
        """
        bound, left = math.inf, self._left
        # HiGHS takes the tolerance as a fraction of the optimum, counted as the costs are: an upper limit of it is on the safe side.
        most = min(self._spread, upper - self._offset)
        options = {"mip_rel_gap": tolerance / most if most > 0 else 0.0, "node_limit": NODE_LIMIT}
        while left >= 0:
            found = self._run(left, 1, options)
            if found is None:
                break
            if bound == math.inf:
                bound = -math.inf if found.mip_dual_bound is None else self._offset + found.mip_dual_bound / self._scale
            if found.x is None:
                break
            chosen = np.flatnonzero(found.x > 0.5)
            over = int(self._growth[chosen].sum()) - self._left if self._limited else 0
            if over <= 0:
                return self._columns[chosen[np.argsort(self._rows[chosen])]], bound
            left -= over  # rounded to integers the solution exceeds the capacity by HiGHS's tolerance: leave it that much room
        return None, bound

    def relaxation(self) -> float:
        """The optimum of the linear relaxation; infinite when that is infeasible already."""
        found = self._run(self._left, 0, {}) if self._left >= 0 else None
        return math.inf if found is None else self._offset + found.fun / self._scale

    def _run(self, left: int, integrality: int, options: Any) -> OptimizeResult | None:
        capacity = [LinearConstraint(csr_array(self._growth[None, :].astype(np.float64)), -np.inf, left)] if self._limited else []
        found = milp(
            self._cost,
            integrality=np.full(len(self._cost), integrality),
            bounds=Bounds(0, 1),
            constraints=[*self._constraints, *capacity],
            options=options,
        )
        # scipy has no status of its own for the node limit: then there is a solution beside status 4, or "limit" in the message.
        if found.status not in (0, 2) and found.x is None and "limit" not in found.message.lower():
            raise CompressError(f"HiGHS could not solve the programme: {found.message}")
        return None if found.status == 2 else found
