"""One-shot scores against loops, and SparseGPT against optimal brain surgeon done step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskllm.errors import MaskError
from maskllm.patterns import Pattern
from maskllm.priors import magnitude, ria, sparsegpt, wanda

OUT, IN, TOKENS = 6, 16, 200


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> Tensor:
    """Correlated, of unequal size: `[tokens, in]`."""
    draw = torch.Generator().manual_seed(1)
    mixing = torch.randn(IN, IN, generator=draw) * torch.linspace(0.2, 2, IN)
    return torch.randn(TOKENS, IN, generator=draw) @ mixing


def test_scores_against_loops(weight: Tensor, inputs: Tensor) -> None:
    squares = inputs.square().sum(0)
    found = magnitude(weight), wanda(weight, squares, TOKENS), ria(weight, squares)
    for i in range(OUT):
        row = sum(abs(v) for v in weight[i].tolist())
        for j in range(IN):
            size, column = abs(weight[i, j].item()), sum(abs(v) for v in weight[:, j].tolist())
            norm = sum(v * v for v in inputs[:, j].tolist()) ** 0.5
            assert found[0][i, j].item() == pytest.approx(size)
            assert found[1][i, j].item() == pytest.approx(size * norm / TOKENS**0.5, rel=1e-5)
            assert found[2][i, j].item() == pytest.approx((size / column + size / row) * norm**0.5, rel=1e-5)


def test_scores_of_low_precision_weights_are_float32(weight: Tensor, inputs: Tensor) -> None:
    squares = inputs.square().sum(0)
    for score in (magnitude(weight.bfloat16()), wanda(weight.bfloat16(), squares, TOKENS), ria(weight.bfloat16(), squares)):
        assert score.dtype == torch.float32


def test_a_matrix_with_a_zero_row_and_column_has_finite_relative_importance(inputs: Tensor, weight: Tensor) -> None:
    weight[2], weight[:, 3] = 0, 0
    score = ria(weight, inputs.square().sum(0))
    assert score.isfinite().all()
    assert float(score[2].abs().max()) == 0


def surgeon(weight: Tensor, gram: Tensor, pattern: Pattern, damping: float) -> tuple[Tensor, Tensor]:
    """Slow and independent: float64; the Hessian of the columns not yet decided is inverted anew at every column.

    At the start of a group the saliency of its columns p is w_p^2 / d_p, where d_p = [H_{p..}^-1]_pp is the inverse over
    p and the columns right of it: what it costs to prune p when those are free to compensate.
    """
    w, h = weight.double().clone(), gram.double().clone()
    columns = w.shape[1]
    h += damping * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    mask = torch.zeros_like(w, dtype=torch.bool)
    for j in range(columns):
        if j % pattern.m == 0:
            for row in range(w.shape[0]):
                cost = {p: (w[row, p] ** 2 / torch.linalg.inv(h[p:, p:])[0, 0]).item() for p in range(j, j + pattern.m)}
                for p in sorted(cost, key=lambda p: -cost[p])[: pattern.n]:
                    mask[row, p] = True
        inverse = torch.linalg.inv(h[j:, j:])
        for row in range(w.shape[0]):
            if not mask[row, j]:
                w[row, j:] -= w[row, j] / inverse[0, 0] * inverse[0]
                w[row, j] = 0
    return mask, w


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(1, 2)], ids=str)
@pytest.mark.parametrize("block", [1, 8, 128])
def test_sparsegpt_is_the_surgeon(weight: Tensor, inputs: Tensor, pattern: Pattern, block: int) -> None:
    gram = inputs.T @ inputs
    found = sparsegpt(weight, gram, pattern, damping=0.05, block=block)
    mask, updated = surgeon(weight, gram, pattern, 0.05)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight.double(), updated, atol=2e-4, rtol=2e-4)
    assert bool((found.weight[~found.mask] == 0).all())
    pattern.index_of(found.mask)  # raises unless every group keeps exactly N


def test_the_scale_of_the_second_moment_does_not_matter(weight: Tensor, inputs: Tensor) -> None:
    gram = inputs.T @ inputs
    one, other = sparsegpt(weight, gram, Pattern(2, 4)), sparsegpt(weight, gram / 1024, Pattern(2, 4))
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight, atol=1e-4, rtol=1e-4)


def test_the_update_lowers_the_error_of_the_output(weight: Tensor, inputs: Tensor) -> None:
    found = sparsegpt(weight, inputs.T @ inputs, Pattern(2, 4))

    def error(w: Tensor) -> float:
        return float(((w - weight) @ inputs.T).square().sum())

    best = weight * found.mask  # the least squares of each row over the weights it keeps bounds what any update can do
    for row, kept in enumerate(found.mask):
        best[row, kept] = torch.linalg.lstsq(inputs[:, kept].double(), inputs.double() @ weight[row].double()).solution.float()
    assert error(best) < error(found.weight) < error(weight * found.mask)
    assert error(found.weight) < error(weight * Pattern(2, 4).best_of(magnitude(weight)))


def test_inputs_that_were_never_on(weight: Tensor, inputs: Tensor) -> None:
    inputs[:, [0, 5, 6, 7]] = 0
    found = sparsegpt(weight, inputs.T @ inputs, Pattern(2, 4))
    assert found.weight.isfinite().all()
    assert bool((found.weight[:, [0, 5, 6, 7]] == 0).all())
    Pattern(2, 4).index_of(found.mask)
    assert bool(found.mask[:, 4].all())  # the one live input of its group is kept
    whole_group = torch.zeros(IN, IN)
    whole_group[4:, 4:] = (inputs.T @ inputs)[4:, 4:]
    Pattern(2, 4).index_of(sparsegpt(weight, whole_group, Pattern(2, 4)).mask)


def test_the_arguments_are_left_alone(weight: Tensor, inputs: Tensor) -> None:
    gram = inputs.T @ inputs
    before = weight.clone(), gram.clone()
    sparsegpt(weight, gram, Pattern(2, 4))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_a_singular_second_moment_says_what_to_do(weight: Tensor) -> None:
    ones = torch.ones(IN, IN)
    with pytest.raises(MaskError, match="raise the damping"):
        sparsegpt(weight, ones - 2 * torch.eye(IN), Pattern(2, 4), damping=0.0)
    with pytest.raises(MaskError, match="does not divide"):
        sparsegpt(weight[:, :15], ones[:15, :15], Pattern(2, 4))
