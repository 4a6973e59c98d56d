"""Hidden states of many micro-batches, in memory or in a scratch file: what work on one block at a time keeps between blocks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from compress.errors import CompressError

Where = Literal["memory", "disk"]


class Activations(Sequence[Tensor]):
    """`count` tensors of one shape and dtype on the CPU, each of which can be replaced.

    With a `file` they lie in it, mapped into memory, and the system keeps in memory what there is room for. The file has its
    whole size from the start. Its content means something only to the process that wrote it: a run that continues computes
    its activations again.
    """

    def __init__(self, count: int, shape: Sequence[int], dtype: torch.dtype, file: Path | None = None) -> None:
        size = torch.Size((count, *shape))
        if file is None:
            self._data = torch.empty(size, dtype=dtype)
            return
        try:
            with file.open("wb") as handle:
                if hasattr(os, "posix_fallocate"):
                    # Writing to a mapped file that has no room yet ends the process by a signal when the disk is full.
                    os.posix_fallocate(handle.fileno(), 0, size.numel() * dtype.itemsize)
                else:
                    handle.truncate(size.numel() * dtype.itemsize)
        except OSError as error:
            raise CompressError(
                f"no room for {size.numel() * dtype.itemsize / 2**30:.2f} GiB of activations at {file}: {error.strerror}; "
                "take fewer or shorter sequences, or keep them in memory"
            ) from error
        self._data = torch.from_file(str(file), shared=True, size=size.numel(), dtype=dtype).view(size)

    def __len__(self) -> int:
        return len(self._data)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        """Views: writing to them alters what is kept."""
        return self._data[index]

    def __setitem__(self, index: int, value: Tensor) -> None:
        """Copy a tensor of the kept shape into its place, from any device. Raises CompressError for another shape."""
        if value.shape != self._data.shape[1:]:
            raise CompressError(f"hidden states of shape {list(value.shape)} came where {list(self._data.shape[1:])} were kept")
        self._data[index].copy_(value)


@contextmanager
def scratch_folder(path: Path, where: Where) -> Iterator[Path | None]:
    """An empty folder for scratch files, removed afterwards whatever happens (a killed run's is removed by the next); None for `memory`."""
    shutil.rmtree(path, ignore_errors=True)
    if where == "memory":
        yield None
        return
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
