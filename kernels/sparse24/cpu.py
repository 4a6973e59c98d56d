"""The compiled 2:4 kernels (cpu.cpp) on torch tensors: shapes and dtypes are checked here, everything else happens there."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from compress_kernels.native import native
from compress_kernels.sparse24.packing import Packed24
from compress_kernels.sparse24.reference import Activation

_LIBRARY = native("sparse24").library
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # enum Type
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATION_CODES = {"float": 0, "int8": 1, "dense": 2}  # enum Activation
_OUT_OF_MEMORY = 1
_WORDS = 7  # of 8 bytes, of struct Matrix
FEATURES = ("avx2", "avx512", "avx512 bf16", "avx512 vnni", "amx")  # enum Feature, from bit 0


def features() -> tuple[str, ...]:
    """Which of `FEATURES` the kernels use on this machine."""
    mask = _LIBRARY.sparse24_features() if _LIBRARY is not None else 0
    return tuple(name for bit, name in enumerate(FEATURES) if mask >> bit & 1)


def use_features(names: Sequence[str]) -> tuple[str, ...]:
    """Restrict the kernels to some of `FEATURES`, for tests and comparisons; returns those in use, as the machine may lack some."""
    kernel_library().sparse24_use_features(sum(1 << FEATURES.index(name) for name in names))
    return features()


def supports(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` takes these: they are on the CPU, in dtypes that it knows, and the kernels are built."""
    return (
        _LIBRARY is not None and x.is_cpu and values.is_cpu and x.dtype in FLOATING and (bias is None or bias.dtype in FLOATING)
    )


def linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: Activation = "float",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.linear` on CPU tensors, by the compiled kernels.

    Raises ValueError for shapes, dtypes or devices that do not fit, MemoryError when there is none for the activations.
    """
    dtype, columns, count = x.dtype, x.shape[-1], len(values)
    # Between two products of a model the weights have driven everything else out of the caches: each line here then costs microseconds.
    plain = (
        bias is None
        and columns
        and _fits(x, values, meta, scale, values.dtype, activation)
        and (
            scale is None or (scale.shape == (count,) and scale.dtype is torch.float32 and scale.is_cpu and scale.is_contiguous())
        )
        and x.is_contiguous()
        and values.is_contiguous()
        and meta.is_contiguous()
    )
    if not plain:
        return linear_many(x, ((values, meta, scale),), (bias,), activation, out_dtype)[0]
    out_dtype = out_dtype or dtype
    out = torch.empty((*x.shape[:-1], count), dtype=out_dtype)
    address = 0 if scale is None else scale.data_ptr()
    described = values.data_ptr(), meta.data_ptr(), address, 0, out.data_ptr(), count, -1
    pitch = columns * x.element_size()
    _call(x, pitch, x.numel() // columns, columns, values.dtype, out_dtype, ACTIVATION_CODES[activation], described)
    return out


def linear_many(
    x: Tensor,
    matrices: Sequence[Packed24 | tuple[Tensor, Tensor, Tensor | None]],
    biases: Sequence[Tensor | None],
    activation: Activation = "float",
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The products of x with several packed matrices: x is prepared once, and one pool of threads works on all the rows.

    The matrices share K and the dtype of their values. Raises ValueError otherwise.
    """
    out_dtype = out_dtype or x.dtype
    lead = x.shape[:-1]
    rows = _rows(x)
    value_type = matrices[0][0].dtype
    held: list[Tensor] = []  # copies must live until the call returns
    outputs = []
    described: list[int] = []
    for (values, meta, scale), bias in zip(matrices, biases, strict=True):
        count = len(values)
        if scale is not None or bias is not None or not _fits(x, values, meta, scale, value_type, activation):
            _check(x, values, meta, scale, bias, activation, value_type)
        if not (values.is_contiguous() and meta.is_contiguous()):
            values, meta = values.contiguous(), meta.contiguous()
            held += (values, meta)
        if scale is not None:
            held.append(scale := scale.contiguous())
        if bias is not None:
            held.append(bias := bias.contiguous())
        out = torch.empty((*lead, count), dtype=out_dtype)
        outputs.append(out)
        described += (
            values.data_ptr(),
            meta.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            count,
            -1 if bias is None else TYPE_CODES[bias.dtype],
        )
    _run(rows, value_type, out_dtype, ACTIVATION_CODES[activation], described)
    return outputs


def _fits(x: Tensor, values: Tensor, meta: Tensor, scale: Tensor | None, value_type: torch.dtype, activation: Activation) -> bool:
    """Whether x and a matrix are of the kinds and shapes of a product, as far as `_check` asks without scale and bias."""
    count, half = values.shape
    columns = x.shape[-1]
    return (
        2 * half == columns
        and columns % 4 == 0
        and meta.shape == (count, (columns + 7) // 8)
        and meta.dtype is torch.uint8
        and values.dtype is value_type
        and (activation == "float" or (activation == "int8" and value_type is torch.int8))
        and (scale is None) == (value_type is not torch.int8)
        and x.dtype in FLOATING
        and x.is_cpu
        and values.is_cpu
        and meta.is_cpu
    )


def _rows(x: Tensor) -> Tensor:
    """x as `[B, K]` whose rows are contiguous; a view where that is possible."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride()[1] == 1 else rows.contiguous()


def dense_linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x `[B, K]` times a dense bf16 weight `[N, K]` transposed, by a kernel written as the packed ones for small batches are.

    It tells what sparsity gains from what good code does. Raises ValueError for shapes and dtypes that do not fit.
    """
    x, weight = x.contiguous(), weight.contiguous()
    shapes_fit = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1] and x.shape[1] % 4 == 0
    if not (shapes_fit and x.is_cpu and weight.is_cpu and x.dtype in FLOATING and weight.dtype == torch.bfloat16):
        raise ValueError(
            f"dense_linear takes x [B, K] and a bf16 weight [N, K] on the CPU, K a multiple of 4, "
            f"not {x.dtype} {list(x.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    out = x.new_empty(len(x), len(weight), dtype=out_dtype or x.dtype)
    _run(x, torch.bfloat16, out.dtype, ACTIVATION_CODES["dense"], [weight.data_ptr(), 0, 0, 0, out.data_ptr(), len(weight), -1])
    return out


def read(buffer: Tensor) -> int:
    """Read a contiguous buffer once with `torch.get_num_threads()` threads, as fast as memory gives it: the probe of its bandwidth."""
    kernel_library().sparse24_read.restype = ctypes.c_int64
    size, threads = ctypes.c_int64(buffer.nbytes), ctypes.c_int64(torch.get_num_threads())
    return int(kernel_library().sparse24_read(ctypes.c_void_p(buffer.data_ptr()), size, threads))


@functools.cache
def _layout(count: int) -> struct.Struct:
    """`struct Call` with `count` matrices: words of 8 bytes, in the machine's order."""
    return struct.Struct(f"{10 + _WORDS * count}q")


def kernel_library() -> ctypes.CDLL:
    """The compiled kernels. Raises ValueError when they are not built."""
    if _LIBRARY is None:
        raise ValueError(f"the compiled 2:4 kernels are not available: {native('sparse24').reason}")
    return _LIBRARY


def _run(x: Tensor, value_type: torch.dtype, out_dtype: torch.dtype, activation: int, described: Sequence[int]) -> None:
    """`_call` for x `[B, K]` with contiguous rows."""
    batch, columns = x.shape
    _call(x, x.stride()[0] * x.element_size(), batch, columns, value_type, out_dtype, activation, described)


def _call(
    x: Tensor,
    pitch: int,
    batch: int,
    columns: int,
    value_type: torch.dtype,
    out_dtype: torch.dtype,
    activation: int,
    described: Sequence[int],
) -> None:
    """Call the kernel for the `batch` rows of x, `pitch` bytes apart, and the matrices described, `_WORDS` words each."""
    count = len(described) // _WORDS
    words = (
        x.data_ptr(),
        pitch,
        TYPE_CODES[x.dtype],
        batch,
        columns,
        TYPE_CODES[value_type],
        TYPE_CODES[out_dtype],
        activation,
        torch.get_num_threads(),
        count,
        *described,
    )
    status = kernel_library().sparse24_linear(_layout(count).pack(*words))
    if status:
        raise (
            MemoryError("no memory for the activations of a 2:4 product")
            if status == _OUT_OF_MEMORY
            else ValueError("the 2:4 kernel refused a call")
        )


def _check(
    x: Tensor, values: Tensor, meta: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str, value_type: torch.dtype
) -> None:
    """Raise ValueError that says what does not fit."""
    rows, columns = values.shape[0], x.shape[-1]
    if values.shape[1] * 2 != columns or meta.shape != (rows, (columns + 7) // 8) or columns % 4:
        raise ValueError(
            f"x has {columns} columns, values are {list(values.shape)} and metadata {list(meta.shape)}: not one 2:4 product"
        )
    if x.dtype not in FLOATING or values.dtype not in TYPE_CODES or meta.dtype != torch.uint8:
        raise ValueError(
            f"x is {x.dtype}, values are {values.dtype}, metadata {meta.dtype}; the 2:4 product has no kernel for these"
        )
    if values.dtype != value_type:
        raise ValueError(f"matrices that are multiplied at once have values of one dtype, not {value_type} and {values.dtype}")
    if (scale is None) == (values.dtype == torch.int8) or (
        scale is not None and (scale.shape != (rows,) or scale.dtype != torch.float32)
    ):
        raise ValueError("int8 values have an fp32 scale for every row, other values have none")
    if activation == "int8" and scale is None:
        raise ValueError(f"int8 activations go with int8 values, and these are {values.dtype}; pack the matrix as int8")
    if activation not in ("float", "int8"):
        raise ValueError(f"activations are taken as 'float' or 'int8', not {activation!r}")
    if bias is not None and (bias.shape != (rows,) or bias.dtype not in FLOATING):
        raise ValueError(f"a bias is [{rows}] in a floating-point dtype, not {bias.dtype} {list(bias.shape)}")
    tensors = (x, values, meta, *(t for t in (scale, bias) if t is not None))
    if not all(t.is_cpu for t in tensors):
        raise ValueError(f"all tensors of a product on the CPU have to be there, not on {[str(t.device) for t in tensors]}")
