"""The compiled router against its definition in torch, on every instruction set this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_kernels.native import ISAS, native, use_isa
from compress_kernels.routing import Router, count_experts, cpu, reference


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert native("routing").library is not None, native("routing").reason
    best = native("routing").isa
    if use_isa("routing", request.param) != request.param:
        use_isa("routing", best)
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    use_isa("routing", best)


def router(width: int, k: int, experts: int, rank: int, seed: int) -> Router:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return Router(
        normal(rank, width) / width**0.5,
        normal(rank + k - 1, k) / 3,
        normal(rank + k - 1) / 3,
        normal(k - 1, rank) / 2,
        normal(experts) / 2,
        normal(1)[0] / 2,
    )


def inputs(tokens: int, width: int, k: int, experts: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(tokens, width, generator=draw)
    weights = torch.rand(tokens, k, generator=draw).sort(dim=-1, descending=True).values
    return hidden.to(dtype), weights.to(dtype), torch.randint(0, experts, (tokens, k), generator=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "k", "rank"), [(33, 2, 1), (64, 4, 5), (195, 8, 32)])
def test_it_counts_what_the_definition_counts(isa: str, width: int, k: int, rank: int, dtype: torch.dtype) -> None:
    numbers = router(width, k, 16, rank, seed=k)
    tensors = inputs(300, width, k, 16, 1, dtype)
    found = cpu.count_experts(*tensors, numbers)
    assert torch.equal(found, reference.count_experts(*tensors, numbers))
    assert len(found.unique()) > 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_a_token_has_the_same_result_in_any_batch(seed: int, tokens: int) -> None:
    numbers = router(48, 4, 8, 6, seed)
    tensors = inputs(tokens, 48, 4, 8, seed, torch.float32)
    together = cpu.count_experts(*tensors, numbers)
    alone = [cpu.count_experts(*(x[i : i + 1] for x in tensors), numbers) for i in range(tokens)]
    assert torch.equal(torch.cat(alone), together)


def test_a_tie_keeps_more_and_no_token_is_no_token(isa: str) -> None:
    zeros = Router(*[torch.zeros_like(part) for part in router(8, 3, 4, 2, 0)])
    tensors = inputs(5, 8, 3, 4, 0, torch.float32)
    assert cpu.count_experts(*tensors, zeros).tolist() == [3] * 5
    assert cpu.count_experts(*(x[:0] for x in tensors), zeros).tolist() == []


def test_weights_of_zero_count_as_the_least_weight(isa: str) -> None:
    numbers = router(8, 3, 4, 2, 0)
    hidden, weights, experts = inputs(6, 8, 3, 4, 2, torch.float32)
    weights[:, 1:] = 0
    assert torch.equal(
        cpu.count_experts(hidden, weights, experts, numbers), reference.count_experts(hidden, weights, experts, numbers)
    )


def test_strided_inputs_and_what_it_does_not_take() -> None:
    numbers = router(16, 4, 8, 3, 1)
    hidden, weights, experts = inputs(12, 32, 4, 8, 3, torch.float32)
    strided = hidden[:, ::2]
    expected = reference.count_experts(strided, weights, experts, numbers)
    assert torch.equal(cpu.count_experts(strided, weights, experts, numbers), expected)
    for other in (strided.double(), strided.half()):
        assert not cpu.supported(other, weights, numbers)
        assert torch.equal(
            count_experts(other, weights, experts, numbers), reference.count_experts(other, weights, experts, numbers)
        )
    assert not cpu.supported(strided, weights, Router(*[part.float() for part in numbers]))
