"""Small models with random 2:4 masks, and a decoder of the packed format that shares no code with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_configs
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.export.packed24 import PackedExport, export_packed
from compress.export.source import open_source
from compress.models import LoadedModel, load_model
from compress.weights import by_parameter, find_weights
from maskllm.patterns import Pattern
from maskllm.storage import MaskFile, load_masks, save_masks

P24 = Pattern(2, 4)


@dataclass
class Case:
    """A saved model, its mask file, and both as they are read."""

    source: Path
    mask: Path
    loaded: LoadedModel
    masks: MaskFile

    def pack(self, out: Path, **options: Any) -> PackedExport:
        return export_packed(open_source(str(self.source)), out, masks=self.masks, **options)

    def meant(self, name: str) -> Tensor:
        """A parameter with +0.0 where its mask drops."""
        value = self.loaded.model.get_parameter(name).detach()
        return torch.where(self.masks.masks[name], value, torch.zeros_like(value))


def make_case(folder: Path, architecture: str, seed: int = 1, **changes: Any) -> Case:
    """A tiny model of an architecture with a random mask over all its matrices."""
    tiny_configs.BUILDERS[architecture](**changes).save_pretrained(folder / "source")
    return case_of(folder / "source", folder / "mask.safetensors", seed)


def case_of(source: Path, mask: Path, seed: int = 1) -> Case:
    """A saved model with a random mask, written to `mask`."""
    loaded = load_model(str(source), tokenizer=False)
    generator = torch.Generator().manual_seed(seed)
    masks, dims = {}, {}
    for parameter in by_parameter(find_weights(loaded.model)):
        score = torch.rand(loaded.model.get_parameter(parameter.name).shape, generator=generator)
        dims[parameter.name] = parameter.contracted_dim
        masks[parameter.name] = (
            P24.best_of(score.movedim(dims[parameter.name], -1)).movedim(-1, dims[parameter.name]).contiguous()
        )
    save_masks(mask, masks, P24, dims, {"model": str(source)})
    return Case(source, mask, loaded, load_masks(mask))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from all its safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def decode(values: Tensor, meta: Tensor) -> Tensor:
    """Dense `[N, K]` of packed tensors, group by group as the format's description says it."""
    rows, half = values.shape
    dense = torch.zeros(rows, 2 * half, dtype=values.dtype)
    for row in range(rows):
        for group in range(half // 2):
            byte = int(meta[row, group // 2])
            code = byte >> 4 if group % 2 else byte & 15
            first, second = code & 3, code >> 2
            assert first < second
            dense[row, 4 * group + first] = values[row, 2 * group]
            dense[row, 4 * group + second] = values[row, 2 * group + 1]
    return dense
