"""The packed-moe format: what a checkpoint of low-bit matrices calls its tensors, their shapes and types, and what config.json says.

Every matrix `[N, K]` has a grid of its own (`compress.quantize.grid`: 1 to 8 bits, group size, kind, type of its scales) and lies in

- `codes` uint8 `[N, ceil(K * bits / 8)]`: dense bits (`compress.quantize.packing`);
- `scale` float16 or bfloat16 `[N, G]`, G groups a row;
- `zero`, of an asymmetric grid uint8 `[N, ceil(G * bits / 8)]`, dense bits like the codes; of a float grid `[N, G]` like the scales.

The weight of module `M` lies in `M.weight_codes`, `M.weight_scale`, `M.weight_zero`. The experts of a mixture lie in slabs: of each role
(gate_proj, up_proj, down_proj) all experts of grid number g, in the order of their indices, in `<mixture>.<role>_g<g>_codes [n, N, bytes]`,
`_scale`, `_zero`. So an expert's place in its slab is the number of experts before it that have the same grid. All other tensors keep the
names and bytes that they have in the source. config.json lists the grids and, by parameter, the number of the grid of every matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.checkpoint import Checkpoint, TensorInfo, as_stored, read_json
from compress.errors import CompressError, UsageError
from compress.packed import quant_method
from compress.quantize.grid import Grid, Quantized
from compress.quantize.packing import pack, packed_bytes, unpack
from compress.structure import join
from maskllm.safefile import DTYPE_NAMES, DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "compress-packed-moe"
VERSION = 1
PARTS = ("codes", "scale", "zero")


@dataclass(frozen=True, eq=False)
class LowBitMatrix:
    """One packed matrix `[N, columns]`; the tensors are those of the format."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid
    columns: int

    @classmethod
    def of(cls, matrix: Quantized) -> LowBitMatrix:
        """Pack a quantised matrix."""
        grid, zero = matrix.grid, matrix.zero
        if zero is not None:
            zero = pack(zero, grid.bits) if grid.kind == "asymmetric" else zero.contiguous()
        return cls(pack(matrix.codes, grid.bits), matrix.scale.contiguous(), zero, grid, matrix.codes.shape[1])

    def unpacked(self) -> Quantized:
        """The inverse of `of`."""
        zero = self.zero
        if zero is not None and self.grid.kind == "asymmetric":
            zero = unpack(zero, self.grid.bits, self.grid.groups(self.columns))
        return Quantized(unpack(self.codes, self.grid.bits, self.columns), self.scale, zero, self.grid)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[N, columns]`, computed in float32 and rounded once to `dtype`."""
        return self.unpacked().dequantize(dtype)


@dataclass(frozen=True)
class Slab:
    """Matrices of one grid, one after the other: `experts` says whose, None for the weight of a linear layer."""

    prefix: str  # what stands before "codes", "scale" and "zero" in the names of its tensors
    grid: Grid
    experts: tuple[int, ...] | None
    rows: int
    columns: int

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Part -> dtype and shape, in the order of `PARTS`."""
        lead = (self.rows,) if self.experts is None else (len(self.experts), self.rows)
        grid, groups = self.grid, self.grid.groups(self.columns)
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (*lead, packed_bytes(self.columns, grid.bits))),
            "scale": (grid.dtype, (*lead, groups)),
        }
        if grid.kind == "asymmetric":
            parts["zero"] = (torch.uint8, (*lead, packed_bytes(groups, grid.bits)))
        elif grid.kind == "float":
            parts["zero"] = (grid.dtype, (*lead, groups))
        return parts

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.tensors.values())

    def matrix(self, parts: Mapping[str, Tensor]) -> LowBitMatrix:
        """One matrix of the slab from its parts."""
        return LowBitMatrix(parts["codes"], parts["scale"], parts.get("zero"), self.grid, self.columns)


@dataclass(frozen=True)
class LowBitParameter:
    """One parameter of which every matrix is packed. `shape` and `contracted_dim` (-1 or -2) are those of `name` in the dense model.

    roles: the matrices of one expert in the order of `compress.weights`, with the number in `grids` of each expert's grid; of a
    linear layer the name of its parameter and one number.
    """

    name: str
    shape: tuple[int, ...]
    contracted_dim: int
    roles: Mapping[str, tuple[int, ...]]
    grids: tuple[Grid, ...]

    @property
    def module_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(N, K)` of one expert's slice, all roles together."""
        out, contracted = self.shape[-2:] if self.contracted_dim == -1 else self.shape[:-3:-1]
        return out, contracted

    @cached_property
    def slabs(self) -> dict[str, list[Slab]]:
        """The slabs of every role, by number of the grid."""
        out, columns = self.matrix_shape
        rows = out // len(self.roles)
        result: dict[str, list[Slab]] = {}
        for role, numbers in self.roles.items():
            if len(self.shape) == 2:
                result[role] = [Slab(f"{self.name}_", self.grids[numbers[0]], None, rows, columns)]
                continue
            members: dict[int, list[int]] = {}
            for expert, number in enumerate(numbers):
                members.setdefault(number, []).append(expert)
            result[role] = [
                Slab(join(self.module_name, f"{role}_g{number}_"), self.grids[number], tuple(members[number]), rows, columns)
                for number in sorted(members)
            ]
        return result

    def matrices(self) -> Iterator[tuple[str, Slab, int]]:
        """Name (that of its `WeightRef`), slab and place in it of every matrix, slab by slab."""
        for role, slabs in self.slabs.items():
            for slab in slabs:
                if slab.experts is None:
                    yield self.name, slab, 0
                for place, expert in enumerate(slab.experts or ()):
                    yield f"{self.module_name}.{expert}.{role}", slab, place

    @property
    def weights(self) -> int:
        """Weights of the dense parameter."""
        return prod(self.shape)

    @property
    def code_bits(self) -> int:
        """Bits of all codes, without scales, zeros and padding."""
        return sum(slab.rows * slab.columns * slab.grid.bits for _, slab, _ in self.matrices())

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(slab.nbytes for slabs in self.slabs.values() for slab in slabs)


