"""Small quantised models: a store of rounded matrices whose widths, groups and kinds differ from matrix to matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_configs
import torch

from compress.export.packed_moe import PackedMoeExport, export_packed_moe
from compress.export.source import open_source
from compress.models import LoadedModel, load_model
from compress.quantize.gptq import rtn
from compress.quantize.grid import Grid, Kind, Quantized
from compress.quantize.store import QuantizedStore, put_into
from compress.weights import WeightRef, find_weights

KINDS: tuple[Kind, ...] = ("float", "asymmetric", "symmetric", "midrise")


@dataclass
class Case:
    """A saved model and its store; `dense` is the model with the values that the store stands for."""

    source: Path
    store: QuantizedStore
    original: LoadedModel
    dense: LoadedModel

    def pack(self, out: Path, **options: Any) -> PackedMoeExport:
        return export_packed_moe(open_source(str(self.source)), self.store, out, **options)


def mixed(number: int, ref: WeightRef) -> Grid:
    """1 to 8 bits, all kinds, groups that do not divide the inputs, both types of scales."""
    kind = KINDS[number % 4] if number % 9 else "midrise"
    bits = 1 + number % 8
    return Grid(
        bits if bits > 1 or kind != "symmetric" else 2,
        (8, 10, 128)[number % 3],
        kind,
        (torch.float16, torch.bfloat16)[number % 2],
    )


def make_case(folder: Path, architecture: str, grid: Callable[[int, WeightRef], Grid] = mixed, **changes: Any) -> Case:
    """A tiny model of an architecture, all its matrices rounded; `grid` gives that of the i-th."""
    dtype = changes.pop("dtype", torch.float32)
    tiny_configs.BUILDERS[architecture](**changes).to(dtype).save_pretrained(folder / "source")
    original = load_model(str(folder / "source"), tokenizer=False)
    store = QuantizedStore(folder / "quantized")
    layers: dict[int, dict[str, Quantized]] = {}
    for number, ref in enumerate(find_weights(original.model)):
        layers.setdefault(ref.layer or 0, {})[ref.name] = rtn(ref.view().float(), grid(number, ref))
    for layer, matrices in layers.items():
        store.write(layer, matrices)
    dense = load_model(str(folder / "source"), tokenizer=False)
    put_into(dense.model, store)
    return Case(folder / "source", store, original, dense)
