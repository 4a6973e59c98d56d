"""The fused loss against torch's own cross-entropy and KL divergence, on every instruction set this machine has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compress_kernels.loss import cpu, reference, token_loss
from compress_kernels.native import ISAS, native, use_isa

ROWS, VOCABULARY = 7, 5003  # neither a multiple of a vector


@pytest.fixture(params=[*ISAS, "torch"])
def kernel(request):
    if request.param == "torch":
        yield reference.token_loss
        return
    assert native("loss").library is not None, native("loss").reason
    best = native("loss").isa
    if use_isa("loss", request.param) != request.param:
        use_isa("loss", best)
        pytest.skip(f"this machine has no {request.param}")
    yield cpu.token_loss
    use_isa("loss", best)


def logits(seed: int, rows: int = ROWS, vocabulary: int = VOCABULARY, spread: float = 4.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def labels(rows: int = ROWS, vocabulary: int = VOCABULARY) -> torch.Tensor:
    out = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(9))
    out[rows // 2] = -1
    return out


def oracle(student, teacher, targets, ce_weight, kl_weight):
    """Autograd in float64 of the textbook formula."""
    z = student.double().requires_grad_()
    here = targets >= 0
    ce = F.cross_entropy(z[here], targets[here], reduction="sum")
    kl = torch.zeros((), dtype=torch.float64)
    if teacher is not None:
        kl = F.kl_div(z[here].log_softmax(-1), teacher.double()[here].log_softmax(-1), reduction="sum", log_target=True)
    ((ce_weight * ce + kl_weight * kl) / here.sum()).backward()
    return ce.item(), kl.item(), z.grad


@pytest.mark.parametrize(("ce_weight", "kl_weight"), [(1.0, 0.0), (0.0, 1.0), (0.7, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(kernel, ce_weight, kl_weight, dtype, teacher_dtype):
    student, teacher, targets = logits(0).to(dtype), logits(1).to(teacher_dtype) if kl_weight else None, labels()
    ce, kl, grad = kernel(student, teacher, targets, ce_weight, kl_weight, True)
    want_ce, want_kl, want_grad = oracle(student, teacher, targets, ce_weight, kl_weight)
    assert float(ce) == pytest.approx(want_ce, rel=1e-5)
    assert float(kl) == pytest.approx(want_kl, rel=1e-5)
    assert grad.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 5e-3  # relative: bfloat16 has 8 bits
    torch.testing.assert_close(grad.double(), want_grad, rtol=bound * 10, atol=1e-9)


def test_without_a_gradient_the_sums_are_the_same(kernel):
    student, teacher, targets = logits(0), logits(1), labels()
    with_grad, without = (kernel(student, teacher, targets, 1.0, 1.0, want) for want in (True, False))
    assert without[2] is None
    assert float(with_grad[0]) == float(without[0])
    assert float(with_grad[1]) == pytest.approx(float(without[1]), rel=1e-6)


def test_tokens_masked_out_and_far_ones_add_nothing(kernel):
    student, teacher = logits(0), logits(1)
    student[:, 7] = teacher[:, 7] = -math.inf
    student[:, 11] = -1e4
    targets = labels()
    ce, kl, grad = kernel(student, teacher, targets, 1.0, 1.0, True)
    keep = [i for i in range(VOCABULARY) if i != 7]
    targets = torch.where(targets > 7, targets - 1, targets)
    want_ce, want_kl, want_grad = oracle(student[:, keep], teacher[:, keep], targets, 1.0, 1.0)
    assert float(ce) == pytest.approx(want_ce, rel=1e-5)
    assert float(kl) == pytest.approx(want_kl, rel=1e-5)
    torch.testing.assert_close(grad[:, keep].double(), want_grad, rtol=1e-5, atol=1e-9)
    assert (grad[:, 7].abs() < 1e-30).all()


def test_a_nan_shows(kernel):
    student = logits(0)
    student[2, 100] = math.nan
    ce, _, grad = kernel(student, None, torch.zeros(ROWS, dtype=torch.int64), 1.0, 0.0, True)
    assert math.isnan(float(ce))
    assert grad[2].isnan().any()
    assert grad[3].isfinite().all()


def test_the_same_bits_for_any_number_of_threads():
    student, teacher, targets = logits(0).bfloat16(), logits(1).bfloat16(), labels()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(token_loss(student, teacher, targets, 0.5, 1.0, True))
    finally:
        torch.set_num_threads(before)
    for ce, kl, grad in results[1:]:
        assert (ce, kl) == (results[0][0], results[0][1])
        assert torch.equal(grad, results[0][2])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 5), vocabulary=st.integers(1, 70), seed=st.integers(0, 99))
def test_any_shape(rows, vocabulary, seed):
    student, teacher = logits(seed, rows, vocabulary), logits(seed + 100, rows, vocabulary)
    targets = torch.randint(-1, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    fast = cpu.token_loss(student, teacher, targets, 1.0, 0.5, True)
    slow = reference.token_loss(student.double(), teacher.double(), targets, 1.0, 0.5, True)
    assert float(fast[0]) == pytest.approx(float(slow[0]), rel=1e-5, abs=1e-5)
    assert float(fast[1]) == pytest.approx(float(slow[1]), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(fast[2].double(), slow[2], rtol=1e-4, atol=1e-7)
