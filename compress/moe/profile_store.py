"""What was measured of a model's experts, a file a layer.

    layer-00003.safetensors   frequency, weight, peak [E], residual [1], squared and (where measured) fisher [E, C], and of single
                              matrices squared_<role>, fisher_<role> [E, C]; C candidates. The metadata holds candidates (bits, group size),
                              roles and shapes, and the fingerprint of model, text and quantiser

A layer's file appears whole or not at all, so a profile that was interrupted goes on with the first layer that has none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from compress.errors import CompressError, UsageError
from maskllm.safefile import Entry, write_safetensors

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LayerProfile:
    """Of the mixture of one layer, E experts and C candidates.

    frequency `[E]`: tokens an expert got. weight `[E]`: sum of its routing probabilities before the top k are renormalised; None where
    they are out of sight. peak `[E]`: largest magnitude in its output. residual: Frobenius norm of the block's output over all tokens,
    the scale that errors of different layers are put on. squared `[E, C]`: squared Frobenius norm of the block output's change when the
    expert alone is quantised; fisher `[E, C]`: the same weighted by squared gradients of the loss, None where not measured.
    by_role: the same two for a single matrix quantised. shapes: `[out, in]` of each matrix.
    """

    layer: int
    frequency: Floats
    weight: Floats | None
    peak: Floats
    residual: float
    squared: Floats
    fisher: Floats | None
    by_role: dict[str, tuple[Floats, Floats | None]]
    shapes: dict[str, tuple[int, int]]
    candidates: tuple[tuple[int, int], ...]

    @property
    def experts(self) -> int:
        return len(self.frequency)


class ProfileStore:
    """The folder of one profile. identity: what all its layers must share, such as fingerprints of model and text."""

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder, self.identity = folder, identity

    def file(self, layer: int) -> Path:
        """Where a layer lies, there or not."""
        return self.folder / f"layer-{layer:05d}.safetensors"

    def has(self, layer: int) -> bool:
        """Whether a layer is done. Raises UsageError for one of another model, text or quantiser, naming the difference."""
        if not self.file(layer).is_file():
            return False
        found = self._description(layer)["identity"]
        different = sorted(key for key in self.identity if found.get(key) != self.identity[key])
        if different:
            raise UsageError(
                f"{self.file(layer)} was measured with another {', '.join(different)}; profile into another folder, or delete this one"
            )
        return True

    def write(self, profile: LayerProfile) -> None:
        """Keep a layer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Floats] = {
            "frequency": profile.frequency,
            "peak": profile.peak,
            "squared": profile.squared,
            "residual": np.array([profile.residual]),
        }
        optional = {"weight": profile.weight, "fisher": profile.fisher}
        for role, (squared, fisher) in profile.by_role.items():
            arrays[f"squared_{role}"] = squared
            optional[f"fisher_{role}"] = fisher
        arrays |= {name: value for name, value in optional.items() if value is not None}
        description = {"candidates": profile.candidates, "shapes": profile.shapes, "identity": self.identity}
        entries = [
            Entry.of(name, torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64))) for name, value in arrays.items()
        ]
        write_safetensors(self.file(profile.layer), entries, {"profile": json.dumps(description)})

    def read(self, layer: int) -> LayerProfile:
        """One layer. Raises CompressError when its file is damaged."""
        description = self._description(layer)
        with safe_open(self.file(layer), "np") as stored:
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        shapes = {role: (shape[0], shape[1]) for role, shape in description["shapes"].items()}
        return LayerProfile(
            layer,
            arrays["frequency"],
            arrays.get("weight"),
            arrays["peak"],
            float(arrays["residual"][0]),
            arrays["squared"],
            arrays.get("fisher"),
            {role: (arrays[f"squared_{role}"], arrays.get(f"fisher_{role}")) for role in shapes},
            shapes,
            tuple((bits, group) for bits, group in description["candidates"]),
        )

    def layers(self) -> list[int]:
        """Layers that are done, ascending."""
        return sorted(int(file.stem.removeprefix("layer-")) for file in self.folder.glob("layer-*.safetensors"))

    def _description(self, layer: int) -> dict[str, Any]:
        try:
            with safe_open(self.file(layer), "np") as stored:
                return json.loads(stored.metadata()["profile"])
        except Exception as error:
            raise CompressError(f"{self.file(layer)} is damaged ({error}); delete it and resume the run") from error
