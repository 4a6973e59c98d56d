"""What a checkpoint holds, tensor by tensor: shapes, types, bytes, zeros, and the N:M pattern that the zeros satisfy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint import Checkpoint, TensorInfo, checkpoint_files, read_header
from compress.errors import UsageError
from compress.packed import PackedCheckpoint, is_packed
from compress.packed_moe import PackedMoeCheckpoint, is_packed_moe
from compress.verify import nonzeros
from maskllm.errors import MaskError
from maskllm.patterns import Pattern
from maskllm.storage import FORMAT, group_counts, load_masks, npz_arrays

# Tightest first: the first one that holds is reported.
PATTERNS = tuple(Pattern.parse(p) for p in ("1:8", "1:4", "2:8", "2:4", "4:8", "6:8"))


@dataclass(frozen=True)
class TensorRow:
    """One tensor. bits: stored bits a weight. sparsity: share of zeros. pattern: the tightest found, with its dimension, or "dense"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    bits: float
    sparsity: float
    pattern: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def inspect_checkpoint(path: Path) -> Iterator[TensorRow]:
    """Rows of a checkpoint folder (packed ones too), a .safetensors file, a mask file, a .gguf file or a published MaskLLM .npz, one
    tensor in memory at a time.

    Raises UsageError when it is none of them.
    """
    if path.suffix == ".npz":
        yield from _npz(path)
    elif path.suffix == ".gguf":
        yield from _gguf(path)
    elif path.is_file() and read_header(path)[0].get("format") == FORMAT:
        yield from _mask_file(path)
    elif path.is_dir() and (path / "mask.safetensors").is_file() and not any(path.glob("model*.safetensors")):
        yield from _mask_file(path / "mask.safetensors")
    elif path.is_dir() and is_packed(path):
        yield from _packed(path)
    elif path.is_dir() and is_packed_moe(path):
        yield from _packed_moe(path)
    else:
        checkpoint_files(path)
        checkpoint = Checkpoint(path)
        yield from _plain(checkpoint, checkpoint.tensors.values())


def _plain(checkpoint: Checkpoint, infos: Iterable[TensorInfo]) -> Iterator[TensorRow]:
    for info in infos:
        sparsity, pattern = describe(checkpoint.read(info.name))
        yield TensorRow(info.name, info.shape, info.dtype, info.nbytes, 8 * info.nbytes / max(info.numel, 1), sparsity, pattern)


def _packed(path: Path) -> Iterator[TensorRow]:
    """The packed parameters, each as one row of its dense shape with the bytes of all its parts; int8 tables likewise; then the rest."""
    packed = PackedCheckpoint(path)
    for matrix in packed.matrices:
        sparsity, pattern = describe(packed.dense(matrix).movedim(matrix.contracted_dim, -1))
        along = "" if matrix.contracted_dim == -1 else " along -2"
        bits = 8 * matrix.nbytes / matrix.weights
        yield TensorRow(matrix.name, matrix.shape, f"packed {matrix.values}", matrix.nbytes, bits, sparsity, pattern + along)
    for table in packed.tables:
        sparsity, pattern = describe(packed.stored(table)["values"])
        yield TensorRow(table.name, table.shape, "int8", table.nbytes, 8 * table.nbytes / table.weights, sparsity, pattern)
    yield from _plain(packed.checkpoint, packed.plain)


def _packed_moe(path: Path) -> Iterator[TensorRow]:
    """The quantised parameters, each as one row of its dense shape with the bytes of all its matrices; then the rest."""
    packed = PackedMoeCheckpoint(path)
    for parameter in packed.parameters:
        zeros, patterns, widths = 0, set(), set()
        for _, slab, place in parameter.matrices():
            matrix = packed.read(slab, place).dequantize()
            share, pattern = describe(matrix)
            zeros += round(share * matrix.numel())
            patterns.add(pattern)
            widths.add(slab.grid.bits)
        bits = 8 * parameter.nbytes / parameter.weights
        kind = "packed " + ", ".join(map(str, sorted(widths))) + " bit"
        pattern = patterns.pop() if len(patterns) == 1 else "dense"
        yield TensorRow(parameter.name, parameter.shape, kind, parameter.nbytes, bits, zeros / parameter.weights, pattern)
    yield from _plain(packed.checkpoint, packed.plain)


def describe(tensor: Tensor) -> tuple[float, str]:
    """Share of zeros, and the tightest pattern of `PATTERNS` along the last or the last but one dimension ("" for vectors)."""
    kept = nonzeros(tensor)
    sparsity = 1 - int(kept.sum()) / kept.numel() if kept.numel() else 0.0
    if tensor.dim() < 2 or not tensor.numel():
        return sparsity, ""
    for pattern in PATTERNS:
        for dim in (-1, -2):
            if tensor.shape[dim] % pattern.m == 0 and 1 - sparsity <= pattern.n / pattern.m:
                counts = group_counts(kept, pattern.m, dim)
                if int(counts.max()) <= pattern.n:
                    return sparsity, f"{pattern}" + ("" if dim == -1 else " along -2")
    return sparsity, "dense"


def _mask_file(path: Path) -> Iterator[TensorRow]:
    try:
        file = load_masks(path)
    except MaskError as error:
        raise UsageError(str(error)) from error
    sizes = read_header(path)[1]
    for name, mask in file.masks.items():
        nbytes = sizes[name].nbytes
        sparsity = 1 - int(mask.sum()) / mask.numel()
        along = "" if file.contracted[name] == -1 else f" along {file.contracted[name]}"
        yield TensorRow(name, tuple(mask.shape), "mask", nbytes, 8 * nbytes / mask.numel(), sparsity, f"{file.pattern}{along}")


def _npz(path: Path) -> Iterator[TensorRow]:
    try:
        for name, packed in npz_arrays(path):
            if packed.dtype != np.uint8:
                raise UsageError(f"{path}: {name} holds {packed.dtype}, not the packed bits (uint8) of a mask")
            mask = torch.from_numpy(np.unpackbits(packed))  # shapes are not stored: groups of the flat weight
            sparsity, pattern = describe(mask.view(1, -1))
            yield TensorRow(name, tuple(mask.shape), "mask", packed.nbytes, 1.0, sparsity, pattern)
    except MaskError as error:
        raise UsageError(str(error)) from error


def _gguf(path: Path) -> Iterator[TensorRow]:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise UsageError("reading a GGUF file needs the package gguf: pip install 'maskllm-compress[gguf]'")
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        entries = GGUFReader(path).tensors
    except (ValueError, IndexError, OSError) as error:
        raise UsageError(f"{path} is not a GGUF file, or it is truncated ({error})") from error
    for entry in entries:
        values = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        sparsity, pattern = describe(values)
        nbytes = int(entry.n_bytes)
        yield TensorRow(
            entry.name, tuple(values.shape), entry.tensor_type.name, nbytes, 8 * nbytes / values.numel(), sparsity, pattern
        )
