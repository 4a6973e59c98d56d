"""An output folder that appears under its name only when it is complete, and the shards in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compress.checkpoint import INDEX_NAME, SIDECAR_NAME
from compress.errors import UsageError
from maskllm.safefile import Entry, sync_folder, write_safetensors


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


def write_shards(folder: Path, shards: Sequence[Sequence[Entry]]) -> None:
    """Write the tensors of a checkpoint, one in memory at a time, and the index of the shards when they are several."""
    places: dict[str, str] = {}
    for number, entries in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, entries, {"format": "pt"})
        places.update({entry.name: file for entry in entries})
    if len(shards) > 1:
        total = sum(entry.nbytes for entries in shards for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
