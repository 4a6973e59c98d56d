"""Mask files as a user hands them in: read them for a model, compare two of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from maskllm.patterns import Pattern
from maskllm.storage import MaskFile, difference, load_masks, load_npz

if TYPE_CHECKING:
    from torch import Tensor

    from compress.weights import ParameterRef


@dataclass(frozen=True)
class MatrixDifference:
    """Groups of one parameter that differ between two masks. `layer` is the first number in its name, None without one."""

    name: str
    layer: int | None
    kind: str
    differing: int
    groups: int

    @property
    def share(self) -> float:
        return self.differing / self.groups


@dataclass(frozen=True)
class MaskDifference:
    """What differs between two mask files, parameter by parameter, in the order of layers."""

    pattern: str
    matrices: list[MatrixDifference]

    @property
    def share(self) -> float:
        """Share of all groups that differ."""
        return sum(m.differing for m in self.matrices) / sum(m.groups for m in self.matrices)

    def by_layer(self) -> dict[int | None, list[MatrixDifference]]:
        """The matrices of each layer."""
        layers: dict[int | None, list[MatrixDifference]] = {}
        for matrix in self.matrices:
            layers.setdefault(matrix.layer, []).append(matrix)
        return layers

    def to_json(self) -> dict[str, Any]:
        """Plain values: the total, and shares per layer and per matrix."""
        layers = {
            str(layer): sum(m.differing for m in members) / sum(m.groups for m in members)
            for layer, members in self.by_layer().items()
        }
        matrices = {m.name: {"differing": m.differing, "groups": m.groups} for m in self.matrices}
        return {"pattern": self.pattern, "share": self.share, "layers": layers, "matrices": matrices}


def open_mask(path: Path) -> MaskFile:
    """A mask file, or the result of a run directory. Raises UsageError for what is neither, MaskError for a damaged file."""
    if path.is_dir():
        if not (path / "mask.safetensors").exists():
            raise UsageError(f"{path} holds no mask.safetensors; give a mask file, or the folder of a finished run")
        path = path / "mask.safetensors"
    if path.suffix == ".npz":
        raise UsageError(
            f"{path} stores no shapes, so its groups are not known; turn it into a mask file first: "
            f"compress export MODEL --mask {path} --format mask --out mask.safetensors"
        )
    return load_masks(path)


def diff_masks(a: Path, b: Path) -> MaskDifference:
    """Compare two masks group by group. Raises UsageError when their patterns differ, MaskError when names or shapes do."""
    first, second = open_mask(a), open_mask(b)
    if first.pattern != second.pattern:
        raise UsageError(
            f"{a} is {first.pattern} and {b} is {second.pattern}: masks of different patterns have no groups in common"
        )
    if first.contracted != second.contracted and first.masks.keys() == second.masks.keys():
        raise UsageError(f"{a} and {b} group along different dimensions, so they belong to different layouts of the model")
    counts = difference(first.masks, second.masks, first.pattern, first.contracted)
    matrices = []
    for name, (differing, groups) in counts.items():
        number = re.search(r"\.(\d+)\.", name)
        layer = int(number.group(1)) if number else None
        kind = name[number.end() :] if number else name
        matrices.append(MatrixDifference(name, layer, kind.removesuffix(".weight"), differing, groups))
    matrices.sort(key=lambda m: (m.layer is None, m.layer or 0))
    return MaskDifference(str(first.pattern), matrices)


def masks_of_model(path: Path, parameters: Sequence[ParameterRef], pattern: Pattern) -> dict[str, Tensor]:
    """The masks of `parameters` from a mask file, a run directory or a MaskLLM `.npz`: name -> bool tensor, True = kept.

    Masks of other parameters in the file are left out. Raises UsageError when the pattern is another, when a parameter has no mask
    there, or when a shape or contracted dimension does not fit the model.
    """
    if path.suffix == ".npz":
        shapes = {p.name: tuple(p.refs[0].parameter.shape) for p in parameters}
        found = load_npz(path, shapes, {p.name: p.contracted_dim for p in parameters}, pattern)
        missing = [name for name in shapes if name not in found]
        if missing:
            raise UsageError(_missing(path, missing, len(shapes)))
        return {p.name: found[p.name] for p in parameters}
    file = open_mask(path)
    if file.pattern != pattern:
        raise UsageError(f"{path} holds {file.pattern} masks, but the recipe's pattern is {pattern}")
    missing = [p.name for p in parameters if p.name not in file.masks]
    if missing:
        raise UsageError(_missing(path, missing, len(parameters)))
    for p in parameters:
        shape = tuple(p.refs[0].parameter.shape)
        if file.shapes[p.name] != shape or file.contracted[p.name] != p.contracted_dim:
            raise UsageError(
                f"{path}: the mask of {p.name} has shape {list(file.shapes[p.name])} with groups along {file.contracted[p.name]}, "
                f"the model's weight {list(shape)} along {p.contracted_dim}: it is the mask of another model"
            )
    return {p.name: file.masks[p.name] for p in parameters}


def _missing(path: Path, names: list[str], total: int) -> str:
    return (
        f"{path} has no mask for {len(names)} of {total} weights, first {names[0]}; it belongs to another model, or exclude those "
        "weights (weights.exclude)"
    )
