"""From a profile to a width for every matrix of every expert.

Errors of different layers are put on one scale by the norm of the hidden states that leave the layer: what an expert changes is small or
large beside these. So a cost is `squared / residual^2`; that of `fisher` is an estimate of the loss already and is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from compress.errors import UsageError
from compress.moe.allocate import Allocation, Budget, Candidate, Limit, Unit, allocate
from compress.moe.modes import PMQ_EXPONENTS, Options, allocate_experts
from compress.moe.profile_store import Floats, LayerProfile
from compress.moe.statistics import ExpertStatistics, LayerStatistics
from compress.quantize.grid import Grid
from compress.quantize.packing import packed_bytes
from compress.quantize.quantizer import Quantizer

Granularity = Literal["expert", "projection", "gate-up", "layer"]
Mode = Literal["error", "fisher", "pmq"]
_PEAK_SHARE, _PEAK_OVER_MEDIAN = 0.1, 30.0


@dataclass(frozen=True)
class Assignment:
    """Widths of all experts. widths: layer -> expert -> role -> (bits, group size). allocation: how they were found."""

    widths: dict[int, list[dict[str, tuple[int, int]]]]
    allocation: Allocation
    protected: list[str]

    def average_bits(self, profiles: Sequence[LayerProfile]) -> float:
        """Bits of the codes a weight of the experts."""
        above = below = 0
        for profile in profiles:
            for expert in self.widths[profile.layer]:
                for role, (rows, columns) in profile.shapes.items():
                    above += expert[role][0] * rows * columns
                    below += rows * columns
        return above / below


def matrix_bytes(grid: Grid, rows: int, columns: int) -> int:
    """Bytes of one quantised matrix in a packed-moe checkpoint: codes, rows padded to whole bytes, scales of 16 bits, and zeros (16 bits
    where they are free numbers, packed like codes where they are codes)."""
    groups = grid.groups(columns)
    zeros = {"float": 2 * groups, "asymmetric": packed_bytes(groups, grid.bits)}.get(grid.kind, 0)
    return rows * (packed_bytes(columns, grid.bits) + 2 * groups + zeros)


def super_experts(profiles: Sequence[LayerProfile]) -> list[str]:
    """Names of the experts with massive outputs, `layers.L.experts.E`.

    After Su et al. (arXiv 2507.23279) a super expert's largest output stands out from those of all experts of the model: at least a tenth of
    the model's largest, and above the 99.5th percentile. Models without massive outputs have a largest one, too, so here it must also be
    30 times the median.
    """
    peaks = np.concatenate([profile.peak for profile in profiles])
    least = max(float(np.percentile(peaks, 99.5)), _PEAK_SHARE * peaks.max(), _PEAK_OVER_MEDIAN * float(np.median(peaks)))
    return [f"layers.{p.layer}.experts.{e}" for p in profiles for e in range(p.experts) if p.peak[e] >= least and p.peak[e] > 0]


def assign(
    profiles: Sequence[LayerProfile],
    budget: Budget,
    quantizer: Quantizer,
    *,
    mode: Mode = "error",
    granularity: Granularity = "projection",
    limits: Sequence[Limit] = (),
    protect: Sequence[str] = (),
    protect_super: bool = True,
    exponents: tuple[float, float, float] = PMQ_EXPONENTS,
) -> Assignment:
    """Choose a candidate for every unit of the granularity within the budget.

    Units are named `layers.L`, `layers.L.experts.E`, or `layers.L.experts.E.ROLE` (of gate-up: `gate_up` and `down`). Raises UsageError
    as `allocate` does, and for a mode whose costs were not measured.
    """
    found = super_experts(profiles) if protect_super else []
    if mode == "pmq":
        return _pmq(profiles, budget, limits, [*protect, *found], found, exponents)
    units, parts = _units(profiles, mode, granularity, quantizer)
    patterns = [*protect, *(name if granularity == "expert" else f"{name}.*" for name in found)]
    if granularity == "layer":
        patterns = [*protect, *dict.fromkeys(name.rpartition(".experts.")[0] for name in found)]
    allocation = allocate(units, budget, limits=limits, protect=patterns)
    widths: dict[int, list[dict[str, tuple[int, int]]]] = {p.layer: [{} for _ in range(p.experts)] for p in profiles}
    for name, candidate in allocation.chosen.items():
        layer, experts, roles = parts[name]
        for e in experts:
            for role in roles:
                assert candidate.group_size is not None
                widths[layer][e][role] = (candidate.bits, candidate.group_size)
    return Assignment(widths, allocation, found)


def _cost(profile: LayerProfile, squared: Floats, fisher: Floats | None, mode: Mode) -> Floats:
    if mode == "fisher":
        if fisher is None:
            raise UsageError("mode fisher needs gradients, which this profile has not; profile with allocate.mode: fisher")
        return fisher
    return squared / profile.residual**2


def _units(
    profiles: Sequence[LayerProfile], mode: Mode, granularity: Granularity, quantizer: Quantizer
) -> tuple[list[Unit], dict[str, tuple[int, list[int], list[str]]]]:
    """The units, and of each by name: its layer, its experts, its roles."""
    units, parts = [], {}
    for profile in profiles:
        whole = _cost(profile, profile.squared, profile.fisher, mode)
        single = {role: _cost(profile, *profile.by_role[role], mode) for role in profile.shapes}
        roles = list(profile.shapes)

        def unit(name: str, experts: list[int], own: list[str], costs: Floats, profile: LayerProfile = profile) -> None:
            candidates = []
            for (bits, group), cost in zip(profile.candidates, costs.tolist(), strict=True):
                size = sum(matrix_bytes(quantizer.grid(bits, group), *profile.shapes[role]) for role in own)
                candidates.append(Candidate(bits, cost, group, size * len(experts)))
            weights = sum(profile.shapes[role][0] * profile.shapes[role][1] for role in own) * len(experts)
            units.append(Unit(name, weights, tuple(candidates)))
            parts[name] = (profile.layer, experts, own)

        everyone = list(range(profile.experts))
        if granularity == "layer":
            unit(f"layers.{profile.layer}", everyone, roles, whole.sum(0))
            continue
        for e in everyone:
            name = f"layers.{profile.layer}.experts.{e}"
            if granularity == "expert":
                unit(name, [e], roles, whole[e])
            elif granularity == "projection":
                for role in roles:
                    unit(f"{name}.{role}", [e], [role], single[role][e])
            else:
                last = [role for role in roles if _is_last(profile, role)]
                first = [role for role in roles if role not in last]
                unit(f"{name}.gate_up", [e], first, np.sum([single[role][e] for role in first], axis=0))
                unit(f"{name}.down", [e], last, np.sum([single[role][e] for role in last], axis=0))
    return units, parts


def _is_last(profile: LayerProfile, role: str) -> bool:
    """Whether a matrix is the expert's projection back: by the common names, else the last one."""
    known = [name for name in profile.shapes if name in ("down_proj", "w2", "fc2", "output_linear")]
    return role in known if known else role == list(profile.shapes)[-1]


