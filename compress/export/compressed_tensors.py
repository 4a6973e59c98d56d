"""`--format compressed-tensors`: a checkpoint in the `pack-quantized` layout that vLLM and others read.

Every matrix is a linear layer of its own under the name that the source's files give it, experts one by one, with the tensors of
`compress.quantize.packing.to_compressed_tensors`. config.json groups the layers by width, group size and symmetry. Readers know one scheme
for all experts of a mixture, so mixed experts are an error, or, with `promote`, written at the width of the widest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint, as_stored
from compress.errors import CompressError, UsageError
from compress.export.card import Sizes, write_lowbit_card
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
from compress.quantize.grid import Grid, Quantized
from compress.quantize.packing import from_compressed_tensors, packed_bytes, to_compressed_tensors
from compress.quantize.store import QuantizedStore
from compress.structure import decoder_blocks, is_conv1d, is_linear, join, router_parameters
from compress.verify import Report
from compress.weights import ParameterRef, WeightRef, by_parameter, find_weights
from maskllm.safefile import Entry

QUANT_METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"


@dataclass
class CompressedTensorsExport:
    """What was written: reports of the verification, and the sizes. promoted: matrices written wider than they were quantised."""

    reports: list[Report]
    sizes: Sizes
    promoted: int


def export_compressed_tensors(
    source: MatrixSource,
    store: QuantizedStore,
    out: Path,
    *,
    promote: bool = False,
    recipe_text: str | None = None,
    metrics: list[dict[str, Any]] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompressedTensorsExport:
    """Write the quantised matrices of `store` and everything else of `source`, read it back and compare every tensor.

    promote: where the format cannot say what a matrix or the experts of a mixture are, `widen` them to what it can; the values stay the
    same bit for bit. Everything is written to `<out>.partial` and renamed when it has been verified. Raises UsageError for grids that
    the format does not know, experts of a mixture that differ (without `promote`), a source that stores its experts fused, scales that
    the source's type cannot hold, and an `out` in the way; VerificationError when the comparison fails.
    """
    say = progress or (lambda done, total, note: None)
    parameters = quantized_parameters(source, store)
    names = {name: module for parameter in parameters for name, module in _module_names(source, parameter).items()}
    grids = _containers(parameters, store, promote)
    last, refs = Last(), [ref for parameter in parameters for ref in parameter.refs]
    replaced = replaced_entries(source, store)

    def packed(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return to_compressed_tensors(_in_type(widen(store.read(name), grids[name]), dtype, name))

    quantized: dict[str, tuple[int, list[Entry]]] = {}
    for parameter in parameters:
        kind, entries = source.dtype(parameter.name, parameter.contracted_dim), []
        for ref in parameter.refs:
            prefix = f"{names[ref.name]}."
            shapes = _shapes(grids[ref.name], *ref.shape, kind)
            entries += last.entries(prefix, shapes, partial(packed, ref.name, kind))
        quantized[parameter.name] = (parameter.contracted_dim, entries)
    with output_folder(out, overwrite=overwrite, source=source.folder) as folder:
        facts = {"format": QUANT_METHOD, "promoted": promote, "packed": list(quantized)}
        config = _config(source, refs, names, grids)
        say(0, len(refs), "packing")
        copied, nbytes = write_checkpoint(source, folder, quantized, replaced, config, facts)
        checkpoint = Checkpoint(folder)
        report = Report(f"{out}: every quantised matrix is what was quantised, bit for bit", None)
        for done, ref in enumerate(refs):
            say(done, len(refs), "verifying")
            found = _read(checkpoint, names[ref.name], grids[ref.name])
            report.rows.append(matrix_row(ref.name, found, store.read(ref.name)))
        say(len(refs), len(refs), "verified")
        reports = [report, copied_report(out, checkpoint, copied)]
        for one in reports:
            one.raise_if_bad()
        ours = sum(entry.nbytes for _, entries in quantized.values() for entry in entries)
        promoted = sum(grids[name].bits != grid.bits for name, (grid, *_) in store.grids().items())
        result = CompressedTensorsExport(reports, sizes(store, source, ours, nbytes), promoted)
        loads = _loads(refs, grids)
        note = f" {promoted:,} of them are written in wider codes that stand for the same values." if promoted else ""
        write_lowbit_card(folder, source, result.sizes, QUANT_METHOD, loads, note=note, recipe_text=recipe_text, metrics=metrics)
    return result


def _loads(refs: list[WeightRef], grids: Mapping[str, Grid]) -> str:
    """Where this export loads. transformers 5.23 decodes the experts of all layers by one scheme, and says nothing when they have several.

    Tried with compressed-tensors 0.20, whose empty modules have zero points of the wrong shape where a scheme is asymmetric.
    """
    experts = {grids[ref.name] for ref in refs if ref.expert is not None}
    if len(experts) > 1:
        plain = "**no**: it decodes the experts of all layers by one scheme, so that others come out wrong without a word"
    elif any(grid.kind == "asymmetric" for grid in grids.values()):
        plain = "no (transformers 5.23, compressed-tensors 0.20): it raises an error for the zero points of asymmetric schemes"
    else:
        plain = "yes (transformers 5.23, compressed-tensors 0.20)"
    return f"""| software | loads | smaller in memory |
