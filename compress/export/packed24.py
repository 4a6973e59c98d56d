"""`--format packed-24`: a checkpoint whose 2:4 matrices hold two values and a 4-bit code for every four weights.

`compress.packed` describes the format. The source is read, packed and written tensor by tensor, so that memory holds the largest
parameter packed and one matrix of it, whatever the size of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import __version__
from compress.checkpoint import SIDECAR_NAME, read_json
from compress.errors import UsageError
from compress.export.card import write_packed_card
from compress.export.folder import output_folder, write_shards
from compress.export.source import MatrixSource
from compress.packed import QUANT_METHOD, VALUE_DTYPES, Int8Table, PackedCheckpoint, PackedMatrix, experts_of, to_config
from compress.runtime_experts import check_packable
from compress.runtime_tables import find_tables
from compress.verify import Report, compare, masked, nonzeros
from compress.verify_packed import compare_int8, compare_packed
from compress.weights import by_parameter, find_weights
from compress_kernels.sparse24 import pack
from compress_kernels.sparse24.packing import to_int8
from maskllm.patterns import Pattern
from maskllm.safefile import Entry
from maskllm.storage import MaskFile, mask_digest

P24 = Pattern(2, 4)
_CHUNK = 1 << 24  # weights of a table rounded at once
Progress = Callable[[int, int, str], None]  # parameters done, parameters in all, what is being done


@dataclass
class PackedExport:
    """What was written: reports of the verification, the packed parameters, how many of their weights are zero, and what was rounded to int8."""

    reports: list[Report]
    matrices: list[PackedMatrix] = field(default_factory=list)
    zeros: int = 0
    tables: list[Int8Table] = field(default_factory=list)


def export_packed(
    source: MatrixSource,
    out: Path,
    *,
    masks: MaskFile | None = None,
    values: str = "auto",
    activations: str = "float",
    embedding: str = "dense",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    recipe_text: str | None = None,
    metrics: list[dict[str, Any]] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackedExport:
    """Write mask * source packed, read it back and compare every tensor with what was meant.

    masks: which weights to keep, all of a 2:4 mask file; without them the zeros of the source say it: then the matrices that its
    compress.json lists, else all that `include` and `exclude` select, must be 2:4 already. values: "bf16", "fp16", "fp32" or "int8" (one
    scale a row); "auto" keeps the type of the source. activations: "int8" (with int8 values) rounds each token to int8 before products.
    embedding: "int8" rounds the token embedding and the output head, one scale a row; "dense" copies them.
    Everything is written to `<out>.partial` and renamed when it has been verified. Raises UsageError for a pattern that is not 2:4, a
    matrix with more than two non-zeros in a group, weights that the values' type cannot hold, masks that do not fit, and an `out` in the
    way; VerificationError when the comparison fails.
    """
    if masks is not None and masks.pattern != P24:
        raise UsageError(f"packed-24 holds 2:4 masks, and this mask is {masks.pattern}; use --format dense")
    if masks is not None and (include or exclude):
        raise UsageError("the mask file says which matrices to pack; include and exclude go with a source without one")
    contracted = _checked(source, masks) if masks is not None else _selected(source, include, exclude)
    values = _values(source, contracted) if values == "auto" else values
    if values not in VALUE_DTYPES:
        raise UsageError(f"values {values!r} are not known; one of auto, {', '.join(VALUE_DTYPES)}")
    if activations == "int8" and values != "int8":
        raise UsageError(f"int8 activations go with int8 values, not with {values}")
    matrices = []
    for name, dim in contracted.items():
        matrix = PackedMatrix(name, tuple(source.model.get_parameter(name).shape), dim, values)
        if matrix.matrix_shape[-1] % 4:
            raise UsageError(
                f"{name}: its contracted dimension is {matrix.matrix_shape[-1]}, which 4 does not divide; exclude it"
            )
        check_packable(source.model, matrix.name, matrix.shape)
        matrices.append(matrix)
    if embedding not in ("dense", "int8"):
        raise UsageError(f"embedding {embedding!r} is not known; one of dense, int8")
    tables = find_tables(source.model) if embedding == "int8" else []
    if both := {table.name for table in tables} & contracted.keys():
        raise UsageError(f"{both.pop()} is to be packed 2:4, so it cannot be rounded as a table too; leave it out of one of them")
    with output_folder(out, overwrite=overwrite, source=source.folder) as folder:
        packer = _Packer(source, masks, progress)
        copied = _write(source, packer, matrices, tables, folder)
        source.write_companions(folder)
        config = read_json(folder / "config.json") | {"quantization_config": to_config(matrices, values, activations, tables)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _sidecar(source, masks, matrices, tables, folder)
        result = _verify(packer, matrices, tables, copied, folder, out)
        for report in result.reports:
            report.raise_if_bad()
        write_packed_card(folder, source, result, values, activations, recipe_text=recipe_text, metrics=metrics)
    return result


def _checked(source: MatrixSource, masks: MaskFile) -> dict[str, int]:
    """Contracted dimensions of the masked parameters, which must be there."""
    parameters = dict(source.model.named_parameters())
    for name, shape in masks.shapes.items():
        if name not in parameters or tuple(parameters[name].shape) != shape:
            raise UsageError(f"the mask of {name} {list(shape)} does not belong to {source.name}")
    return dict(masks.contracted)


def _selected(source: MatrixSource, include: Sequence[str], exclude: Sequence[str]) -> dict[str, int]:
    """Contracted dimensions of the parameters that should be 2:4 already."""
    refs = find_weights(source.model, include or ("*",), exclude)
    found = {parameter.name: parameter.contracted_dim for parameter in by_parameter(refs)}
    sidecar = source.folder / SIDECAR_NAME if source.folder else None
    if include or exclude or sidecar is None or not sidecar.is_file():
        return found
    listed = {row["name"] for row in read_json(sidecar).get("matrices", ())}
    return {name: dim for name, dim in found.items() if listed.issuperset(source.stored_names(name, dim))} or found


def _values(source: MatrixSource, contracted: dict[str, int]) -> str:
    kinds = {source.dtype(name, dim) for name, dim in contracted.items()}
    names = [name for name, dtype in VALUE_DTYPES.items() if {dtype} == kinds]
    if not names:
        stored = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise UsageError(
            f"the matrices of {source.name} are stored as {stored}; choose the type to pack: --values bf16, fp16, fp32 or int8"
        )
    return names[0]


class _Packer:
    """Makes the packed parts of parameters, and says what they should be. The last parameter is kept: its parts are asked for in turn."""

    def __init__(self, source: MatrixSource, masks: MaskFile | None, progress: Progress | None) -> None:
        self.source, self.masks = source, masks
        self._progress = progress or (lambda done, total, note: None)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def say(self, done: int, total: int, note: str) -> None:
        self._progress(done, total, note)

    def part(self, matrix: PackedMatrix, part: str) -> Tensor:
        """One of the tensors of `PackedMatrix.tensors`."""
        if self._last[0] != matrix.name:
            self._last = ("", {})
            self._last = (matrix.name, self._packed(matrix))
        return self._last[1][part]

    def _packed(self, matrix: PackedMatrix) -> dict[str, Tensor]:
        result = {part: torch.empty(shape, dtype=dtype) for part, (dtype, shape) in matrix.tensors.items()}
        for index, expert in enumerate(self.experts(matrix)):
            try:
                packed = pack(expert, VALUE_DTYPES[matrix.values])
            except ValueError as error:
                which = f"{matrix.name}, expert {index}" if len(matrix.shape) == 3 else matrix.name
                advice = "; leave it dense with --exclude, or give the mask with --mask" if "2:4" in str(error) else ""
                raise UsageError(f"{which}: {error}{advice}") from error
            for part, tensor in result.items():
                (tensor[index] if len(matrix.shape) == 3 else tensor).copy_(getattr(packed, part))
        return result

    def table_part(self, table: Int8Table, part: str) -> Tensor:
        """One of the tensors of `Int8Table.tensors`."""
        if self._last[0] != table.name:
            self._last = ("", {})
            result = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in table.tensors.items()}
            weight, step = self.table(table), max(1, _CHUNK // table.shape[1])
            for first in range(0, len(weight), step):
                rows = slice(first, first + step)
                try:
                    result["values"][rows], result["scale"][rows] = to_int8(weight[rows], first)
                except ValueError as error:
                    raise UsageError(f"{table.name}: {error}; leave it with --embedding dense") from error
            self._last = (table.name, result)
        return self._last[1][part]

    def table(self, table: Int8Table) -> Tensor:
        """The dense embedding or head `[V, H]`."""
        return self.source.matrix(table.name, -1)

    def experts(self, matrix: PackedMatrix) -> Iterator[Tensor]:
        """The matrices of a parameter as they should be, one by one: `[out, in]` in the type of the source."""
        mask = self.masks.masks[matrix.name] if self.masks is not None else None
        for index in range(matrix.shape[0] if len(matrix.shape) == 3 else 1):
            weight = self.source.matrix(matrix.name, matrix.contracted_dim, index)
            if mask is not None:
                kept = mask[index] if mask.dim() == 3 else mask
                weight = masked(weight, kept if matrix.contracted_dim == -1 else kept.T)
            yield weight


def _write(
    source: MatrixSource, packer: _Packer, matrices: list[PackedMatrix], tables: list[Int8Table], folder: Path
) -> list[Entry]:
    """Write all shards, and their index when they are several; return the entries of the tensors that are copied as they are."""
    done = 0

    def make(matrix: PackedMatrix, part: str) -> Tensor:
        nonlocal done
        if part == "values":
            packer.say(done, len(matrices), "packing")
            done += 1
        return packer.part(matrix, part)

    packed = {
        matrix.name: (
            matrix.contracted_dim,
            [
                Entry(matrix.prefix + part, dtype, shape, partial(make, matrix, part))
                for part, (dtype, shape) in matrix.tensors.items()
            ],
        )
        for matrix in matrices
    }
    for table in tables:
        parts = table.tensors.items()
        packed[table.name] = (
            -1,
            [Entry(table.prefix + part, dtype, shape, partial(packer.table_part, table, part)) for part, (dtype, shape) in parts],
        )
    shards = source.shards(packed)
    write_shards(folder, shards)
    ours = {entry.name for _, entries in packed.values() for entry in entries}
    return [entry for entries in shards for entry in entries if entry.name not in ours]


def _sidecar(
    source: MatrixSource, masks: MaskFile | None, matrices: list[PackedMatrix], tables: list[Int8Table], folder: Path
) -> None:
    facts = {
        "tool": f"maskllm-compress {__version__}",
        "format": "packed-24",
        "quant_method": QUANT_METHOD,
        "source": source.name,
        "pattern": str(P24),
        "mask_sha256": mask_digest(masks.masks) if masks is not None else None,
        "packed": [matrix.name for matrix in matrices],
        "int8_tables": [table.name for table in tables],
    }
    (folder / SIDECAR_NAME).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _verify(
    packer: _Packer, matrices: list[PackedMatrix], tables: list[Int8Table], copied: list[Entry], folder: Path, out: Path
) -> PackedExport:
    """Read everything back and compare it with the source again."""
    written = PackedCheckpoint(folder)
    values = matrices[0].values
    equal = "is the masked source rounded to int8" if values == "int8" else f"equals the masked source in {values}, bit for bit"
    report = Report(f"{out}: every packed matrix is 2:4 and {equal}", str(P24))
    result = PackedExport([report], matrices, tables=tables)
    for done, matrix in enumerate(matrices):
        packer.say(done, len(matrices), "verifying")
        for (name, packed), meant in zip(experts_of(matrix, written.read(matrix)), packer.experts(matrix), strict=True):
            report.rows.append(compare_packed(name, packed, meant))
            result.zeros += meant.numel() - int(nonzeros(meant).sum())
    packer.say(len(matrices), len(matrices), "verified")
    if tables:
        report = Report(f"{out}: embedding and head are the source's rounded to int8", None)
        for table in tables:
            parts = written.stored(table)
            report.rows.append(compare_int8(table.name, parts["values"], parts["scale"], packer.table(table)))
        result.reports.append(report)
    if copied:
        report = Report(f"{out}: every other tensor equals the source's, bit for bit", None)
        report.rows = [compare(entry.name, written.checkpoint.read(entry.name), entry.make()) for entry in copied]
        result.reports.append(report)
    return result
