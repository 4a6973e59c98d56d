"""Run packed-moe checkpoints: modules that dequantise the matrix that they multiply by, and put it away again.

A `LowBitLinear` takes the place of each packed linear layer; a fused module of experts keeps its class, with packed slabs in place of
its parameters. Of the experts only those that a token reaches are dequantised. All products go through `lowbit_linear`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.packed_moe import PARTS, LowBitMatrix, LowBitParameter, Slab, check_finite
from compress.quantize.grid import Grid
from compress.runtime_experts import DispatchedExperts, PackedModule, check_packable, mix_in
from compress.weights import expert_roles


def lowbit_linear(x: Tensor, matrix: LowBitMatrix, bias: Tensor | None) -> Tensor:
    """`[..., K] -> [..., N]` in the type of `x`: the product with the matrix dequantised to that type, plus `bias [N]` (or None)."""
    return nn.functional.linear(x, matrix.dequantize(x.dtype), bias)


class LowBitLinear(PackedModule):
    """A linear layer with a packed weight: `[..., in_features] -> [..., out_features]`, in the type of its input.

    Buffers: `weight_codes`, `weight_scale`, `weight_zero` (or None) as `compress.packed_moe` says, and `bias [out_features]` or None.
    Made empty; `from_packed` and `load_state_dict` fill it. bias: its dtype, None for a layer without.
    """

    _parts = tuple(f"weight_{part}" for part in PARTS)
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: Grid,
        *,
        bias: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        self.slab = Slab("weight_", grid, None, out_features, in_features)
        _register(self, self.slab, device)
        self.register_buffer("bias", None if bias is None else torch.empty(out_features, dtype=bias, device=device))

    @classmethod
    def from_packed(cls, matrix: LowBitMatrix, bias: Tensor | None = None) -> LowBitLinear:
        """A layer around a packed matrix, whose tensors it shares."""
        kind = None if bias is None else bias.dtype
        layer = cls(matrix.columns, len(matrix.codes), matrix.grid, bias=kind, device="meta")
        layer.weight_codes, layer.weight_scale, layer.weight_zero, layer.bias = matrix.codes, matrix.scale, matrix.zero, bias
        return layer

    @property
    def matrix(self) -> LowBitMatrix:
        """The packed weight."""
        parts = self._buffers
        return LowBitMatrix(parts["weight_codes"], parts["weight_scale"], parts["weight_zero"], self.grid, self.in_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return lowbit_linear(x, self.matrix, self.bias)

    def extra_repr(self) -> str:
        grid, sizes = self.grid, f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, bits={grid.bits}, group_size={grid.group_size}, kind={grid.kind}"


class _LowBitExperts(DispatchedExperts):
    """Experts with packed low-bit parameters, each matrix with a grid of its own.

    places: role -> of every expert its slab (named within this module) and its place there. outputs: of the product with a packed parameter.
    """

    places: dict[str, list[tuple[Slab, int]]]
    outputs: dict[str, int]

    def packed_matrix(self, role: str, expert: int) -> LowBitMatrix:
        """The packed matrix of an expert: gate_proj, up_proj or down_proj."""
        slab, place = self.places[role][expert]
        return slab.matrix({part: self._buffers[slab.prefix + part][place] for part in slab.tensors})  # type: ignore[index]

    def _project(self, name: str, index: int, x: Tensor) -> Tensor:
        if hasattr(self, name):
            return super()._project(name, index, x)
        bias = self._bias(name, index)
        roles = expert_roles(self, name, self.outputs[name])
        if len(roles) == 1:
            return lowbit_linear(x, self.packed_matrix(name, index), bias)
        result = x.new_empty(len(x), self.outputs[name])  # gate and up where the module's `_apply_gate` expects them
        for role, rows in roles.items():
            result[:, rows] = lowbit_linear(x, self.packed_matrix(role, index), None if bias is None else bias[rows])
        return result


def _register(module: nn.Module, slab: Slab, device: Any) -> None:
    for part in PARTS:
        if part in slab.tensors:
            dtype, shape = slab.tensors[part]
            module.register_buffer(slab.prefix + part, torch.empty(shape, dtype=dtype, device=device))
        elif slab.experts is None:
            module.register_buffer(slab.prefix + part, None)


def install(model: nn.Module, parameters: Iterable[LowBitParameter]) -> None:
    """Put empty packed modules into a model (on the meta device, as a rule); their tensors are loaded after.

    Raises UsageError when the model has no such parameters, or modules of a kind that cannot run packed (see `check_packable`).
    """
    for parameter in parameters:
        check_packable(model, parameter.name, parameter.shape)
        module = model.get_submodule(parameter.module_name)
        device = parameter_of(model, parameter).device
        if len(parameter.shape) == 3:
            _pack_experts(module, parameter, device)
            continue
        out, contracted = parameter.matrix_shape
        bias: Any = getattr(module, "bias", None)
        grid = next(iter(parameter.slabs.values()))[0].grid
        layer = LowBitLinear(contracted, out, grid, bias=None if bias is None else bias.dtype, device=device)
        parent, _, child = parameter.module_name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.train(module.training))


def parameter_of(model: nn.Module, parameter: LowBitParameter) -> Tensor:
    """The dense parameter in the model."""
    return getattr(model.get_submodule(parameter.module_name), parameter.name.rpartition(".")[2])


def _pack_experts(module: Any, parameter: LowBitParameter, device: torch.device) -> None:
    name = parameter.name.rpartition(".")[2]
    out, _ = parameter.matrix_shape
    if set(expert_roles(module, name, out)) != set(parameter.roles):
        raise UsageError(f"{parameter.name} has other matrices in the model than {', '.join(parameter.roles)} of its config.json")
    delattr(module, name)
    if not isinstance(module, _LowBitExperts):
        mix_in(module, _LowBitExperts)
        module.places, module.outputs = {}, {}
    module.outputs[name] = out
    for role, slabs in parameter.slabs.items():
        where: dict[int, tuple[Slab, int]] = {}
        for slab in slabs:
            local = Slab(slab.prefix.rpartition(".")[2], slab.grid, slab.experts, slab.rows, slab.columns)
            _register(module, local, device)
            module._parts += tuple(local.prefix + part for part in local.tensors)
            where |= {expert: (local, place) for place, expert in enumerate(local.experts or ())}
        module.places[role] = [where[expert] for expert in range(parameter.shape[0])]


def check_loaded(model: nn.Module, parameters: Iterable[LowBitParameter], where: str) -> None:
    """Raise CompressError when scales or zeros of a loaded model are not finite."""
    for parameter in parameters:
        for slab in (slab for slabs in parameter.slabs.values() for slab in slabs):
            check_finite(slab, {part: model.get_buffer(slab.prefix + part) for part in slab.tensors}, where)


def widths_of(model: nn.Module) -> list[int]:
    """The bits of the packed matrices in a model, ascending; empty where there are none."""
    linears = {module.grid.bits for module in model.modules() if isinstance(module, LowBitLinear)}
    mixtures = [module.places for module in model.modules() if isinstance(module, _LowBitExperts)]
    return sorted(linears | {slab.grid.bits for places in mixtures for where in places.values() for slab, _ in where})
