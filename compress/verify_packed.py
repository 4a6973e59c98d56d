"""Prove that a packed checkpoint is what it claims to be: legal 2:4 codes, and its mask times the original in the type of its values."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.packed import PackedCheckpoint, PackedMatrix, experts_of
from compress.verify import Report, Row, compare, masked, nonzeros
from compress_kernels.sparse24 import Packed24, unpack
from maskllm.patterns import Pattern
from maskllm.storage import MaskFile

if TYPE_CHECKING:
    from compress.models import LoadedModel

P24 = Pattern(2, 4)
_CHUNK = 1 << 24  # weights compared at once


def verify_packed(
    folder: Path,
    pattern: Pattern | None = None,
    *,
    masks: MaskFile | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Report:
    """Check the codes of every packed parameter that the globs select and, with `masks`, that it is zero wherever its mask drops.

    Raises UsageError for a folder that is not packed or not whole, a pattern other than 2:4, and when nothing is selected.
    """
    if pattern is not None and pattern != P24:
        raise UsageError(f"{folder} is packed, so its pattern is 2:4; whether it is {pattern} too, `compress inspect` shows")
    checkpoint = PackedCheckpoint(folder)
    known = {matrix.name: matrix for matrix in checkpoint.matrices}
    report = Report(f"{folder} is packed 2:4" + (", as the mask file says" if masks is not None else ""), str(P24))
    names = list(known if masks is None else dict.fromkeys([*masks.masks, *known]))
    chosen = [name for name in names if _matches(name, include) and not _matches(name, exclude)]
    if not chosen:
        raise UsageError(f"{folder}: no matrix to check; include {list(include)} and exclude {list(exclude)} leave none")
    for name in chosen:
        if name not in known or (masks is not None and name not in masks.masks):
            report.rows.append(Row(name, (), note="is not " + ("in the mask file" if name in known else "packed"), wrong=True))
        else:
            report.rows.append(_check(checkpoint, known[name], masks.masks[name] if masks is not None else None))
    return report


def _check(checkpoint: PackedCheckpoint, matrix: PackedMatrix, mask: Tensor | None) -> Row:
    shape, dim = matrix.shape, matrix.contracted_dim
    try:
        dense = checkpoint.dense(matrix)
    except CompressError as error:
        return Row(matrix.name, shape, dim, note=str(error), wrong=True)
    kept = 0
    if mask is not None:
        if tuple(mask.shape) != shape:
            return Row(matrix.name, shape, dim, note=f"its mask has shape {list(mask.shape)}", wrong=True)
        kept = int((nonzeros(dense) & ~mask).sum())
    return Row(matrix.name, shape, dim, matrix.weights // 4, differing=kept, note="not zero where the mask drops" if kept else "")


def verify_packed_against(folder: Path, masks: Mapping[str, Tensor], original: LoadedModel) -> Report:
    """Compare every packed parameter with mask * original (`compare_packed`), int8 tables with the original's (`compare_int8`), and all others as the
    model loads them, bit for bit."""
    from compress.models import load_model

    model = original.model
    expected = model.state_dict()
    if unknown := sorted(masks.keys() - expected.keys()):
        raise UsageError(f"the mask set has {unknown[0]}, which the model {original.source} does not have")
    checkpoint = PackedCheckpoint(folder)
    report = Report(f"{folder} is the mask times {original.source}, in the type of its values", str(P24))
    packed = {matrix.name for matrix in checkpoint.matrices}
    parts = {matrix.prefix + part for matrix in checkpoint.matrices for part in matrix.tensors}
    parts |= {table.prefix + part for table in checkpoint.tables for part in table.tensors}
    for matrix in checkpoint.matrices:
        name, dim = matrix.name, matrix.contracted_dim
        if name not in expected or tuple(expected[name].shape) != matrix.shape or name not in masks:
            note = "has no mask" if name in expected else "is not in the original"
            report.rows.append(Row(name, matrix.shape, note=note, wrong=True))
            continue
        meant = masked(expected[name], masks[name])
        meant = (meant if dim == -1 else meant.mT).reshape(-1, *matrix.matrix_shape[-2:])
        try:
            pairs = zip(experts_of(matrix, checkpoint.read(matrix)), meant, strict=True)
            report.rows += [compare_packed(one, found, dense) for (one, found), dense in pairs]
        except CompressError as error:
            report.rows.append(Row(name, matrix.shape, dim, note=str(error), wrong=True))
            return report  # what is damaged cannot be loaded
    rounded: set[int] = set()  # addresses: a head that is tied to its embedding is there under two names
    for table in checkpoint.tables:
        if table.name not in expected or tuple(expected[table.name].shape) != table.shape:
            report.rows.append(Row(table.name, table.shape, note="is not in the original", wrong=True))
            continue
        found = checkpoint.stored(table)
        report.rows.append(compare_int8(table.name, found["values"], found["scale"], expected[table.name]))
        rounded.add(expected[table.name].data_ptr())
    packed |= {name for name, value in expected.items() if value.data_ptr() in rounded}
    dtype = str(model.dtype).removeprefix("torch.")
    actual = load_model(str(folder), dtype=dtype, tokenizer=False).model.state_dict()
    for name in sorted((actual.keys() - parts) ^ (expected.keys() - packed)):
        report.rows.append(Row(name, (), note="is in only one of the two models", wrong=True))
    report.rows += [
        compare(name, actual[name], expected[name], masks.get(name)) for name in sorted(actual.keys() & expected.keys())
    ]
    return report


def compare_packed(name: str, packed: Packed24, meant: Tensor) -> Row:
    """Compare one packed matrix with the dense one that it should stand for, `[out, in]` of any floating type.

    bf16, fp16, fp32: equal bits after rounding to that type; the sign of a zero is not stored and does not count. int8: the scale is that
    of the row's largest weight, max|w| / 127, zeros are zeros, and every weight is off by half a step at most.
    """
    found = unpack(packed)
    if packed.scale is None:
        return compare(name, _unsigned_zeros(found), _unsigned_zeros(meant.to(packed.values.dtype)))
    return compare_int8(name, found, packed.scale, meant)


def compare_int8(name: str, values: Tensor, scale: Tensor, meant: Tensor) -> Row:
    """Compare a matrix that was rounded to int8, with scales `[N]` of its rows, with the dense one that it should stand for (see `compare_packed`).

    values: `[N, K]`, int8, or floating-point and times the scale already.
    """
    shape, differing, furthest = tuple(values.shape), 0, 0.0
    step = max(1, _CHUNK // max(shape[1], 1))
    for first in range(0, shape[0], step):
        part = slice(first, first + step)
        expected, found, scales = meant[part].float(), values[part], scale[part]
        if not torch.equal(expected.abs().amax(1) / 127, scales):
            return Row(name, shape, note="its scales are not max|w| / 127 of its rows", wrong=True)
        off = ((found if found.is_floating_point() else found.float() * scales[:, None]) - expected).abs()
        wrong = (off > 0.50001 * scales[:, None]) | ((expected == 0) & (found != 0))
        if bool(wrong.any()):
            differing, furthest = differing + int(wrong.sum()), max(furthest, float(off[wrong].max()))
    return Row(name, shape, differing=differing, max_difference=furthest)


def _unsigned_zeros(tensor: Tensor) -> Tensor:
    return torch.where(tensor == 0, torch.zeros((), dtype=tensor.dtype), tensor)


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, glob) for glob in globs)
