"""An output folder that appears under its name only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.checkpoint import SIDECAR_NAME
from compress.errors import UsageError
from maskllm.safefile import sync_folder


@contextmanager
def output_folder(out: Path, *, overwrite: bool, source: Path | None) -> Iterator[Path]:
    """Yield `<out>.partial` to write into; it becomes `out` when the block ends well, and is removed when it does not.

    Raises UsageError when `out` is there and not empty, unless `overwrite` and it is an earlier export (it has a
    compress.json), or when it is the source itself.
    """
    out = Path(os.path.abspath(out))
    partial, previous = out.with_name(out.name + ".partial"), out.with_name(out.name + ".partial-replaced")
    if previous.is_dir() and not out.exists():  # a run was killed between the two renames below: the earlier export stands
        previous.rename(out)
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"{out} is the source model; choose another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; an export needs a folder")
    occupied = out.is_dir() and any(out.iterdir())
    if occupied and not overwrite:
        raise UsageError(f"{out} exists and is not empty; choose another folder, or overwrite it with --overwrite")
    if occupied and not (out / SIDECAR_NAME).is_file():
        raise UsageError(
            f"{out} is not an earlier export (it has no {SIDECAR_NAME}), so it is not overwritten; empty it yourself"
        )
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    shutil.rmtree(previous, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if occupied:
            out.rename(previous)
        elif out.exists():
            out.rmdir()
        partial.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
