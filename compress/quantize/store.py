"""A quantised model between quantising and exporting: codes of every matrix on disk, a file a layer.

    layer-00003.safetensors   `<matrix>|codes` (packed dense bits), `<matrix>|scale`, `<matrix>|zero` where its grid stores one; the
                              metadata says of every matrix its grid and shape
    replaced.safetensors      parameters that take other values in the export without being quantised (tuned routers), by name

Matrices are named as `compress.weights.find_weights` names them. A layer's file appears whole or not at all, so a run that was killed
goes on with the first layer that has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.errors import CompressError
from compress.quantize.grid import Grid, Quantized
from compress.quantize.packing import pack, unpack
from maskllm.safefile import DTYPE_NAMES, DTYPES, Entry, write_safetensors

_REPLACED = "replaced.safetensors"


class QuantizedStore:
    """The folder of one quantised model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, layer: int) -> Path:
        """Where the matrices of a layer lie, there or not."""
        return self.folder / f"layer-{layer:05d}.safetensors"

    def write(self, layer: int, matrices: Mapping[str, Quantized], facts: Mapping[str, Any] | None = None) -> None:
        """Write all quantised matrices of a layer at once. facts: JSON values to keep beside them (`facts`)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entries, grids = [], {}
        for name, matrix in matrices.items():
            entries.append(Entry.of(f"{name}|codes", pack(matrix.codes, matrix.grid.bits)))
            entries.append(Entry.of(f"{name}|scale", matrix.scale.contiguous()))
            if matrix.zero is not None:
                entries.append(Entry.of(f"{name}|zero", matrix.zero.contiguous()))
            grid = matrix.grid
            grids[name] = [grid.bits, grid.group_size, grid.kind, DTYPE_NAMES[grid.dtype], *matrix.codes.shape]
        write_safetensors(self.file(layer), entries, {"grids": json.dumps(grids), "facts": json.dumps(dict(facts or {}))})
        self.__dict__.pop("_matrices", None)

    def facts(self, layer: int) -> dict[str, Any]:
        """What `write` was given beside the matrices of a layer."""
        return json.loads(_metadata(self.file(layer))["facts"])

    @cached_property
    def _matrices(self) -> dict[str, tuple[Path, Grid, int, int]]:
        """Matrix -> its file, grid, rows and columns."""
        found = {}
        for file in sorted(self.folder.glob("layer-*.safetensors")):
            for name, (bits, group, kind, dtype, rows, columns) in json.loads(_metadata(file)["grids"]).items():
                found[name] = (file, Grid(bits, group, kind, DTYPES[dtype]), rows, columns)
        return found

    def grids(self) -> dict[str, tuple[Grid, int, int]]:
        """Every matrix, in order of layers, with its grid, rows and columns; reads headers alone."""
        return {name: (grid, rows, columns) for name, (_, grid, rows, columns) in self._matrices.items()}

    def read(self, name: str) -> Quantized:
        """One matrix. Raises CompressError when the store does not have it, or its file is damaged."""
        if name not in self._matrices:
            raise CompressError(f"{self.folder} holds no matrix {name}")
        file, grid, _, columns = self._matrices[name]
        with safe_open(file, "pt") as stored:
            codes = unpack(stored.get_tensor(f"{name}|codes"), grid.bits, columns)
            zero = stored.get_tensor(f"{name}|zero") if grid.zero_bits else None
            return Quantized(codes, stored.get_tensor(f"{name}|scale"), zero, grid)

    def read_layer(self, layer: int) -> Iterator[tuple[str, Quantized]]:
        """All matrices of a layer, one after the other."""
        for name, (file, *_) in self._matrices.items():
            if file == self.file(layer):
                yield name, self.read(name)

    def write_replaced(self, values: Mapping[str, Tensor]) -> None:
        """Keep new values of parameters that are not quantised, by their names in the model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(
            self.folder / _REPLACED, [Entry.of(name, value.detach().cpu().contiguous()) for name, value in values.items()], {}
        )

    def replaced(self) -> dict[str, Tensor]:
        """What `write_replaced` kept; empty when it was not called."""
        file = self.folder / _REPLACED
        if not file.is_file():
            return {}
        with safe_open(file, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as stored:
            found = stored.metadata()
    except Exception as error:
        raise CompressError(f"{file} is damaged: {error}; delete it and resume the run") from error
    if not found or not {"grids", "facts"} <= found.keys():
        raise CompressError(f"{file} is no part of a quantised model")
    return found


@torch.no_grad()
def put_into(model: torch.nn.Module, store: QuantizedStore) -> None:
    """Give a model the values that a store stands for: dequantised matrices, rounded to the parameters' type, and replaced parameters.

    Raises UsageError when the model has no such matrix.
    """
    from compress.weights import find_weights

    names = store.grids()
    wanted = {ref.name: ref for ref in find_weights(model, list(names))}
    for name in names:
        ref = wanted[name]
        ref.view().copy_(store.read(name).dequantize(ref.parameter.dtype))
    for name, value in store.replaced().items():
        model.get_parameter(name).copy_(value)
