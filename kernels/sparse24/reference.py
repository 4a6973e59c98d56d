"""What the 2:4 product computes, in torch: the oracle of the kernels, and what runs where there is no kernel.

With activations "float", y = x W^T + bias with every product of the values as they are stored and sums in fp32; y has the dtype of x.
With activations "int8" each token of x is first rounded to int8, symmetric with scale max|x| / 127, and the sums are integers: for int8
values only. NaN and infinities are those of the dense product, zeros of the pruned weights included: 0 * NaN and 0 * inf are NaN, so
that one NaN in a token of x makes all outputs of that token NaN, whichever weights are kept. With "int8" an infinity does so too.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compress_kernels.sparse24.packing import Packed24, expand

Activation = Literal["float", "int8"]
SMALLEST_MAXIMUM = 1e-30  # of a token: below it 127 / max overflows, and all its values round to zero


def linear(
    x: Tensor,
    packed: Packed24,
    bias: Tensor | None = None,
    activation: Activation = "float",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y `[..., N]` = x `[..., K]` times the packed `[N, K]` transposed, plus bias `[N]`, in `out_dtype` (default: that of x)."""
    y = (
        _integer_product(x, packed)
        if activation == "int8"
        else torch.nn.functional.linear(x.float(), expand(packed, torch.float32))
    )
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype or x.dtype)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each token of x `[..., K]` -> int8 `[..., K]` and fp32 scale `[..., 1]`; the scale of a token with NaN or infinity is NaN."""
    x = x.float()
    finite = x.isfinite().all(-1, keepdim=True)
    maximum = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_MAXIMUM)
    inverse = torch.full_like(maximum, 127) / maximum  # `127 / maximum` would be 127 * reciprocal, rounded twice
    q = torch.where(finite, x * inverse, 0).round().to(torch.int8)
    return q, torch.where(finite, maximum / 127, torch.nan)


def _integer_product(x: Tensor, packed: Packed24) -> Tensor:
    if packed.scale is None:
        raise ValueError(f"int8 activations go with int8 values, and these are {packed.values.dtype}; pack the matrix as int8")
    q, scale = quantize_activations(x)
    values = expand(
        Packed24(packed.values, packed.meta, torch.ones_like(packed.scale)), torch.float64
    )  # sums below 2^53 are exact
    return (q.double() @ values.T).float() * (scale * packed.scale)
