"""What the exports of a quantised model share: the parameters of a store, how the rest is copied, and the comparison at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import __version__
from compress.checkpoint import SIDECAR_NAME, Checkpoint, as_stored, read_json
from compress.errors import UsageError
from compress.export.card import Sizes
from compress.export.folder import write_shards
from compress.export.source import MatrixSource
from compress.quantize.grid import Quantized
from compress.quantize.store import QuantizedStore
from compress.verify import Report, Row, compare
from compress.weights import ParameterRef, by_parameter, find_weights
from maskllm.safefile import Entry

Progress = Callable[[int, int, str], None]  # parameters done, parameters in all, what is being done


def quantized_parameters(source: MatrixSource, store: QuantizedStore) -> list[ParameterRef]:
    """The parameters whose matrices a store holds, in the order of the model.

    Raises UsageError for a store without matrices, one of another model, and one that holds only a part of a parameter.
    """
    grids = store.grids()
    if not grids:
        raise UsageError(f"{store.folder} holds no quantised matrices; is the run finished?")
    refs = find_weights(source.model, list(grids))
    for ref in refs:
        grid = grids.get(ref.name)
        if grid is not None and grid[1:] != ref.shape:
            raise UsageError(f"{ref.name} is {list(ref.shape)} in {source.name}, but {list(grid[1:])} in {store.folder}")
    return by_parameter([ref for ref in refs if ref.name in grids])


def replaced_entries(source: MatrixSource, store: QuantizedStore) -> dict[str, tuple[int, list[Entry]]]:
    """The tensors in place of those that the store replaces, in the types of the source: for `MatrixSource.shards`."""
    known = dict(source.model.named_parameters())
    result = {}
    for name, value in store.replaced().items():
        if name not in known or known[name].shape != value.shape:
            raise UsageError(f"{store.folder} replaces {name} {list(value.shape)}, which {source.name} does not have")
        names = source.stored_names(name, -1)
        pieces = [value] if len(names) == 1 else list(as_stored(source.model, name, value).values())
        kind = source.dtype(name, -1)
        result[name] = (-1, [Entry.of(stored, piece.to(kind)) for stored, piece in zip(names, pieces, strict=True)])
    return result


def write_checkpoint(
    source: MatrixSource,
    folder: Path,
    quantized: Mapping[str, tuple[int, list[Entry]]],
    replaced: Mapping[str, tuple[int, list[Entry]]],
    quantization: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> tuple[list[Entry], int]:
    """Write shards, companions, config.json with its `quantization_config` and compress.json with `facts`.

    quantized, replaced: parameter -> contracted dimension and the entries in its place. Returns the entries that are not of
    `quantized`, and the bytes of all tensors.
    """
    shards = source.shards({**quantized, **replaced})
    write_shards(folder, shards)
    source.write_companions(folder)
    config = read_json(folder / "config.json") | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sidecar = {"tool": f"maskllm-compress {__version__}", "source": source.name, **facts}
    (folder / SIDECAR_NAME).write_text(json.dumps(sidecar, indent=1), encoding="utf-8")
    ours = {entry.name for _, entries in quantized.values() for entry in entries}
    entries = [entry for shard in shards for entry in shard]
    return [entry for entry in entries if entry.name not in ours], sum(entry.nbytes for entry in entries)


def matrix_row(name: str, found: Quantized, meant: Quantized) -> Row:
    """Compare the values that two quantised matrices stand for, bit for bit in float32."""
    return compare(name, found.dequantize(), meant.dequantize())


def copied_report(out: Path, checkpoint: Checkpoint, copied: Iterable[Entry]) -> Report:
    """Compare every tensor that is not quantised with what it should be."""
    report = Report(f"{out}: every other tensor is the source's or its replacement, bit for bit", None)
    report.rows = [compare(entry.name, checkpoint.read(entry.name), entry.make()) for entry in copied]
    return report


def sizes(store: QuantizedStore, source: MatrixSource, nbytes: int, whole_nbytes: int) -> Sizes:
    """The sizes of an export: nbytes of the quantised matrices, whole_nbytes of all tensors."""
    counts: Counter[int] = Counter()
    weights: Counter[int] = Counter()
    for grid, rows, columns in store.grids().values():
        counts[grid.bits] += 1
        weights[grid.bits] += rows * columns
    whole = sum(parameter.numel() for parameter in source.model.parameters())
    code_bits = sum(bits * count for bits, count in weights.items())
    widths = {bits: (count, weights[bits]) for bits, count in counts.items()}
    return Sizes(code_bits, sum(weights.values()), nbytes, whole, whole_nbytes, widths)


class Last:
    """Makes a group of tensors once and gives them one by one: the entries of a group are written in turn."""

    def __init__(self) -> None:
        self._key: object = None
        self._parts: dict[str, Tensor] = {}

    def entries(
        self, prefix: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], make: Callable[[], dict[str, Tensor]]
    ) -> list[Entry]:
        """The entries of one group: part -> dtype and shape, and what makes all parts."""
        return [
            Entry(prefix + part, dtype, shape, partial(self._part, prefix, part, make))
            for part, (dtype, shape) in tensors.items()
        ]

    def _part(self, key: str, part: str, make: Callable[[], dict[str, Tensor]]) -> Tensor:
        if self._key != key:
            self._key, self._parts = key, {}  # the group before is freed first
            self._parts = make()
        return self._parts[part]
