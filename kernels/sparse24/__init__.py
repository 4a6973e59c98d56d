"""The product of activations with packed 2:4 matrices, by the best implementation at hand.

`linear` and `linear_many` are what layers call; `compress::sparse24_linear` is the same product as a torch operator, which torch.compile,
fake tensors and autograd see. On a CPU the compiled kernels compute it (cpu.cpp), on a GPU cuda.py, and where these cannot, the torch
reference; `implementation` says which and why. reference.py defines the result; of activations that are not finite GPUs give less
(see `cuda.linear`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress_kernels.native import native
from compress_kernels.sparse24 import cpu, reference
from compress_kernels.sparse24.packing import Packed24, expand, pack, unpack
from compress_kernels.sparse24.reference import Activation

__all__ = ["Activation", "Implementation", "Packed24", "implementation", "linear", "linear_many", "pack", "unpack", "unwatched"]

_OPERATOR = "compress::sparse24_linear"


class Implementation(NamedTuple):
    """What computes the product on a device, and why nothing faster does (empty where there is nothing faster)."""

    name: str
    reason: str


def implementation(device: torch.device | str = "cpu") -> Implementation:
    """What computes the product on a device of this machine."""
    kind = torch.device(device).type
    if kind == "cpu":
        found = native("sparse24")
        if found.library is None:
            return Implementation("torch reference", f"the compiled kernels are not available: {found.reason}")
        missing = [name for name in cpu.FEATURES if name not in cpu.features()]
        reason = f"this machine has no {', '.join(missing)}" if missing else ""
        return Implementation(f"C++ ({', '.join(cpu.features()) or 'no vector instructions'})", reason)
    if kind == "cuda":
        _, reason = _cuda()
        return Implementation("torch reference" if reason else "CUDA", reason)
    return Implementation("torch reference", f"there are no kernels for {kind}")


def linear(x: Tensor, packed: Packed24, bias: Tensor | None = None, activation: Activation = "float") -> Tensor:
    """y `[..., N]`, in the dtype of x, = x `[..., K]` times the packed `[N, K]` transposed, plus bias `[N]`.

    activation: "float" takes x as it is; "int8", with int8 values only, rounds each token to int8 first, which makes the product faster.
    Gradients flow to x and bias, not to the packed matrix. Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    values, meta, scale = packed
    if unwatched(x, bias):
        return _product(x, values, meta, scale, bias, activation)
    return torch.ops.compress.sparse24_linear(x, values, meta, scale, bias, activation)


def linear_many(
    x: Tensor, matrices: Sequence[Packed24], biases: Sequence[Tensor | None] | None = None, activation: Activation = "float"
) -> list[Tensor]:
    """The products of x with several packed matrices, such as those of query, key and value, as `linear` gives them one by one.

    On a CPU with compiled kernels this is one call: x is prepared once, and threads start once.
    """
    biases = [None] * len(matrices) if biases is None else biases
    if len(biases) != len(matrices):
        raise ValueError(f"{len(matrices)} matrices and {len(biases)} biases")
    alike = len({packed.values.dtype for packed in matrices}) == 1
    if alike and all(
        unwatched(x, bias) and cpu.supports(x, packed.values, bias) for packed, bias in zip(matrices, biases, strict=True)
    ):
        return cpu.linear_many(x, matrices, biases, activation)
    return [linear(x, packed, bias, activation) for packed, bias in zip(matrices, biases, strict=True)]


def unwatched(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether nobody watches: no tracing, no gradient. The call then skips torch's dispatcher, which takes as long as a small layer."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    watched = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None
    return not watched and torch._C._functorch.maybe_current_level() is None


def _product(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation = "float",
) -> Tensor:
    if cpu.supports(x, values, bias):
        return cpu.linear(x, values, meta, scale, bias, activation)
    if x.device.type == "cuda" and activation == "float":
        product, _ = _cuda()
        if product is not None:
            return product(x, values, meta, scale, bias)
    return reference.linear(x, Packed24(values, meta, scale), bias, activation)


@functools.cache
def _cuda() -> tuple[Callable[..., Tensor] | None, str]:
    """The product on GPUs, or why there is none."""
    try:
        from compress_kernels.sparse24 import cuda
    except ImportError as error:
        return None, f"the GPU kernels do not load: {error}"
    return cuda.linear, ""


torch.library.define(
    _OPERATOR, "(Tensor x, Tensor values, Tensor meta, Tensor? scale=None, Tensor? bias=None, str activation='float') -> Tensor"
)
torch.library.impl(_OPERATOR, "CompositeExplicitAutograd")(_product)


@torch.library.register_fake(_OPERATOR)
def _fake(
    x: Tensor, values: Tensor, meta: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, activation: str = "float"
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, meta, scale, bias, _ = inputs
    ctx.save_for_backward(values, meta, scale)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x: grad times the dense weight, int8 activations as if they had not been rounded. Of bias: the sum of grad over tokens."""
    values, meta, scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (grad.float() @ expand(Packed24(values, meta, scale), torch.float32)).to(ctx.x_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.float().flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None


torch.library.register_autograd(_OPERATOR, _backward, setup_context=_save)
