"""One token through all decoder layers of a model whose matrices are packed, in one call of the compiled kernels (cpu_decode.h).

What is computed is Llama's network, with biases and norms of queries and keys where there are some: for each layer `h = x + O attention(...)`,
`y = h + D (silu(G n(h)) * U n(h))` with `n` an RMS norm, and the norm of what leaves the last. Between the products everything is float32, so in
bfloat16 fewer numbers are rounded than by an operation after the other.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress_kernels.sparse24.cpu import ACTIVATION_CODES, FLOATING, TYPE_CODES, kernel_library
from compress_kernels.sparse24.packing import Packed24
from compress_kernels.sparse24.reference import Activation

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # struct Layer has its matrices in this order
_TOKEN = struct.Struct("11q2d9q")  # struct Token
_DENSE = struct.Struct("12q")  # struct Dense


@dataclass(frozen=True)
class LayerParts:
    """The tensors of a layer, all of them on the CPU and contiguous.

    matrices, biases: by `PROJECTIONS`; matrices share the dtype of their values. input_norm, post_norm: `[hidden]`; q_norm, k_norm: `[head_dim]` or
    None, all in one dtype. activation: as of `sparse24.linear`, for all matrices; "dense" takes bf16 matrices `[N, K]` as values, without
    metadata: the same code without sparsity, to tell one gain from the other.
    """

    matrices: Mapping[str, Packed24]
    biases: Mapping[str, Tensor | None]
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    head_dim: int
    eps: float
    activation: Activation | Literal["dense"] = "float"

    def columns(self, name: str) -> int:
        """Inputs of a matrix."""
        width = self.matrices[name].values.shape[1]
        return width if self.activation == "dense" else 2 * width

    def tensors(self) -> list[Tensor]:
        """All of them."""
        parts = [t for m in self.matrices.values() for t in (m.values, m.meta, m.scale)]
        return [t for t in (*parts, *self.biases.values(), *self.norms()) if t is not None]

    def norms(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Those of the layer's input, of the second half's input, of queries and of keys."""
        return self.input_norm, self.post_norm, self.q_norm, self.k_norm

    def kind(self) -> tuple[object, ...]:
        """What all layers of a model have in common."""
        shapes = tuple(m.values.shape for m in self.matrices.values())
        norms = tuple(n is None for n in self.norms())
        return shapes, norms, self.matrices["q"].values.dtype, self.input_norm.dtype, self.head_dim, self.eps, self.activation

    def problem(self) -> str | None:
        """Why there is no kernel for this layer, or None when there is one."""
        rows = {name: len(m.values) for name, m in self.matrices.items()}
        columns = {name: self.columns(name) for name in self.matrices}
        hidden, queries, keys, inner = columns["q"], rows["q"], rows["k"], rows["gate"]
        shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        if any((rows[name], columns[name]) != shape for name, shape in shapes.items()):
            return "its matrices do not fit each other"
        if self.head_dim % 2 or queries % self.head_dim or keys % self.head_dim or queries % keys:
            return f"{queries} and {keys} rows of queries and keys are not groups of heads of {self.head_dim}"
        if len({m.values.dtype for m in self.matrices.values()}) > 1 or len({n.dtype for n in self.norms() if n is not None}) > 1:
            return "its matrices, or its norms, are of several dtypes"
        if self.activation == "int8" and self.matrices["q"].values.dtype != torch.int8:
            return "int8 activations go with int8 values"
        widths = (hidden, hidden, self.head_dim, self.head_dim)
        if any(n is not None and n.shape != (width,) for n, width in zip(self.norms(), widths, strict=True)):
            return "its norms do not fit its matrices"
        if any(b is not None and b.shape != (rows[name],) for name, b in self.biases.items()):
            return "its biases do not fit its matrices"
        floating = [t.dtype for t in (*self.biases.values(), *self.norms()) if t is not None]
        if self.activation == "dense" and self.matrices["q"].values.dtype != torch.bfloat16:
            return "dense matrices are taken in bfloat16"
        if not all(dtype in FLOATING for dtype in floating) or any(
            (self.activation != "dense" and m.meta.shape != (rows[name], -(-columns[name] // 8)))
            or m.meta.dtype != torch.uint8
            or m.values.dtype not in TYPE_CODES
            for name, m in self.matrices.items()
        ):
            return "there is no kernel for its dtypes"
        if any(
            (m.scale is None) == (m.values.dtype == torch.int8)
            or (m.scale is not None and (m.scale.shape != (rows[name],) or m.scale.dtype != torch.float32))
            for name, m in self.matrices.items()
        ):
            return "int8 values have an fp32 scale for every row, other values have none"
        if not all(t.is_cpu and t.is_contiguous() for t in self.tensors()):
            return "its tensors are not all on the CPU and contiguous"
        return None


class Decoder:
    """The layers of a model for tokens in `dtype`, which hidden states, cache, cosines and sines share.

    layers: of one shape, in one set of dtypes. norm: `[hidden]`, of what leaves the last one. scaling: of the scores. The tensors' addresses are
    kept, and with the parts their memory. Raises ValueError where `problem` says why, or the kernels are not built.
    """

    def __init__(self, layers: Sequence[LayerParts], norm: Tensor, scaling: float, dtype: torch.dtype) -> None:
        if problem := self.problem(layers, norm, dtype):
            raise ValueError(f"these layers cannot be run in one call: {problem}")
        first = layers[0]
        self.dtype, self._held = dtype, (list(layers), norm)
        self.count, self.hidden, self.head_dim = len(layers), first.columns("q"), first.head_dim
        self.heads, self.kv_heads = (len(first.matrices[name].values) // first.head_dim for name in "qk")
        self._library = kernel_library()
        self._layers = ctypes.create_string_buffer(b"".join(map(_described, layers)))
        gate = first.matrices["gate"].values
        self._head = (
            ctypes.addressof(self._layers),
            self.count,
            self.hidden,
            self.heads,
            self.kv_heads,
            self.head_dim,
            len(gate),
            TYPE_CODES[dtype],
            TYPE_CODES[norm.dtype],
            TYPE_CODES[gate.dtype],
            ACTIVATION_CODES[first.activation],
            first.eps,
            scaling,
            norm.data_ptr(),
        )

    @staticmethod
    def problem(layers: Sequence[LayerParts], norm: Tensor, dtype: torch.dtype) -> str | None:
        """Why there is no kernel for these layers, or None when there is one."""
        if not layers:
            return "there are none"
        if dtype not in FLOATING:
            return f"there is no kernel for tokens in {dtype}"
        for index, parts in enumerate(layers):
            if reason := parts.problem():
                return f"layer {index}: {reason}"
            if parts.kind() != layers[0].kind():
                return f"layer {index} is of other shapes or dtypes than the first one"
        first = layers[0]
        if (
            norm.shape != first.input_norm.shape
            or norm.dtype != first.input_norm.dtype
            or not (norm.is_cpu and norm.is_contiguous())
        ):
            return "the last norm does not fit the layers"
        return None

    def cache(self, capacity: int) -> Tensor:
        """Room for the keys and values of `capacity` tokens: `[2 * layers, 1, kv_heads, capacity, head_dim]`, keys and values of a layer in turn."""
        return torch.empty(2 * self.count, 1, self.kv_heads, capacity, self.head_dim, dtype=self.dtype)

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, tokens: int) -> Tensor:
        """What leaves the last layer's norm, `[1, 1, hidden]`, for one token x `[1, 1, hidden]` at the angles cos, sin `[1, 1, head_dim]`.

        cache: as `cache` makes it, contiguous, with the keys and values of `tokens` tokens before this one; this token's are written behind them.
        Raises ValueError for other shapes or dtypes and where the cache is full.
        """
        for tensor, width in ((x, self.hidden), (cos, self.head_dim), (sin, self.head_dim)):
            if tensor.shape != (1, 1, width) or tensor.dtype is not self.dtype or not tensor.is_cpu:
                raise ValueError(f"one token is {self.dtype} [1, 1, {width}] on the CPU, not {tensor.dtype} {list(tensor.shape)}")
        capacity = cache.shape[3] if cache.dim() == 5 else 0
        expected = (2 * self.count, 1, self.kv_heads, capacity, self.head_dim)
        if cache.shape != expected or cache.dtype is not self.dtype or not cache.is_contiguous() or not cache.is_cpu:
            raise ValueError(f"the cache is {self.dtype} {list(expected)}, contiguous, not {cache.dtype} {list(cache.shape)}")
        if not 0 <= tokens < capacity:
            raise ValueError(f"{tokens} tokens are in a cache for {capacity}: there is no room for another one")
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty_like(x)
        token = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cache.data_ptr(), capacity, tokens, out.data_ptr())
        status = self._library.sparse24_decode_token(_TOKEN.pack(*self._head, *token, torch.get_num_threads()))
        if status:
            raise (
                MemoryError("no memory for a token's activations")
                if status == 1
                else ValueError("the 2:4 kernel refused a layer")
            )
        return out


def _described(parts: LayerParts) -> bytes:
    """struct Layer: words of 8 bytes, in the machine's order."""
    words = struct.pack("4q", *map(_address, parts.norms()))
    for name in PROJECTIONS:
        (values, meta, scale), bias = parts.matrices[name], parts.biases[name]
        kind = -1 if bias is None else TYPE_CODES[bias.dtype]
        words += struct.pack("7q", values.data_ptr(), meta.data_ptr(), _address(scale), _address(bias), 0, len(values), kind)
    return words


def dense_tokens(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """A few tokens x `[..., K]` times a weight `[N, K]` transposed, plus bias, in the dtype of x: for a model's head.

    float32, bfloat16 and float16, contiguous, on the CPU; an int8 weight has a float32 scale `[N]` of its rows, others have none. Every token costs
    about the same, so with many of them a product of matrices is faster. Raises ValueError for others, MemoryError when there is none for them.
    """
    rows, columns = weight.shape if weight.dim() == 2 else (0, 0)
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == columns
    fits = fits and all(part is None or part.shape == (rows,) for part in (bias, scale))
    kinds = x.dtype in FLOATING and (weight.dtype in FLOATING or weight.dtype == torch.int8)
    kinds = kinds and (scale is None) == (weight.dtype != torch.int8) and (scale is None or scale.dtype == torch.float32)
    kinds = kinds and (bias is None or bias.dtype in FLOATING)
    tensors = [tensor for tensor in (x, weight, bias, scale) if tensor is not None]
    if not (fits and kinds and all(t.is_cpu and t.is_contiguous() for t in tensors)):
        raise ValueError(
            f"tokens [..., {columns}] and a weight [N, {columns}] on the CPU, contiguous and floating-point (or int8 with a scale) are wanted, "
            f"not {x.dtype} {list(x.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    out = x.new_empty(*x.shape[:-1], rows)
    addresses = (x.data_ptr(), weight.data_ptr(), _address(scale), _address(bias), out.data_ptr())
    types = (TYPE_CODES[x.dtype], TYPE_CODES[weight.dtype], -1 if bias is None else TYPE_CODES[bias.dtype])
    tokens = x.numel() // max(columns, 1)
    call = _DENSE.pack(*addresses, tokens, rows, columns, *types, torch.get_num_threads())
    if kernel_library().sparse24_dense_tokens(call):
        raise MemoryError("no memory for the tokens' activations")
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
