"""The Triton soft mask in the interpreter against reference.py; test_gumbel_triton.py runs this file with TRITON_INTERPRET=1."""

# ruff: noqa: E402  The environment is looked at before triton is imported.
from __future__ import annotations

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/kernels/test_gumbel_triton.py, which starts this file"

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_kernels.gumbel import Draw, gumbel_noise, reference, stream_key
from compress_kernels.gumbel import triton as kernels
from maskllm.patterns import Pattern

PATTERNS = [Pattern(1, 4), Pattern(2, 4), Pattern(2, 8), Pattern(4, 8)]
KEY = stream_key(7, 3, 0, 11) | 1 << 63  # the top bit set: keys are unsigned


def problem(pattern: Pattern, scores: bool, groups: int, logits_dtype=torch.float32, weight_dtype=torch.float32):
    generator = torch.Generator().manual_seed(groups)
    width = pattern.m if scores else pattern.count
    logits = (0.05 * torch.randn(groups, width, generator=generator)).to(logits_dtype)
    weight = torch.randn(groups, pattern.m, generator=generator).to(weight_dtype)
    grad = torch.randn(groups, pattern.m, generator=generator)
    return logits, weight, grad, pattern.candidates().float()


def more_than_a_tile(pattern: Pattern) -> int:
    return kernels.tile_groups(pattern.count, pattern.m) + 3


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = wanted.float().abs().max()
    assert scale > 0
    assert float((found.float() - wanted.float()).abs().max() / scale) < tolerance


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "noise"])
@pytest.mark.parametrize("scores", [False, True], ids=["patterns", "scores"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_forward_and_backward_are_the_references(pattern, scores, key, hard):
    logits, weight, grad, table = problem(pattern, scores, more_than_a_tile(pattern))
    draw = Draw(tau=1.7, kappa=60.0, noise_key=key, hard=hard)
    out, norm = kernels.masked_weight(logits, weight, table, scores, draw, torch.float32, True)
    wanted, wanted_norm = reference.masked_weight(logits, weight, table, scores, draw, torch.float32, True)
    close(out, wanted, 2e-6)
    assert float(norm) == pytest.approx(float(wanted_norm), rel=1e-5)
    grad_norm = torch.tensor(0.3)
    found = kernels.masked_weight_backward(grad, grad_norm, logits, weight, table, scores, draw)
    close(found, reference.masked_weight_backward(grad, grad_norm, logits, weight, table, scores, draw), 2e-5)


@pytest.mark.parametrize(("with_grad", "with_norm"), [(True, False), (False, True)])
def test_either_gradient_may_be_missing(with_grad, with_norm):
    logits, weight, grad, table = problem(Pattern(2, 4), False, 50)
    draw = Draw(tau=1.0, kappa=30.0, noise_key=KEY)
    given = (grad if with_grad else None, torch.tensor(0.7) if with_norm else None)
    found = kernels.masked_weight_backward(*given, logits, weight, table, False, draw)
    close(found, reference.masked_weight_backward(*given, logits, weight, table, False, draw), 2e-5)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_16_bits(dtype, out_dtype):
    # The interpreter cuts bf16 results off where a GPU rounds them: one unit in the last place is allowed.
    unit = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
    logits, weight, grad, table = problem(Pattern(2, 4), False, 70, dtype, dtype)
    draw = Draw(tau=2.0, kappa=40.0, noise_key=KEY)
    out, _ = kernels.masked_weight(logits, weight, table, False, draw, out_dtype, False)
    wanted, _ = reference.masked_weight(logits, weight, table, False, draw, out_dtype, False)
    assert out.dtype == out_dtype
    assert bool(((out.float() - wanted.float()).abs() <= unit[out_dtype] * wanted.float().abs() + 1e-6).all())
    found = kernels.masked_weight_backward(grad.to(dtype), None, logits, weight, table, False, draw)
    wanted = reference.masked_weight_backward(grad.to(dtype), None, logits, weight, table, False, draw)
    assert found.dtype == dtype
    assert bool(((found.float() - wanted.float()).abs() <= unit[dtype] * wanted.float().abs() + 1e-6).all())


@triton.jit
def noise_kernel(out, first, stream_low, stream_high, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    first = tl.load(first)
    tl.store(out + i, kernels._gumbel(first + i, first, stream_low, stream_high))


@pytest.mark.parametrize("first", [0, (1 << 31) - 100, (1 << 32) - 100, (1 << 32) + 5, 5 * (1 << 32) - 1])
@pytest.mark.parametrize("key", [0, 1, KEY, (1 << 64) - 1])
def test_noise_is_the_references_stream(key, first):
    out, stream = torch.empty(256), stream_key(key)
    noise_kernel[(1,)](out, torch.tensor(first), kernels._signed(stream), kernels._signed(stream >> 32), COUNT=256)
    # One unit of a logarithm of a logarithm: numpy's and torch's differ in it.
    torch.testing.assert_close(out, gumbel_noise(key, first, 256), rtol=2e-6, atol=2e-6)


def test_a_part_of_a_weight_draws_its_part_of_the_noise_past_2_to_32():
    pattern = Pattern(2, 4)
    logits, weight, grad, table = problem(pattern, False, 200)
    draw = Draw(tau=1.0, kappa=30.0, noise_key=KEY)
    first_group = ((1 << 32) - 300) // pattern.count  # 50 groups before element 2^32
    noise = gumbel_noise(KEY, first_group * pattern.count, 200 * pattern.count).view(200, pattern.count)
    noisy = logits + noise / draw.kappa
    plain = Draw(draw.tau, draw.kappa)
    out, _ = kernels.masked_weight(logits, weight, table, False, draw, torch.float32, False, first_group=first_group)
    close(out, reference.masked_weight(noisy, weight, table, False, plain, torch.float32, False)[0], 2e-5)
    found = kernels.masked_weight_backward(grad, None, logits, weight, table, False, draw, first_group=first_group)
    close(found, reference.masked_weight_backward(grad, None, noisy, weight, table, False, plain), 1e-4)


def test_no_groups():
    logits, weight, grad, table = problem(Pattern(2, 4), False, 0)
    out, norm = kernels.masked_weight(logits, weight, table, False, Draw(1.0, 1.0), torch.bfloat16, True)
    assert out.shape == (0, 4)
    assert float(norm) == 0
    assert kernels.masked_weight_backward(grad, None, logits, weight, table, False, Draw(1.0, 1.0)).shape == (0, 6)


def test_strides_other_than_contiguous():
    logits, weight, grad, table = problem(Pattern(2, 4), False, 40)
    draw = Draw(tau=1.0, kappa=30.0, noise_key=KEY)
    strided = [torch.stack([tensor, tensor], 2).flatten(1)[:, ::2] for tensor in (logits, weight, grad)]
    assert not strided[0].is_contiguous()
    out, _ = kernels.masked_weight(strided[0], strided[1], table, False, draw, torch.float32, False)
    assert torch.equal(out, kernels.masked_weight(logits, weight, table, False, draw, torch.float32, False)[0])
    found = kernels.masked_weight_backward(strided[2], None, strided[0], strided[1], table, False, draw)
    assert torch.equal(found, kernels.masked_weight_backward(grad, None, logits, weight, table, False, draw))


def test_what_is_supported():
    logits, weight, _, table = problem(Pattern(2, 4), False, 4)
    assert kernels.supported(logits, weight, table, torch.bfloat16)
    assert not kernels.supported(logits.double(), weight, table)
    assert not kernels.supported(logits, weight, table, torch.float64)
    assert not kernels.supported(logits, weight[:, :3], table[:, :3])
