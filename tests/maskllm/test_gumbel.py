"""The soft mask against plain formulas, its noise against integers in pure Python, schedules and prior logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import compress_kernels.gumbel.reference as reference
from compress_kernels.gumbel import Draw, gumbel_noise, masked_weight, masked_weight_backward, probabilities, stream_key
from maskllm.errors import MaskError
from maskllm.gumbel import Parametrization, Schedule, hard_mask, logit_width, prior_logits, soft_masked_weight
from maskllm.patterns import Pattern

PATTERNS = [Pattern(n, m) for m in range(2, 9) for n in range(1, m)]
BOTH: tuple[Parametrization, ...] = ("patterns", "scores")
patterns = st.sampled_from(PATTERNS)
parametrizations = st.sampled_from(BOTH)
keys = st.none() | st.integers(0, (1 << 64) - 1)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def written_out(logits: Tensor, weight: Tensor, pattern: Pattern, parametrization: str, draw: Draw) -> Tensor:
    """Equations 4-7 of the paper over whole tensors, in the dtype given: w' `[G, M]`."""
    table = pattern.candidates().to(logits.dtype)  # [C, M]
    pi = logits if parametrization == "patterns" else logits @ table.T  # [G, C]
    z = draw.kappa * pi
    if draw.noise_key is not None:
        z = z + gumbel_noise(draw.noise_key, 0, z.numel()).view(z.shape).to(z)
    y = torch.softmax(z / draw.tau, -1)
    if draw.hard:
        y = torch.nn.functional.one_hot(y.argmax(-1), pattern.count).to(y) + (y - y.detach())
    return (y @ table) * weight


# --- the mask


@given(patterns, parametrizations, keys, st.floats(0.05, 4), st.floats(1, 500), st.integers(0, 99))
def test_every_soft_mask_keeps_n_in_sum(
    pattern: Pattern, parametrization: Parametrization, key: int | None, tau: float, kappa: float, seed: int
) -> None:
    logits = numbers(3, 5, logit_width(pattern, parametrization), seed=seed, dtype=torch.float32) * 0.05
    ones = torch.ones(3, 5 * pattern.m)
    mask, _ = soft_masked_weight(logits, ones, pattern, parametrization, Draw(tau, kappa, key))
    groups = mask.unflatten(-1, (-1, pattern.m))
    torch.testing.assert_close(groups.sum(-1), torch.full((3, 5), float(pattern.n)), atol=1e-5, rtol=0)
    assert float(mask.min()) >= 0
    assert float(mask.max()) <= 1 + 1e-6


@given(patterns, parametrizations, keys, st.booleans(), st.booleans(), st.integers(0, 999))
def test_values_and_closed_form_gradients(
    pattern: Pattern, parametrization: Parametrization, key: int | None, hard: bool, want_norm: bool, seed: int
) -> None:
    """Against autograd through the plain formula, in float64, with an upstream gradient on the weight and on its norm."""
    draw = Draw(tau=0.7, kappa=1.9, noise_key=key, hard=hard)
    weight, upstream = numbers(7, 2 * pattern.m, seed=seed + 1), numbers(7, 2 * pattern.m, seed=seed + 2)
    start = numbers(7, 2, logit_width(pattern, parametrization), seed=seed)

    mine = start.clone().requires_grad_()
    out, norm = soft_masked_weight(mine, weight, pattern, parametrization, draw, want_norm=want_norm)
    ((out * upstream).sum() + (0.3 * norm if want_norm else 0)).backward()

    plain = start.clone().requires_grad_()
    expected = written_out(plain.reshape(14, -1), weight.reshape(14, -1), pattern, parametrization, draw).view(weight.shape)
    squared = expected.square().sum()
    ((expected * upstream).sum() + (0.3 * squared if want_norm else 0)).backward()

    assert mine.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(norm, squared.detach() if want_norm else torch.zeros_like(norm), atol=1e-9, rtol=0)
    torch.testing.assert_close(mine.grad, plain.grad, atol=1e-9, rtol=0)


def test_a_gradient_on_the_norm_alone() -> None:
    logits, weight = numbers(6, 6).requires_grad_(), numbers(6, 4, seed=1)
    _, norm = soft_masked_weight(logits.view(6, 1, 6), weight, Pattern(2, 4), "patterns", Draw(0.7, 1.9), want_norm=True)
    (mine,) = torch.autograd.grad(norm, logits)
    squared = written_out(logits, weight, Pattern(2, 4), "patterns", Draw(0.7, 1.9)).square().sum()
    torch.testing.assert_close(mine, torch.autograd.grad(squared, logits)[0], atol=1e-9, rtol=0)


def test_gradcheck() -> None:
    weight = numbers(3, 8, seed=1)
    for parametrization in BOTH:
        logits = numbers(3, 2, logit_width(Pattern(2, 4), parametrization)).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, p=parametrization: soft_masked_weight(x, weight, Pattern(2, 4), p, Draw(0.9, 1.5, 7), want_norm=True),
            (logits,),
        )


