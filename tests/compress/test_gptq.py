"""GPTQ against optimal brain surgeon done step by step, refinement against exhaustive search, and what happens without calibration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.quantize import gptq as module
from compress.quantize.gptq import gptq, output_error, quantize_matrix, refine, rtn, weighted_gram
from compress.quantize.grid import KINDS, Grid, Quantized
from compress.quantize.published import published
from maskllm.errors import MaskError
from maskllm.hessian import damped
from maskllm.patterns import Pattern

OUT, IN, TOKENS = 12, 96, 600


def inputs(columns: int = IN, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    """Correlated, of unequal size: `[tokens, columns]`. All seeds come from one distribution."""
    mixing = torch.randn(columns, columns, generator=torch.Generator().manual_seed(7)) * torch.linspace(0.1, 2, columns)
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) @ mixing


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gram() -> Tensor:
    return weighted_gram(inputs())


def loss(weight: Tensor, quantized: Quantized, hessian: Tensor) -> float:
    gap = weight.double() - quantized.dequantize().double()
    return float(((gap @ hessian.double()) * gap).sum())


def grid_of(bits: int, kind: str = "float", group_size: int = 32) -> Grid:
    return Grid(bits, group_size, "midrise" if bits == 1 and kind == "float" else kind)  # type: ignore[arg-type]


def surgeon(weight: Tensor, hessian: Tensor, start: Quantized, visit: list[int]) -> Tensor:
    """Slow and independent: float64; the Hessian of the columns not yet rounded is inverted anew at every column."""
    w, h = weight.double().clone(), hessian.double()
    scale, zero = (part.double() for part in start.parameters())
    codes = torch.zeros_like(start.codes)
    for place, column in enumerate(visit):
        rest = visit[place:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        s, z = (part[:, column // start.grid.group_size] for part in (scale, zero))
        code = (w[:, column] / s + z).round().clamp(0, start.grid.top)
        codes[:, column] = code.to(torch.uint8)
        w[:, rest] -= torch.outer((w[:, column] - (code - z) * s) / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize("block", [1, 20, 128])
@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_pass_is_optimal_brain_surgeon(
    weight: Tensor, gram: Tensor, bits: int, order: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    found = gptq(weight, gram, grid_of(bits), order=order, rounds=0)  # type: ignore[arg-type]
    h, _ = damped(gram, 0.01)
    visit = sorted(range(IN), key=lambda j: -float(h[j, j])) if order == "activation" else list(range(IN))
    same = (surgeon(weight, h, found, visit) == found.codes).float().mean()
    assert float(same) > 0.995  # a value half-way between two levels may fall to either side in float32


@pytest.mark.parametrize("kind", KINDS)
def test_refinement_never_raises_the_sum_and_ends_where_no_code_can_change(kind: str, weight: Tensor, gram: Tensor) -> None:
    h, _ = damped(gram, 0.01)
    found = rtn(weight, grid_of(2, kind))
    last = loss(weight, found, h)
    for _ in range(30):
        found = refine(weight, h, found, rounds=1)
        now = loss(weight, found, h)
        assert now <= last * (1 + 1e-6)
        last = now
    found = refine(weight, h, found, rounds=100)
    value, (scale, _) = found.dequantize().double(), found.parameters()
    pull = (weight.double() - value) @ h.double()
    settled = 0
    for row, column, step in itertools.product(range(OUT), range(IN), (-1, 1)):
        if not 0 <= int(found.codes[row, column]) + step <= found.grid.top:
            settled += 1
            continue
        change = step * scale[row, column // 32].item()
        rise = change**2 * h[column, column].item() - 2 * change * pull[row, column].item()
        settled += rise >= -1e-3 * change**2 * h[column, column].item()
    assert settled == 2 * OUT * IN


@pytest.mark.parametrize("kind", KINDS)
def test_refinement_against_all_codes_there_are(kind: str) -> None:
    """Six weights at two bits: with the scale it ends at, the result is near the best of all 4^6 codes, and RTN is not."""
    columns, rows = 6, 20
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    h, _ = damped(weighted_gram(inputs(columns, 50)), 0.01)
    found = gptq(weight, h, Grid(2, columns, kind), damping=0.0, rounds=20)  # type: ignore[arg-type]
    every = torch.cartesian_prod(*[torch.arange(4.0)] * columns)  # [4^6, 6]
    scale, zero = found.parameters()
    best = 0.0
    for row in range(rows):
        gap = (every - zero[row]) * scale[row] - weight[row]
        best += float(((gap @ h) * gap).sum(1).min())
    assert best <= loss(weight, found, h) * (1 + 1e-5)
    assert loss(weight, found, h) <= 1.3 * best
    assert loss(weight, rtn(weight, found.grid), h) > 1.3 * best


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_held_out_error_is_at_most_six_tenths_of_the_published_recipes(bits: int, weight: Tensor, gram: Tensor) -> None:
    test = weighted_gram(inputs(seed=2))
    ours = gptq(weight, gram, grid_of(bits))
    theirs = published(weight, gram, bits, 32)
    assert output_error(weight, ours.dequantize(), test) <= 0.6 * output_error(weight, theirs.dequantize(), test)
    assert ours.bits_per_weight == theirs.bits_per_weight


@pytest.mark.parametrize("kind", KINDS)
def test_error_never_grows_with_bits(kind: str, weight: Tensor, gram: Tensor) -> None:
    test = weighted_gram(inputs(seed=2))
    for h in (gram, test):
        errors = [output_error(weight, gptq(weight, gram, Grid(b, 32, kind)).dequantize(), h) for b in range(1, 9)]  # type: ignore[arg-type]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_step_helps_on_held_out_inputs(bits: int, weight: Tensor, gram: Tensor) -> None:
    test = weighted_gram(inputs(seed=2))
    found = [
        rtn(weight, grid_of(bits)),
        gptq(weight, gram, grid_of(bits), order="given", rounds=0),
        gptq(weight, gram, grid_of(bits), rounds=0),
        gptq(weight, gram, grid_of(bits)),
    ]
    errors = [output_error(weight, q.dequantize(), test) for q in found]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pruned_weights_stay_exactly_zero(kind: str, bits: int, weight: Tensor, gram: Tensor) -> None:
    mask = Pattern(2, 4).best_of(weight.abs())
    grid = grid_of(bits, kind)
    for found in (gptq(weight, gram, grid, mask=mask), rtn(weight, grid, mask=mask)):
        assert bool((found.dequantize()[~mask] == 0).all())
    # The weights that are left make up for the pruned ones: better than quantising the pruned matrix as if it were the original.
    compensated = gptq(weight, gram, grid, mask=mask)
    plain = gptq(weight * mask, gram, grid, mask=mask)
    assert output_error(weight, compensated.dequantize(), gram) < output_error(weight, plain.dequantize(), gram)


def test_masks_that_do_not_fit_are_refused(weight: Tensor, gram: Tensor) -> None:
    mask = weight > 0
    for kind in ("float", "midrise"):
        with pytest.raises(UsageError, match="no level at zero"):
            gptq(weight, gram, Grid(2, 32, kind), mask=mask)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="bool mask"):
        rtn(weight, Grid(2, 32, "symmetric"), mask=mask.float())


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_scale_of_the_gram_does_not_matter(scale: float, weight: Tensor, gram: Tensor) -> None:
    gram = gram.clone()
    gram[5], gram[:, 5] = 0, 0  # an input that was never on
    one, other = (gptq(weight, h, grid_of(2)) for h in (gram, gram * scale))
    assert float((one.codes == other.codes).float().mean()) > 0.99
    error = [output_error(weight, q.dequantize(), gram) for q in (one, other)]
    assert error[0] == pytest.approx(error[1], rel=0.02)


def test_an_input_that_was_never_on_keeps_a_sensible_weight(weight: Tensor, gram: Tensor) -> None:
    gram = gram.clone()
    gram[5], gram[:, 5] = 0, 0
    found = gptq(weight, gram, grid_of(4))
    assert float((found.dequantize()[:, 5] - weight[:, 5]).abs().max()) < 0.6


def test_weighted_grams_against_a_loop() -> None:
    x, c = inputs(8, 20), torch.rand(20, generator=torch.Generator().manual_seed(3))
    expected = sum(c[t] * torch.outer(x[t], x[t]) for t in range(20))
    torch.testing.assert_close(weighted_gram(x, c), expected)
    torch.testing.assert_close(weighted_gram(x), x.T @ x)
    with pytest.raises(UsageError, match="20 inputs"):
        weighted_gram(x, c[:5])
    with pytest.raises(UsageError, match="at least 0"):
        weighted_gram(x, -c)


def test_routing_weights_move_the_error_to_tokens_that_count_less(weight: Tensor) -> None:
    x = torch.cat([inputs(seed=1), inputs(seed=2) @ torch.linspace(3, 0.1, IN).diag()])
    c = torch.cat([torch.full((TOKENS,), 1.0), torch.full((TOKENS,), 1e-3)])
    plain, weighted = (gptq(weight, weighted_gram(x, w), grid_of(2)).dequantize() for w in (None, c))
    first = weighted_gram(x[:TOKENS])
    assert output_error(weight, weighted, first) < 0.8 * output_error(weight, plain, first)


def test_output_error_is_that_of_the_outputs(weight: Tensor, gram: Tensor) -> None:
    changed, x = rtn(weight, grid_of(2)).dequantize(), inputs()
    expected = (x @ (weight - changed).T).square().sum() / (x @ weight.T).square().sum()
    assert output_error(weight, changed, gram) == pytest.approx(float(expected), rel=1e-4)
    zero = torch.zeros_like(weight)
    assert output_error(zero, zero, gram) == 0
    assert output_error(zero, weight, gram) == float("inf")


@pytest.mark.parametrize("tokens", [1, 10, 60])
def test_a_singular_gram_is_damped_by_its_tokens(tokens: int, weight: Tensor) -> None:
    few = weighted_gram(inputs(tokens=tokens, seed=5))
    test = weighted_gram(inputs(seed=2))
    found = quantize_matrix(weight, few, grid_of(2), tokens=tokens)
    assert (found.method, found.damping) == ("gptq", IN / (2 * tokens))
    assert f"{tokens} tokens for {IN} inputs" in found.note
    assert found.error == pytest.approx(output_error(weight, found.quantized.dequantize(), few))
    plain = output_error(weight, rtn(weight, grid_of(2)).dequantize(), test)
    assert output_error(weight, found.quantized.dequantize(), test) < 1.05 * plain


def test_enough_tokens_need_no_note(weight: Tensor, gram: Tensor) -> None:
    found = quantize_matrix(weight, gram, grid_of(3), tokens=100 * IN)
    assert (found.method, found.damping, found.note) == ("gptq", 0.01, "")
    assert torch.equal(found.quantized.codes, gptq(weight, gram, grid_of(3)).codes)


def test_a_gram_that_is_not_positive_definite_raises_the_damping(weight: Tensor, gram: Tensor) -> None:
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -0.05 * gram.diagonal().mean()
    broken = vectors @ values.diag() @ vectors.T
    with pytest.raises(MaskError, match="positive definite"):
        gptq(weight, broken, grid_of(2))
    found = quantize_matrix(weight, broken, grid_of(2))
    assert found.method == "gptq"
    assert found.damping == pytest.approx(0.09)
    assert "damping raised to 0.09" in found.note


def test_without_usable_inputs_it_rounds_to_nearest_and_says_so(weight: Tensor, gram: Tensor) -> None:
    plain = rtn(weight, grid_of(2))
    for nothing in (None, torch.zeros(IN, IN)):
        found = quantize_matrix(weight, nothing, grid_of(2), tokens=0)
        assert (found.method, found.damping, found.error) == ("rtn", None, None)
        assert "no calibration token" in found.note
        assert torch.equal(found.quantized.codes, plain.codes)
    hopeless = quantize_matrix(weight, gram - 10 * gram.diagonal().mean() * torch.eye(IN), grid_of(2))
    assert hopeless.method == "rtn"
    assert "any damping" in hopeless.note


def test_unsound_arguments_are_refused(weight: Tensor, gram: Tensor) -> None:
    bad = gram.clone()
    bad[0, 1] = torch.nan
    with pytest.raises(CompressError, match="gram of the inputs holds 1"):
        gptq(weight, bad, grid_of(2))
    with pytest.raises(CompressError, match="the weight holds"):
        quantize_matrix(weight * torch.nan, gram, grid_of(2))
    with pytest.raises(UsageError, match="needs a gram of that size"):
        gptq(weight, gram[:5, :5], grid_of(2))
    with pytest.raises(UsageError, match="order"):
        gptq(weight, gram, grid_of(2), order="random")  # type: ignore[arg-type]


def test_the_published_recipe_does_not_compensate_inside_a_block_below_four_bits(weight: Tensor, gram: Tensor) -> None:
    """96 columns are one block, so two bits are rounding to nearest of the weights themselves; four bits are not."""
    for bits, same in ((1, True), (2, True), (3, True), (4, False)):
        found = published(weight, gram, bits, 32)
        wide = (part.repeat_interleave(32, 1) for part in found.parameters())
        nearest = found.grid.nearest(weight, *wide).to(torch.uint8)
        assert torch.equal(found.codes, nearest) is same
    # Wider than a block, the second block answers for the first.
    wide_weight = torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    found = published(wide_weight, weighted_gram(inputs(200, 2000)), 2, 128)
    scale, zero = (part.repeat_interleave(128, 1)[:, :200] for part in found.parameters())
    differs = found.codes != found.grid.nearest(wide_weight, scale, zero).to(torch.uint8)
    assert not bool(differs[:, :128].any())
    assert bool(differs[:, 128:].any())
