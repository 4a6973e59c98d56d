"""The packed-24 format: what a packed checkpoint calls its tensors, their shapes and types, and what config.json says of them.

Of every group of four weights along the inputs two are stored, and a 4-bit code says which two. For a matrix `[N, K]`:

- `values [N, K/2]` in bfloat16, float16, float32 or int8; with int8 also `scale`, float32 `[N]`: a weight is value * scale of its row;
- `meta` uint8 `[N, ceil(K/8)]`: code `i | j << 2` of a group that keeps the weights i < j, two groups a byte, the low nibble first.

The weight of module `M` lies in `M.values`, `M.meta`, `M.scale`. A fused parameter `P` of experts lies in `P_values [E, N, K/2]`,
`P_meta`, `P_scale`, expert after expert, each as `[out, in]` even where the model stores it transposed.

A model's token embedding, and its output head where that is not tied to it, may be rounded instead: a table `[V, H]` is then `values` int8
`[V, H]` and `scale` float32 `[V]`, a weight being value * scale of its row. All other tensors keep the names that they have in the dense
checkpoint. config.json lists the packed parameters and the tables under `quantization_config`; with tables it is of version 2, which releases
before them do not read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint, TensorInfo, as_stored, read_json
from compress.errors import CompressError, UsageError
from compress_kernels.sparse24.packing import Packed24, check, unpack
from maskllm.safefile import DTYPE_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "compress-packed-24"
VERSIONS = (1, 2)  # without tables, and with
VALUE_DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
}
# "float": products of the activations as they are. "int8": each token is rounded to int8 first (int8 values only).
ACTIVATIONS = ("float", "int8")


class _Stored(ABC):
    """A parameter that lies in the checkpoint as other tensors than its own."""

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Part -> dtype and shape."""

    @property
    def weights(self) -> int:
        """Weights of the dense parameter."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.tensors.values())


@dataclass(frozen=True)
class PackedMatrix(_Stored):
    """One packed parameter. `shape` and `contracted_dim` (-1 or -2) are those of the dense parameter `name` in the model."""

    name: str
    shape: tuple[int, ...]
    contracted_dim: int
    values: str  # a key of VALUE_DTYPES

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`(N, K)`, or `(E, N, K)` for fused experts."""
        *experts, a, b = self.shape
        return (*experts, a, b) if self.contracted_dim == -1 else (*experts, b, a)

    @property
    def prefix(self) -> str:
        """What stands before `values`, `meta` and `scale` in the names of the tensors."""
        module, _, parameter = self.name.rpartition(".")
        return f"{module}." if parameter == "weight" else f"{self.name}_"

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Part ("values", "meta", "scale") -> dtype and shape, in the order of `Packed24`."""
        *lead, k = self.matrix_shape
        parts = {"values": (VALUE_DTYPES[self.values], (*lead, k // 2)), "meta": (torch.uint8, (*lead, -(-k // 8)))}
        return parts | ({"scale": (torch.float32, tuple(lead))} if self.values == "int8" else {})


@dataclass(frozen=True)
class Int8Table(_Stored):
    """The token embedding or output head `name` of a model, `shape` `(V, H)`, rounded to int8 with one scale a row."""

    name: str
    shape: tuple[int, ...]

    @property
    def prefix(self) -> str:
        """What stands before `values` and `scale` in the names of the tensors."""
        return self.name.removesuffix("weight")

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Part ("values", "scale") -> dtype and shape."""
        return {"values": (torch.int8, self.shape), "scale": (torch.float32, self.shape[:1])}


