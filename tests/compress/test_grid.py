"""Grids against loops and exhaustive search, and the properties every grid has."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.quantize.gptq import rtn
from compress.quantize.grid import KINDS, Grid, Quantized, fit, quantize, spread


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(grid: Grid, scale: float, zero: float) -> list[float]:
    return [(code - zero) * scale for code in range(1 << grid.bits)]


grids = st.builds(
    Grid,
    bits=st.integers(1, 8),
    group_size=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(1, 4), st.integers(1, 50), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_every_weight_gets_the_nearest_level_of_its_group_and_stays_there(
    grid: Grid, rows: int, columns: int, seed: int, size: float
) -> None:
    weight = normal(rows, columns, seed=seed) * size
    found = rtn(weight, grid)
    scale, zero = found.parameters()
    assert found.codes.shape == (rows, columns)
    assert scale.shape == zero.shape == (rows, -(-columns // grid.group_size))
    assert int(found.codes.max()) <= grid.top
    value = found.dequantize()
    for row, column in itertools.product(range(rows), range(columns)):
        group = column // grid.group_size
        near = levels(grid, scale[row, group].item(), zero[row, group].item())
        gap = min(abs(weight[row, column].item() - level) for level in near)
        assert abs((value - weight)[row, column].item()) <= gap + 1e-4 * abs(scale[row, group].item())
    again = quantize(value, grid, scale, zero)
    assert torch.equal(again.dequantize(), value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3])
def test_the_clip_search_is_close_to_the_best_grid_there_is(kind: str, bits: int) -> None:
    """Against a dense search over scale and zero, on the weighted error it minimises."""
    grid = Grid(bits, 64, kind)  # type: ignore[arg-type]
    weight, importance = normal(12, 64, seed=3), normal(64, seed=4).square() + 0.05
    scale, zero = fit(weight, grid, importance)
    error = (importance * (quantize(weight, grid, scale, zero).dequantize() - weight).square()).sum(1)
    reach = float(weight.abs().max())
    steps = torch.linspace(-1, 1, 201)[:, None] * 2.2 * reach / max(1, grid.top)
    if grid.fixed_zero is not None:
        zeros = [grid.fixed_zero]
    else:
        zeros = torch.linspace(0, grid.top, (grid.top if kind == "asymmetric" else 8 * grid.top) + 1).tolist()
    ratios = []
    for row in range(len(weight)):
        best = min(
            float(
                (importance * ((grid.nearest(weight[row], steps, torch.tensor(z)) - z) * steps - weight[row]).square())
                .sum(1)
                .min()
            )
            for z in zeros
        )
        ratios.append(float(error[row]) / best)
    assert sum(ratios) / len(ratios) < 1.07


def test_a_gaussian_loses_what_the_literature_says() -> None:
    """Mean squared error of the best uniform quantiser of a unit Gaussian: Max 1960, table II: 0.363, 0.1188, 0.0374, 0.0115."""
    weight = normal(64, 4096, seed=1)
    for bits, known in ((1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)):
        found = rtn(weight, Grid(bits, 4096, "midrise"))
        assert float((found.dequantize() - weight).square().mean()) == pytest.approx(known, rel=0.015)


def test_one_bit_is_sign_and_mean_magnitude() -> None:
    weight = normal(5, 40)
    for search in (True, False):
        found = rtn(weight, Grid(1, 16, "midrise"), search=search)
        for row in range(5):
            for start in (0, 16, 32):
                group = weight[row, start : start + 16]
                mean = group.abs().mean()
                value = found.dequantize()[row, start : start + 16]
                torch.testing.assert_close(value, torch.where(group >= 0, mean, -mean), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_error_never_grows_with_bits_and_the_search_beats_min_max(kind: str) -> None:
    weight = normal(16, 200, seed=5)
    last = torch.inf
    for bits in range(1, 9):
        grid = Grid(bits, 64, kind)  # type: ignore[arg-type]
        error = float((rtn(weight, grid).dequantize() - weight).square().sum())
        plain = float((rtn(weight, grid, search=False).dequantize() - weight).square().sum())
        assert error <= plain * (1 + 1e-6)
        assert error <= last
        last = error


def test_importance_decides_where_the_error_goes() -> None:
    weight = normal(8, 32, seed=6)
    importance = torch.where(torch.arange(32) < 4, 1000.0, 1.0)
    plain, weighted = (rtn(weight, Grid(2, 32), h).dequantize() - weight for h in (None, importance))
    assert float(weighted[:, :4].square().sum()) < 0.5 * float(plain[:, :4].square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_zeros_and_of_one_value(kind: str) -> None:
    weight = torch.zeros(3, 12)
    weight[1] = 0.75
    weight[2, 4:8] = -2.0
    found = rtn(weight, Grid(2, 4, kind)).dequantize()  # type: ignore[arg-type]
    torch.testing.assert_close(found, weight, rtol=2e-3, atol=0)


def test_dequantised_values_are_the_formula_bit_for_bit() -> None:
    found = rtn(normal(4, 20), Grid(3, 8, "float", torch.bfloat16))
    assert found.zero is not None
    assert found.scale.dtype == found.zero.dtype == torch.bfloat16
    for row, column in itertools.product(range(4), range(20)):
        scale, zero = found.scale[row, column // 8].float(), found.zero[row, column // 8].float()
        assert found.dequantize()[row, column].item() == ((found.codes[row, column].float() - zero) * scale).item()
    assert torch.equal(found.dequantize(torch.bfloat16), found.dequantize().bfloat16())


def test_stored_zeros_and_honest_bits() -> None:
    weight = normal(4, 192)
    kept = {kind: rtn(weight, Grid(2, 128, kind)) for kind in KINDS}
    assert {kind: None if q.zero is None else q.zero.dtype for kind, q in kept.items()} == {
        "symmetric": None,
        "asymmetric": torch.uint8,
        "float": torch.float16,
        "midrise": None,
    }
    assert kept["symmetric"].bits_per_weight == 2 + 2 * 16 / 192
    assert kept["asymmetric"].bits_per_weight == 2 + 2 * 18 / 192
    assert kept["float"].bits_per_weight == 2 + 2 * 32 / 192
    assert rtn(normal(1, 3), Grid(3, 4, "midrise")).bits_per_weight == (16 + 16) / 3  # 9 bits of codes take two bytes


def test_spread_repeats_each_group_over_its_columns() -> None:
    assert spread(torch.tensor([[1.0, 2.0]]), 3, 5).tolist() == [[1, 1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 0}, "1 to 8 bits"),
        ({"bits": 9}, "1 to 8 bits"),
        ({"bits": 2, "group_size": 0}, "group size"),
        ({"bits": 2, "kind": "wavy"}, "symmetric, asymmetric, float, midrise"),
        ({"bits": 2, "dtype": torch.float32}, "float16 or bfloat16"),
    ],
)
def test_impossible_grids_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Grid(**arguments)  # type: ignore[arg-type]


def test_weights_that_cannot_be_quantised_are_refused() -> None:
    weight = normal(4, 8)
    weight[1, 2], weight[3, 3] = torch.nan, torch.inf
    with pytest.raises(CompressError, match="holds 2 values"):
        rtn(weight, Grid(2))
    with pytest.raises(CompressError, match="shape"):
        rtn(torch.zeros(4), Grid(2))
    with pytest.raises(CompressError, match="bfloat16"):
        rtn(normal(4, 8) * 1e7, Grid(2))
    assert isinstance(rtn(normal(4, 8) * 1e7, Grid(2, dtype=torch.bfloat16)), Quantized)
