"""Patterns: the fixed candidate order, index <-> mask for every N:M up to 8, and best_of against brute force."""

from __future__ import annotations

import itertools
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskllm.errors import MaskError
from maskllm.patterns import Pattern

PATTERNS = [Pattern(n, m) for m in range(2, 9) for n in range(1, m)]


def test_order_of_24_is_that_of_the_published_files() -> None:
    rows = ["".join(str(int(x)) for x in row) for row in Pattern(2, 4).candidates().tolist()]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_candidates_are_all_masks_once(pattern: Pattern) -> None:
    table = pattern.candidates()
    assert table.shape == (comb(pattern.m, pattern.n), pattern.m) == (pattern.count, pattern.m)
    assert (table.sum(-1) == pattern.n).all()
    assert len({tuple(row) for row in table.tolist()}) == pattern.count
    assert torch.equal(pattern.index_of(table.flatten()), torch.arange(pattern.count))


@given(st.sampled_from(PATTERNS), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_index_and_mask_are_inverse(pattern: Pattern, rows: int, groups: int, seed: int) -> None:
    index = torch.randint(pattern.count, (rows, groups), generator=torch.Generator().manual_seed(seed))
    mask = pattern.mask_of(index)
    assert mask.shape == (rows, groups * pattern.m)
    assert torch.equal(pattern.index_of(mask), index)


@settings(deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(0, 2**32 - 1), st.booleans())
def test_best_of_against_brute_force(pattern: Pattern, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, pattern.m)
    score = torch.randint(3, shape, generator=generator).double() if ties else torch.randn(shape, generator=generator).double()
    found = pattern.best_of(score)
    for row, kept in zip(score.tolist(), found.tolist(), strict=True):
        # max() returns the first of equals, and combinations come in lexicographic order: on a tie the earlier weight stays.
        best = max(itertools.combinations(range(pattern.m), pattern.n), key=lambda c: sum(row[i] for i in c))
        assert tuple(i for i, k in enumerate(kept) if k) == best


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "8:16", "5:11", "2", "a:b", "2:4:8", ""])
def test_impossible_patterns(text: str) -> None:
    with pytest.raises(MaskError):
        Pattern.parse(text)


def test_masks_that_are_not_nm() -> None:
    with pytest.raises(MaskError, match="1 of 2 groups"):
        Pattern(2, 4).index_of(torch.tensor([1, 1, 0, 0, 1, 1, 1, 0]).bool())
    with pytest.raises(MaskError, match="does not divide"):
        Pattern(2, 4).index_of(torch.ones(6).bool())
    with pytest.raises(MaskError, match="candidate indices"):
        Pattern(2, 4).mask_of(torch.tensor([6]))