def to_config(parameters: Sequence[LowBitParameter]) -> dict[str, Any]:
    """The `quantization_config` of config.json. All parameters share one table of grids."""
    entries = {}
    for p in parameters:
        same = {role: numbers[0] if len(set(numbers)) == 1 else list(numbers) for role, numbers in p.roles.items()}
        entries[p.name] = {"shape": list(p.shape), "contracted_dim": p.contracted_dim, "grids": same}
    table = [
        {"bits": g.bits, "group_size": g.group_size, "kind": g.kind, "scales": DTYPE_NAMES[g.dtype]} for g in parameters[0].grids
    ]
    return {"quant_method": QUANT_METHOD, "version": VERSION, "grids": table, "parameters": entries}


def from_config(config: Mapping[str, Any], where: str) -> list[LowBitParameter]:
    """The inverse of `to_config`. `where` names the checkpoint in errors.

    Raises UsageError for another format or version, and for a description that contradicts itself.
    """
    if config.get("quant_method") != QUANT_METHOD:
        raise UsageError(f"{where} is quantised by {config.get('quant_method')!r}, which is not packed-moe ({QUANT_METHOD!r})")
    if config.get("version") != VERSION:
        raise UsageError(
            f"{where} is packed-moe of version {config.get('version')!r}; this release reads version {VERSION}, so update the tool"
        )
    try:
        grids = tuple(Grid(g["bits"], g["group_size"], g["kind"], DTYPES[g["scales"]]) for g in config["grids"])
        parameters = [_parameter(name, entry, grids) for name, entry in config["parameters"].items()]
    except UsageError as error:
        raise UsageError(f"{where}: its quantization_config is wrong: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{where}: its quantization_config cannot be read ({error!r})") from error
    if not parameters:
        raise UsageError(f"{where}: its quantization_config lists no parameters")
    return parameters