@given(patterns, parametrizations, keys, st.integers(1, 300))
def test_chunks_change_nothing(pattern: Pattern, parametrization: Parametrization, key: int | None, chunk: int) -> None:
    logits = numbers(23, logit_width(pattern, parametrization))
    weight, grad = numbers(23, pattern.m, seed=1), numbers(23, pattern.m, seed=2)
    table, draw = pattern.candidates().float(), Draw(0.8, 2.0, key)

    def run() -> tuple[Tensor, ...]:
        scores = parametrization == "scores"
        forward = masked_weight(logits, weight, table, scores, draw, torch.float64, True)
        return *forward, masked_weight_backward(grad, torch.tensor(0.1).double(), logits, weight, table, scores, draw)

    whole = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_LOGITS", chunk)
        parts = run()
    # The noise is float32, and the last bit of its logarithms may depend on an element's place in the vector.
    tolerance = 1e-11 if key is None else 1e-4
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_low_precision_weights_and_outputs() -> None:
    weight = numbers(4, 8, seed=1).bfloat16()
    logits = numbers(4, 2, 6, dtype=torch.float32).requires_grad_()
    out, _ = soft_masked_weight(logits, weight, Pattern(2, 4), "patterns", Draw(1.0, 1.0))
    assert out.dtype == torch.bfloat16
    exact = written_out(logits.double().view(8, 6), weight.double().view(8, 4), Pattern(2, 4), "patterns", Draw(1.0, 1.0))
    torch.testing.assert_close(out.double(), exact.view(4, 8), atol=1e-2, rtol=8e-3)
    out.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.float32
    wide, _ = soft_masked_weight(logits, weight, Pattern(2, 4), "patterns", Draw(1.0, 1.0), out_dtype=torch.float32)
    assert wide.dtype == torch.float32


def test_logits_of_another_weight_are_refused() -> None:
    with pytest.raises(MaskError, match=r"logits \(4, 2, 6\) do not belong to a weight \(4, 8\)"):
        soft_masked_weight(torch.zeros(4, 2, 6), torch.zeros(4, 8), Pattern(2, 4), "scores", Draw(1.0, 1.0))


@given(patterns, parametrizations, st.integers(0, 99))
def test_the_hard_mask_is_the_most_probable_candidate(pattern: Pattern, parametrization: Parametrization, seed: int) -> None:
    logits = numbers(2, 3, logit_width(pattern, parametrization), seed=seed, dtype=torch.float32)
    y = probabilities(logits.flatten(0, 1), pattern.candidates().float(), parametrization == "scores", Draw(1.0, 1.0))
    expected = pattern.candidates()[y.argmax(-1)].view(2, -1)
    assert torch.equal(hard_mask(logits, pattern, parametrization), expected)


def test_a_tie_goes_to_the_lower_candidate() -> None:
    assert hard_mask(torch.zeros(1, 1, 6), Pattern(2, 4), "patterns").tolist() == [[True, True, False, False]]
    assert hard_mask(torch.zeros(1, 1, 4), Pattern(2, 4), "scores").tolist() == [[True, True, False, False]]


# --- the noise

