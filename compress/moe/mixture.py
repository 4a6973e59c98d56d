"""The experts of one decoder block: their matrices, what text sends to them, and one expert run alone on its tokens.

Fused experts behind the interface of transformers' `use_experts_implementation` and lists of expert modules are run by their own code,
so gates, biases, clamps and interleaved rows are the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.capture import InputCapture
from compress.errors import UsageError
from compress.routing.mixtures import call_arguments
from compress.structure import Block, expert_groups, router_parameters
from compress.weights import WeightRef


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert: its matrices by role (`gate_proj`, `w2`, ...), and `run`, hidden states `[n, hidden] -> [n, hidden]`, unweighted."""

    index: int
    refs: dict[str, WeightRef]
    run: Callable[[Tensor], Tensor]

    @property
    def weights(self) -> int:
        """Weights of all its matrices."""
        return sum(ref.shape[0] * ref.shape[1] for ref in self.refs.values())


@dataclass(frozen=True, eq=False)
class Mixture:
    """The mixture of one block. router: the parameter `[experts, hidden]` that chooses, None where there is no such plain matrix."""

    name: str
    layer: int
    module: nn.Module
    fused: bool
    experts: list[Expert]
    router: str | None

    @property
    def roles(self) -> list[str]:
        return list(self.experts[0].refs)


@dataclass
class Routed:
    """What one pass over text sent to a mixture, all batches together, on the CPU.

    hidden `[T, hidden]` in the model's type; index `[T, k]`: the experts of each token; weights `[T, k]` float32: their routing weights as
    the model uses them, None for a list of modules, whose weights are applied out of sight; probabilities `[T, k]` float32: those of the
    softmax over all experts before the top k are renormalised, or the weights where the router is no softmax.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor | None
    probabilities: Tensor | None

    def of(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """Numbers of the tokens that an expert gets `[n]`, and their weights `[n]`."""
        token, slot = (self.index == expert).nonzero(as_tuple=True)
        return token, None if self.weights is None else self.weights[token, slot]


def find_mixture(model: nn.Module, block: Block, refs: Sequence[WeightRef]) -> Mixture | None:
    """The mixture in a block, or None in a dense one. refs: the matrices of the model.

    Raises UsageError for fused experts of another interface (Llama-4 gives every token to every expert), and for several mixtures.
    """
    groups = expert_groups(model, block)
    if not groups:
        return None
    if len(groups) > 1:
        raise UsageError(f"{block.name} holds {len(groups)} mixtures of experts; one a layer is what can be allocated")
    group = groups[0]
    if group.fused and not all(hasattr(group.module, name) for name in ("_apply_gate", "num_experts", "has_gate")):
        raise UsageError(
            f"{group.name} ({type(group.module).__name__}) is not called with the experts of each token and their weights, as "
            "transformers' `use_experts_implementation` has it; its experts cannot be profiled or quantised"
        )
    matrices: dict[int, dict[str, WeightRef]] = {i: {} for i in range(group.count)}
    for ref in refs:
        if ref.expert is not None and ref.layer == block.index and ref.name.startswith(f"{group.name}.{ref.expert}."):
            matrices[ref.expert][ref.role] = ref
    if not all(matrices.values()):
        raise UsageError(f"{group.name}: some of its experts are excluded; profile all experts of a mixture or none")
    experts = [Expert(i, found, _runner(group.module, group.fused, i)) for i, found in matrices.items()]
    router = next((name for name in router_parameters(model, block) if _rows(model, name) == group.count), None)
    return Mixture(group.name, block.index, group.module, group.fused, experts, router)


def _rows(model: nn.Module, name: str) -> int:
    return model.get_parameter(name).shape[0]


def _runner(module: Any, fused: bool, index: int) -> Callable[[Tensor], Tensor]:
    if not fused:
        return lambda x: module[index](x)

    def run(x: Tensor) -> Tensor:
        chosen = torch.full((len(x), 1), index, device=x.device)
        return module(x, chosen, torch.ones(len(x), 1, dtype=x.dtype, device=x.device))

    return run


@contextmanager
def observing(model: nn.Module, mixture: Mixture) -> Iterator[list[Routed]]:
    """While it lasts, every pass through the mixture adds what its experts were given to the list; `joined` makes one of them."""
    found: list[Routed] = []
    handles = []
    if mixture.fused:

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, weights = call_arguments(args, kwargs, mixture.name)
            given = weights.detach().float().cpu()
            raw = _probabilities(model, mixture, hidden, index, given)
            found.append(Routed(hidden.detach().cpu(), index.detach().cpu(), given, raw))

        handles.append(mixture.module.register_forward_pre_hook(before, with_kwargs=True))
    else:
        for expert in mixture.experts:
            listed: Any = mixture.module

            def one(module: nn.Module, args: tuple[Any, ...], e: int = expert.index) -> None:
                hidden = args[0].detach().reshape(-1, args[0].shape[-1]).cpu()
                found.append(Routed(hidden, torch.full((len(hidden), 1), e), None, None))

            handles.append(listed[expert.index].register_forward_pre_hook(one))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def joined(parts: Sequence[Routed], mixture: Mixture) -> Routed:
    """All passes as one. Raises UsageError when nothing reached the mixture."""
    if not parts:
        raise UsageError(f"no token reached {mixture.name}")

    def cat(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return Routed(cat("hidden"), cat("index"), cat("weights"), cat("probabilities"))


def _probabilities(model: nn.Module, mixture: Mixture, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Softmax probabilities of the chosen experts, if the model's weights are these up to a factor a token; else the weights."""
    if mixture.router is None:
        return weights
    router = model.get_parameter(mixture.router)
    owner = model.get_submodule(mixture.router.rpartition(".")[0])
    bias = getattr(owner, "bias", None)
    logits = nn.functional.linear(
        hidden.detach().float(), router.detach().float(), None if bias is None else bias.detach().float()
    )
    chosen = logits.softmax(-1).gather(1, index).cpu()
    shares = [part / part.sum(-1, keepdim=True).clamp_min(1e-20) for part in (chosen, weights)]
    alike = (shares[0] - shares[1]).abs().mean() < 0.02  # bfloat16 routing weights differ by up to 0.4 %
    return chosen if bool(alike) else weights


class _Inputs(InputCapture):
    """Keeps the inputs of matrices as they are, instead of summing them up."""

    def __init__(self, refs: Sequence[WeightRef]) -> None:
        super().__init__(refs, gram=False)
        self.kept: dict[str, Tensor] = {}

    def _record(self, refs: list[WeightRef], inputs: Tensor, stacked: bool) -> None:
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        for ref in refs:
            self.kept[ref.role] = flat


def inputs_of(expert: Expert, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Run an expert on `x [n, hidden]`: the inputs `[n, in]` of each of its matrices, by role, and its output `[n, hidden]`.

    Take it within `compress.walk.measuring`. Raises UsageError when a matrix takes part in no product that is recognised.
    """
    with _Inputs(list(expert.refs.values())) as capture:
        output = expert.run(x)
    missing = [ref.name for role, ref in expert.refs.items() if role not in capture.kept]
    if missing:
        raise UsageError(f"{missing[0]}: its expert ran without any product with it that is recognised; exclude it")
    return capture.kept, output
