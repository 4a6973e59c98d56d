"""One-shot pruning of one matrix: the masks that learning starts from and is compared with.

Each function scores a weight `[out, in]` from what calibration saw of its inputs; `Pattern.best_of` turns scores into a mask.
SparseGPT decides column by column while it updates the weights that remain, so it is a procedure, not a score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskllm.hessian import damped, inverse_factor
from maskllm.patterns import Pattern


def magnitude(weight: Tensor) -> Tensor:
    """`|W|`: float32 `[out, in]`."""
    return weight.float().abs()


def wanda(weight: Tensor, sum_squares: Tensor, tokens: int) -> Tensor:
    """`|W_ij| * ||x_j||_2 / sqrt(tokens)` (Sun et al., arXiv 2306.11695). sum_squares: `[in]`, over `tokens` calibration tokens."""
    return weight.float().abs() * (sum_squares.float() / max(tokens, 1)).sqrt()


def ria(weight: Tensor, sum_squares: Tensor, exponent: float = 0.5) -> Tensor:
    """RIA, relative importance and activations (Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for
    Large Language Models", ICLR 2024):

    `(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||x_j||_2^exponent`.
    """
    size = weight.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    relative = size / size.sum(0, keepdim=True).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return relative * sum_squares.float().sqrt().pow(exponent)


@dataclass(frozen=True)
class SparseGPTResult:
    """mask: bool `[out, in]`. weight: `[out, in]` float32, pruned and updated."""

    mask: Tensor
    weight: Tensor


@torch.no_grad()
def sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern, *, damping: float = 0.01, block: int = 128) -> SparseGPTResult:
    """SparseGPT (Frantar & Alistarh, arXiv 2301.00774, algorithm 1 with the N:M selection of its section 3.4).

    weight: `[out, in]`. gram: `sum x x^T` over the calibration tokens, `[in, in]`; its scale does not matter.
    Columns are visited in order. At the first column of every group of M the N weights with the largest `w^2 / [U_jj]^2` are
    kept, U the upper Cholesky factor of the damped inverse; every pruned weight's error is spread over the columns to its right.
    damping: see `damped`. Raises MaskError when the damped matrix is still not positive definite.
    """
    w = weight.float().clone()
    columns = w.shape[1]
    pattern.check_divides(columns, "weight")
    step = max(pattern.m, block // pattern.m * pattern.m)  # a block never cuts a group
    h, dead = damped(gram, damping)
    w[:, dead] = 0  # their weights change nothing
    upper = inverse_factor(h)

    mask = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        part, u = w[:, start:end], upper[start:end, start:end]
        errors = torch.zeros_like(part)
        for j in range(end - start):
            if j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                score = part[:, group].square() / u.diagonal()[group].square()
                mask[:, start + j : start + j + pattern.m] = pattern.best_of(score)
            column = part[:, j]
            error = torch.where(mask[:, start + j], 0.0, column) / u[j, j]
            part[:, j:] -= torch.outer(error, u[j, j:])
            errors[:, j] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    w[~mask] = 0  # what the subtraction leaves of a pruned weight is rounding
    return SparseGPTResult(mask, w)
