"""The 2:4 product by the libraries that torch ships for it, cuSPARSELt and CUTLASS, from packed values and plain codes.

They are made for many tokens at once: torch pads the tokens to a multiple of 8 and copies the result where it padded, so that a single
token costs as much as eight and two copies more. `cutlass_metadata` is checked on the CPU against torch's own packer; the products
need a GPU, and none has run them from here yet (tests/gpu).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS

TOKENS = 8  # tokens are padded to a multiple of it, for 16-bit types

_algorithms: dict[tuple[torch.device, tuple[int, int], torch.dtype, int], int] = {}


def cutlass_metadata(meta: Tensor, k: int, value_dtype: torch.dtype) -> Tensor:
    """Plain codes uint8 `[N, K/8]` -> the order of CUTLASS and `torch.sparse`: int16 `[N, K/16]`, and int32 `[N, K/32]` for int8 values.

    The order is the image of the registers of `mma.sp`: of m16n8k32, one 32-bit word of a lane for two tiles of 16 rows, and of
    m16n8k64 for int8. 16-bit values need N a multiple of 32 and K of 32, int8 values N a multiple of 16 and K of 64; else ValueError.
    """
    n = meta.shape[0]
    narrow = value_dtype == torch.int8
    if n % (16 if narrow else 32) or k % (64 if narrow else 32):
        raise ValueError(
            f"CUTLASS metadata of {value_dtype} needs whole tiles of 16 or 32 rows and 32 or 64 columns, not {n} x {k}"
        )
    if narrow:
        words = meta.view(torch.int32).view(n // 16, 2, 8, k // 64, 2)  # [tile, row half, g, chunk of 64 columns, half of it]
        return words.permute(3, 0, 2, 4, 1).reshape(n, k // 32)  # a quad's lanes: (column half, row half)
    words = meta.view(torch.int16).view(
        n // 32, 2, 2, 8, k // 32, 2
    )  # [pair of tiles, tile, row half, g, chunk of 32 columns, half of it]
    return words.permute(4, 0, 3, 1, 5, 2).reshape(n, k // 16)  # a quad's lanes: (tile, column half); a word's halves: row halves


def cutlass_supported(n: int, k: int, x_dtype: torch.dtype, value_dtype: torch.dtype) -> bool:
    """Whether the CUTLASS kernels take a matrix `[n, k]`; which GPUs they run on only a run shows."""
    return n % 32 == 0 and k % 64 == 0 and x_dtype == value_dtype and x_dtype in (torch.bfloat16, torch.float16)


def cutlass_weight(values: Tensor, meta: Tensor) -> Tensor:
    """The matrix as torch's tensor subclass, for `torch.nn.functional.linear`: shares `values`, reorders the codes."""
    n, kept = values.shape
    order = cutlass_metadata(meta, 2 * kept, values.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype stage")
        return SparseSemiStructuredTensorCUTLASS(
            torch.Size([n, 2 * kept]), packed=values, meta=order, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
        )


def cusparselt_supported(n: int, k: int, x_dtype: torch.dtype, value_dtype: torch.dtype) -> bool:
    """Whether cuSPARSELt is there and takes a matrix `[n, k]`."""
    shapes = n % 16 == 0 and k % 16 == 0
    return (
        shapes
        and x_dtype == value_dtype
        and x_dtype in (torch.bfloat16, torch.float16)
        and torch.backends.cusparselt.is_available()
    )


def cusparselt_linear(x: Tensor, compressed: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    """y `[batch, N]` = x `[batch, K]` W^T + bias, where `compressed` is W `[N, K]` as `torch._cslt_compress` made it.

    The algorithm is the one that cuSPARSELt's own search found when this shape first met as many tokens, to a power of two.
    """
    tokens = pad_tokens(x)
    key = (x.device, shape, x.dtype, len(tokens).bit_length())
    if key not in _algorithms:
        _algorithms[key] = int(torch._cslt_sparse_mm_search(compressed, tokens.t(), transpose_result=True))
    return torch._cslt_sparse_mm(compressed, tokens.t(), bias=bias, transpose_result=True, alg_id=_algorithms[key])[: len(x)]


def pad_tokens(x: Tensor) -> Tensor:
    """x `[batch, K]` with zero rows appended up to a multiple of `TOKENS`."""
    missing = -len(x) % TOKENS
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
