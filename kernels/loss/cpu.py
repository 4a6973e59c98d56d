"""The C++ form of the loss (`cpu.cpp`), called through ctypes."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from compress_kernels.native import native

_CODES = {torch.float32: 0, torch.bfloat16: 1}


def supported(student: Tensor, teacher: Tensor | None) -> bool:
    """Whether the library is there and takes these logits: on the CPU, float32 or bfloat16."""
    tensors = [student] if teacher is None else [student, teacher]
    return native("loss").library is not None and all(t.device.type == "cpu" and t.dtype in _CODES for t in tensors)


def token_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, ce_weight: float, kl_weight: float, want_grad: bool
) -> tuple[float, float, Tensor | None]:
    """As `compress_kernels.loss.reference.token_loss`, which defines it."""
    library = native("loss").library
    assert library is not None
    student = student.contiguous()
    teacher = teacher.contiguous() if teacher is not None else None
    labels = labels.contiguous()
    rows, vocabulary = student.shape
    counted = int((labels >= 0).sum())
    grad = torch.empty_like(student) if want_grad else None
    sums = (ctypes.c_double * 2)()
    library.loss_rows(
        ctypes.c_void_p(student.data_ptr()),
        _CODES[student.dtype],
        ctypes.c_void_p(teacher.data_ptr() if teacher is not None else None),
        _CODES[teacher.dtype] if teacher is not None else 0,
        ctypes.c_void_p(labels.data_ptr()),
        ctypes.c_void_p(grad.data_ptr() if grad is not None else None),
        ctypes.c_int64(rows),
        ctypes.c_int64(vocabulary),
        ctypes.c_float(ce_weight),
        ctypes.c_float(kl_weight),
        ctypes.c_float(1 / max(counted, 1)),
        sums,
        torch.get_num_threads(),
    )
    return sums[0], sums[1], grad
