"""`--format packed-moe`: a checkpoint whose matrices hold codes of 1 to 8 bits, every matrix its own, for this tool's runtime.

`compress.packed_moe` describes the format. Source and store are read and written tensor by tensor, so that memory holds the largest
slab of experts packed and one matrix of it, whatever the size of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.export.card import LOADS_PACKED_MOE, Sizes, write_lowbit_card
from compress.export.folder import output_folder
from compress.export.lowbit import (
    Last,
    Progress,
    copied_report,
    matrix_row,
    quantized_parameters,
    replaced_entries,
    sizes,
    write_checkpoint,
)
from compress.export.source import MatrixSource
from compress.packed_moe import QUANT_METHOD, LowBitMatrix, LowBitParameter, PackedMoeCheckpoint, Slab, to_config
from compress.quantize.grid import Grid
from compress.quantize.store import QuantizedStore
from compress.runtime_experts import check_packable
from compress.verify import Report
from compress.weights import ParameterRef


@dataclass
class PackedMoeExport:
    """What was written: reports of the verification, the packed parameters, and the sizes."""

    reports: list[Report]
    parameters: list[LowBitParameter]
    sizes: Sizes


def export_packed_moe(
    source: MatrixSource,
    store: QuantizedStore,
    out: Path,
    *,
    recipe_text: str | None = None,
    metrics: list[dict[str, Any]] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackedMoeExport:
    """Write the quantised matrices of `store` and everything else of `source`, read it back and compare every tensor.

    recipe_text, metrics (rows of summary.json): for the model card. Everything is written to `<out>.partial` and renamed when it has been
    verified. Raises UsageError for a store that does not fit the source, for matrices that no runtime can run packed, and an `out`
    in the way; VerificationError when the comparison fails.
    """
    say = progress or (lambda done, total, note: None)
    parameters = describe(quantized_parameters(source, store), store)
    for parameter in parameters:
        check_packable(source.model, parameter.name, parameter.shape)
    replaced = replaced_entries(source, store)
    last, done = Last(), iter(range(len(parameters)))

    def packed(slab: Slab, names: list[str], first: bool) -> dict[str, Tensor]:
        if first:
            say(next(done), len(parameters), "packing")
        return _pack(slab, names, store)

    quantized = {}
    for parameter in parameters:
        members: dict[str, tuple[Slab, list[str]]] = {}
        for name, slab, _ in parameter.matrices():
            members.setdefault(slab.prefix, (slab, []))[1].append(name)
        entries = []
        for number, (prefix, (slab, names)) in enumerate(members.items()):
            entries += last.entries(prefix, slab.tensors, partial(packed, slab, names, number == 0))
        quantized[parameter.name] = (parameter.contracted_dim, entries)
    with output_folder(out, overwrite=overwrite, source=source.folder) as folder:
        facts = {"format": "packed-moe", "quant_method": QUANT_METHOD, "packed": [p.name for p in parameters]}
        copied, nbytes = write_checkpoint(source, folder, quantized, replaced, to_config(parameters), facts)
        written = PackedMoeCheckpoint(folder)
        report = Report(f"{out}: every quantised matrix is what was quantised, bit for bit", None)
        for number, parameter in enumerate(written.parameters):
            say(number, len(parameters), "verifying")
            for name, slab, place in parameter.matrices():
                report.rows.append(matrix_row(name, written.read(slab, place).unpacked(), store.read(name)))
        say(len(parameters), len(parameters), "verified")
        reports = [report, copied_report(out, written.checkpoint, copied)]
        for one in reports:
            one.raise_if_bad()
        result = PackedMoeExport(reports, parameters, sizes(store, source, sum(p.nbytes for p in parameters), nbytes))
        write_lowbit_card(folder, source, result.sizes, "packed-moe", LOADS_PACKED_MOE, recipe_text=recipe_text, metrics=metrics)
    return result


def describe(parameters: list[ParameterRef], store: QuantizedStore) -> list[LowBitParameter]:
    """The packed form of parameters, their grids in one table by bits, group size, kind and type."""
    grids = store.grids()
    used = {grids[ref.name][0] for parameter in parameters for ref in parameter.refs}
    table = tuple(sorted(used, key=_order))
    number = {grid: index for index, grid in enumerate(table)}
    result = []
    for parameter in parameters:
        roles: dict[str, list[int]] = {}
        fused = getattr(parameter.module, parameter.parameter_name).dim() == 3
        for ref in parameter.refs:  # expert by expert
            roles.setdefault(ref.role if fused else parameter.parameter_name, []).append(number[grids[ref.name][0]])
        shape = tuple(getattr(parameter.module, parameter.parameter_name).shape)
        numbers = {role: tuple(found) for role, found in roles.items()}
        result.append(LowBitParameter(parameter.name, shape, parameter.contracted_dim, numbers, table))
    return result


def _order(grid: Grid) -> tuple[int, int, str, str]:
    return grid.bits, grid.group_size, grid.kind, str(grid.dtype)


def _pack(slab: Slab, names: list[str], store: QuantizedStore) -> dict[str, Tensor]:
    """The parts of a slab: matrices are read and packed one by one."""
    result = {part: torch.empty(shape, dtype=dtype) for part, (dtype, shape) in slab.tensors.items()}
    for place, name in enumerate(names):
        matrix = LowBitMatrix.of(store.read(name))
        for part, tensor in result.items():
            (tensor if slab.experts is None else tensor[place]).copy_(getattr(matrix, part))
    return result