_LOW32, _LOW64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def split_mix(*parts: int) -> int:
    """splitmix64's output function, applied as a chain over the parts."""
    key = 0
    for part in parts:
        x = ((key ^ (part % 2**64)) + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        key = x ^ (x >> 31)
    return key


def one_gumbel(key: int, number: int) -> float:
    """One element, with unsigned integers of Python."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW32
        return x ^ (x >> 16)

    pair = split_mix(key, number >> 32)
    bits = mix((mix((number & _LOW32) ^ (pair & _LOW32)) + (pair >> 32)) & _LOW32) >> 9
    return -math.log(-math.log((bits + 0.5) / 2**23))


def test_splitmix_is_the_published_function() -> None:
    """The first outputs of splitmix64 from state 0, as published with its C code."""
    assert stream_key(0) == 0xE220A8397B1DCDAF
    assert stream_key(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


@given(st.lists(st.integers(-(1 << 63), (1 << 64) - 1), max_size=4))
def test_stream_keys(parts: list[int]) -> None:
    assert stream_key(*parts) == split_mix(*parts)


@pytest.mark.parametrize("first", [0, 1, 12345, (1 << 31) - 3, (1 << 31), (1 << 32) - 3, (1 << 32) + 9, (1 << 40) + 1])
@pytest.mark.parametrize("key", [0, 1, 0xFFFFFFFFFFFFFFFF, stream_key(1, 2, 3)])
def test_noise_against_python_integers(key: int, first: int) -> None:
    expected = [one_gumbel(key, first + i) for i in range(7)]  # across the 2^31 and 2^32 boundaries too
    # float32: u near 1 loses digits in log(u), as the definition says
    torch.testing.assert_close(gumbel_noise(key, first, 7).double(), torch.tensor(expected).double(), atol=2e-3, rtol=1e-5)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 33), st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_noise_is_the_same_in_any_pieces(key: int, first: int, sizes: list[int]) -> None:
    whole = gumbel_noise(key, first, sum(sizes))
    at, pieces = first, []
    for size in sizes:
        pieces.append(gumbel_noise(key, at, size))
        at += size
    # Bits of log may differ by one unit between vectorised and leftover elements.
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-5, rtol=1e-5)


def test_noise_has_the_moments_of_gumbel_and_streams_are_apart() -> None:
    count = 400_000
    streams = [gumbel_noise(stream_key(0, step, 0, layer), 0, count).double() for step in (0, 1) for layer in (0, 1)]
    for noise in streams:
        assert noise.isfinite().all()
        assert float(noise.mean()) == pytest.approx(0.5772156649, abs=0.01)  # 5 standard errors
        assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
        # distribution function exp(-exp(-x)): the share below each of a few points
        for x in (-1.0, 0.0, 1.0, 3.0):
            assert float((noise < x).double().mean()) == pytest.approx(math.exp(-math.exp(-x)), abs=0.004)
        assert abs(float(torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1])) < 0.008
    apart = torch.corrcoef(torch.stack(streams)) - torch.eye(4).double()
    assert float(apart.abs().max()) < 0.008


# --- schedules


def test_schedules() -> None:
    assert [Schedule(4, 0.05).at(p) for p in (0, 0.5, 1)] == pytest.approx([4, 2.025, 0.05])
    assert [Schedule(4, 0.25, "exponential").at(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([4, 2, 1, 0.25])
    assert [Schedule(4, 0, "cosine").at(p) for p in (0, 1 / 3, 0.5, 1)] == pytest.approx([4, 3, 2, 0])
    assert [Schedule(4, 9, "constant").at(p) for p in (0, 1)] == [4, 4]
    assert (Schedule(1, 2).at(-1), Schedule(1, 2).at(7)) == (1, 2)
    with pytest.raises(MaskError, match="two positive ends"):
        Schedule(4, 0, "exponential")


# --- priors


def random_mask(pattern: Pattern, rows: int, groups: int, seed: int = 0) -> Tensor:
    index = torch.randint(pattern.count, (rows, groups), generator=torch.Generator().manual_seed(seed))
    return pattern.mask_of(index)


@given(patterns, parametrizations, st.integers(0, 99))
def test_without_noise_the_prior_is_the_argmax(pattern: Pattern, parametrization: Parametrization, seed: int) -> None:
    mask = random_mask(pattern, 3, 17, seed)
    logits = prior_logits(mask, pattern, parametrization, strength=3, std=0.01, noise=False)
    assert logits.shape == (3, 17, logit_width(pattern, parametrization))
    assert torch.equal(hard_mask(logits, pattern, parametrization), mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_both_parametrisations_start_from_the_same_candidate_logits(pattern: Pattern) -> None:
    """Equation 10 written out; patterns' mean over the candidates is zero, scores give the same by S s."""
    mask = random_mask(pattern, 2, 9)
    table = pattern.candidates().double()
    overlap = mask.view(2, 9, pattern.m).double() @ table.T
    expected = (overlap - overlap.mean(-1, keepdim=True)) * 3 * 0.01
    stored = {p: prior_logits(mask, pattern, p, strength=3, std=0.01, noise=False).double() for p in BOTH}
    torch.testing.assert_close(stored["patterns"], expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(stored["scores"] @ table.T, expected, atol=1e-7, rtol=0)


def test_with_the_papers_noise_most_groups_keep_the_prior() -> None:
    pattern = Pattern(2, 4)
    mask = random_mask(pattern, 200, 1000)
    logits = prior_logits(mask, pattern, "patterns", strength=3, std=0.01, noise=True, generator=torch.Generator().manual_seed(0))
    kept = (hard_mask(logits, pattern, "patterns") == mask).unflatten(-1, (-1, 4)).all(-1).double().mean()
    assert float(kept) == pytest.approx(0.945, abs=1e-2)
    centred = logits - prior_logits(mask, pattern, "patterns", strength=3, std=0.01, noise=False)
    assert float(centred.std()) == pytest.approx(0.01, rel=0.01)


def test_noise_on_scores_spreads_the_candidates_alike_and_follows_its_generator() -> None:
    pattern = Pattern(2, 4)
    mask = random_mask(pattern, 100, 500)

    def draw(seed: int) -> Tensor:
        return prior_logits(
            mask, pattern, "scores", strength=3, std=0.01, noise=True, generator=torch.Generator().manual_seed(seed)
        )

    noise = draw(1) - prior_logits(mask, pattern, "scores", strength=3, std=0.01, noise=False)
    assert float((noise @ pattern.candidates().float().T).std()) == pytest.approx(0.01, rel=0.02)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
