"""Bit allocation against enumeration, dynamic programming, HiGHS's own relaxation, and the published allocations of MC."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from compress.errors import UsageError
from compress.moe import core, highs, knapsack
from compress.moe.allocate import Allocation, AtLeast, Budget, Candidate, Limit, Unit, allocate, candidate_bytes
from compress.moe.curve import trade_off
from compress.moe.modes import PMQ_PAPER_EXPONENTS, Options, allocate_experts, expert_costs, widths_by_layer
from compress.moe.statistics import parse_statistics

# Layer 0 of Mixtral-8x7B as published with MC (arXiv 2410.06270): selections and summed routing weights on 128 x 2,048 tokens of C4,
# quantisation losses at 1, 2 and 3 bits, and the widths of the published allocations by total bits of the layer.
MIXTRAL_LAYER_0: dict[str, Any] = {
    "bits": [1, 2, 3],
    "frequency": [[68862, 63387, 62746, 63751, 66314, 70431, 56466, 72331]],
    "weight": [[19891.64, 22812.15, 21595.75, 21344.5, 19123.95, 16804.89, 17566.24, 18464.88]],
    "quant_loss": [
        [
            [455, 180.4, 78.21],
            [3856.11, 708.03, 369.99],
            [735.98, 372.66, 156.33],
            [663.2, 341.52, 143.51],
            [525.43, 273.92, 114.71],
            [434.18, 218.07, 92.07],
            [3275.43, 677.75, 288.98],
            [450.27, 231.79, 97.39],
        ]
    ],
}
PUBLISHED = {12: [1, 3, 2, 1, 1, 1, 2, 1], 16: [2, 3, 2, 2, 2, 1, 3, 1], 20: [2, 3, 3, 3, 2, 2, 3, 2]}


def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "benchmarks" / "allocation.py"
    spec = importlib.util.spec_from_file_location("allocation_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def enumerated(units: list[Unit], capacity: int, rules: list[AtLeast], layers: list[int]) -> float:
    """The least cost over all choices; infinite where there is none. A rule's pattern is `LAYER.*`."""
    best = math.inf
    for choice in itertools.product(*[unit.candidates for unit in units]):
        if sum(c.nbytes or 0 for c in choice) > capacity:
            continue
        kept = all(
            sum(c.bits == rule.bits and f"{layer}.*" == rule.pattern for c, layer in zip(choice, layers, strict=True))
            >= rule.count
            for rule in rules
        )
        if kept:
            best = min(best, math.fsum(c.cost for c in choice))
    return best


COSTS = st.one_of(st.integers(0, 5).map(float), st.floats(-3, 50, allow_nan=False).map(lambda x: round(x, 3)))


@st.composite
def programmes(draw: st.DrawFn) -> tuple[list[Unit], int, list[int]]:
    """Units of one to four candidates in two layers, and a capacity from too small to ample."""
    layers = draw(st.lists(st.integers(0, 1), min_size=1, max_size=5))
    units = []
    for i, layer in enumerate(layers):
        widths = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
        sizes = [draw(st.integers(0, 3)) + b * draw(st.sampled_from([4, 5])) for b in widths]
        candidates = tuple(Candidate(b, draw(COSTS), None, n) for b, n in zip(widths, sizes, strict=True))
        units.append(Unit(f"{layer}.{i}", 1, candidates))
    least, most = (sum(pick(c.nbytes or 0 for c in unit.candidates) for unit in units) for pick in (min, max))
    capacity = draw(st.integers(max(least - 2, 1), most + 1))
    return units, capacity, layers


def check(found: Allocation, units: list[Unit], capacity: int, best: float, exact: bool = True) -> None:
    chosen = list(found.chosen.values())
    assert all(c in unit.candidates for c, unit in zip(chosen, units, strict=True))
    assert sum(c.nbytes or 0 for c in chosen) == found.nbytes
    assert found.nbytes is not None
    assert found.nbytes <= capacity
    assert found.objective == pytest.approx(math.fsum(c.cost for c in chosen))
    slack = 1e-9 * max(abs(best), 1)
    assert found.lp_bound <= found.bound + slack
    assert found.bound <= best + slack
    assert best <= found.objective + slack
    if exact:
        assert found.objective == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("solver", ["auto", "highs"])