def _parameter(name: str, entry: Mapping[str, Any], grids: tuple[Grid, ...]) -> LowBitParameter:
    shape, dim = tuple(int(n) for n in entry["shape"]), int(entry["contracted_dim"])
    if len(shape) not in (2, 3) or dim not in (-1, -2) or min(shape) < 1:
        raise UsageError(f"{name} of shape {list(shape)} has no matrices along {dim}")
    count = shape[0] if len(shape) == 3 else 1
    roles = {}
    for role, numbers in entry["grids"].items():
        roles[role] = (numbers,) * count if isinstance(numbers, int) else tuple(int(n) for n in numbers)
        if len(roles[role]) != count or not all(0 <= n < len(grids) for n in roles[role]):
            raise UsageError(
                f"{name}: {role} has {count} matrices, and the table {len(grids)} grids, which its numbers do not fit"
            )
    expected = ["gate_proj", "up_proj"] if len(shape) == 3 and name.endswith(".gate_up_proj") else [name.rpartition(".")[2]]
    parameter = LowBitParameter(name, shape, dim, {role: roles[role] for role in expected if role in roles}, grids)
    if list(roles) != expected or parameter.matrix_shape[0] % len(expected):
        raise UsageError(f"{name} of shape {list(shape)} has the matrices {', '.join(expected)}, not {', '.join(roles)}")
    return parameter


def is_packed_moe(folder: Path) -> bool:
    """Whether the config.json of a folder says that the checkpoint is packed-moe, of any version; one that cannot be read does not."""
    return quant_method(folder) == QUANT_METHOD


def find_tensors(
    parameters: Iterable[LowBitParameter], tensors: Mapping[str, TensorInfo], model: Callable[[], PreTrainedModel], where: str
) -> dict[str, str]:
    """Find all packed tensors among those of a checkpoint: name by the format -> name in the checkpoint.

    `model` gives the model (on the meta device will do), which knows under which other names transformers may have saved them. Raises
    UsageError for one that is missing, or has another shape or type than config.json says.
    """
    found = {}
    for parameter in parameters:
        for slab in (slab for slabs in parameter.slabs.values() for slab in slabs):
            for part, (dtype, shape) in slab.tensors.items():
                own = name = slab.prefix + part
                if name not in tensors:
                    name = next(iter(as_stored(model(), name, torch.empty(shape, dtype=dtype, device="meta"))))
                if name not in tensors:
                    raise UsageError(f"{where}: {own}, a part of the packed {parameter.name}, is missing")
                info = tensors[name]
                if info.shape != shape or info.dtype != DTYPE_NAMES[dtype]:
                    raise UsageError(
                        f"{where}: {name} is {info.dtype} {list(info.shape)}; "
                        f"config.json makes it {DTYPE_NAMES[dtype]} {list(shape)}; the checkpoint contradicts itself"
                    )
                found[own] = name
    return found


class PackedMoeCheckpoint:
    """A packed-moe folder on disk, one matrix in memory at a time.

    Raises UsageError when the folder is not packed-moe, lacks tensors, or has some that do not fit its config.json.
    """

    def __init__(self, folder: Path) -> None:
        from compress.models import meta_model

        self.folder = folder
        quantization = read_json(folder / "config.json").get("quantization_config")
        self.parameters = from_config(quantization if isinstance(quantization, dict) else {}, str(folder))
        self.checkpoint = Checkpoint(folder)
        self._names = find_tensors(self.parameters, self.checkpoint.tensors, cache(lambda: meta_model(str(folder))), str(folder))

    @cached_property
    def plain(self) -> list[TensorInfo]:
        """The tensors that are not packed."""
        packed = set(self._names.values())
        return [info for name, info in self.checkpoint.tensors.items() if name not in packed]

    def read(self, slab: Slab, place: int) -> LowBitMatrix:
        """One matrix of a slab. Raises CompressError when its scales or zeros are not finite."""
        parts = {}
        for part in slab.tensors:
            name = self._names[slab.prefix + part]
            with safe_open(self.checkpoint.tensors[name].file, framework="pt") as file:
                parts[part] = file.get_tensor(name) if slab.experts is None else file.get_slice(name)[place]
        check_finite(slab, parts, str(self.folder))
        return slab.matrix(parts)


def check_finite(slab: Slab, parts: Mapping[str, Tensor], where: str) -> None:
    """Raise CompressError when scales or zeros of a slab, or of a part of it, are NaN or infinite."""
    for part in ("scale", "zero"):
        if part in parts and parts[part].is_floating_point() and not bool(parts[part].isfinite().all()):
            raise CompressError(
                f"{where}: {slab.prefix}{part} holds values that are not finite; the file is damaged, so export or download it again"
            )