def statistics(
    profiles: Sequence[LayerProfile], group_size: int, scale_bits: int = 16, zero_bits: int | None = 16
) -> ExpertStatistics:
    """The profile as `compress allocate-bits --stats` takes it: whole experts, candidates of one group size.

    quant_loss is relative to the residual of its layer, so that layers compare. Raises UsageError when the candidates of that group size do
    not name every width once.
    """
    columns = [j for j, (_, group) in enumerate(profiles[0].candidates) if group == group_size]
    bits = tuple(profiles[0].candidates[j][0] for j in columns)
    if not bits:
        raise UsageError(f"no candidate has the group size {group_size}")
    layers = {}
    for p in profiles:
        loss = np.sqrt(p.squared[:, columns]) / p.residual
        layers[p.layer] = LayerStatistics(
            p.experts, p.frequency, p.weight, loss, None if p.fisher is None else p.fisher[:, columns]
        )
    shapes = tuple(profiles[0].shapes.values())
    return ExpertStatistics(layers, bits, shapes, group_size, scale_bits, zero_bits)


def statistics_json(found: ExpertStatistics) -> dict[str, Any]:
    """The same as the JSON object of `compress.moe.statistics`."""
    result: dict[str, Any] = {"bits": list(found.bits)}
    for name in ("frequency", "weight", "quant_loss", "fisher"):
        values = {str(i): getattr(layer, name) for i, layer in found.layers.items()}
        if all(value is not None for value in values.values()):
            result[name] = {i: value.tolist() for i, value in values.items()}
    if found.expert_shapes:
        result |= {"expert_shapes": [list(shape) for shape in found.expert_shapes], "group_size": found.group_size}
        result["scale_bits"] = found.scale_bits
        if found.zero_bits is not None:
            result["zero_bits"] = found.zero_bits
    return result


def _pmq(
    profiles: Sequence[LayerProfile],
    budget: Budget,
    limits: Sequence[Limit],
    protect: Sequence[str],
    found: list[str],
    exponents: tuple[float, float, float],
) -> Assignment:
    groups = sorted({group for _, group in profiles[0].candidates})
    if len(groups) > 1:
        raise UsageError(f"pmq knows widths, not group sizes; the candidates have group sizes {groups}")
    given = statistics(profiles, groups[0])
    options = Options("pmq", (), exponents, tuple(limits), tuple(protect))
    allocation = allocate_experts(given, budget, options)
    return Assignment(_by_expert(profiles, allocation.chosen, groups[0]), allocation, found)


def _by_expert(
    profiles: Sequence[LayerProfile], chosen: Mapping[str, Candidate], group: int
) -> dict[int, list[dict[str, tuple[int, int]]]]:
    return {
        p.layer: [dict.fromkeys(p.shapes, (chosen[f"layers.{p.layer}.experts.{e}"].bits, group)) for e in range(p.experts)]
        for p in profiles
    }


def from_layers(
    layers: Mapping[str, Sequence[int]], profiles_shapes: Mapping[int, tuple[int, Sequence[str]]], group: int, where: str
) -> dict[int, list[dict[str, tuple[int, int]]]]:
    """Widths that `compress allocate-bits --out` wrote, for matrices of these mixtures: layer -> (experts, roles).

    Raises UsageError when layers or experts are others.
    """
    if {int(i) for i in layers} != set(profiles_shapes):
        raise UsageError(f"{where} is for layers {sorted(map(int, layers))}, the model has experts in {sorted(profiles_shapes)}")
    result = {}
    for index, bits in layers.items():
        count, roles = profiles_shapes[int(index)]
        if len(bits) != count:
            raise UsageError(f"{where}: layer {index} has {len(bits)} widths for {count} experts")
        result[int(index)] = [dict.fromkeys(roles, (int(b), group)) for b in bits]
    return result
