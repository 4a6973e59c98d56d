"""What the packed runtimes share: modules that hold packed parts, and experts that each run on the tokens that chose them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.structure import is_conv1d, is_linear, join

Module = TypeVar("Module", bound="PackedModule")


class PackedModule(nn.Module):
    """Holds packed parts as buffers, whose types say what is stored: `model.half()` and the like leave them alone."""

    _parts: tuple[str, ...]  # names of the buffers

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        before = {name: getattr(self, name) for name in self._parts}
        super()._apply(fn, recurse)
        for name, part in before.items():
            if part is not None and getattr(self, name).dtype != part.dtype:
                setattr(self, name, part.to(getattr(self, name).device))
        return self


class DispatchedExperts(PackedModule):
    """What is mixed into a fused module of experts whose parameters are (some of them) packed; a format overrides `_project`.

    It follows the interface of transformers' `use_experts_implementation`: `has_gate`, `has_bias`, `is_transposed`, `_apply_gate`.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[tokens, hidden]`, the experts chosen for each token `[tokens, k]` and their weights `[tokens, k]` -> `[tokens, hidden]`.

        A router drops a slot by choosing expert `num_experts` (or above): nothing is computed for it, and it adds nothing.
        """
        (tokens, hidden), k = hidden_states.shape, top_k_index.shape[1]
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts)[: self.num_experts].tolist()
        order = order[: sum(counts)]  # dropped slots come last
        rows = hidden_states[order // k]  # [slots, hidden], those of one expert next to each other
        results, start = [], 0
        for index, count in enumerate(counts):
            if count:
                results.append(self._expert(index, rows[start : start + count]))
                start += count
        result = torch.cat(results) if results else rows
        if getattr(self, "has_post_expert_norm", False):
            result = self.post_expert_norm(result)
        result = result * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = result.new_zeros(tokens * k, hidden).index_copy_(0, order, result)  # token by token again
        return back.view(tokens, k, hidden).sum(1).to(hidden_states.dtype)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        """One expert on its tokens: `[n, hidden] -> [n, hidden]`."""
        if self.has_gate:
            return self._project("down_proj", index, self._apply_gate(self._project("gate_up_proj", index, x)))
        return self._project("down_proj", index, self.act_fn(self._project("up_proj", index, x)))

    def _bias(self, name: str, index: int) -> Tensor | None:
        return getattr(self, f"{name}_bias")[index] if self.has_bias else None

    def _project(self, name: str, index: int, x: Tensor) -> Tensor:
        """The product with an expert's slice of a parameter, here a dense one: `[n, in] -> [n, out]`."""
        weight = getattr(self, name)[index]
        return nn.functional.linear(x, weight.T if self.is_transposed else weight, self._bias(name, index))


def mix_in(module: Any, kind: Any) -> None:
    """Make `module` an instance of its class and of `kind`, a subclass of `DispatchedExperts`, once."""
    if not isinstance(module, kind):
        plain: Any = type(module)
        module.__class__ = _mixed(kind, plain)
        module._parts = ()


@functools.cache
def _mixed(kind: Any, plain: Any) -> type[nn.Module]:
    return type(f"Packed{plain.__name__}", (kind, plain), {"__module__": kind.__module__})


def check_packable(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Raise UsageError unless `model` has the parameter, dense and of that shape, in a module that can run packed.

    These are linear layers (transformers' Conv1D among them) and fused experts behind the interface of transformers'
    `use_experts_implementation`, whose forward pass does not depend on the model.
    """
    module_name, _, parameter = name.rpartition(".")
    try:
        module: Any = model.get_submodule(module_name)
        weight = getattr(module, parameter)
    except AttributeError as error:
        raise UsageError(f"the model has no parameter {name}, which its config.json lists as packed") from error
    if tuple(weight.shape) != shape:
        raise UsageError(f"{name} is {list(weight.shape)} in the model, but {list(shape)} where it is packed")
    linear = len(shape) == 2 and parameter == "weight" and (is_linear(module) or is_conv1d(module))
    if not (linear or (len(shape) == 3 and _dispatchable(module))):
        raise UsageError(
            f"{name} lies in a {type(module).__name__}, whose forward pass cannot be run on packed weights; export with "
            f"--format dense, or leave {join(module_name, '*')!r} as it is (exclude)"
        )


def _dispatchable(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts"))
