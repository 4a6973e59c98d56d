"""The rules against their definitions, written out slot by slot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.routing import rules


@st.composite
def sorted_weights(draw: st.DrawFn) -> torch.Tensor:
    k = draw(st.integers(2, 6))
    rows = draw(st.lists(st.lists(st.floats(0.015625, 1, width=32), min_size=k, max_size=k), min_size=1, max_size=5))
    return torch.tensor(rows).sort(dim=-1, descending=True).values


@given(sorted_weights(), st.integers(1, 8))
def test_keep_first(weights: torch.Tensor, keep: int) -> None:
    assert rules.keep_first(weights, keep).tolist() == [min(keep, weights.shape[1])] * len(weights)


@given(sorted_weights(), st.floats(0.0625, 1, width=32))
def test_keep_share_is_the_shortest_prefix_that_holds_it(weights: torch.Tensor, share: float) -> None:
    for row, kept in zip(weights, rules.keep_share(weights, share).tolist(), strict=True):
        held = (row.cumsum(0) / row.sum()).tolist()
        assert kept == next((j + 1 for j in range(len(row)) if held[j] >= share), len(row))


@given(sorted_weights(), st.lists(st.floats(0, 1, width=32), min_size=5, max_size=5))
def test_keep_ratio_stops_at_the_first_slot_below_its_threshold(weights: torch.Tensor, mu: list[float]) -> None:
    k = weights.shape[1]
    for row, kept in zip(weights, rules.keep_ratio(weights, torch.tensor(mu[: k - 1])).tolist(), strict=True):
        expected = 1
        while expected < k and row[expected] >= torch.tensor(mu[expected - 1]) * row[0]:
            expected += 1
        assert kept == expected


def test_with_two_experts_the_ratio_rule_is_the_papers() -> None:
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]])
    assert rules.keep_ratio(weights, torch.tensor([0.5])).tolist() == [1, 2, 2]
    assert rules.median_ratios(weights).tolist() == pytest.approx([0.4 / 0.6])


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(0, 3), st.integers(0, 99))
def test_received_attention_sums_over_queries(batch: int, heads: int, queries: int, past: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, queries, past + queries, generator=draw, dtype=torch.float64)
    causal = torch.ones(queries, past + queries).tril(past).bool()
    attention = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    found = rules.received_attention(attention)
    for b in range(batch):
        for j in range(queries):
            terms = [attention[b, h, i, past + j] for h in range(heads) for i in range(j, queries)]
            assert float(found[b, j]) == pytest.approx(float(sum(terms)) / heads / (queries - j), rel=1e-5)
    if past == 0:  # what the released code sums is the same for all tokens: a row of a softmax
        assert attention.sum(-1).sub(1).abs().max() < 1e-12


def test_the_most_important_tokens_of_each_sequence() -> None:
    hidden = torch.tensor([[[3.0, -3.0], [1.0, 1.0], [2.0, 0.0], [0.0, 9.0]]])
    received = torch.tensor([[0.5, 1.0, 4.0, 0.1]])
    values = rules.importance(hidden, received)
    assert values.tolist() == [pytest.approx([3.0, 2.0, 8.0, 0.9])]
    assert rules.most_important(values, 0.5).tolist() == [[True, False, True, False]]
    assert not rules.most_important(values, 0.2).any()  # floor(0.2 * 4) = 0
    assert rules.most_important(torch.ones(2, 4), 0.25).tolist() == [[True, False, False, False]] * 2


@pytest.mark.parametrize(("target", "k", "fits"), [(0.25, 4, True), (0.24, 4, False), (1.0, 2, True), (0.49, 2, False)])
def test_targets_below_one_expert_cannot_be_met(target: float, k: int, fits: bool) -> None:
    if fits:
        rules.check_target(target, k)
        return
    with pytest.raises(UsageError, match=f"at least one of its {k} experts"):
        rules.check_target(target, k)
