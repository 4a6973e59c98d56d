"""How long bit allocation takes at the size of large models, and how close to the optimum it is proven to be.

    python scripts/benchmarks/allocation.py            # a table
    python scripts/benchmarks/allocation.py --json     # one JSON object

The costs are synthetic: an expert's sensitivity is lognormal (sigma 1.2) times the relative squared error of a Gaussian at each
width, times lognormal noise (sigma 0.15). Everything runs on one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from compress.moe.allocate import Allocation, Budget, Candidate, Unit, allocate, candidate_bytes

# Relative squared error of Gaussian weights in groups of 128 by width; 8 bits by 6 dB a bit from 4.
ERROR = {1: 0.36, 2: 0.116, 3: 0.0339, 4: 0.0089, 8: 3.5e-5}


def synthetic_units(
    layers: int, experts: int, projections: Sequence[tuple[int, int]], widths: Sequence[int], group_size: int = 128, seed: int = 0
) -> list[Unit]:
    """Units `layers.L.experts.E.P`, one a projection of shape [out, in]."""
    random = np.random.default_rng(seed)
    count = layers * experts * len(projections)
    error = np.array([ERROR[b] for b in widths])
    cost = random.lognormal(0, 1.2, (count, 1)) * error * random.lognormal(0, 0.15, (count, len(widths)))
    nbytes = [[candidate_bytes(shape, b, group_size) for b in widths] for shape in projections]
    names = [(layer, e, p) for layer in range(layers) for e in range(experts) for p in range(len(projections))]
    return [
        Unit(
            f"layers.{layer}.experts.{e}.{p}",
            projections[p][0] * projections[p][1],
            tuple(Candidate(b, c, group_size, n) for b, c, n in zip(widths, row, nbytes[p], strict=True)),
        )
        for (layer, e, p), row in zip(names, cost.tolist(), strict=True)
    ]


def dynamic_programming(units: Sequence[Unit], capacity: int) -> float:
    """The optimum for integer sizes, by a method that shares nothing with `allocate`: the least cost for every total number of bits.

    The size of a candidate is its bits; capacity: the most bits of all units together. O(units * candidates * capacity).
    """
    base = [min(c.bits for c in unit.candidates) for unit in units]
    room = capacity - sum(base)
    least = np.zeros(room + 1)  # cost of the units so far with at most so many bits above their smallest
    for unit, smallest in zip(units, base, strict=True):
        ahead = np.full(room + 1, np.inf)
        for candidate in unit.candidates:
            more = candidate.bits - smallest
            if more <= room:
                ahead[more:] = np.minimum(ahead[more:], least[: room + 1 - more] + candidate.cost)
        least = ahead
    return float(least[room])


def measured(name: str, units: Sequence[Unit], budget: Budget) -> tuple[dict[str, Any], Allocation]:
    """One case: `seconds` is that of `allocate`, from units to the named choice."""
    found = allocate(units, budget)
    variables = sum(len(unit.candidates) for unit in units)
    facts = {"case": name, "units": len(units), "variables": variables, "budget": budget.limit, "measure": budget.measure}
    return {**facts, **found.to_json(), "lp_gap": (found.objective - found.lp_bound) / found.objective}, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    wanted = parser.parse_args()
    results = []

    # Qwen3-30B-A3B: 48 layers of 128 experts, an expert as a unit.
    units = synthetic_units(48, 128, [(3 * 768, 2048)], (1, 2, 3))
    for bits in (1.5, 2.0, 2.5):
        result, found = measured("6,144 experts, 3 widths, average bits", units, Budget(bits))
        began = time.perf_counter()
        optimum = dynamic_programming(units, int(bits * len(units)))
        result["dynamic_programming"] = {"objective": optimum, "seconds": time.perf_counter() - began}
        if abs(found.objective - optimum) > 1e-9 * optimum:
            raise SystemExit(f"{bits} bits: {found.objective} is not the optimum {optimum} of dynamic programming")
        results.append(result)
    case = "6,144 experts, 3 widths, bits per weight"
    results += [measured(case, units, Budget(bits, "bits-per-weight"))[0] for bits in (2.0, 2.5)]

    # The size of Kimi K2: 61 layers of 384 experts, each of the three projections a unit.
    units = synthetic_units(61, 384, [(2048, 7168), (2048, 7168), (7168, 2048)], (1, 2, 3, 4, 8))
    case = "70,272 projections, 5 widths, bits per weight"
    results += [measured(case, units, Budget(bits, "bits-per-weight"))[0] for bits in (2.0, 2.5, 3.0)]

    report = {
        "machine": platform.processor() or platform.machine(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "results": results,
    }
    if wanted.json:
        print(json.dumps(report))
        return
    print(f"{'case':46} {'variables':>9} {'budget':>6} {'seconds':>8} {'gap':>11} {'LP gap':>11}  method")
    for r in results:
        other = r.get("dynamic_programming")
        note = f"; equals dynamic programming ({other['seconds']:.2f} s)" if other else ""
        gap, lp_gap = f"{100 * r['gap']:.6f} %", f"{100 * r['lp_gap']:.6f} %"
        print(
            f"{r['case']:46} {r['variables']:9,} {r['budget']:6} {r['seconds']:8.2f} {gap:>11} {lp_gap:>11}  {r['method']}{note}"
        )


if __name__ == "__main__":
    main()