@given(programme=programmes())
def test_equals_enumeration(solver: Any, programme: tuple[list[Unit], int, list[int]]) -> None:
    units, capacity, layers = programme
    best = enumerated(units, capacity, [], layers)
    if best == math.inf:
        with pytest.raises(UsageError, match="too small: the smallest possible is"):
            allocate(units, Budget(capacity, "bytes"), solver=solver)
        return
    found = allocate(units, Budget(capacity, "bytes"), solver=solver)
    check(found, units, capacity, best)
    if solver == "auto":
        assert found.gap == 0 or best == 0


@pytest.mark.parametrize("way", ["auto", "highs", "repair"])
@given(programme=programmes(), data=st.data())
def test_rules_equal_enumeration(way: str, programme: tuple[list[Unit], int, list[int]], data: st.DataObject) -> None:
    units, capacity, layers = programme
    rules = [
        AtLeast(f"{layer}.*", data.draw(st.sampled_from([2, 3])), data.draw(st.integers(1, 2)))
        for layer in sorted(set(layers))
        for _ in range(data.draw(st.integers(0, 2)))
    ]
    best = enumerated(units, capacity, rules, layers)
    with pytest.MonkeyPatch.context() as patch:
        if way == "repair":  # as for programmes that are too large for HiGHS
            patch.setattr(knapsack, "HIGHS_CANDIDATES", 0)
        if best == math.inf:
            with pytest.raises(UsageError, match=r"too small|contradicts|cannot be kept"):
                allocate(units, Budget(capacity, "bytes"), rules=rules, solver="highs" if way == "highs" else "auto")
            return
        found = allocate(units, Budget(capacity, "bytes"), rules=rules, solver="highs" if way == "highs" else "auto")
    check(found, units, capacity, best, exact=way != "repair")
    for rule in rules:
        assert sum(c.bits == rule.bits for name, c in found.chosen.items() if name.startswith(rule.pattern[:2])) >= rule.count


@given(programme=programmes(), states=st.integers(1, 3), work=st.integers(0, 20))
def test_bound_holds_when_the_core_is_cut_off(programme: tuple[list[Unit], int, list[int]], states: int, work: int) -> None:
    units, capacity, layers = programme
    best = enumerated(units, capacity, [], layers)
    if best == math.inf:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "MAX_STATES", states)
        patch.setattr(core, "MAX_WORK", work)
        check(allocate(units, Budget(capacity, "bytes")), units, capacity, best, exact=False)


def random_tables(seed: int, units: int, widths: int) -> tuple[np.ndarray, np.ndarray, int]:
    random = np.random.default_rng(seed)
    cost = random.lognormal(0, 1.5, (units, 1)) * np.sort(random.random((units, widths)))[:, ::-1]
    cost[random.random(cost.shape) < 0.1] = np.inf  # units with fewer candidates
    cost[:, 0] = np.where(np.isfinite(cost[:, 0]), cost[:, 0], 1.0)
    size = np.cumsum(random.integers(1, 1000, (units, widths)), axis=1)
    return cost, size, int(size[:, 0].sum() + 0.4 * (size[:, -1] - size[:, 0]).sum())


