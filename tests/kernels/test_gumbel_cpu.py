"""The C++ soft mask against the torch definition, the plain formulas under autograd and the noise stream, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gumbel_cases import BOTH, KEY, PATTERNS, case, close, need_kernel, numbers
from torch import Tensor

from compress_kernels import gumbel
from compress_kernels.gumbel import Draw, cpu, reference
from compress_kernels.native import ISAS, use_isa
from maskllm.gumbel import Parametrization, logit_width
from maskllm.patterns import Pattern

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    need_kernel()
    if use_isa("gumbel", request.param) != request.param:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    use_isa("gumbel", ISAS[-1])


# --- values and gradients


@pytest.mark.parametrize("groups", [0, 1, 3, 16, 17, 63, 64, 1023, 1024, 1041, 2500])
@pytest.mark.parametrize("parametrization", BOTH)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values_and_gradients_against_the_definition_in_float64(
    isa: str, pattern: Pattern, parametrization: Parametrization, groups: int
) -> None:
    """Every tail of a vector and of a chunk, hard and soft, with and without noise, norm and both upstream gradients."""
    logits, weight, grad = case(pattern, parametrization, groups)
    table, scores = pattern.candidates().double(), parametrization == "scores"
    for key in (None, KEY):
        for hard in (False, True):
            draw = Draw(0.5, 100.0, key, hard)
            out, norm = cpu.masked_weight(logits, weight, pattern.n, scores, draw, torch.float32, True)
            exact, exact_norm = reference.masked_weight(logits.double(), weight, table, scores, draw, torch.float64, True)
            close(out, exact, TOLERANCE[torch.float32])
            close(norm, exact_norm, 4e-6)
            for upstream, on_norm in ((grad, None), (grad, torch.tensor(0.3)), (None, torch.tensor(-0.2))):
                mine = cpu.masked_weight_backward(upstream, on_norm, logits, weight, pattern.n, scores, draw)
                wide = upstream if upstream is None else upstream.double()
                theirs = reference.masked_weight_backward(wide, on_norm, logits.double(), weight, table, scores, draw)
                close(mine, theirs, 2e-6, scale=200 * 5)  # kappa / tau times dL/dm


def test_the_norm_is_zero_unless_asked_for(isa: str) -> None:
    logits, weight, _ = case(Pattern(2, 4), "scores", 40)
    assert float(cpu.masked_weight(logits, weight, 2, True, Draw(1.0, 1.0), torch.float32, False)[1]) == 0


@pytest.mark.parametrize("parametrization", BOTH)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_against_autograd_of_the_plain_formula(isa: str, pattern: Pattern, parametrization: Parametrization) -> None:
    logits, weight, grad = case(pattern, parametrization, 37)
    table = pattern.candidates().double()
    start = logits.double().requires_grad_()
    pi = start @ table.T if parametrization == "scores" else start
    noise = reference.gumbel_noise(KEY, 0, 37 * pattern.count).view(37, -1).double()
    masked = torch.softmax((20.0 * pi + noise) / 0.8, -1) @ table * weight.double()
    ((masked * grad.double()).sum() + 0.1 * masked.square().sum()).backward()
    draw = Draw(0.8, 20.0, KEY)
    mine = cpu.masked_weight_backward(grad, torch.tensor(0.1), logits, weight, pattern.n, parametrization == "scores", draw)
    assert start.grad is not None
    close(mine, start.grad, 2e-6, scale=25 * 5)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", list(TOLERANCE))
@pytest.mark.parametrize("weight_dtype", list(TOLERANCE))
@pytest.mark.parametrize("parametrization", BOTH)
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(2, 8)], ids=str)
def test_every_dtype(
    isa: str,
    pattern: Pattern,
    parametrization: Parametrization,
    weight_dtype: torch.dtype,
    out_dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> None:
    logits, weight, grad = case(pattern, parametrization, 75)
    logits, weight, grad = logits.to(logits_dtype), weight.to(weight_dtype), grad.to(out_dtype)
    table, scores, draw = pattern.candidates().double(), parametrization == "scores", Draw(0.5, 100.0)
    out, _ = cpu.masked_weight(logits, weight, pattern.n, scores, draw, out_dtype, False)
    assert out.dtype == out_dtype
    exact, _ = reference.masked_weight(logits.double(), weight, table, scores, draw, torch.float64, False)
    close(out, exact, TOLERANCE[out_dtype])
    mine = cpu.masked_weight_backward(grad, None, logits, weight, pattern.n, scores, draw)
    assert mine.dtype == logits_dtype
    theirs = reference.masked_weight_backward(grad.double(), None, logits.double(), weight, table, scores, draw)
    close(mine, theirs, TOLERANCE[logits_dtype], scale=1000 if logits_dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    """Every 16-bit number in, and floats at, beside and between them out; a mask of ones (huge scores all alike) keeps half."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    # Hard, all scores equal: the mask is 1100, so the first two weights of a group pass unchanged.
    pairs = torch.zeros(1 << 15, 4, dtype=dtype)
    pairs[:, :2] = every.view(-1, 2)
    logits, draw = torch.zeros(1 << 15, 4), Draw(1.0, 1.0, hard=True)
    same, _ = cpu.masked_weight(logits, pairs, 2, True, draw, torch.float32, False)
    torch.testing.assert_close(same[:, :2].flatten(), every.float(), rtol=0, atol=0, equal_nan=True)

    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    ties = (every.float().view(torch.int32) + (1 << (15 if dtype == torch.bfloat16 else 12))).view(torch.float32)
    floats = torch.cat([every.float(), ties, bits.view(torch.float32), numbers(1 << 16) * 1e-6, torch.full((4,), 65520.0)])
    wide = torch.zeros(floats.numel() // 2, 4)
    wide[:, :2] = floats.view(-1, 2)
    out, _ = cpu.masked_weight(torch.zeros_like(wide), wide, 2, True, draw, dtype, False)
    mine, expected = out[:, :2].flatten().float(), floats.to(dtype).float()
    # AVX-512's instruction for bfloat16 makes denormals zero.
    settled = torch.where(floats.abs() < 2.0**-126, torch.zeros(()), expected) if isa == "avx512" else expected
    mine = torch.where(floats.abs() < 2.0**-126, torch.zeros(()), mine) if isa == "avx512" else mine
    torch.testing.assert_close(mine, settled, rtol=0, atol=0, equal_nan=True)


# --- noise


@pytest.mark.parametrize("first", [0, 5, (1 << 31) - 3, (1 << 32) - 20, (1 << 32) - 1, (1 << 40) + 1])
def test_the_noise_is_the_reference_stream(isa: str, first: int) -> None:
    mine, theirs = cpu.gumbel_noise(KEY, first, 3001), gumbel.gumbel_noise(KEY, first, 3001)
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("count", [1, 6, 70])
def test_masks_cross_the_2_to_the_32_boundary(isa: str, count: int) -> None:
    """Groups whose element numbers straddle it, within one group too; 1:4's four candidates divide it, 2:4's six do not."""
    pattern = {1: Pattern(1, 4), 6: Pattern(2, 4), 70: Pattern(4, 8)}[count]
    first = (1 << 32) // pattern.count - 29
    logits, weight, _ = case(pattern, "patterns", 80)
    out, _ = cpu.masked_weight(logits, weight, pattern.n, False, Draw(0.5, 10.0, KEY), torch.float32, False, first_group=first)
    y = reference._probabilities(logits.double(), pattern.candidates().double(), False, Draw(0.5, 10.0, KEY), first)
    close(out, (y.t() @ pattern.candidates().double()) * weight, 4e-6)


# --- hard cases


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("parametrization", BOTH)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_extreme_logits(isa: str, pattern: Pattern, parametrization: Parametrization, key: int | None, hard: bool) -> None:
    logits, weight, grad = case(pattern, parametrization, 50)
    logits = torch.where(logits > 0, 1e4, -1e4) + logits
    scores, draw = parametrization == "scores", Draw(0.01, 500.0, key, hard)
    out, norm = cpu.masked_weight(logits, weight, pattern.n, scores, draw, torch.float32, True)
    back = cpu.masked_weight_backward(grad, torch.tensor(0.1), logits, weight, pattern.n, scores, draw)
    assert out.isfinite().all()
    assert norm.isfinite()
    assert back.isfinite().all()
    mask = out / weight
    torch.testing.assert_close(mask.sum(-1), torch.full((50,), float(pattern.n)), rtol=1e-5, atol=0)


def test_nothing_denormal_is_made(isa: str) -> None:
    """Probabilities from 1 down to 2^-200: those too small for float32's normal range are zero, and so are their gradients."""
    logits = torch.linspace(0, 140, 4096).repeat(6, 1).t() * torch.tensor([0.0, -1, -1, -1, -1, -1])
    weight, grad = torch.ones(4096, 4), numbers(4096, 4)
    out, _ = cpu.masked_weight(logits, weight, 2, False, Draw(1.0, 1.0), torch.float32, False)
    back = cpu.masked_weight_backward(grad * 1e-6, None, logits, weight, 2, False, Draw(1.0, 1.0))
    for result in (out, back):
        assert not ((result != 0) & (result.abs() < torch.finfo(torch.float32).tiny)).any()
    assert (back[:1000, 1:] != 0).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_nan_and_infinite_weights_propagate(isa: str, dtype: torch.dtype) -> None:
    logits, weight, grad = case(Pattern(2, 4), "scores", 33)
    weight[3, 1], weight[32, 2] = torch.nan, torch.inf
    out, norm = cpu.masked_weight(logits, weight.to(dtype), 2, True, Draw(1.0, 1.0), dtype, True)
    assert out[3, 1].isnan()
    assert out[32, 2].isinf()
    assert int(out.isfinite().sum()) == 33 * 4 - 2
    assert norm.isnan()
    back = cpu.masked_weight_backward(grad, None, logits, weight, 2, True, Draw(1.0, 1.0))
    assert back[3].isnan().all()
    assert back[4:32].isfinite().all()


@pytest.mark.parametrize("parametrization", BOTH)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_nan_logits_show(isa: str, pattern: Pattern, parametrization: Parametrization) -> None:
    """Wherever in a group the NaN is: the whole group is NaN, as softmax makes it, and no other."""
    for place in range(logit_width(pattern, parametrization)):
        logits, weight, _ = case(pattern, parametrization, 20)
        logits[7, place] = torch.nan
        out, _ = cpu.masked_weight(logits, weight, pattern.n, parametrization == "scores", Draw(1.0, 1.0), torch.float32, False)
        assert out[7].isnan().all()
        assert int(out.isnan().sum()) == pattern.m


def test_a_tie_goes_to_the_lower_candidate(isa: str) -> None:
    for pattern in PATTERNS:
        logits = torch.zeros(20, pattern.count)
        out, _ = cpu.masked_weight(
            logits, torch.ones(20, pattern.m), pattern.n, False, Draw(1.0, 1.0, hard=True), torch.float32, False
        )
        assert torch.equal(out, pattern.candidates()[:1].float().expand(20, -1))


# --- memory and threads


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("parametrization", BOTH)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_accumulate(isa: str, pattern: Pattern, parametrization: Parametrization, dtype: torch.dtype) -> None:
    logits, weight, grad = case(pattern, parametrization, 45)
    scores, draw = parametrization == "scores", Draw(0.5, 100.0, KEY)
    alone = cpu.masked_weight_backward(grad, None, logits, weight, pattern.n, scores, draw)
    before = numbers(*logits.shape, seed=9, dtype=dtype)
    total = before.clone()
    returned = cpu.masked_weight_backward(grad, None, logits, weight, pattern.n, scores, draw, accumulate=total)
    assert returned is total
    torch.testing.assert_close(total, (before.float() + alone).to(dtype), rtol=TOLERANCE[dtype], atol=1e-6)


def test_nothing_is_written_or_read_beyond_the_arrays(isa: str) -> None:
    """Arrays that end exactly where their memory does are for the sanitizers; here guards behind them must survive."""
    for pattern in PATTERNS:
        for groups in (1, 15, 17, 40):
            logits, weight, grad = case(pattern, "patterns", groups)
            guarded = torch.full((groups * pattern.count + 64,), 7.0)
            out = guarded[: groups * pattern.count].view(groups, -1).zero_()
            cpu.masked_weight_backward(grad, None, logits, weight, pattern.n, False, Draw(1.0, 1.0), accumulate=out)
            assert (guarded[groups * pattern.count :] == 7).all()
            assert (out != 0).any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_threads_change_no_bit(isa: str, pattern: Pattern) -> None:
    logits, weight, grad = case(pattern, "scores", 5000)
    draw = Draw(0.5, 100.0, KEY)

    def run(threads: int) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            forward = cpu.masked_weight(logits, weight, pattern.n, True, draw, torch.bfloat16, True)
            return *forward, cpu.masked_weight_backward(grad, torch.tensor(0.1), logits, weight, pattern.n, True, draw)
        finally:
            torch.set_num_threads(before)

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


def test_arrays_that_are_not_contiguous(isa: str) -> None:
    logits, weight, grad = case(Pattern(2, 4), "scores", 40)
    draw = Draw(0.5, 100.0)
    strided = [x.t().contiguous().t() for x in (logits, weight, grad)]
    for a, b in zip(
        cpu.masked_weight(logits, weight, 2, True, draw, torch.float32, True),
        cpu.masked_weight(strided[0], strided[1], 2, True, draw, torch.float32, True),
        strict=True,
    ):
        assert torch.equal(a, b)
    plain = cpu.masked_weight_backward(grad, None, logits, weight, 2, True, draw)
    assert torch.equal(plain, cpu.masked_weight_backward(strided[2], None, strided[0], strided[1], 2, True, draw))
    ones = torch.ones(()).expand(40, 4)  # what the gradient of a sum looks like
    assert torch.equal(
        cpu.masked_weight_backward(ones, None, logits, weight, 2, True, draw),
        cpu.masked_weight_backward(torch.ones(40, 4), None, logits, weight, 2, True, draw),
    )
    with pytest.raises(ValueError, match="contiguous result"):
        cpu.masked_weight_backward(grad, None, logits, weight, 2, True, draw, accumulate=torch.zeros(4, 40).t())
