"""The Triton soft mask on a real GPU against the torch reference on the same GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress_kernels import gumbel
from compress_kernels.gumbel import Draw, reference, stream_key
from maskllm.gumbel import soft_masked_weight
from maskllm.patterns import Pattern

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from compress_kernels.gumbel import triton as kernels

KEY = stream_key(7, 3, 0, 11) | 1 << 63
UNIT = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def problem(pattern: Pattern, scores: bool, groups: int, logits_dtype=torch.float32, weight_dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(groups)
    width = pattern.m if scores else pattern.count
    logits = 0.05 * torch.randn(groups, width, generator=generator, device="cuda")
    weight = torch.randn(groups, pattern.m, generator=generator, device="cuda")
    grad = torch.randn(groups, pattern.m, generator=generator, device="cuda")
    return logits.to(logits_dtype), weight.to(weight_dtype), grad.to(weight_dtype), pattern.candidates().float().cuda()


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = wanted.float().abs().max()
    assert scale > 0
    assert float((found.float() - wanted.float()).abs().max() / scale) < tolerance


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "noise"])
@pytest.mark.parametrize("scores", [False, True], ids=["patterns", "scores"])
@pytest.mark.parametrize("pattern", [Pattern(1, 4), Pattern(2, 4), Pattern(2, 8), Pattern(4, 8), Pattern(2, 16)], ids=str)
def test_forward_and_backward(pattern, scores, key, hard):
    logits, weight, grad, table = problem(pattern, scores, 10007)
    draw = Draw(tau=1.7, kappa=60.0, noise_key=key, hard=hard)
    out, norm = kernels.masked_weight(logits, weight, table, scores, draw, torch.float32, True)
    wanted, wanted_norm = reference.masked_weight(logits, weight, table, scores, draw, torch.float32, True)
    if hard:  # two candidates whose probabilities differ by rounding may change places, in a few groups
        different = (out != wanted).any(1)
        assert float(different.float().mean()) < 1e-3
        out, wanted = out[~different], wanted[~different]
    close(out, wanted, 2e-5)
    assert float(norm) == pytest.approx(float(wanted_norm), rel=1e-3 if hard else 1e-5)
    found = kernels.masked_weight_backward(grad, None, logits, weight, table, scores, draw)
    close(found, reference.masked_weight_backward(grad, None, logits, weight, table, scores, draw), 1e-4)


@pytest.mark.parametrize("weight_dtype", list(UNIT))
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_types(logits_dtype, weight_dtype):
    logits, weight, grad, table = problem(Pattern(2, 4), False, 5000, logits_dtype, weight_dtype)
    draw = Draw(tau=2.0, kappa=40.0, noise_key=KEY)
    out, _ = kernels.masked_weight(logits, weight, table, False, draw, weight_dtype, False)
    wanted, _ = reference.masked_weight(logits, weight, table, False, draw, weight_dtype, False)
    assert out.dtype == weight_dtype
    assert bool(((out.float() - wanted.float()).abs() <= 2 * UNIT[weight_dtype] * wanted.float().abs() + 1e-5).all())
    norm_gradient = torch.tensor(0.3, device="cuda")
    found = kernels.masked_weight_backward(grad, norm_gradient, logits, weight, table, False, draw)
    assert found.dtype == logits_dtype
    wanted = reference.masked_weight_backward(grad, norm_gradient, logits, weight, table, False, draw)
    close(found, wanted, 1e-4 if logits_dtype == torch.float32 else 1e-2)


def test_noise_past_element_2_to_32():
    pattern = Pattern(2, 4)
    logits, weight, _, table = problem(pattern, False, 2000)
    draw = Draw(tau=1.0, kappa=30.0, noise_key=KEY)
    for first_group in (((1 << 32) - 3000) // 6, (1 << 31) + 5, (1 << 32) + 5):
        noise = gumbel.gumbel_noise(KEY, first_group * 6, 2000 * 6, "cuda").view(2000, 6)
        out, _ = kernels.masked_weight(logits, weight, table, False, draw, torch.float32, False, first_group=first_group)
        wanted, _ = reference.masked_weight(logits + noise / 30, weight, table, False, Draw(1.0, 30.0), torch.float32, False)
        close(out, wanted, 1e-4)


def test_the_gpus_draw_is_the_cpus():
    logits, weight, _, table = problem(Pattern(2, 4), False, 3000)
    draw = Draw(tau=1.0, kappa=30.0, noise_key=KEY)
    out, _ = kernels.masked_weight(logits, weight, table, False, draw, torch.float32, False)
    wanted, _ = reference.masked_weight(logits.cpu(), weight.cpu(), table.cpu(), False, draw, torch.float32, False)
    close(out.cpu(), wanted, 1e-4)


def test_the_same_call_gives_the_same_bits():
    logits, weight, grad, table = problem(Pattern(2, 4), False, 100_000)
    draw = Draw(tau=1.0, kappa=30.0, noise_key=KEY)
    first = kernels.masked_weight(logits, weight, table, False, draw, torch.bfloat16, True)
    again = kernels.masked_weight(logits, weight, table, False, draw, torch.bfloat16, True)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    found = [kernels.masked_weight_backward(grad, None, logits, weight, table, False, draw) for _ in range(2)]
    assert torch.equal(*found)


@pytest.mark.parametrize("parametrization", ["patterns", "scores"])
def test_autograd_takes_the_kernel(parametrization):
    pattern = Pattern(2, 4)
    assert gumbel.implementation("cuda", 2, 4, torch.float32, torch.bfloat16) == "Triton"
    width = pattern.count if parametrization == "patterns" else pattern.m
    weight = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    logits = (0.02 * torch.randn(64, 64, width, device="cuda")).requires_grad_()
    grads = []
    for kind in ("fastest", "torch"):
        with gumbel.using(kind):
            out, norm = soft_masked_weight(logits, weight, pattern, parametrization, Draw(2.0, 50.0, KEY), want_norm=True)
            (out.float().square().sum() + 0.1 * norm).backward()
            grads.append(logits.grad.clone())
            logits.grad = None
    close(grads[0], grads[1], 1e-2)  # the upstream gradient is bf16
