"""The device that work goes to, and the floating-point type that it multiplies fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compress import console
from compress.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Of a CPU, by torch.cpu.get_capabilities: any one of them will do.
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
_told: set[torch.dtype] = set()


def pick_device(device: str) -> torch.device:
    """ "auto" is cuda where there is one, else cpu. Raises UsageError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has instructions for products of matrices of this floating-point type.

    A processor without them (for bfloat16 any x86 with AVX2 alone, for example) gains nothing from a narrow type and loses much: torch then
    multiplies on plain paths, several times slower than in float32, in a backward pass on one thread (docs/masks.md has figures).
    """
    if dtype not in _INSTRUCTIONS or device.type not in ("cpu", "cuda"):
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    # A torch that cannot tell gets float32, which is fast everywhere.
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in _INSTRUCTIONS[dtype])


def fastest_dtype(device: torch.device) -> str:
    """bfloat16 where the device multiplies it, else float32."""
    return "bfloat16" if multiplies(torch.bfloat16, device) else "float32"


def dtype_on(device: torch.device, name: str) -> torch.dtype | None:
    """What the name of a type means on a device: None for "auto", the checkpoint's own; "fastest" is `fastest_dtype`.

    Raises UsageError for a name that is none.
    """
    if name == "auto":
        return None
    if name == "fastest":
        name = fastest_dtype(device)
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not known; one of auto, fastest, {', '.join(DTYPES)}")
    return DTYPES[name]


def tell_slow(model: torch.nn.Module, dtype: torch.dtype | None = None, *, head: bool = True) -> None:
    """One line on stderr, once a process, when a model is about to compute in a type for which its processor has no instructions.

    dtype: that of its products, where it is not that of its weights. head: whether its output head multiplies more than a token at a time. A model
    whose matrices are all packed computes their products in types of its own, as fast in a narrow type.
    """
    first = next(model.parameters(), None)
    if first is None:
        return
    dtype = dtype or first.dtype
    if dtype in _told or multiplies(dtype, first.device) or not _has_dense_products(model, head):
        return
    _told.add(dtype)
    kind = str(dtype).removeprefix("torch.")
    console.log.print(
        f"[yellow]the model computes in {kind}, for which this processor has no instructions: long texts take several times as long as in "
        "float32. With twice the memory, dtype float32 (or fastest, which chooses by the machine) is the faster one here[/]",
        soft_wrap=True,
    )


def _has_dense_products(model: torch.nn.Module, head: bool) -> bool:
    """Whether torch multiplies by a matrix of the model's, its output head counted or not. Embeddings are looked up."""
    find: Any = getattr(model, "get_output_embeddings", None)
    left_out = find() if find and not head else None
    return any(
        parameter.dim() > 1
        for module in model.modules()
        if module is not left_out and not isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    )
