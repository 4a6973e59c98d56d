"""The soft mask on a CPU in one pass over memory: `cpu.cpp` through ctypes, with the functions and signatures of reference.py.

The two operations are registered with torch.library, so that tracing (torch.compile, fake tensors) sees opaque calls.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from compress_kernels.gumbel.reference import Draw
from compress_kernels.native import native

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Call(ctypes.Structure):
    """`struct Call` of cpu.cpp."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("first_group", ctypes.c_int64),
        ("key", ctypes.c_uint64),
        ("tau", ctypes.c_float),
        ("kappa", ctypes.c_float),
        ("grad_norm", ctypes.c_float),
        ("n", ctypes.c_int32),
        ("m", ctypes.c_int32),
        ("scores", ctypes.c_int32),
        ("noise", ctypes.c_int32),
        ("hard", ctypes.c_int32),
        ("accumulate", ctypes.c_int32),
        ("logits_type", ctypes.c_int32),
        ("weight_type", ctypes.c_int32),
        ("grad_type", ctypes.c_int32),
        ("out_type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


@functools.cache
def unsupported(n: int, m: int, *dtypes: torch.dtype) -> str:
    """Why this machine's kernel does not take an N:M with tensors of these dtypes; empty when it does."""
    found = native("gumbel")
    if found.library is None:
        return f"the C++ kernel is not available: {found.reason}"
    if not found.library.gumbel_supports(n, m):
        return f"the C++ kernel has no {n}:{m}, only 1:4, 2:4, 2:8 and 4:8"
    others = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes if dtype not in _TYPES})
    return f"the C++ kernel has no {', '.join(others)}, only float32, bfloat16 and float16" if others else ""


def masked_weight(
    logits: Tensor,
    weight: Tensor,
    n: int,
    scores: bool,
    draw: Draw,
    out_dtype: torch.dtype,
    want_norm: bool,
    *,
    first_group: int = 0,
) -> tuple[Tensor, Tensor]:
    """`reference.masked_weight` with N in place of the table, whose rows are in the order of `itertools.combinations`.

    The norm is a free by-product here; it is float32, summed in float64, and the same for any number of threads.
    first_group: the number of the first group in the noise stream. Arrays that are not contiguous are copied.
    """
    out = torch.empty(weight.shape, dtype=out_dtype)
    norm = torch.zeros((), dtype=torch.float64)
    run = torch.ops.compress_kernels.soft_mask if _traced(out) else _run_forward
    run(out, norm, logits, weight, n, scores, draw.tau, draw.kappa, _signed(draw.noise_key), draw.hard, want_norm, first_group)
    return out, norm.float()


def masked_weight_backward(
    grad: Tensor | None,
    grad_norm: Tensor | None,
    logits: Tensor,
    weight: Tensor,
    n: int,
    scores: bool,
    draw: Draw,
    *,
    accumulate: Tensor | None = None,
    first_group: int = 0,
) -> Tensor:
    """`reference.masked_weight_backward`. With `accumulate` (contiguous, the logits' shape; float32, bfloat16 or float16) the
    result is added to it, rounded once, and it is returned."""
    out = torch.empty(logits.shape, dtype=logits.dtype) if accumulate is None else accumulate
    key, added = _signed(draw.noise_key), accumulate is not None
    run = torch.ops.compress_kernels.soft_mask_backward if _traced(out) else _run_backward
    run(out, grad, grad_norm, logits, weight, n, scores, draw.tau, draw.kappa, key, draw.hard, added, first_group)
    return out


def _traced(out: Tensor) -> bool:
    """Whether somebody watches operations, and must see the operator. It costs as long as the kernel needs for 20,000 weights."""
    return type(out) is not Tensor or torch.compiler.is_compiling()