@pytest.mark.parametrize("seed", range(5))
def test_bound_is_that_of_the_linear_relaxation(seed: int) -> None:
    cost, size, capacity = random_tables(seed, 40, 5)
    found = knapsack.solve(cost, size, capacity)
    assert found is not None
    rows, columns = np.nonzero(np.isfinite(cost))
    one = (rows == np.arange(len(cost))[:, None]).astype(float)
    relaxed = linprog(cost[rows, columns], A_ub=size[rows, columns][None], b_ub=[capacity], A_eq=one, b_eq=np.ones(len(cost)))
    assert found.lp_bound == pytest.approx(relaxed.fun, rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_bound_holds_when_states_are_cut_off(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cost, size, capacity = random_tables(seed, 60, 5)
    exact = knapsack.solve(cost, size, capacity)
    monkeypatch.setattr(core, "MAX_STATES", 3)
    cut = knapsack.solve(cost, size, capacity)
    assert exact is not None
    assert cut is not None
    assert exact.gap == 0
    assert cut.lp_bound <= cut.bound <= exact.objective * (1 + 1e-12)
    assert exact.objective <= cut.objective * (1 + 1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_bound_holds_when_rules_are_repaired(seed: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cost, size, capacity = random_tables(seed, 48, 4)
    groups = np.arange(48).reshape(8, 6)
    capacity += capacity // 2
    # Two units of each group at the widest candidate, and one at the next; where shared, the first rule twice over.
    rules = []
    for rows in groups:
        for column, count in ((3, 2), (2, 1), *([(3, 2)] if shared else [])):
            mask = np.isfinite(cost[rows]) & (np.arange(4) == column)
            rules += [highs.Rule(rows, mask, min(count, int(mask.any(axis=1).sum())))]
    exact = knapsack.solve(cost, size, capacity, rules, highs=True)
    monkeypatch.setattr(knapsack, "HIGHS_CANDIDATES", 0)
    repaired = knapsack.solve(cost, size, capacity, rules)
    assert exact is not None
    assert repaired is not None
    assert "repaired" in repaired.method
    assert knapsack.obeys(rules, repaired.choice)
    assert size[np.arange(48), repaired.choice].sum() <= capacity
    assert exact.gap < 1e-9
    assert repaired.lp_bound < repaired.bound <= exact.objective * (1 + 1e-9)
    assert exact.objective <= repaired.objective * (1 + 1e-9)
    assert repaired.gap < 0.3


def test_price_of_rules_by_hand() -> None:
    # Reduced costs of three units: a rule that wants two of them in column 1 costs at least 3 + 4 above L.
    reduced = np.array([[0.0, 5.0, 1.0], [0.0, 3.0, 2.0], [0.0, 4.0, 6.0]])
    second, third = (np.tile(np.arange(3) == j, (3, 1)) for j in (1, 2))
    two = highs.Rule(np.arange(3), second, 2)
    one = highs.Rule(np.arange(3), third, 1)
    assert knapsack._bound_with_rules((10.0, reduced), [two]) == 17.0
    assert knapsack._bound_with_rules((10.0, reduced), [two, one]) == 18.0  # different candidates: both must be paid for
    assert knapsack._bound_with_rules((10.0, reduced), [two, two]) == 17.0  # the same candidates: paid for once


def test_node_limit_leaves_a_sound_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, size, capacity = random_tables(7, 60, 5)
    exact = knapsack.solve(cost, size, capacity)
    monkeypatch.setattr(highs, "NODE_LIMIT", 1)
    cut = knapsack.solve(cost, size, capacity, highs=True)
    assert exact is not None
    assert cut is not None
    assert exact.gap == 0
    assert cut.bound <= exact.objective * (1 + 1e-9)
    assert exact.objective <= cut.objective * (1 + 1e-9)


def test_equals_dynamic_programming_at_6144_experts() -> None:
    module = benchmark()
    units = module.synthetic_units(48, 128, [(768, 2048)], (1, 2, 3), seed=3)
    found = allocate(units, Budget(2.2))
    optimum = module.dynamic_programming(units, math.floor(2.2 * 6144))
    assert found.objective == pytest.approx(optimum, rel=1e-12)
    assert found.gap == 0
    assert found.average_bits <= 2.2


def test_many_units_in_bytes_are_within_a_ten_thousandth() -> None:
    module = benchmark()
    units = module.synthetic_units(12, 64, [(2048, 1000), (1000, 2048)], (1, 2, 3, 4, 8), seed=4)
    budget = Budget(2.7, "bits-per-weight", other_weights=10_000_000, other_bytes=20_000_000)
    found = allocate(units, budget)
    assert found.nbytes is not None
    weights = sum(unit.weights for unit in units)
    assert 8 * (found.nbytes + 20_000_000) / (weights + 10_000_000) <= 2.7
    assert found.gap <= 1e-4


def test_candidate_bytes() -> None:
    # By hand: 4-bit codes, an fp16 scale and an fp16 zero point for 128 weights make 4.25 bits a weight.
    assert candidate_bytes((4096, 4096), 4, 128, zero_bits=16) * 8 == 4.25 * 4096 * 4096
    # A row of 256 3-bit codes is 24 words of 32 bits, of 250 as well; 2 groups; zero points of 11 rows are 33 bits, two words a group.
    assert candidate_bytes((11, 256), 3, 128) == 11 * 24 * 4 + 11 * 2 * 2 + 2 * 8
    assert candidate_bytes((11, 250), 3, 128) == 11 * 24 * 4 + 11 * 2 * 2 + 2 * 8
    assert candidate_bytes((11, 256), 3, 128, zero_bits=0) == 11 * 24 * 4 + 11 * 2 * 2
    assert candidate_bytes((10, 256), 1, 64) == 10 * 8 * 4 + 10 * 4 * 2
    assert candidate_bytes((10, 256), 8, None, zero_bits=0) == 10 * 256 + 10 * 2
    assert candidate_bytes((7, 11, 256), 3, 128) == 7 * candidate_bytes((11, 256), 3, 128)
    assert candidate_bytes((10, 256), 16) == 10 * 256 * 2
    for shape, bits, group in (((10,), 3, 128), ((10, 0), 3, 128), ((10, 256), 0, 128), ((10, 256), 3, 0)):
        with pytest.raises(UsageError):
            candidate_bytes(shape, bits, group)


def test_budgets_are_read_as_decimals() -> None:
    assert Budget(2.1).capacity(10) == 21  # 2.1 * 10 is 21.000000000000004 below, 20.99 in other floating point orders
    assert Budget(0.7).capacity(10) == 7
    assert Budget(1.1).capacity(1_000_000_000_000) == 1_100_000_000_000
    assert Budget(1000.5, "bytes").capacity(10) == 1000
    whole = Budget(4.0, "bits-per-weight", other_weights=60, other_bytes=30)
    assert whole.capacity(100) == 50
    assert whole.limit_for(50, 100) == 4.0


def small_units() -> list[Unit]:
    return [
        Unit(f"layers.{i // 4}.experts.{i % 4}", 100, tuple(Candidate(b, (i + 1.0) / 4**b, 128, 20 * b) for b in (1, 2, 3, 4)))
        for i in range(8)
    ]


def test_floors_ceilings_and_protection() -> None:
    found = allocate(
        small_units(),
        Budget(2.5),
        limits=[Limit("layers.0.*", floor=2), Limit("layers.1.experts.3", ceiling=1), Limit("*.experts.0", floor=1, ceiling=3)],
        protect=["layers.1.experts.2"],
    )
    bits = {name: c.bits for name, c in found.chosen.items()}
    assert min(bits[f"layers.0.experts.{e}"] for e in range(4)) >= 2
    assert bits["layers.1.experts.3"] == 1
    assert bits["layers.1.experts.2"] == 4
    assert sum(bits.values()) == 20
    assert found.average_bits == 2.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limits": [Limit("layers.7.*", floor=2)]}, "matches no unit"),
        ({"protect": ["LAYERS.0.*"]}, "matches no unit"),
        (
            {"limits": [Limit("layers.0.*", floor=3), Limit("*.experts.1", ceiling=2)]},
            r"layers\.0\.experts\.1.*floor 3.*ceiling 2",
        ),
        ({"limits": [Limit("layers.0.experts.2", floor=8)]}, r"layers\.0\.experts\.2.*1, 2, 3, 4 bits, under floor 8"),
        ({"limits": [Limit("*", ceiling=2)], "protect": ["*.3"]}, "ceiling 2 bits for .*; protection of"),
        (
            {"limits": [Limit("*", floor=3)]},
            r"2 average bits is too small: the smallest possible is 3 average bits under floor 3",
        ),
        ({"protect": ["layers.0.*"]}, r"smallest possible is 2\.5 average bits under protection of"),
        ({"rules": [AtLeast("layers.0.*", 4, 5)]}, "4 of its 4 units may have 4 bits"),
        ({"rules": [AtLeast("layers.0.*", 8)]}, "0 of its 4 units may have 8 bits"),
        ({"rules": [AtLeast("layers.0.*", 4, 3), AtLeast("layers.0.*", 3, 2)]}, "contradicts those before it: 'at least 3"),
        ({"rules": [AtLeast("*", 4, 4)]}, r"smallest possible is 2\.5 average bits under at least 4"),
    ],
)
def test_what_makes_it_infeasible(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        allocate(small_units(), Budget(2.0), **arguments)


def test_the_smallest_budget_that_an_error_names_is_enough() -> None:
    units = [Unit(f"u{i}", 3, (Candidate(1, 1.0, None, 7), Candidate(2, 0.5, None, 11))) for i in range(7)]
    for budget in (Budget(0.3), Budget(3.0, "bytes"), Budget(0.3, "bits-per-weight", 11, 13)):
        with pytest.raises(UsageError) as caught:
            allocate(units, budget)
        words = str(caught.value).split("smallest possible is ")[1].split()
        enough = Budget(float(words[0].replace(",", "")), budget.measure, budget.other_weights, budget.other_bytes)
        assert allocate(units, enough).nbytes == 49


@pytest.mark.parametrize(
    ("units", "budget", "message"),
    [
        ([], Budget(2), "no units"),
        ([Unit("a", 1, (Candidate(1, 0.0),))] * 2, Budget(2), "same name"),
        ([Unit("a", 1, ())], Budget(2), "0 candidates"),
        ([Unit("a", 0, (Candidate(1, 0.0),))], Budget(2), "0 weights"),
        ([Unit("a", 1, (Candidate(1, math.nan),))], Budget(2), "not finite"),
        ([Unit("a", 1, (Candidate(1, 0.0),))], Budget(math.inf), "positive and finite"),
        ([Unit("a", 1, (Candidate(1, 0.0),))], Budget(0), "positive and finite"),
        ([Unit("a", 1, (Candidate(1, 0.0),))], Budget(2, "bytes"), "needs the bytes"),
    ],
)
def test_units_and_budgets_that_make_no_sense(units: list[Unit], budget: Budget, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        allocate(units, budget)


def test_two_group_sizes_of_one_width() -> None:
    units = [
        Unit(f"u{i}", 1, (Candidate(2, 1.0, 128, 10), Candidate(2, 0.1 * i, 32, 14), Candidate(3, 0.0, 128, 20)))
        for i in range(4)
    ]
    found = allocate(units, Budget(48, "bytes"), rules=[AtLeast("*", 2, 4)])
    assert [(c.bits, c.group_size) for c in found.chosen.values()] == [(2, 32), (2, 32), (2, 128), (2, 128)]


# The cost modes


@pytest.mark.parametrize("total", sorted(PUBLISHED))
@pytest.mark.parametrize("solver", ["auto", "highs"])
def test_pmq_gives_the_published_allocation(total: int, solver: Any) -> None:
    statistics = parse_statistics(MIXTRAL_LAYER_0)
    found = allocate_experts(statistics, Budget(total / 8), Options("pmq", solver=solver))
    assert widths_by_layer(statistics, found) == {0: PUBLISHED[total]}
    assert found.gap == pytest.approx(0, abs=1e-9)


def test_pmq_cost_by_hand() -> None:
    statistics = parse_statistics(MIXTRAL_LAYER_0)
    phi, w = (np.array(MIXTRAL_LAYER_0[name][0]) for name in ("frequency", "weight"))
    layer = statistics.layers[0]
    expected = 1000 * (68862 / phi.sum()) * (19891.64 / w.sum()) ** 1.5 * 180.4
    assert expert_costs(layer, 0, "pmq")[0, 1] == pytest.approx(expected)
    paper = 1000 * (68862 / phi.sum()) * (19891.64 / w.sum()) * 180.4**2
    assert expert_costs(layer, 0, "pmq", PMQ_PAPER_EXPONENTS)[0, 1] == pytest.approx(paper)
    assert expert_costs(layer, 0, "error")[0, 1] == 180.4**2


def random_statistics(seed: int, layers: int = 4, experts: int = 5, **more: Any) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    loss = (
        random.lognormal(0, 1, (layers, experts, 1)) * np.array([1.0, 0.8, 0.3]) * random.lognormal(0, 0.3, (layers, experts, 3))
    )
    return {
        "bits": [1, 2, 3],
        "frequency": random.integers(0, 100, (layers, experts)).tolist(),
        "weight": random.random((layers, experts)).tolist(),
        "quant_loss": loss.tolist(),
        **more,
    }


@pytest.mark.parametrize("seed", range(4))
def test_pmq_equals_enumeration_layer_by_layer(seed: int) -> None:
    statistics = parse_statistics(random_statistics(seed))
    for total in (8, 9, 11, 13):
        found = allocate_experts(statistics, Budget(total / 5), Options("pmq"))
        best = 0.0
        for index, layer in statistics.layers.items():
            cost = expert_costs(layer, index, "pmq")
            best += min(
                sum(cost[e, b - 1] for e, b in enumerate(choice))
                for choice in itertools.product((1, 2, 3), repeat=5)
                if sum(choice) <= total and 3 in choice and 2 in choice
            )
        assert found.objective == pytest.approx(best, rel=1e-12)
        assert found.gap == pytest.approx(0, abs=1e-9)
        for widths in widths_by_layer(statistics, found).values():
            assert sum(widths) <= total
            assert {2, 3} <= set(widths)


def test_global_modes_move_bits_between_layers() -> None:
    data = random_statistics(0)
    data["quant_loss"][2] = (np.array(data["quant_loss"][2]) * 50).tolist()
    statistics = parse_statistics(data)
    found = widths_by_layer(statistics, allocate_experts(statistics, Budget(2), Options("error")))
    assert sum(map(sum, found.values())) <= 40
    assert sum(found[2]) > 10
    fisher = parse_statistics({"fisher": data["quant_loss"], "bits": [1, 2, 3]})
    by_fisher = allocate_experts(fisher, Budget(2), Options("fisher"))
    linear = np.concatenate([expert_costs(layer, i, "fisher") for i, layer in fisher.layers.items()])
    assert linear.tolist() == [row for layer in data["quant_loss"] for row in layer]
    assert by_fisher.gap == 0


def test_limits_in_pmq_apply_to_their_layers_alone() -> None:
    statistics = parse_statistics(random_statistics(1))
    options = Options("pmq", limits=(Limit("layers.1.*", ceiling=2),), protect=("layers.2.experts.0",), bits=(1, 2, 3))
    with pytest.raises(UsageError, match=r"layer 1: the rule 'at least 1 of 'layers\.1\.\*' at 3 bits' cannot be kept"):
        allocate_experts(statistics, Budget(2), options)
    options = Options("pmq", protect=("layers.2.experts.0",))
    assert widths_by_layer(statistics, allocate_experts(statistics, Budget(2), options))[2][0] == 3
    with pytest.raises(UsageError, match="matches no unit"):
        allocate_experts(statistics, Budget(2), Options("pmq", protect=("layers.9.*",)))
    with pytest.raises(UsageError, match="pmq shares out average bits"):
        allocate_experts(statistics, Budget(2000, "bytes"), Options("pmq"))


def test_forms_of_statistics_mean_the_same() -> None:
    lists = random_statistics(2, layers=2)
    keyed = {
        "frequency": {"3": dict(enumerate_keys(lists["frequency"][0])), "11": lists["frequency"][1]},
        "weight": {"11": lists["weight"][1], "3": lists["weight"][0]},
        "quant_loss": {
            "11": dict(enumerate_keys([by_bits(row) for row in lists["quant_loss"][1]])),
            "3": [by_bits(row) for row in lists["quant_loss"][0]],
        },
    }
    holes = {**lists, **{k: [None, lists[k][0], None, lists[k][1]] for k in ("frequency", "weight", "quant_loss")}}
    reference = parse_statistics(lists)
    for data, layers in ((keyed, [3, 11]), (holes, [1, 3])):
        found = parse_statistics(data)
        assert list(found.layers) == layers
        assert found.bits == (1, 2, 3)
        for mine, theirs in zip(found.layers.values(), reference.layers.values(), strict=True):
            for name in ("frequency", "weight", "quant_loss"):
                np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    shuffled = {**lists, "bits": [3, 1, 2], "quant_loss": [[[r[2], r[0], r[1]] for r in layer] for layer in lists["quant_loss"]]}
    np.testing.assert_array_equal(parse_statistics(shuffled).layers[0].quant_loss, reference.layers[0].quant_loss)


def enumerate_keys(values: list[Any]) -> list[tuple[str, Any]]:
    return [(str(i), value) for i, value in enumerate(values)]


def by_bits(losses: list[float]) -> dict[str, float]:
    return {str(b): loss for b, loss in zip((1, 2, 3), losses, strict=True)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "one JSON object"),
        ({"quantloss": 1}, "unknown key 'quantloss'"),
        ({"quant_loss": None}, "quant_loss: must be a list or an object"),
        ({"quant_loss": []}, "quant_loss has no layers|has frequency but no quant_loss"),
        ({"frequency": [[1, 2, 3]]}, "frequency of 3 experts but weight of 2"),
        ({"frequency": [[1, -2]]}, "frequency, layer 0, expert 1: must be a finite number"),
        ({"frequency": [[1, True]]}, "must be a finite number"),
        ({"frequency": [[1, 2], [1, 2]]}, "layer 1 has frequency but no weight"),
        ({"weight": {"0": [1, 2], "x": [1, 2]}}, "the key 'x' is not a whole number"),
        ({"weight": {"0": {"0": 1, "2": 2}}}, r"0, 1, \.\.\. without a hole"),
        ({"quant_loss": [[[3, 2, 1], [3, 2]]]}, "2 losses for 3 widths"),
        ({"quant_loss": [[[3, 2, 1], {"1": 3, "2": 2}]]}, r"has widths \[1, 2\] where others have \[1, 2, 3\]"),
        ({"quant_loss": [[[3, 2, float("nan")], [3, 2, 1]]]}, "layer 0, expert 0, 3 bits: must be a finite number"),
        ({"bits": [1, 2, 2]}, "names a width twice"),
        ({"bits": [1, 2, 0]}, "whole number from 1 on"),
        ({"expert_shapes": [[3, 4, 5]]}, "must be a list of"),
        ({"group_size": 0}, "group_size: must be a whole number from 1 on"),
    ],
)
def test_faults_of_statistics_are_named(change: Any, message: str) -> None:
    sound = {"bits": [1, 2, 3], "frequency": [[1, 2]], "weight": [[1, 2]], "quant_loss": [[[3, 2, 1], [3, 2, 1]]]}
    parse_statistics(sound)
    with pytest.raises(UsageError, match=message):
        parse_statistics({**sound, **change} if isinstance(change, dict) else change)


def test_losses_as_lists_need_bits() -> None:
    with pytest.raises(UsageError, match="needs the key `bits`"):
        parse_statistics({"quant_loss": [[[3, 2, 1]]]})
    with pytest.raises(UsageError, match="neither quant_loss nor fisher"):
        parse_statistics({"frequency": [[3, 2, 1]]})


@pytest.mark.parametrize(
    ("mode", "missing"),
    [("pmq", "frequency"), ("pmq", "weight"), ("pmq", "quant_loss"), ("error", "quant_loss"), ("fisher", "fisher")],
)
def test_a_mode_says_what_it_lacks(mode: Any, missing: str) -> None:
    data = random_statistics(3)
    data["fisher"] = data["quant_loss"]
    del data[missing]
    with pytest.raises(UsageError, match=f"mode {mode} needs {missing}"):
        allocate_experts(parse_statistics(data), Budget(2), Options(mode))


def test_pmq_cannot_weigh_experts_that_were_never_used() -> None:
    data = random_statistics(3)
    data["frequency"][1] = [0] * 5
    with pytest.raises(UsageError, match="layer 1: all its experts have frequency 0"):
        allocate_experts(parse_statistics(data), Budget(2), Options("pmq"))
    with pytest.raises(UsageError, match="no loss was measured at 4 bits, only at 1, 2, 3"):
        allocate_experts(parse_statistics(data), Budget(2), Options("error", bits=(1, 4)))


def test_trade_off_is_no_worse_than_pmq_and_uniform() -> None:
    statistics = parse_statistics(random_statistics(5, expert_shapes=[[64, 128], [128, 64]], group_size=64))
    curve = trade_off(statistics, Options("error"))
    mine, pmq, uniform = (curve["series"][name] for name in ("error", "pmq", "uniform"))
    assert len(mine) == len(pmq) == 20
    costs = [point["cost"] for point in mine]
    assert costs == sorted(costs, reverse=True)
    feasible = [(a, b) for a, b in zip(mine, pmq, strict=True) if "cost" in b]
    assert len(feasible) > 10
    assert all(a["cost"] <= b["cost"] * (1 + 1e-12) for a, b in feasible)
    assert any(a["cost"] < b["cost"] * 0.99 for a, b in feasible)
    assert "too small" in pmq[0]["infeasible"]
    assert uniform[0]["cost"] == pytest.approx(mine[0]["cost"])
    assert (
        uniform[0]["nbytes"] == mine[0]["nbytes"] == 20 * (candidate_bytes((64, 128), 1, 64) + candidate_bytes((128, 64), 1, 64))
    )
    without = parse_statistics({k: v for k, v in random_statistics(5).items() if k != "weight"})
    assert "needs weight" in trade_off(without, Options("error"))["notes"][0]
