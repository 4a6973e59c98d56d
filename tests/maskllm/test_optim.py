"""AdamW with narrow states: its codes, its rounding, and what it does beside AdamW in float32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_kernels.gumbel import random_bits
from maskllm.errors import MaskError
from maskllm.optim import (
    BLOCK,
    MaskAdamW,
    StateFormat,
    accumulate,
    code_table,
    decode,
    encode,
    logit_dtype,
    squared_norm,
    state_bytes,
    to_bfloat16,
)

FORMATS: list[StateFormat] = ["float32", "bfloat16", "8bit"]
NARROW: list[StateFormat] = ["bfloat16", "8bit"]


def low_bits(key: int, count: int, mask: int) -> Tensor:
    return random_bits(key, 0, count) & mask


def spread(count: int, octaves: float, seed: int = 0) -> Tensor:
    """Numbers of both signs whose magnitudes cover so many powers of two."""
    draw = torch.Generator().manual_seed(seed)
    sign = torch.where(torch.rand(count, generator=draw) < 0.5, -1.0, 1.0)
    return sign * torch.exp2(-octaves * torch.rand(count, generator=draw))


# --- the 8-bit codes


def test_the_tables_are_what_the_module_says() -> None:
    signed, unsigned = code_table(True), code_table(False)
    assert signed[127] == 1
    assert signed[255] == -1
    assert signed[0] == signed[128] == 0
    assert signed[1] == 1.25 * 2.0**-16
    assert unsigned[255] == 1
    assert unsigned[0] == 0
    assert unsigned[1] == 1.25 * 2.0**-32
    for table in (signed[:128], unsigned):
        ratios = table[2:] / table[1:-1]
        assert bool((ratios > 1).all())
        assert float(ratios.max()) <= 1.125


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_decodes_to_what_encodes_to_it(signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode(codes, torch.tensor([3.0]), signed=signed)
    again, scale = encode(values, torch.zeros(256, dtype=torch.int32), signed=signed)
    assert float(scale) == 3
    keep = codes != 128 if signed else codes >= 0  # -0 comes back as 0
    # A value on a code has no bits below it, and random bits of 0 add half of their own unit: nothing is carried. The division by the
    # scale may cost the last bit, so the code may be one lower, never another.
    assert int((codes.int() - again.int())[keep].abs().max()) <= 1
    assert torch.allclose(decode(again, scale, signed=signed)[keep], values[keep], rtol=0.13)


@pytest.mark.parametrize(("signed", "octaves"), [(True, 15), (False, 31)])
def test_codes_are_near_and_right_on_average(signed: bool, octaves: float) -> None:
    x = spread(BLOCK * 16, octaves)
    x = x if signed else x.abs()
    x[::BLOCK] = 1.0  # the scale, so that the rest lies where the codes reach
    total, worst, squares, draws = torch.zeros_like(x), 0.0, 0.0, 256
    for key in range(draws):
        found = decode(*encode(x, low_bits(key, x.numel(), 0xFF), signed=signed), signed=signed)
        error = (found - x) / x
        worst, squares = max(worst, float(error.abs().max())), squares + float(error.square().mean())
        total += found
    assert worst < 0.125
    assert math.sqrt(squares / draws) < 0.04
    bias = (total / draws - x) / x
    # One rounding spreads by at most 6.25 %: the mean of 256 by 0.4 %; five times that for the largest of 4,096.
    assert float(bias.abs().max()) < 0.02
    assert abs(float(bias.mean())) < 3e-4


def test_what_is_too_small_for_a_code() -> None:
    """A first moment becomes 0. A second moment never does: Adam would divide by it."""
    x = torch.zeros(BLOCK)
    x[0], x[1], x[2] = 1.0, 2.0**-20, -(2.0**-20)
    none = torch.zeros(BLOCK, dtype=torch.int32)
    assert decode(*encode(x, none, signed=True), signed=True)[1:].eq(0).all()
    v = torch.zeros(BLOCK)
    v[0], v[1] = 1.0, 2.0**-60
    found = decode(*encode(v, none, signed=False), signed=False)
    assert found[1] == 1.25 * 2.0**-32
    assert found[2:].eq(0).all()


@given(st.integers(0, 2**31 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_any_block_stays_within_a_code(seed: int, scale: float) -> None:
    x = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)) * scale
    for signed, values in ((True, x), (False, x.abs())):
        found = decode(*encode(values, low_bits(seed, BLOCK, 0xFF), signed=signed), signed=signed)
        largest = float(values.abs().max())
        assert torch.equal(found.sign()[found != 0], values.sign()[found != 0])
        assert bool(((found - values).abs() <= 0.125 * values.abs() + 2.0**-15 * largest).all())
        assert float(found.abs().max()) <= largest


def test_zeros_stay_zero() -> None:
    zero, random = torch.zeros(2 * BLOCK), low_bits(1, 2 * BLOCK, 0xFF)
    for signed in (True, False):
        codes, scale = encode(zero, random, signed=signed)
        assert codes.eq(0).all()
        assert scale.eq(0).all()
        assert decode(codes, scale, signed=signed).eq(0).all()


# --- bfloat16


def test_bfloat16_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    x = spread(4096, 30, seed=1)
    below = (x.view(torch.int32) & -65536).view(torch.float32)
    above = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    total, draws = torch.zeros(4096, dtype=torch.float64), 256
    for key in range(draws):
        found = to_bfloat16(x, low_bits(key, 4096, 0xFFFF))
        assert bool(((found.float() == below) | (found.float() == above)).all())
        total += found.double()
    error = (total / draws - x.double()) / (above - below).abs().double()  # in units of the last place
    assert float(error.abs().max()) < 5 * 0.5 / math.sqrt(draws)
    assert abs(float(error.mean())) < 5 * 0.5 / math.sqrt(draws * 4096)


def test_a_bfloat16_number_and_an_infinity_round_to_themselves() -> None:
    x = torch.cat([torch.randn(1000).bfloat16().float(), torch.tensor([math.inf, -math.inf, 0.0])])
    assert torch.equal(to_bfloat16(x, torch.full((1003,), 0xFFFF, dtype=torch.int32)).float(), x)


def test_a_sum_keeps_terms_that_rounding_to_nearest_loses() -> None:
    count, terms = 8192, 512
    total, nearest = torch.ones(count).bfloat16(), torch.ones(count).bfloat16()
    term = torch.full((count,), 2.0**-10).bfloat16()  # an eighth of the unit of 1
    for index in range(terms):
        accumulate(total, term, 7, index)
        nearest += term
    assert nearest.eq(1).all()
    assert float(total.float().mean()) == pytest.approx(1 + terms * 2.0**-10, abs=2e-3)


# --- the optimizer


def parameters(state: StateFormat, sizes: tuple[int, ...] = (1000, 70_000)) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter((0.03 * torch.randn(n, generator=draw)).to(logit_dtype(state))) for n in sizes]


def gradients(step: int, sizes: tuple[int, ...] = (1000, 70_000)) -> list[Tensor]:
    """Noise with a part that stays and sizes that differ by four powers of ten, as those of logits do."""
    draw = torch.Generator().manual_seed(100 + step)
    still = torch.Generator().manual_seed(4)
    result = []
    for n in sizes:
        size = 10.0 ** (-4 * torch.rand(n, generator=still))
        result.append(size * (torch.randn(n, generator=draw) + torch.randn(n, generator=still)))
    return result


def train(state: StateFormat, steps: int, seed: int = 0, weight_decay: float = 0.0) -> tuple[MaskAdamW, list[torch.nn.Parameter]]:
    ps = parameters(state)
    optimizer = MaskAdamW(ps, lr=1e-3, betas=(0.9, 0.95), weight_decay=weight_decay, state=state, seed=seed)
    for step in range(steps):
        for p, g in zip(ps, gradients(step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return optimizer, ps


def test_float32_is_torchs_adamw_bitwise() -> None:
    ours, theirs = parameters("float32"), parameters("float32")
    a = MaskAdamW(ours, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    b = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for step in range(20):
        for p, q, g in zip(ours, theirs, gradients(step), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("state", NARROW)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_narrow_states_follow_float32(state: StateFormat, weight_decay: float) -> None:
    """After 40 steps, over the distance that float32 went."""
    _, exact = train("float32", 40, weight_decay=weight_decay)
    _, found = train(state, 40, weight_decay=weight_decay)
    for before, a, b in zip(parameters("float32"), exact, found, strict=True):
        moved = (a - before).detach()
        error = (b.float() - a).detach()
        assert float(error.norm() / moved.norm()) < 0.1
        assert abs(float(error.mean())) < 0.02 * float(moved.abs().mean())


def test_the_second_moment_is_unbiased_over_many_steps() -> None:
    """A constant gradient: v must go to g^2 and stay there, though a decay by 0.1 % a step is less than half a code."""
    g = torch.exp2(-8 * torch.rand(4096, generator=torch.Generator().manual_seed(0)))
    p = torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    optimizer = MaskAdamW([p], lr=0.0, betas=(0.9, 0.999), state="8bit")
    for _ in range(300):
        p.grad = g.bfloat16()
        optimizer.step()
    moments = optimizer.moments(p)
    v = decode(moments["exp_avg_sq_codes"], moments["exp_avg_sq_scales"], signed=False)
    expected = g.bfloat16().float().square() * (1 - 0.999**300)
    assert float((v / expected).mean()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("state", FORMATS)
def test_one_by_one_in_any_order_is_the_same_as_all_at_once(state: StateFormat) -> None:
    a, ps = train(state, 3)
    b, qs = train(state, 2)
    for q, g in reversed(list(zip(qs, gradients(2), strict=True))):
        q.grad = g.to(q.dtype)
        b.step_one(q)
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))
    assert all(torch.equal(a.moments(p)[k], b.moments(q)[k]) for p, q in zip(ps, qs, strict=True) for k in a.moments(p))


@pytest.mark.parametrize("state", FORMATS)
def test_a_gain_scales_the_gradient(state: StateFormat) -> None:
    """By a power of two, so that scaling in bfloat16 and in float32 is the same."""
    ps, qs = parameters(state), parameters(state)
    a, b = (MaskAdamW(x, lr=1e-3, state=state) for x in (ps, qs))
    for step in range(3):
        for p, q, g in zip(ps, qs, gradients(step), strict=True):
            p.grad, q.grad = g.to(p.dtype) / 4, g.to(q.dtype)
            a.step_one(p)
            b.step_one(q, torch.tensor(0.25))
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.parametrize("state", FORMATS)
def test_resumed_is_uninterrupted(state: StateFormat) -> None:
    _, expected = train(state, 6)
    first, ps = train(state, 3)
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    second = MaskAdamW(qs, lr=1e-3, weight_decay=0.0, state=state)
    for p, q in zip(ps, qs, strict=True):
        second.load_moments(q, 3, {k: v.clone() for k, v in first.moments(p).items()})
    for step in range(3, 6):
        for q, g in zip(qs, gradients(step), strict=True):
            q.grad = g.to(q.dtype)
        second.step()
    assert all(torch.equal(p, q) for p, q in zip(expected, qs, strict=True))


@pytest.mark.parametrize("state", NARROW)
def test_the_seed_decides_the_rounding_and_threads_do_not(state: StateFormat) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(train(state, 3)[1])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))
    assert not torch.equal(results[0][1], train(state, 3, seed=1)[1][1])


def test_the_norm_is_the_same_on_any_number_of_threads() -> None:
    x = spread(300_001, 20)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found.append(squared_norm(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(x, spread(300_001, 20))  # and it only reads
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert float(found[0]) == pytest.approx(float(x.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("count", [4, 256, 1000])
def test_the_bytes_are_as_stated(state: StateFormat, count: int) -> None:
    optimizer, (p,) = MaskAdamW(ps := parameters(state, (count,)), lr=1e-3, state=state), ps
    held = [p.detach(), *optimizer.moments(p).values()]
    assert sum(t.numel() * t.element_size() for t in held) == state_bytes(state, count)


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MaskError, match=r"logits are torch\.float32, but a 8bit state"):
        MaskAdamW(parameters("float32"), lr=1e-3, state="8bit")
    optimizer, ps = train("8bit", 1)
    other, qs = train("bfloat16", 1)
    with pytest.raises(MaskError, match="not that of a 8bit state"):
        optimizer.load_moments(ps[0], 1, other.moments(qs[0]))
    with pytest.raises(MaskError, match="not that of a bfloat16 state"):
        other.load_moments(qs[0], 1, other.moments(qs[1]))
    with pytest.raises(MaskError, match="none of the optimizer's"):
        optimizer.step_one(qs[0])


@pytest.mark.parametrize("state", FORMATS)
def test_parts_of_logits_move_as_the_whole_does(state: StateFormat) -> None:
    """Cut at multiples of 256, each part told where it begins: the same random bits and the same blocks of codes."""
    draw = torch.Generator().manual_seed(0)
    start = (torch.randn(1000, generator=draw) * 0.01).to(logit_dtype(state))
    grads = [torch.randn(1000, generator=draw).to(logit_dtype(state)) for _ in range(3)]
    cuts = [(0, 256), (256, 768), (768, 1000)]
    whole = torch.nn.Parameter(start.clone())
    parts = [torch.nn.Parameter(start[a:b].clone()) for a, b in cuts]
    one = MaskAdamW([whole], lr=0.01, state=state, seed=3)
    runs = [MaskAdamW([part], lr=0.01, state=state, seed=3, firsts=[a]) for part, (a, _) in zip(parts, cuts, strict=True)]
    for grad in grads:
        whole.grad = grad.clone()
        one.step()
        for run, part, (a, b) in zip(runs, parts, cuts, strict=True):
            part.grad = grad[a:b].clone()
            run.step()
    assert torch.equal(torch.cat([part.detach() for part in parts]), whole.detach())
    for key, value in one.moments(whole).items():
        assert torch.equal(torch.cat([run.moments(part)[key] for run, part in zip(runs, parts, strict=True)]), value), key
