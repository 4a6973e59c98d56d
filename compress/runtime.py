"""Run packed checkpoints: modules that multiply by packed weights, and the loader that puts them into a model.

`load` is the way in. A `Sparse24Linear` takes the place of each packed linear layer; a fused module of experts keeps its class, with
the packed parameters in place of the dense ones and a forward pass that multiplies by them. No dense copy of a weight is ever made.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.fallback import tell_missing
from compress.packed import VALUE_DTYPES, PackedMatrix, check_codes, is_packed
from compress.packed_moe import is_packed_moe
from compress.runtime_experts import DispatchedExperts, PackedModule, check_packable, mix_in
from compress_kernels import sparse24
from compress_kernels.sparse24 import Activation, Packed24

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(folder: str | Path, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a packed checkpoint folder as a model in evaluation mode.

    dtype: of everything that is not packed, and so of the activations ("auto" is the checkpoint's own, else "float32", "bfloat16",
    "float16"); packed values keep their type. device: "auto" is cuda where there is one, else cpu. The model is made without memory
    and its tensors are read one by one. Raises UsageError for a folder that is not packed, of another version, or not whole, and
    CompressError for one that is damaged.
    """
    from compress.models import load_model

    if not (is_packed(Path(folder)) or is_packed_moe(Path(folder))):
        raise UsageError(
            f"{folder} is not a packed checkpoint (its config.json has no quantization_config of ours); "
            "load it with transformers, or pack it with `compress export --format packed-24` (or packed-moe)"
        )
    return load_model(str(folder), dtype=dtype, device=device, tokenizer=False).model


class Sparse24Linear(PackedModule):
    """A linear layer with a packed 2:4 weight: `[..., in_features] -> [..., out_features]`, in the type of its input.

    Buffers: `values [out, in/2]`, `meta` uint8 `[out, ceil(in/8)]`, `scale` float32 `[out]` with int8 values (else None), `bias [out]`
    or None. Made empty; `from_packed` and `load_state_dict` fill it. values: their dtype; bias: its dtype, None for a layer without.
    activation: "int8" rounds each token to int8 before the product (with int8 values only), "float" does not.
    """

    _parts = ("values", "meta", "scale")
    values: Tensor
    meta: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        values: torch.dtype,
        bias: torch.dtype | None = None,
        activation: Activation = "float",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if in_features % 4:
            raise UsageError(f"a 2:4 layer needs a multiple of 4 inputs, not {in_features}")
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.register_buffer("values", torch.empty(out_features, in_features // 2, dtype=values, device=device))
        self.register_buffer("meta", torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8, device=device))
        scale = torch.empty(out_features, dtype=torch.float32, device=device) if values == torch.int8 else None
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else torch.empty(out_features, dtype=bias, device=device))

    @classmethod
    def from_packed(cls, packed: Packed24, bias: Tensor | None = None, activation: Activation = "float") -> Sparse24Linear:
        """A layer around packed tensors, which it shares."""
        out, contracted = packed.shape
        kind = None if bias is None else bias.dtype
        layer = cls(contracted, out, values=packed.values.dtype, bias=kind, activation=activation, device="meta")
        layer.values, layer.meta, layer.scale, layer.bias = packed.values, packed.meta, packed.scale, bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        # Attribute access would look up each name there, after everything else: a quarter of the time of a small product.
        parts = self._buffers
        packed = Packed24(parts["values"], parts["meta"], parts["scale"])
        return sparse24.linear(x, packed, parts["bias"], self.activation)

    def extra_repr(self) -> str:
        values = str(self.values.dtype).removeprefix("torch.")
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, values={values}, activation={self.activation}"


class _PackedExperts(DispatchedExperts):
    """Experts with packed 2:4 parameters."""

    activation: Activation

    def _project(self, name: str, index: int, x: Tensor) -> Tensor:
        if f"{name}_values" not in self._parts:
            return super()._project(name, index, x)
        scale = getattr(self, f"{name}_scale")
        packed = Packed24(
            getattr(self, f"{name}_values")[index],
            getattr(self, f"{name}_meta")[index],
            None if scale is None else scale[index],
        )
        return sparse24.linear(x, packed, self._bias(name, index), self.activation)


def install(model: nn.Module, matrices: Iterable[PackedMatrix], activation: Activation = "float") -> None:
    """Put empty packed modules into a model (on the meta device, as a rule) where `matrices` says; their tensors are loaded after.

    Raises UsageError when the model has no such parameters, or modules of a kind that cannot run packed (see `check_packable`).
    """
    if not torch.cuda.is_available():
        tell_missing("sparse24")
    for matrix in matrices:
        check_packable(model, matrix.name, matrix.shape)
        module_name, _, parameter = matrix.name.rpartition(".")
        module = model.get_submodule(module_name)
        device = getattr(module, parameter).device
        if len(matrix.shape) == 3:
            _pack_experts(module, parameter, matrix, device)
            module.activation = activation
            continue
        out, contracted = matrix.matrix_shape
        bias: Any = getattr(module, "bias", None)
        values, kind = VALUE_DTYPES[matrix.values], None if bias is None else bias.dtype
        layer = Sparse24Linear(contracted, out, values=values, bias=kind, activation=activation, device=device)
        parent, _, child = module_name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.train(module.training))


def _pack_experts(module: Any, parameter: str, matrix: PackedMatrix, device: torch.device) -> None:
    delattr(module, parameter)
    names = []
    for part in ("values", "meta", "scale"):
        dtype, shape = matrix.tensors.get(part, (None, None))
        names.append(f"{parameter}_{part}")
        module.register_buffer(names[-1], None if shape is None else torch.empty(shape, dtype=dtype, device=device))
    mix_in(module, _PackedExperts)
    module._parts += tuple(names)


def check_loaded(model: nn.Module, matrices: Iterable[PackedMatrix], where: str) -> None:
    """Raise CompressError when the metadata of a loaded model holds codes that are none."""
    for matrix in matrices:
        check_codes({part: model.get_buffer(matrix.prefix + part) for part in matrix.tensors}, matrix, where)
