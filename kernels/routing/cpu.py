"""The C++ form of the router (`cpu.cpp`), called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from compress_kernels.native import native
from compress_kernels.routing.reference import EPS, LEAST_WEIGHT, Router

_CODES = {torch.float32: 0, torch.bfloat16: 1}
_MOST_SLOTS, _MOST_RANK = 64, 1024  # the kernel's own arrays


def supported(hidden: Tensor, weights: Tensor, router: Router) -> bool:
    """Whether the library is there and takes these tensors: on the CPU, float32 or bfloat16, a router in float64."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in _CODES
        and weights.dtype in _CODES
        and router.project.dtype == torch.float64
        and weights.shape[1] <= _MOST_SLOTS
        and router.project.shape[0] <= _MOST_RANK
        and native("routing").library is not None
    )


def count_experts(hidden: Tensor, weights: Tensor, experts: Tensor, router: Router) -> Tensor:
    """As `compress_kernels.routing.reference.count_experts`, which defines it; a token's result is the same bits in any batch."""
    hidden, weights, experts = hidden.contiguous(), weights.contiguous(), experts.contiguous()
    kept = torch.empty(len(hidden), dtype=torch.int64)
    _function()(
        hidden.data_ptr(),
        _CODES[hidden.dtype],
        weights.data_ptr(),
        _CODES[weights.dtype],
        experts.data_ptr(),
        kept.data_ptr(),
        *hidden.shape,
        weights.shape[1],
        router.project.shape[0],
        *[part.data_ptr() for part in router],
        EPS,
        LEAST_WEIGHT,
        torch.get_num_threads(),
    )
    return kept


@functools.cache
def _function() -> Any:
    """The kernel with the types of its arguments, which saves a conversion in Python for each of them."""
    library = native("routing").library
    assert library is not None
    function = library.routing_count
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [
        *(pointer, integer, pointer, integer, pointer, pointer),
        *[ctypes.c_int64] * 4,
        *[pointer] * len(Router._fields),
        *(ctypes.c_double, ctypes.c_double, integer),
    ]
    function.restype = None
    return function
