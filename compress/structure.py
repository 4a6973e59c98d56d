"""The anatomy of a decoder: its blocks, the experts in them and the routers beside the experts.

Everything here looks at structure (module lists, parameter shapes, the flags that transformers' `use_experts_implementation`
leaves on an experts module), never at the name or class of a model, so that a new architecture needs no new code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.errors import UsageError


@dataclass(frozen=True)
class Block:
    """One decoder layer: its name in `named_modules()`, the module, and its index in the stack."""

    name: str
    module: nn.Module
    index: int


@dataclass(frozen=True, eq=False)
class ExpertGroup:
    """The experts of one mixture: one module with fused `[E, ., .]` parameters, or a ModuleList of E modules."""

    name: str
    module: nn.Module
    count: int
    fused: bool


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer with its weight stored `[in, out]`."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2 and getattr(module, "nf", None) == weight.shape[1] and hasattr(module, "nx")


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer with a dense floating-point weight `[out, in]`."""
    weight = getattr(module, "weight", None)
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return weight is not None and weight.is_floating_point() and tuple(weight.shape) == shape


def join(prefix: str, name: str) -> str:
    """Dotted concatenation that leaves out an empty side."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model inside `model`, or None where there is no configuration."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own floating-point 3-D parameters (not those of its children); convolution kernels are none of them."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: parameter for name, parameter in own if parameter.dim() == 3 and parameter.is_floating_point()}


def _holds_matrix(module: nn.Module) -> bool:
    return any(is_linear(child) or is_conv1d(child) or expert_parameters(child) for child in module.modules())


def decoder_blocks(model: nn.Module) -> list[Block]:
    """The decoder layers in the order they run.

    They are the items of an `nn.ModuleList` inside the language model (`get_decoder()`, which leaves out vision and audio
    towers) that all hold matrices and that lies in no other such list; of several, one with `num_hidden_layers` items goes
    first, then the one with the most parameters.

    Raises UsageError when there is none.
    """
    find_decoder: Any = getattr(model, "get_decoder", None)
    root = find_decoder() if find_decoder else model
    layers = getattr(text_config(model), "num_hidden_layers", None)
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or not all(_holds_matrix(item) for item in module):
            continue
        if any(name.startswith(outer + ".") for outer, _ in found) or not any(module is inner for inner in root.modules()):
            continue
        found.append((name, module))
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no list of decoder layers with weight matrices in it, so there is nothing to compress"
        )
    name, stack = max(found, key=lambda item: (len(item[1]) == layers, sum(p.numel() for p in item[1].parameters())))
    return [Block(join(name, str(index)), module, index) for index, module in enumerate(stack)]


def _expert_counts(holder: Any) -> set[int]:
    """Integers that the attributes of a module or a configuration give as a number of experts."""
    attributes = vars(holder).items() if holder is not None else ()
    return {
        value
        for key, value in attributes
        if "expert" in key and not any(part in key for part in ("per_tok", "top", "size", "group")) and type(value) is int
    }


def expert_groups(model: nn.Module, block: Block) -> list[ExpertGroup]:
    """The mixtures of experts in a block.

    Fused: a module whose 3-D parameters share a leading dimension that the module or the configuration calls a number of
    experts (or that carries the `is_transposed` flag). Listed: a ModuleList of at least two modules with matrices, as many as
    the configuration has experts, or as a linear layer beside the list (its router) has outputs.
    """
    groups = []
    counts = _expert_counts(text_config(model))
    for name, module in block.module.named_modules():
        full_name = join(block.name, name)
        fused = expert_parameters(module)
        sizes = {parameter.shape[0] for parameter in fused.values()}
        if len(sizes) == 1 and (hasattr(module, "is_transposed") or sizes & (counts | _expert_counts(module))):
            groups.append(ExpertGroup(full_name, module, sizes.pop(), fused=True))
        elif isinstance(module, nn.ModuleList) and len(module) > 1 and all(_holds_matrix(item) for item in module):
            parent = block.module.get_submodule(name.rpartition(".")[0])
            beside = {out for child in parent.children() if child is not module for out in _outputs(child).values()}
            if len(module) in counts or len(module) in beside:
                groups.append(ExpertGroup(full_name, module, len(module), fused=False))
    return groups


def _outputs(module: nn.Module) -> dict[str, int]:
    """Number of outputs of every matrix in a module, by parameter name: linear layers and bare 2-D parameters `[out, in]`."""
    return {
        name: parameter.shape[1] if is_conv1d(module.get_submodule(name.rpartition(".")[0])) else parameter.shape[0]
        for name, parameter in module.named_parameters()
        if parameter.dim() == 2
    }


def router_parameters(model: nn.Module, block: Block) -> Iterator[str]:
    """Full names of the 2-D parameters in a block that route tokens to experts or gate a shared expert.

    A router is a neighbour of a group of E experts that says how many it chooses (`top_k`), or whose every matrix has E outputs
    or one (Qwen2-MoE's `shared_expert_gate`).
    """
    groups = expert_groups(model, block)
    for group in groups:
        parent_name = group.name.rpartition(".")[0]
        parent = model.get_submodule(parent_name)
        for name, parameter in parent.named_parameters(recurse=False):
            if parameter.dim() == 2 and parameter.shape[0] in (1, group.count):
                yield join(parent_name, name)
        for child_name, child in parent.named_children():
            holds_experts = any(other.module is inner for other in groups for inner in child.modules())
            outputs = _outputs(child)
            if not holds_experts and (hasattr(child, "top_k") or set(outputs.values()) <= {1, group.count}):
                yield from (join(join(parent_name, child_name), name) for name in outputs)
