"""The soft N:M mask as one operation: logits -> masked weight, and back.

`masked_weight` and `masked_weight_backward` take the fastest implementation that can compute a case: the C++ kernel for tensors on
the CPU, the Triton kernel for tensors on a GPU, and reference.py, which defines the operation, for everything else (float64,
patterns without a kernel, a machine without a compiler). `implementation` says which one and why not a faster one. All of them
draw the same noise from the same counter and agree to rounding.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from compress_kernels.gumbel import cpu, reference
from compress_kernels.gumbel.reference import Draw, gumbel_noise, probabilities, random_bits, stream_key
from compress_kernels.native import native

__all__ = [
    "Draw",
    "gumbel_noise",
    "implementation",
    "masked_weight",
    "masked_weight_backward",
    "probabilities",
    "random_bits",
    "stream_key",
    "using",
]

Implementation = Literal["fastest", "torch"]
_wanted: Implementation = "fastest"  # of the process, not of a thread: autograd runs backward passes in threads of its own


@contextmanager
def using(implementation: Implementation) -> Iterator[None]:
    """Within it `"torch"` computes everything with reference.py: for tests and comparisons. It holds for all threads."""
    global _wanted
    before, _wanted = _wanted, implementation
    try:
        yield
    finally:
        _wanted = before


def implementation(device: torch.device | str, n: int, m: int, *dtypes: torch.dtype) -> str:
    """What computes N:M masks on a device for tensors of these dtypes, with the reason where it is not the fastest.

    For people: "C++ (avx512)", "Triton", or for example "torch, because the C++ kernel has no 3:4, only 1:4, 2:4, 2:8 and 4:8".
    """
    kind = torch.device(device).type
    if _wanted == "torch":
        return "torch, because it was asked for"
    if kind == "cpu":
        reason = cpu.unsupported(n, m, *dtypes)
        return f"torch, because {reason}" if reason else f"C++ ({native('gumbel').isa})"
    if kind == "cuda":
        if isinstance(_triton(), str):
            return f"torch, because {_triton()}"
        if torch.float64 in dtypes:
            return "torch, because the Triton kernel has no float64"
        return "Triton" if m & (m - 1) == 0 else f"torch, because the Triton kernel has no {n}:{m}, only M that is a power of two"
    return f"torch, because there is no kernel for {kind}"


def masked_weight(
    logits: Tensor,
    weight: Tensor,
    table: Tensor,
    scores: bool,
    draw: Draw,
    out_dtype: torch.dtype,
    want_norm: bool,
    *,
    n: int | None = None,
    first_group: int = 0,
) -> tuple[Tensor, Tensor]:
    """`reference.masked_weight`, by the fastest implementation.

    n: how many weights a candidate keeps, when the caller knows that the table is all of N:M in the order of
    `itertools.combinations`; without it the table is read to see.
    """
    if _wanted == "fastest":
        if weight.is_cuda:
            triton = _triton()
            if isinstance(triton, ModuleType) and triton.supported(logits, weight, table, out_dtype):
                return triton.masked_weight(logits, weight, table, scores, draw, out_dtype, want_norm, first_group=first_group)
        elif n := _on_cpu(n, table, weight, logits.dtype, weight.dtype, out_dtype):
            return cpu.masked_weight(logits, weight, n, scores, draw, out_dtype, want_norm, first_group=first_group)
    return reference.masked_weight(logits, weight, table, scores, draw, out_dtype, want_norm, first_group=first_group)


def masked_weight_backward(
    grad: Tensor | None,
    grad_norm: Tensor | None,
    logits: Tensor,
    weight: Tensor,
    table: Tensor,
    scores: bool,
    draw: Draw,
    *,
    n: int | None = None,
    accumulate: Tensor | None = None,
    first_group: int = 0,
) -> Tensor:
    """`reference.masked_weight_backward`, by the fastest implementation. n: see `masked_weight`.

    accumulate: contiguous, of the logits' shape; dL/dlogits is added to it and it is returned. The C++ kernel does so without
    another array, and rounds once.
    """
    if _wanted == "fastest":
        if weight.is_cuda:
            triton = _triton()
            if isinstance(triton, ModuleType) and triton.supported(logits, weight, table):
                found = triton.masked_weight_backward(
                    grad, grad_norm, logits, weight, table, scores, draw, first_group=first_group
                )
                return found if accumulate is None else accumulate.add_(found)
        else:
            dtypes = [x.dtype for x in (logits, weight, grad, accumulate) if x is not None]
            if n := _on_cpu(n, table, weight, *dtypes):
                return cpu.masked_weight_backward(
                    grad, grad_norm, logits, weight, n, scores, draw, accumulate=accumulate, first_group=first_group
                )
    found = reference.masked_weight_backward(grad, grad_norm, logits, weight, table, scores, draw, first_group=first_group)
    return found if accumulate is None else accumulate.add_(found)


def _on_cpu(n: int | None, table: Tensor, weight: Tensor, *dtypes: torch.dtype) -> int:
    """N where the C++ kernel takes the case, else 0."""
    if weight.device.type != "cpu":
        return 0
    n = _kept(tuple(map(tuple, table.tolist()))) if n is None else n
    return 0 if not n or cpu.unsupported(n, table.shape[1], *dtypes) else n


@functools.lru_cache(maxsize=64)
def _kept(rows: tuple[tuple[float, ...], ...]) -> int:
    """N where the rows are all masks of N:M in the order of `itertools.combinations`, else 0."""
    m, n = len(rows[0]), int(sum(rows[0]))
    expected = (tuple(float(j in kept) for j in range(m)) for kept in itertools.combinations(range(m), n))
    return n if rows == tuple(expected) else 0


@functools.cache
def _triton() -> ModuleType | str:
    """The Triton implementation, or why there is none."""
    try:
        from compress_kernels.gumbel import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return triton
