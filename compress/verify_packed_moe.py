"""Prove that a packed-moe checkpoint is whole: every matrix is there in the sizes that config.json says, and stands for finite numbers."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from compress.errors import CompressError, UsageError
from compress.packed_moe import PackedMoeCheckpoint
from compress.verify import Report, Row


def verify_packed_moe(folder: Path, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Report:
    """Read every quantised matrix that the globs select (on its name or that of its parameter).

    Scales and zeros must be finite, and so must be the weights. Raises UsageError for a folder that is not packed-moe or not whole, and
    when nothing is selected.
    """
    checkpoint = PackedMoeCheckpoint(folder)
    report = Report(f"{folder} holds every quantised matrix that its config.json lists, in finite numbers", None)
    for parameter in checkpoint.parameters:
        for name, slab, place in parameter.matrices():
            if not _matches((name, parameter.name), include) or _matches((name, parameter.name), exclude):
                continue
            shape, note = (slab.rows, slab.columns), ""
            try:
                weights = checkpoint.read(slab, place).dequantize()
                note = "" if bool(weights.isfinite().all()) else "stands for weights that are not finite"
            except CompressError as error:
                note = str(error)
            report.rows.append(Row(name, shape, note=note, wrong=bool(note)))
    if not report.rows:
        raise UsageError(f"{folder}: no matrix to check; include {list(include)} and exclude {list(exclude)} leave none")
    return report


def _matches(names: Sequence[str], globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, glob) for name in names for glob in globs)
