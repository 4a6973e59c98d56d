"""N:M patterns: in every group of M consecutive weights along the contracted dimension, N are kept.

The candidates of a pattern are its `C(M, N)` masks, in the order of `itertools.combinations(range(M), N)`. For 2:4 that is
1100, 1010, 1001, 0110, 0101, 0011: the order of the published MaskLLM files, on which every file format here depends.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache
from math import comb

import torch
from torch import Tensor

from maskllm.errors import MaskError


@dataclass(frozen=True)
class Pattern:
    """Keep `n` of every `m` weights, 0 < n < m, with at most 256 candidates (every N:M up to M = 8, and 2:16)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise MaskError(f"pattern {self.n}:{self.m} is not possible: N:M needs 0 < N < M, for example 2:4")
        if comb(self.m, self.n) > 256:
            raise MaskError(
                f"pattern {self.n}:{self.m} has {comb(self.m, self.n)} candidates a group; at most 256 are supported (4:8 has 70)"
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """`"2:4"` -> `Pattern(2, 4)`. Raises MaskError for anything else."""
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if not found:
            raise MaskError(f"{text!r} is not an N:M pattern; write it as in '2:4' (in YAML with the quotes)")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def count(self) -> int:
        """Number of candidate masks of one group, `C(M, N)`."""
        return comb(self.m, self.n)

    def candidates(self) -> Tensor:
        """All masks of one group: bool `[count, m]`, in index order (paper eq. 2)."""
        return _candidates(self.n, self.m).clone()

    def check_divides(self, size: int, name: str) -> None:
        """Raise MaskError unless groups of M fit a contracted dimension of `size`."""
        if size % self.m:
            raise MaskError(
                f"{name}: its contracted dimension is {size}, which {self.m} does not divide, so it cannot have a {self} mask; exclude it"
            )

    def index_of(self, mask: Tensor) -> Tensor:
        """Candidate index of every group: bool `[..., K]` -> int64 `[..., K/m]`.

        Raises MaskError unless every group keeps exactly N.
        """
        self.check_divides(mask.shape[-1], "mask")
        groups = mask.bool().unflatten(-1, (-1, self.m))  # [..., K/m, m]
        kept = groups.sum(-1)
        if bool((kept != self.n).any()):
            bad = int((kept != self.n).sum())
            raise MaskError(f"{bad} of {kept.numel()} groups do not keep exactly {self.n} of {self.m} weights")
        bits = 1 << torch.arange(self.m, device=mask.device)
        code = (groups * bits).sum(-1)
        return _index_of_code(self.n, self.m).to(mask.device)[code]

    def mask_of(self, index: Tensor) -> Tensor:
        """The inverse of `index_of`: integers `[..., K/m]` in [0, count) -> bool `[..., K]`."""
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.count):
            raise MaskError(
                f"candidate indices of {self} lie in [0, {self.count}); found [{int(index.min())}, {int(index.max())}]"
            )
        return _candidates(self.n, self.m).to(index.device)[index.long()].flatten(-2)

    def best_of(self, score: Tensor) -> Tensor:
        """Keep the N highest scores of every group: float `[..., K]` -> bool `[..., K]`; on a tie the earlier weight stays."""
        self.check_divides(score.shape[-1], "score")
        groups = score.unflatten(-1, (-1, self.m))
        order = groups.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : self.n], True)
        return kept.flatten(-2)


@cache
def _candidates(n: int, m: int) -> Tensor:
    table = torch.zeros(comb(m, n), m, dtype=torch.bool)
    for row, kept in enumerate(itertools.combinations(range(m), n)):
        table[row, list(kept)] = True
    return table


@cache
def _index_of_code(n: int, m: int) -> Tensor:
    """Candidate index of each bit code of a group (bit j set = weight j kept); -1 where the code is no candidate."""
    lookup = torch.full((1 << m,), -1, dtype=torch.int64)
    codes = (_candidates(n, m) * (1 << torch.arange(m))).sum(-1)
    lookup[codes] = torch.arange(comb(m, n))
    return lookup
