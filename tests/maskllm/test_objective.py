"""Losses and their one-sweep gradients against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import maskllm.objective
from compress_kernels.loss import reference
from maskllm.errors import MaskError
from maskllm.objective import token_loss, weight_regulariser
from maskllm.parametrization import MaskState, MaskTarget, attach
from maskllm.patterns import Pattern

BATCH, LENGTH, VOCAB = 3, 7, 11


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(BATCH, LENGTH, VOCAB, generator=draw) * 3 for _ in range(2))
    return student, teacher, torch.randint(VOCAB, (BATCH, LENGTH), generator=draw)


def by_torch(student: Tensor, teacher: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
    flat = student[:, :-1].reshape(-1, VOCAB)
    ce = functional.cross_entropy(flat, ids[:, 1:].reshape(-1))
    if teacher is None:
        return ce, torch.zeros_like(ce)
    goal = teacher[:, :-1].reshape(-1, VOCAB).log_softmax(-1)
    return ce, functional.kl_div(flat.log_softmax(-1), goal, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("rows", [1, 4, 1000, "compiled"])
@pytest.mark.parametrize(("a", "b", "taught"), [(1.0, 0.0, False), (0.0, 1.0, True), (0.3, 0.7, True), (1.0, 0.0, True)])
def test_values_and_gradient(
    case: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, rows: int | str, a: float, b: float, taught: bool
) -> None:
    if isinstance(rows, int):  # the form in torch, so many rows at once
        monkeypatch.setattr(maskllm.objective, "kernel", reference.token_loss)
        monkeypatch.setattr(reference, "_CHUNK", rows * VOCAB)
    student, teacher, ids = case
    mine, other = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, ce, kl = token_loss(mine, teacher if taught else None, ids, ce_weight=a, kl_weight=b)
    (loss * 1.7).backward()
    expected_ce, expected_kl = by_torch(other, teacher.double() if taught else None, ids)
    ((a * expected_ce + b * expected_kl) * 1.7).backward()
    assert ce.item() == pytest.approx(expected_ce.item(), rel=1e-5)
    assert kl.item() == pytest.approx(expected_kl.item(), rel=1e-5, abs=1e-7)
    assert loss.item() == pytest.approx((a * expected_ce + b * expected_kl).item(), rel=1e-5)
    assert mine.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(mine.grad.double(), other.grad, atol=1e-6, rtol=1e-5)
    assert float(mine.grad[:, -1].abs().max()) == 0  # nothing is predicted from the last position
    assert not ce.requires_grad
    assert not kl.requires_grad


def test_bfloat16_logits(case: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, ids = case
    mine, other = student.bfloat16().requires_grad_(), student.bfloat16().double().requires_grad_()
    loss, ce, kl = token_loss(mine, teacher.bfloat16(), ids, ce_weight=0.5, kl_weight=0.5)
    loss.backward()
    expected_ce, expected_kl = by_torch(other, teacher.bfloat16().double(), ids)
    (0.5 * expected_ce + 0.5 * expected_kl).backward()
    assert (ce.dtype, kl.dtype) == (torch.float32, torch.float32)
    assert ce.item() == pytest.approx(expected_ce.item(), rel=1e-5)
    assert kl.item() == pytest.approx(expected_kl.item(), rel=1e-5)
    assert mine.grad is not None
    assert other.grad is not None
    assert mine.grad.dtype == torch.bfloat16
    torch.testing.assert_close(mine.grad.double(), other.grad, atol=1e-4, rtol=1e-2)


def test_tokens_masked_out_by_student_and_teacher_are_no_divergence(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """Both at -inf for a token: 0 * (-inf + inf) must count as nothing."""
    student, teacher, ids = case
    student[..., 4], teacher[..., 4] = -torch.inf, -torch.inf
    ids[ids == 4] = 5
    mine = student.clone().requires_grad_()
    loss, _, kl = token_loss(mine, teacher, ids, ce_weight=0.5, kl_weight=0.5)
    loss.backward()
    keep = [v for v in range(VOCAB) if v != 4]
    smaller = teacher[:, :-1, keep].flatten(0, 1).log_softmax(-1)
    expected = functional.kl_div(
        student[:, :-1, keep].flatten(0, 1).log_softmax(-1), smaller, reduction="batchmean", log_target=True
    )
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5)
    assert mine.grad is not None
    assert mine.grad.isfinite().all()


def test_distillation_without_a_teacher_is_refused(case: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(MaskError, match="teacher's logits"):
        token_loss(case[0], None, case[2], ce_weight=0.0, kl_weight=1.0)


def test_the_regulariser_is_the_sum_of_squares_of_masked_weights() -> None:
    layers = [nn.Linear(8, 4), nn.Linear(4, 4)]
    targets = [MaskTarget(str(i), layer, "weight", -1) for i, layer in enumerate(layers)]
    logits = {"0": torch.randn(4, 2, 6) * 0.1, "1": torch.randn(4, 1, 6) * 0.1}
    masks = attach(targets, MaskState(Pattern(2, 4), "patterns", penalised=True), logits)
    with pytest.raises(MaskError, match="no mask recorded"):
        weight_regulariser(masks.values())
    seen = [layer.weight.detach() for layer in layers]
    total = weight_regulariser(masks.values())
    assert total.item() == pytest.approx(sum(float((w**2).sum()) for w in seen), rel=1e-5)
    total.backward()
    assert all(float(mask.logits.grad.abs().max()) > 0 for mask in masks.values())
