"""What was measured of the experts, and the JSON file it is given in.

The file is one object. The measurements are by layer, expert and (the losses) bits:

    frequency    how often each expert was selected: counts, or fractions of the tokens. pmq needs it
    weight       sum of its routing weights (MC: of the softmax over all experts, before the top-k are renormalised). pmq needs it
    quant_loss   ||F(theta) - F(theta with this expert quantised)||_F at the output of the MoE block, F the block. pmq and error need it
    fisher       sum over tokens and channels of (dL/dz)^2 (change of z)^2 at the output z of the block. fisher needs it

Layers are a list (null for a layer without experts) or an object keyed by layer index; experts a list or an object keyed 0, 1,
...; the losses of an expert an object keyed by bit width, or a list in the order of the key `bits`:

    {"bits": [1, 2, 3], "frequency": [[10, 20]], "weight": [[4.0, 9.5]], "quant_loss": [[[9, 4, 1], [7, 3, 1]]]}
    {"frequency": {"0": [10, 20]}, "weight": {"0": [4.0, 9.5]}, "quant_loss": {"0": [{"1": 9, "2": 4, "3": 1}, {"1": 7, "2": 3, "3": 1}]}}

For budgets in bytes it also says what an expert consists of:

    expert_shapes                [out, in] of each of its matrices, the same for all experts
    group_size, scale_bits, zero_bits    as in `candidate_bytes`; 128, 16 and as wide as the codes by default
    other_weights, other_bytes   the rest of the model, for a budget in bits per weight
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UsageError
from compress.moe.units import candidate_bytes

Floats = NDArray[np.float64]
MEASUREMENTS = ("frequency", "weight", "quant_loss", "fisher")
OTHER_KEYS = ("bits", "expert_shapes", "group_size", "scale_bits", "zero_bits", "other_weights", "other_bytes")


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer: frequency and weight [experts], quant_loss and fisher [experts, bits]; None where not measured."""

    experts: int
    frequency: Floats | None = None
    weight: Floats | None = None
    quant_loss: Floats | None = None
    fisher: Floats | None = None


@dataclass(frozen=True)
class ExpertStatistics:
    """layers: by layer index, ascending. bits: the widths that the losses were measured at, ascending."""

    layers: Mapping[int, LayerStatistics]
    bits: tuple[int, ...]
    expert_shapes: tuple[tuple[int, int], ...] | None = None
    group_size: int = 128
    scale_bits: int = 16
    zero_bits: int | None = None
    other_weights: int = 0
    other_bytes: int = 0

    @property
    def expert_weights(self) -> int:
        """Weights of one expert; 1 where its shapes are not known: all experts are taken to be equally large."""
        return sum(rows * columns for rows, columns in self.expert_shapes) if self.expert_shapes else 1

    def expert_bytes(self, bits: int) -> int | None:
        """Bytes of one expert at a width, or None where its shapes are not known."""
        if self.expert_shapes is None:
            return None
        return sum(
            candidate_bytes(shape, bits, self.group_size, scale_bits=self.scale_bits, zero_bits=self.zero_bits)
            for shape in self.expert_shapes
        )


