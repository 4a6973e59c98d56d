"""The implementations of the 2:4 product on a GPU that cuda.py chooses between, behind one interface."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress_kernels.sparse24 import packing, semi_structured
from compress_kernels.sparse24.packing import Packed24

LARGEST_BUCKET = 4096  # more tokens than these are taken to behave alike


@dataclass(frozen=True)
class Case:
    """What a choice depends on. `bucket`: tokens, rounded up to a power of two. `aligned`: values on a 16-byte boundary."""

    device: torch.device
    n: int
    k: int
    bucket: int
    x_dtype: torch.dtype
    value_dtype: torch.dtype
    aligned: bool

    @classmethod
    def of(cls, tokens: Tensor, packed: Packed24) -> Case:
        """The case of tokens `[batch, K]` and a matrix `[N, K]`."""
        bucket = min(LARGEST_BUCKET, 1 << (len(tokens) - 1).bit_length())
        aligned = packed.values.data_ptr() % 16 == 0
        return cls(tokens.device, *packed.shape, bucket, tokens.dtype, packed.values.dtype, aligned)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense matrix in the type of `dense`."""
        return self.n * self.k * _dense_dtype(self.x_dtype, self.value_dtype).itemsize


@dataclass(frozen=True)
class Backend:
    """One implementation: `run(x [batch, K], packed, bias, state)` -> y `[batch, N]` in the dtype of x.

    `prepare` makes the state, what it needs of a weight beside the packed form, of about `extra_bytes`; backends whose names begin
    with the same word share it.
    """

    name: str
    supports: Callable[[Case], bool]
    run: Callable[[Tensor, Packed24, Tensor | None, Any], Tensor]
    prepare: Callable[[Packed24, Case], Any] = lambda packed, case: None
    extra_bytes: Callable[[Case], int] = lambda case: 0


def candidates(case: Case) -> list[Backend]:
    """The implementations that take a case, those first that are expected to be faster."""
    return [backend for backend in _backends() if backend.supports(case)]


def dense(packed: Packed24, x_dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` in a type that also holds x: that of x for int8 values, else the wider of both."""
    dtype = _dense_dtype(x_dtype, packed.values.dtype)
    kernels = _triton()
    aligned = packed.values.is_cuda and packed.values.data_ptr() % 16 == 0
    if kernels is not None and aligned and kernels.can_unpack(packed.shape[1], packed.values.dtype, dtype):
        return kernels.unpack(*packed, dtype)
    return packing.unpack(packed, dtype)


def dense_linear(x: Tensor, packed: Packed24, bias: Tensor | None, weight: Tensor) -> Tensor:
    """The product with a dense copy of the weight, made by `dense`."""
    if weight.dtype == x.dtype:
        return functional.linear(x, weight, bias)
    return functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)


def unpack_linear(x: Tensor, packed: Packed24, bias: Tensor | None, state: None = None) -> Tensor:
    """The product with a dense copy that lives as long as the call."""
    return dense_linear(x, packed, bias, dense(packed, x.dtype))


def _dense_dtype(x_dtype: torch.dtype, value_dtype: torch.dtype) -> torch.dtype:
    return x_dtype if value_dtype == torch.int8 else torch.promote_types(x_dtype, value_dtype)


def _torch_backends() -> list[Backend]:
    """torch's own sparse kernels, then the dense products."""

    def types(case: Case) -> tuple[int, int, torch.dtype, torch.dtype]:
        return case.n, case.k, case.x_dtype, case.value_dtype

    return [
        Backend(
            "cusparselt",
            supports=lambda case: semi_structured.cusparselt_supported(*types(case)),
            run=lambda x, packed, bias, state: semi_structured.cusparselt_linear(x, state, packed.shape, bias),
            prepare=lambda packed, case: torch._cslt_compress(dense(packed, case.x_dtype)),
            extra_bytes=lambda case: 2 * case.dense_bytes,  # the dense matrix for a moment, and about 9/16 of it to stay
        ),
        Backend(
            "cutlass",
            supports=lambda case: semi_structured.cutlass_supported(*types(case)),
            run=lambda x, packed, bias, state: functional.linear(x, state, bias),
            prepare=lambda packed, case: semi_structured.cutlass_weight(packed.values, packed.meta),
            extra_bytes=lambda case: case.n * case.k // 8,
        ),
        Backend(
            "dense",
            supports=lambda case: True,
            run=dense_linear,
            prepare=lambda packed, case: dense(packed, case.x_dtype),
            extra_bytes=lambda case: case.dense_bytes,
        ),
        Backend("unpack", supports=lambda case: True, run=unpack_linear),
    ]


def _triton_backends() -> list[Backend]:
    """Our kernels, in each of their ways to cut the work."""
    kernels = _triton()
    if kernels is None or torch.version.hip is not None:
        return []
    from compress_kernels.sparse24 import mma_sp

    def takes_gemv(case: Case) -> bool:
        return case.aligned and kernels.supported(case.bucket, case.k, case.x_dtype, case.value_dtype)

    def takes_mma(case: Case) -> bool:
        capability = torch.cuda.get_device_capability(case.device)
        return case.aligned and mma_sp.supported(case.bucket, case.k, case.x_dtype, case.value_dtype, capability)

    def gemv(config: Any) -> Backend:
        return Backend(
            f"gemv {config.rows}x{config.warps}",
            supports=takes_gemv,
            run=lambda x, packed, bias, state: kernels.gemv(x, *packed, bias, config),
        )

    def mma(config: Any) -> Backend:
        return Backend(
            f"mma_sp {config.tiles}x{config.warps}",
            supports=lambda case: config.holds(case.bucket) and takes_mma(case),
            run=lambda x, packed, bias, state: mma_sp.linear(x, packed.values, state, bias, config),
            prepare=lambda packed, case: mma_sp.lane_words(packed.meta, case.k),
            extra_bytes=lambda case: 4 * case.n * case.k,  # in passing; n * k / 8 stay
        )

    return [*map(gemv, kernels.CONFIGS), *map(mma, mma_sp.CONFIGS)]


@functools.cache
def _backends() -> tuple[Backend, ...]:
    return (*_triton_backends(), *_torch_backends())


@functools.cache
def _triton() -> ModuleType | None:
    """The Triton kernels, or None where Triton is not installed."""
    try:
        from compress_kernels.sparse24 import triton
    except ImportError:
        return None
    return triton
