"""The learned router: gradients of its relaxation, where it starts, and that no token's decision depends on another's."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.routing.router import TopAnyRouter, expected_share, gumbel_noise, relaxed_keep, straight_through_keep
from compress.routing.storage import frozen

H, K, E = 12, 4, 6


def inputs(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=draw, dtype=dtype)
    weights = torch.rand(tokens, K, generator=draw, dtype=dtype).sort(dim=-1, descending=True).values
    experts = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(tokens)])
    return hidden, weights, experts


def router(seed: int = 0, spread: float = 1.0) -> TopAnyRouter:
    """One with weights drawn at random, so that tokens get different decisions."""
    made = TopAnyRouter(H, K, E, rank=5, seed=seed)
    hidden, weights, _ = inputs(64, seed + 1, torch.float32)
    made.standardise(hidden * 3 + 1, weights)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * spread)
        made.bias.sub_(made.bias.mean())
    return made


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_gradients_of_the_relaxed_decision_are_those_of_finite_differences(noisy: bool, temperature: float) -> None:
    made = router().double()
    hidden, weights, experts = inputs(3)
    noise = gumbel_noise((3, K), torch.float64, hidden.device, torch.Generator().manual_seed(1)) if noisy else None
    values = torch.randn(3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*made.named_parameters(), strict=True)

    def loss(hidden: torch.Tensor, weights: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        for name, part in zip(names, parts, strict=True):
            delattr(made, name)
            setattr(made, name, part)
        logits = made.logits(hidden, weights, experts)
        return (relaxed_keep(logits, temperature, noise) * values).sum() + expected_share(logits).sum()

    for name in names:
        del made._parameters[name]
        setattr(made, name, None)
    arguments = [x.detach().clone().requires_grad_() for x in (hidden, weights, *parameters)]
    assert torch.autograd.gradcheck(loss, arguments, eps=1e-6, atol=1e-7, rtol=1e-5)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([2.0, 0.7]))
def test_straight_through_is_hard_forward_and_relaxed_backward(seed: int, temperature: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, K, generator=draw, dtype=torch.float64, requires_grad=True)
    noise = gumbel_noise((7, K), torch.float64, logits.device, draw)
    values = torch.randn(7, K, generator=draw, dtype=torch.float64)
    hard, soft = straight_through_keep(logits, temperature, noise), relaxed_keep(logits, temperature, noise)
    drawn = (logits + noise).argmax(-1)
    assert torch.equal(hard.detach(), (torch.arange(K) <= drawn[:, None]).double())
    (one,) = torch.autograd.grad((hard * values).sum(), logits)
    (other,) = torch.autograd.grad((soft * values).sum(), logits)
    assert torch.equal(one, other)


def test_candidates_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.3, -0.5, 1.0, 0.0]).expand(200_000, K)
    noise = gumbel_noise(tuple(logits.shape), torch.float32, logits.device, torch.Generator().manual_seed(0))
    kept = straight_through_keep(logits, 1.0, noise).sum(-1)
    shares = torch.bincount(kept.long(), minlength=K + 1)[1:] / len(kept)
    assert torch.allclose(shares, logits[0].softmax(-1), atol=5e-3)


@pytest.mark.parametrize("keep_all", [0.6, 0.95])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_it_starts_with_all_experts_for_every_token(k: int, keep_all: float) -> None:
    made = TopAnyRouter(H, k, 16, rank=5, keep_all=keep_all)
    hidden, weights = torch.randn(50, H), torch.rand(50, k).sort(dim=-1, descending=True).values
    experts = torch.randint(0, 16, (50, k))
    probabilities = made.logits(hidden, weights, experts).softmax(-1)
    assert torch.allclose(probabilities[:, -1], torch.tensor(keep_all), atol=1e-5)
    assert torch.equal(frozen(made)(hidden, weights, experts), torch.full((50,), k))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_folded_form_decides_as_the_logits_do(seed: int) -> None:
    made = router(seed % 7)
    made.offset.fill_((seed % 5 - 2) / 3)
    hidden, weights, experts = inputs(40, seed, torch.float32)
    ready = frozen(made)
    expected = ready.logits(hidden, weights, experts).argmax(-1) + 1
    assert torch.equal(ready(hidden, weights, experts), expected)


def test_a_tie_keeps_more() -> None:
    made = TopAnyRouter(H, K, E, rank=5)
    with torch.no_grad():
        made.bias.zero_()
    assert frozen(made)(*inputs(3, dtype=torch.float32)).tolist() == [K] * 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_decision_does_not_depend_on_the_neighbours(seed: int, dtype: torch.dtype) -> None:
    ready = frozen(router(seed % 5))
    hidden, weights, experts = inputs(33, seed, torch.float32)
    hidden, weights = hidden.to(dtype), weights.to(dtype)
    together = ready(hidden, weights, experts)
    assert len(set(together.tolist())) > 1
    alone = torch.cat([ready(hidden[i : i + 1], weights[i : i + 1], experts[i : i + 1]) for i in range(33)])
    assert torch.equal(alone, together)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ready(hidden[order], weights[order], experts[order]), together[order])


def test_more_offset_never_drops_more() -> None:
    ready = frozen(router(3))
    seen = []
    for offset in (-3.0, -1.0, 0.0, 1.0, 3.0):
        ready.offset.fill_(offset)
        seen.append(ready(*inputs(200, 5, torch.float32)))
    assert all(bool((a <= b).all()) for a, b in itertools.pairwise(seen))
    assert seen[0].float().mean() < seen[-1].float().mean()