def load_statistics(path: Path) -> ExpertStatistics:
    """Read a file of statistics. Raises UsageError when it is not there or not as described above."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    try:
        return parse_statistics(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def parse_statistics(data: Any) -> ExpertStatistics:
    """The statistics in a JSON value. Raises UsageError that names the place where it is not as described above."""
    if not isinstance(data, dict):
        raise UsageError("the statistics must be one JSON object")
    unknown = sorted(set(data) - {*MEASUREMENTS, *OTHER_KEYS})
    if unknown:
        raise UsageError(f"unknown key {unknown[0]!r}; known are {', '.join([*MEASUREMENTS, *OTHER_KEYS])}")
    listed = tuple(_whole(b, "bits", 1) for b in _sequence(data["bits"], "bits")) if "bits" in data else None
    if listed is not None and len(set(listed)) < len(listed):
        raise UsageError(f"bits: {list(listed)} names a width twice")
    measured: dict[str, dict[int, Any]] = {}
    widths = listed
    for name in MEASUREMENTS:
        if name not in data:
            continue
        layers = {layer: value for layer, value in _keyed(data[name], name).items() if value is not None}
        parsed: dict[int, Any] = {}
        for layer, value in layers.items():
            place = f"{name}, layer {layer}"
            experts = _in_order(value, place)
            if name in ("frequency", "weight"):
                parsed[layer] = np.array([_number(x, f"{place}, expert {e}") for e, x in enumerate(experts)])
                continue
            losses = [_by_width(x, listed, f"{place}, expert {e}") for e, x in enumerate(experts)]
            widths = widths or tuple(losses[0])
            for e, loss in enumerate(losses):
                if set(loss) != set(widths):
                    raise UsageError(f"{place}, expert {e}: has widths {sorted(loss)} where others have {sorted(widths)}")
            parsed[layer] = np.array([[loss[b] for b in sorted(widths)] for loss in losses])
        measured[name] = parsed
    if not {"quant_loss", "fisher"} & set(measured) or widths is None:
        raise UsageError("there is neither quant_loss nor fisher, so nothing says what a width costs")
    return ExpertStatistics(_layers(measured), tuple(sorted(widths)), **_sizes(data))


def _layers(measured: Mapping[str, Mapping[int, Any]]) -> dict[int, LayerStatistics]:
    """The measurements by layer. Raises UsageError where they disagree on layers or experts."""
    first, *others = measured
    layers = {}
    for layer, values in sorted(measured[first].items()):
        found = {first: values}
        for name in others:
            if layer not in measured[name]:
                raise UsageError(f"layer {layer} has {first} but no {name}")
            found[name] = measured[name][layer]
            if len(found[name]) != len(values):
                raise UsageError(f"layer {layer} has {first} of {len(values)} experts but {name} of {len(found[name])}")
        layers[layer] = LayerStatistics(len(values), **found)
    for name in others:
        if extra := sorted(set(measured[name]) - set(layers)):
            raise UsageError(f"layer {extra[0]} has {name} but no {first}")
    if not layers:
        raise UsageError(f"{first} has no layers")
    return layers


def _sizes(data: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: _whole(data[name], name, lowest)
        for name, lowest in (("group_size", 1), ("scale_bits", 0), ("zero_bits", 0), ("other_weights", 0), ("other_bytes", 0))
        if data.get(name) is not None
    }
    if data.get("expert_shapes") is not None:
        shapes = [_sequence(shape, "expert_shapes") for shape in _sequence(data["expert_shapes"], "expert_shapes")]
        if not shapes or any(len(shape) != 2 for shape in shapes):
            raise UsageError("expert_shapes: must be a list of [out, in], one of each matrix of an expert")
        found["expert_shapes"] = tuple((_whole(a, "expert_shapes", 1), _whole(b, "expert_shapes", 1)) for a, b in shapes)
    return found


def _by_width(value: Any, listed: Sequence[int] | None, place: str) -> dict[int, float]:
    """Losses of one expert by width."""
    if isinstance(value, dict):
        return {b: _number(x, f"{place}, {b} bits") for b, x in _keyed(value, place).items()}
    losses = _sequence(value, place)
    if listed is None:
        raise UsageError(f"{place}: a list of losses needs the key `bits` that says which widths they belong to")
    if len(losses) != len(listed):
        raise UsageError(f"{place}: {len(losses)} losses for {len(listed)} widths {list(listed)}")
    return {b: _number(x, f"{place}, {b} bits") for b, x in zip(listed, losses, strict=True)}


def _keyed(value: Any, place: str) -> dict[int, Any]:
    """A list, or an object with whole numbers as keys, by index."""
    if isinstance(value, list):
        return dict(enumerate(value))
    if not isinstance(value, dict):
        raise UsageError(f"{place}: must be a list or an object keyed by whole numbers, not {_kind(value)}")
    found = {}
    for key, item in value.items():
        if not (key.isascii() and key.isdigit()):
            raise UsageError(f"{place}: the key {key!r} is not a whole number")
        if int(key) in found:
            raise UsageError(f"{place}: the key {int(key)} is there twice")
        found[int(key)] = item
    return found


def _in_order(value: Any, place: str) -> list[Any]:
    """The experts of a layer, 0, 1, ..."""
    found = _keyed(value, place)
    if not found or sorted(found) != list(range(len(found))):
        raise UsageError(f"{place}: the experts must be 0, 1, ... without a hole, and at least one; there are {sorted(found)}")
    return [found[i] for i in range(len(found))]


def _sequence(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{place}: must be a list that is not empty, not {_kind(value)}")
    return value


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{place}: must be a finite number that is not negative, not {value!r}")
    return float(value)


def _whole(value: Any, place: str, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise UsageError(f"{place}: must be a whole number from {lowest} on, not {value!r}")
    return value


def _kind(value: Any) -> str:
    return {dict: "an object", list: "an empty list", str: "text", type(None): "null"}.get(type(value), repr(value))
