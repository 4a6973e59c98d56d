"""The mixtures of experts of a model, as routing sees them: found by structure, and observed on text.

A mixture can be routed when its experts are called with `(hidden [T, H], top_k_index [T, k], top_k_weights [T, k])`, the interface of
transformers' `use_experts_implementation`; dense and packed experts alike have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.structure import ExpertGroup, decoder_blocks, expert_groups
from compress.walk import eager_experts, evaluating

_CONSTANT = 0.02  # weights whose sum varies by less, relative to its mean, are renormalised: bfloat16 rounds each to 0.4 %


@dataclass(frozen=True, eq=False)
class Mixture:
    """One mixture: its experts module, by name in the model; how many experts it has, and how many a token runs.

    block: the decoder layer around it. renormalise: whether a token's routing weights always have the same sum, so that those of the
    experts that run must be scaled up to it again.
    """

    name: str
    module: nn.Module
    block: nn.Module
    experts: int
    top_k: int
    hidden: int
    renormalise: bool


@dataclass(frozen=True)
class Seen:
    """What calibration text showed of a mixture: up to a limit of tokens, hidden states `[n, H]` and routing weights `[n, k]` in falling order."""

    hidden: Tensor
    weights: Tensor


def expert_modules(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """Name, experts module and decoder block of every mixture that can be routed, in order.

    Raises UsageError for a dense model, and for one with a mixture that has not the interface.
    """
    found = [(name, module, _block_of(model, name)) for name, module in model.named_modules() if _has_interface(module)]
    known = {name for name, _, _ in found}
    for group in _groups(model):
        if group.name not in known:
            raise UsageError(
                f"{group.name} ({type(group.module).__name__}) is not called with the experts of each token and their weights, as "
                "transformers' `use_experts_implementation` has it, so routing cannot reach it"
            )
    if not found:
        raise UsageError(f"{type(model).__name__} has no mixture of experts, so there is nothing to route; it is a dense model")
    for name, module, _ in found:
        if getattr(module, "_is_expert_parallel", False) and not hasattr(module, "_compress_gate"):
            raise UsageError(f"{name} is spread over processes (expert parallelism); routing needs all experts of a layer in one")
    return found


def _groups(model: nn.Module) -> list[ExpertGroup]:
    """All mixtures with dense weights, of whatever interface; a model that is packed throughout has none."""
    try:
        blocks = decoder_blocks(model)
    except UsageError:
        return []
    return [group for block in blocks for group in expert_groups(model, block)]


def _block_of(model: nn.Module, name: str) -> nn.Module:
    """The decoder layer around a module: the item of the outermost list of modules on the way to it, else its parent."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return model.get_submodule(".".join(parts[: depth + 1]))
    return model.get_submodule(".".join(parts[:-1]))


def _has_interface(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("_is_expert_parallel", "_apply_gate", "num_experts"))


def call_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[T, H]`, experts `[T, k]` and weights `[T, k]` out of one call of an experts module."""
    given = [*args, *kwargs.values()]
    if len(given) == 3 and all(isinstance(x, Tensor) and x.dim() == 2 for x in given):
        hidden, index, weights = given
        if index.shape == weights.shape and len(index) == len(hidden) and not index.is_floating_point():
            return hidden, index, weights
    raise UsageError(f"{name} is called in another way than with hidden states, the experts of each token and their weights")


@torch.no_grad()
def observe(model: nn.Module, batches: Sequence[Tensor], limit: int = 1 << 12) -> tuple[list[Mixture], dict[str, Seen]]:
    """Run text through the model and describe its mixtures by what their experts are called with.

    batches: token ids, int64 `[batch, length]`. limit: tokens whose hidden states are kept, a mixture, on the CPU.
    Raises UsageError for a model without mixtures that can be routed, or whose tokens run a single expert.
    """
    found = expert_modules(model)
    hidden: dict[str, list[Tensor]] = {name: [] for name, _, _ in found}
    weights: dict[str, list[Tensor]] = {name: [] for name, _, _ in found}
    handles = []

    def watch(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state, _, given = call_arguments(args, kwargs, name)
            weights[name].append(given.float().sort(dim=-1, descending=True).values.cpu())
            room = limit - sum(len(x) for x in hidden[name])
            if room > 0:
                hidden[name].append(state[:room].float().cpu())

        return before

    try:
        handles += [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module, _ in found]
        with evaluating(model):
            for batch in batches:
                model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    mixtures, seen = [], {}
    for name, module, block in found:
        if not weights[name]:
            raise UsageError(f"the model never called {name}; there is no text to calibrate on, or the layer is not used")
        given, states = torch.cat(weights[name]), torch.cat(hidden[name])
        if given.shape[1] < 2:
            raise UsageError(f"{name} runs one expert a token, so none can be skipped")
        total = given.sum(-1)
        constant = bool(total.max() - total.min() < _CONSTANT * total.mean())
        experts: Any = module.num_experts
        mixtures.append(Mixture(name, module, block, int(experts), given.shape[1], states.shape[1], constant))
        seen[name] = Seen(states, given)
    return mixtures, seen


def takes_sentinel(model: nn.Module, mixture: Mixture) -> bool:
    """Whether the eager loop of the experts passes over the index `experts`, as most do and GPT-OSS's does not.

    Tried on the CPU with one token that runs no expert: no weight is touched, so it does not matter where they are.
    """
    index = torch.full((1, mixture.top_k), mixture.experts)
    try:
        with torch.no_grad(), eager_experts(model):
            type(mixture.module).forward(mixture.module, torch.zeros(1, mixture.hidden), index, torch.zeros(1, mixture.top_k))
    except (RuntimeError, IndexError):
        return False
    return True