| --- | --- | --- |
| vLLM, on a GPU | by its documentation; not tried here | by its documentation; not tried here |
| transformers with the package compressed-tensors | {plain} | no: it dequantises at load |
| this tool | no; it runs `--format packed-moe` | no |
"""


def widen(matrix: Quantized, grid: Grid) -> Quantized:
    """The same values, bit for bit, on another grid: as many bits or more, groups that cut those of the matrix into whole parts.

    A symmetric code moves by the difference of the offsets, 2^(B-1) - 2^(b-1); an asymmetric one stays, with its zero. The levels of a
    midrise grid are odd multiples of s/2: codes 2c of scale s/2, one bit wider. Raises UsageError for a float grid, whose zeros
    are no integers, for a symmetric grid in place of an asymmetric one, and for too few bits; CompressError where s/2 is not a number of
    the scale's type.
    """
    old = matrix.grid
    if grid == old:
        return matrix
    codes, scale, zero = matrix.codes.short(), matrix.scale, matrix.zero
    if old.kind == "midrise":
        half = (scale.float() / 2).to(scale.dtype)
        if not torch.equal(half.float() * 2, scale.float()):
            raise CompressError(f"a scale is too small to be halved in {scale.dtype}, so its matrix cannot be promoted exactly")
        codes, scale, zero = 2 * codes, half, torch.full_like(codes[:, : scale.shape[1]], old.top)
    elif old.kind == "symmetric":
        zero = torch.full_like(codes[:, : scale.shape[1]], 1 << (old.bits - 1))
    if zero is None or old.kind == "float" or not grid.has_zero or _least_bits(old) > grid.bits:
        raise UsageError(f"{old.kind} codes of {old.bits} bits have no exact form as {grid.kind} codes of {grid.bits} bits")
    columns = codes.shape[1]
    if old.group_size % grid.group_size:
        raise UsageError(f"groups of {old.group_size} cannot be cut into groups of {grid.group_size}")
    member = torch.arange(grid.groups(columns)) * grid.group_size // old.group_size
    scale, zero = scale[:, member].contiguous(), zero[:, member].contiguous()
    if grid.kind == "asymmetric":
        return Quantized(codes.to(torch.uint8), scale, zero.to(torch.uint8), grid)
    offset = zero.unique()
    if old.kind == "asymmetric" or len(offset) != 1:
        raise UsageError("an asymmetric grid has no exact symmetric form")
    return Quantized((codes + (1 << (grid.bits - 1)) - offset).to(torch.uint8), scale, None, grid)


def _least_bits(grid: Grid) -> int:
    """Bits of the narrowest container: of a midrise grid one more, and two at least, which is what readers take."""
    return max(2, grid.bits + (grid.kind == "midrise"))


def _containers(parameters: Iterable[ParameterRef], store: QuantizedStore, promote: bool) -> dict[str, Grid]:
    """The grid that every matrix is written with. All matrices of a mixture get the same."""
    known = store.grids()
    mixtures: dict[str, list[WeightRef]] = {}
    for parameter in parameters:
        for ref in parameter.refs:
            mixtures.setdefault(_mixture(ref), []).append(ref)
    result = {}
    for mixture, refs in mixtures.items():
        found = {known[ref.name][0] for ref in refs}
        if any(grid.kind == "float" for grid in found):
            raise UsageError(
                f"{mixture} is on a float grid, whose zeros compressed-tensors cannot hold at any width; quantise with an asymmetric or "
                "symmetric grid, or use --format packed-moe"
            )
        grid = _widest(found, [ref.shape[1] for ref in refs]) if promote else _same(mixture, found, refs)
        result.update({ref.name: grid for ref in refs})
    return result


def _same(mixture: str, found: set[Grid], refs: list[WeightRef]) -> Grid:
    other = "use --promote, which writes the same values in wider codes, or --format packed-moe"
    if len(found) > 1:
        widths = ", ".join(sorted({f"{g.bits} bits ({g.kind}, groups of {g.group_size})" for g in found}))
        raise UsageError(
            f"{mixture} mixes {widths}, and readers of compressed-tensors take one scheme for all experts of a layer; {other}"
        )
    (grid,) = found
    if grid.kind == "midrise" or grid.bits < 2:
        raise UsageError(
            f"{mixture} has {grid.kind} codes of {grid.bits} bits; compressed-tensors starts at 2 bits with a zero; {other}"
        )
    for ref in refs:
        if ref.shape[1] % grid.group_size:
            raise UsageError(
                f"{ref.name}: compressed-tensors needs whole groups, and {grid.group_size} does not divide its {ref.shape[1]} inputs; {other}"
            )
    return grid


def _widest(found: set[Grid], columns: list[int]) -> Grid:
    """The narrowest grid that holds all of `found`."""
    bits = max(_least_bits(grid) for grid in found)
    if bits > 8:
        raise UsageError("midrise codes of 8 bits need 9 in compressed-tensors, which ends at 8; use --format packed-moe")
    dtypes = {grid.dtype for grid in found}
    if len(dtypes) > 1:
        raise UsageError("experts of one layer have scales in float16 and in bfloat16; compressed-tensors needs one type")
    kind = "asymmetric" if any(grid.kind == "asymmetric" for grid in found) else "symmetric"
    return Grid(bits, math.gcd(*(grid.group_size for grid in found), *columns), kind, dtypes.pop())  # type: ignore[arg-type]


def _mixture(ref: WeightRef) -> str:
    """What shares a scheme: the mixture of an expert, or the matrix alone."""
    if ref.expert is None:
        return ref.name
    listed = f".{ref.expert}."
    return (
        ref.module_name.rpartition(listed)[0] if listed in f"{ref.module_name}." and ref.parameter.dim() == 2 else ref.module_name
    )


def _module_names(source: MatrixSource, parameter: ParameterRef) -> dict[str, str]:
    """Matrix -> the name of its module in the source's files.

    Numbered rows of the parameter go the way that transformers takes when it saves it; the tensor in which a matrix's rows come out is its.
    """
    shape, dim = getattr(parameter.module, parameter.parameter_name).shape, parameter.contracted_dim
    if is_conv1d(parameter.module):
        raise UsageError(
            f"{parameter.name} lies in a {type(parameter.module).__name__}, and readers of compressed-tensors know linear layers only; "
            "use --format packed-moe"
        )
    single = list(shape)
    single[dim] = 1
    numbers = torch.arange(math.prod(single)).view(single)
    pieces = as_stored(source.model, parameter.name, numbers)
    stored = source.stored_names(parameter.name, dim)
    rows = {name: piece.flatten().tolist() for name, piece in zip(stored, pieces.values(), strict=False)}
    if len(stored) != len(pieces) or (len(parameter.refs) > 1 and len(stored) == 1):
        rows = {}
    result = {}
    for ref in parameter.refs:
        wanted = ref.slice_of(numbers).flatten().tolist()
        name = next((name for name, found in rows.items() if found == wanted), None)
        if name is None or not name.endswith(".weight"):
            raise UsageError(
                f"{source.name} stores {parameter.name} in one piece, and compressed-tensors takes one linear layer an expert; "
                "use --format packed-moe"
            )
        result[ref.name] = name.removesuffix(".weight")
    return result


def _shapes(grid: Grid, rows: int, columns: int, kind: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    words, groups = -(-packed_bytes(columns, grid.bits) // 4), grid.groups(columns)
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (rows, words)),
        "weight_scale": (_scale_type(grid, kind), (rows, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if grid.kind == "asymmetric":
        parts["weight_zero_point"] = (torch.int32, (-(-packed_bytes(rows, grid.bits) // 4), groups))
    return parts


def _scale_type(grid: Grid, kind: torch.dtype) -> torch.dtype:
    """Readers give scales the type of the model; float32 holds any scale, so those of such a model stay as they are."""
    return kind if kind in (torch.float16, torch.bfloat16) else grid.dtype


def _in_type(matrix: Quantized, kind: torch.dtype, name: str) -> Quantized:
    """The matrix with its scales in the type of the model. Raises UsageError when they are not the same numbers in it."""
    grid = matrix.grid
    wanted = _scale_type(grid, kind)
    if wanted == grid.dtype:
        return matrix
    scale = matrix.scale.to(wanted)
    if not torch.equal(scale.float(), matrix.scale.float()):
        raise UsageError(
            f"{name} has scales in {grid.dtype}, which readers would round to the {wanted} of the model; quantise with scales in {wanted}, "
            "or use --format packed-moe"
        )
    return Quantized(matrix.codes, scale, matrix.zero, Grid(grid.bits, grid.group_size, grid.kind, wanted))


def _read(checkpoint: Checkpoint, module: str, grid: Grid) -> Quantized:
    parts = {name: f"{module}.{name}" for name in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")}
    tensors = {part: checkpoint.read(name) for part, name in parts.items() if name in checkpoint.tensors}
    return from_compressed_tensors(tensors, grid.bits, grid.group_size)


def _config(source: MatrixSource, refs: list[WeightRef], names: Mapping[str, str], grids: Mapping[str, Grid]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    schemes: dict[tuple[int, int, str], list[str]] = {}
    # transformers takes the first group that says "experts", shared ones too, for the routed experts: theirs comes first.
    for ref in sorted(refs, key=lambda ref: ref.expert is None):
        grid = grids[ref.name]
        schemes.setdefault((grid.bits, grid.group_size, grid.kind), []).append(_pattern(source, names[ref.name], ref.expert))
    groups = {}
    for (bits, group_size, kind), found in schemes.items():
        groups[f"w{bits}_g{group_size}_{kind}"] = {
            "targets": _by_layer(found),
            "format": _FORMAT,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": kind == "symmetric",
                "strategy": "group",
                "group_size": group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": QUANT_METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": _by_layer(_ignored(source, refs)),
        "config_groups": groups,
    }


def _ignored(source: MatrixSource, refs: list[WeightRef]) -> list[str]:
    """Patterns of everything that readers might take for a quantised layer: other matrices, routers, the head."""
    model, quantized = source.model, {ref.full_name for ref in refs}
    found = []
    rest = {ref.name: ref for ref in find_weights(model) if ref.full_name not in quantized}
    for parameter in by_parameter(list(rest.values())):
        if len(parameter.refs) > 1:
            found += [_pattern(source, name, rest[ref].expert) for ref, name in _module_names(source, parameter).items()]
    for block in decoder_blocks(model):
        for name in router_parameters(model, block):
            found += [_pattern(source, stored.rpartition(".")[0]) for stored in source.stored_names(name, -1)]
    for name, module in model.named_modules():
        if (is_linear(module) or is_conv1d(module)) and join(name, "weight") not in quantized:
            found.append(_pattern(source, name))
    return found


def _pattern(source: MatrixSource, module: str, expert: int | None = None) -> str:
    """A module's name as a regular expression, without the prefix that checkpoints of a base model lack."""
    name = module.removeprefix(f"{source.model.base_model_prefix}.")
    if expert is not None:
        before, _, after = name.rpartition(f".{expert}.")
        return rf"{re.escape(before)}\.\d+\.{re.escape(after)}"
    return re.escape(name)


def _by_layer(patterns: Iterable[str]) -> list[str]:
    """Patterns that differ in their first number alone as one."""
    layers: dict[tuple[str, str], dict[str, None]] = {}
    for pattern in patterns:
        split = re.match(r"(.*?\\\.)(\d+)(\\\..*)", pattern)
        before, number, after = split.groups() if split else (pattern, "", "")
        layers.setdefault((before, after), {})[number] = None
    result = []
    for (before, after), numbers in layers.items():
        plain = before.replace("\\", "")
        if not after and re.fullmatch(r"\w+", plain):
            result.append(plain)  # lm_head
        else:
            among = "|".join(numbers)
            result.append(rf"re:(.*\.)?{before}{f'({among})' if len(numbers) > 1 else among}{after}$")
    return result