def to_config(
    matrices: Iterable[PackedMatrix], values: str, activations: str, tables: Sequence[Int8Table] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json. activations: one of `ACTIVATIONS`, what products are computed with."""
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSIONS[bool(tables)],
        "pattern": "2:4",
        "values": values,
        "activations": activations,
        "matrices": {m.name: {"shape": list(m.shape), "contracted_dim": m.contracted_dim} for m in matrices},
    } | ({"int8_tables": {t.name: {"shape": list(t.shape)} for t in tables}} if tables else {})


def from_config(config: Mapping[str, Any], where: str) -> list[PackedMatrix]:
    """The packed parameters of a `quantization_config` (`tables_from_config` gives the rest). `where` names the checkpoint in errors.

    Raises UsageError for another format or version, and for a description that contradicts itself.
    """
    if config.get("quant_method") != QUANT_METHOD:
        raise UsageError(f"{where} is quantised by {config.get('quant_method')!r}, which is not packed-24 ({QUANT_METHOD!r})")
    if config.get("version") not in VERSIONS:
        raise UsageError(
            f"{where} is packed-24 of version {config.get('version')!r}; this release reads versions up to {VERSIONS[-1]}, so update the tool"
        )
    if config.get("values") not in VALUE_DTYPES or config.get("pattern") != "2:4":
        raise UsageError(
            f"{where}: its quantization_config says pattern {config.get('pattern')!r} and values {config.get('values')!r}; "
            f"packed-24 has pattern '2:4' and values of {', '.join(VALUE_DTYPES)}"
        )
    activations = config.get("activations")
    if activations not in ACTIVATIONS or (activations == "int8" and config["values"] != "int8"):
        raise UsageError(f"{where}: activations {activations!r} do not go with {config['values']} values")
    matrices = []
    try:
        for name, entry in config["matrices"].items():
            shape = tuple(int(n) for n in entry["shape"])
            matrix = PackedMatrix(name, shape, int(entry["contracted_dim"]), config["values"])
            if len(shape) not in (2, 3) or matrix.contracted_dim not in (-1, -2) or matrix.matrix_shape[-1] % 4:
                raise UsageError(f"{where}: {name} of shape {list(shape)} cannot be packed along {matrix.contracted_dim}")
            matrices.append(matrix)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{where}: the matrices in its quantization_config cannot be read ({error!r})") from error
    if not matrices:
        raise UsageError(f"{where}: its quantization_config lists no matrices")
    return matrices


def tables_from_config(config: Mapping[str, Any], where: str) -> list[Int8Table]:
    """The int8 tables of a `quantization_config` that `from_config` has read. Raises UsageError for a description that contradicts itself."""
    try:
        tables = [Int8Table(name, tuple(int(n) for n in entry["shape"])) for name, entry in config.get("int8_tables", {}).items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{where}: the int8 tables in its quantization_config cannot be read ({error!r})") from error
    for table in tables:
        if len(table.shape) != 2 or not table.name.endswith(".weight"):
            raise UsageError(f"{where}: {table.name} of shape {list(table.shape)} is no embedding and no output head")
    return tables


def quant_method(folder: Path) -> str | None:
    """What quantised the checkpoint in a folder, as its config.json says; None where it says nothing or cannot be read."""
    try:
        quantization = read_json(folder / "config.json").get("quantization_config")
    except UsageError:
        return None
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def is_packed(folder: Path) -> bool:
    """Whether the config.json of a folder says that the checkpoint is packed-24, of any version; one that cannot be read does not."""
    return quant_method(folder) == QUANT_METHOD


def find_tensors(
    matrices: Iterable[PackedMatrix | Int8Table],
    tensors: Mapping[str, TensorInfo],
    model: Callable[[], PreTrainedModel],
    where: str,
) -> dict[str, dict[str, str]]:
    """Find the tensors of every packed parameter and table among those of a checkpoint: parameter -> part -> name in the checkpoint.

    `model` gives the model (on the meta device will do), which knows under which other names transformers may have saved them. Raises
    UsageError for one that is missing, or has another shape or type than config.json says.
    """
    found: dict[str, dict[str, str]] = {}
    for matrix in matrices:
        found[matrix.name] = {}
        for part, (dtype, shape) in matrix.tensors.items():
            name = matrix.prefix + part
            if name not in tensors:
                name = next(iter(as_stored(model(), name, torch.empty(shape, dtype=dtype, device="meta"))))
            if name not in tensors:
                raise UsageError(f"{where}: {matrix.prefix}{part}, a part of the packed {matrix.name}, is missing")
            info = tensors[name]
            if info.shape != shape or info.dtype != DTYPE_NAMES[dtype]:
                raise UsageError(
                    f"{where}: {name} is {info.dtype} {list(info.shape)}; "
                    f"config.json makes it {DTYPE_NAMES[dtype]} {list(shape)}; the checkpoint contradicts itself"
                )
            found[matrix.name][part] = name
    return found


class PackedCheckpoint:
    """A packed folder on disk, one packed parameter in memory at a time.

    Raises UsageError when the folder is not packed-24, lacks tensors, or has some that do not fit its config.json.
    """

    def __init__(self, folder: Path) -> None:
        from compress.models import meta_model

        self.folder = folder
        quantization = read_json(folder / "config.json").get("quantization_config")
        self.config: dict[str, Any] = quantization if isinstance(quantization, dict) else {}
        self.matrices = from_config(self.config, str(folder))
        self.tables = tables_from_config(self.config, str(folder))
        self.checkpoint = Checkpoint(folder)
        skeleton = cache(lambda: meta_model(str(folder)))
        self._names = find_tensors([*self.matrices, *self.tables], self.checkpoint.tensors, skeleton, str(folder))

    @cached_property
    def plain(self) -> list[TensorInfo]:
        """The tensors that are neither packed nor tables."""
        packed = {name for parts in self._names.values() for name in parts.values()}
        return [info for name, info in self.checkpoint.tensors.items() if name not in packed]

    def read(self, matrix: PackedMatrix) -> dict[str, Tensor]:
        """Its parts ("values", "meta", perhaps "scale"). Raises CompressError when a code in its metadata is illegal."""
        parts = self.stored(matrix)
        check_codes(parts, matrix, str(self.folder))
        return parts

    def stored(self, parameter: Int8Table | PackedMatrix) -> dict[str, Tensor]:
        """Its parts as they are stored."""
        return {part: self.checkpoint.read(name) for part, name in self._names[parameter.name].items()}

    def dense(self, matrix: PackedMatrix) -> Tensor:
        """The dense parameter of `matrix.shape`, in the type of the values (int8: float32)."""
        dense = unpack(flat(self.read(matrix))).view(matrix.matrix_shape)
        return dense if matrix.contracted_dim == -1 else dense.mT.contiguous()


def flat(parts: Mapping[str, Tensor]) -> Packed24:
    """Parts as one packed matrix, of fused experts as `[E * N, K]`: every row is packed for itself."""
    values, meta, scale = parts["values"], parts["meta"], parts.get("scale")
    return Packed24(values.flatten(0, -2), meta.flatten(0, -2), None if scale is None else scale.flatten())


def experts_of(matrix: PackedMatrix, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Packed24]]:
    """The single matrices of a packed parameter with names for messages: itself, or each of its experts."""
    if len(matrix.shape) == 2:
        yield matrix.name, flat(parts)
    else:
        for index in range(matrix.shape[0]):
            yield f"{matrix.name}[{index}]", flat({name: part[index] for name, part in parts.items()})


def check_codes(parts: Mapping[str, Tensor], matrix: PackedMatrix, where: str) -> None:
    """Raise CompressError when the metadata holds a code that is none of the six pairs i < j."""
    try:
        check(flat(parts))
    except ValueError as error:
        raise CompressError(f"{where}: {matrix.name}: {error}; the file is damaged, so export or download it again") from error