def gumbel_noise(key: int, first: int, count: int) -> Tensor:
    """`reference.gumbel_noise` as the kernel draws it: the same bits, logarithms to a few units in the last place."""
    out = torch.empty(count)
    _library().gumbel_noise(ctypes.c_uint64(key), ctypes.c_uint64(first), ctypes.c_int64(count), ctypes.c_void_p(out.data_ptr()))
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    library = native("gumbel").library
    if library is None:
        raise RuntimeError(f"kernel gumbel: {native('gumbel').reason}")
    library.gumbel_noise.restype = None
    return library


def _signed(key: int | None) -> int | None:
    """A 64-bit key as the int64 that an operator can take."""
    return key if key is None or key < 1 << 63 else key - (1 << 64)


def _call(logits: Tensor, weight: Tensor, out: Tensor, n: int, scores: bool, key: int | None, **values: float) -> _Call:
    groups, m = weight.shape
    if logits.shape[0] != groups or not out.is_contiguous() or logits.is_cuda or weight.is_cuda or out.is_cuda:
        raise ValueError(
            f"logits {tuple(logits.shape)}, weight {tuple(weight.shape)} and a contiguous result on the CPU are needed"
        )
    return _Call(
        logits=logits.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        groups=groups,
        key=(key or 0) % (1 << 64),
        n=n,
        m=m,
        scores=scores,
        noise=key is not None,
        logits_type=_TYPES[logits.dtype],
        weight_type=_TYPES[weight.dtype],
        out_type=_TYPES[out.dtype],
        threads=torch.get_num_threads(),
        **values,
    )


def _run_forward(
    out: Tensor,
    norm: Tensor,
    logits: Tensor,
    weight: Tensor,
    n: int,
    scores: bool,
    tau: float,
    kappa: float,
    key: int | None,
    hard: bool,
    want_norm: bool,
    first_group: int,
) -> None:
    logits, weight = logits.contiguous(), weight.contiguous()  # bound here: pointers keep nothing alive
    call = _call(logits, weight, out, n, scores, key, tau=tau, kappa=kappa, hard=hard, first_group=first_group)
    if want_norm:
        call.norm = norm.data_ptr()
    if _library().gumbel_masked_weight(ctypes.byref(call)):
        raise ValueError(unsupported(n, weight.shape[1]))


def _run_backward(
    out: Tensor,
    grad: Tensor | None,
    grad_norm: Tensor | None,
    logits: Tensor,
    weight: Tensor,
    n: int,
    scores: bool,
    tau: float,
    kappa: float,
    key: int | None,
    hard: bool,
    accumulate: bool,
    first_group: int,
) -> None:
    logits, weight = logits.contiguous(), weight.contiguous()
    call = _call(logits, weight, out, n, scores, key, tau=tau, kappa=kappa, hard=hard, first_group=first_group)
    call.accumulate = accumulate
    if grad_norm is not None:
        call.grad_norm = float(grad_norm)
    if grad is not None:
        grad = grad.contiguous()
        call.grad, call.grad_type = grad.data_ptr(), _TYPES[grad.dtype]
    if _library().gumbel_masked_weight_backward(ctypes.byref(call)):
        raise ValueError(unsupported(n, weight.shape[1]))


# Not torch.library.custom_op: its first call imports torch._dynamo, which takes a second or more.
_OPERATORS = torch.library.Library("compress_kernels", "FRAGMENT")
_COMMON = "Tensor logits, Tensor weight, int n, bool scores, float tau, float kappa, int? key, bool hard"
_OPERATORS.define(f"soft_mask(Tensor(a!) out, Tensor(b!) norm, {_COMMON}, bool want_norm, int first_group) -> ()")
_OPERATORS.define(
    f"soft_mask_backward(Tensor(a!) out, Tensor? grad, Tensor? grad_norm, {_COMMON}, bool accumulate, int first_group) -> ()"
)
for _name, _function in (("soft_mask", _run_forward), ("soft_mask_backward", _run_backward)):
    _OPERATORS.impl(_name, _function, "CPU")
    torch.library.register_fake(f"compress_kernels::{_name}", lambda *_: None, lib=_OPERATORS)
