"""Put decisions in front of the experts of a model: slots that a decision drops cost no arithmetic.

A slot is one of the k experts of a token. A hook before the experts module changes what it is called with, in one of three ways:

- One token on a CPU (decoding): it is called with the experts that run, and no others.
- Several tokens on a CPU, where the experts are dispatched by `grouped_mm` or `batched_mm`: it is called with every slot that runs as a
  token of its own that has one expert, and a hook behind it adds up the slots of each token.
- Else a dropped slot gets the index `experts`, one past the last, and weight 0. That is transformers' own mark for slots that another
  process of an expert-parallel group computes: the eager loop passes over it, and `grouped_mm`, told so by `_is_expert_parallel`, sorts
  it behind the rows that it multiplies. No number of slots has to be known on the CPU, so a GPU never waits.

Shared experts are other modules and always run. Where the model renormalises routing weights, those that remain are scaled to the sum that
all had, which keeps a model's `routed_scaling_factor`; where it does not, they stay as they are. A call in which no slot is dropped goes on
as it came, bit for bit.

Gates are no submodules of the model: its parameters, its state dict and its fingerprint are what they were.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError
from compress.routing import rules
from compress.routing.decisions import Decision
from compress.routing.mixtures import Mixture, call_arguments, takes_sentinel
from compress.routing.router import TopAnyRouter, expected_share, gumbel_noise, straight_through_keep
from compress.runtime_experts import DispatchedExperts

Mode = Literal["skip", "relaxed", "off"]


@dataclass
class Relaxation:
    """How masks are drawn in mode "relaxed": the temperature, and the seed of this forward pass's noise."""

    temperature: float = 1.0
    seed: int = 0
    shares: list[Tensor] = field(
        default_factory=list
    )  # expected share of experts that run, `[]`, one a mixture, in order of the calls


class Gate:
    """The decision of one mixture, as the hook that applies it."""

    def __init__(self, mixture: Mixture, decision: Decision, number: int, protect: float, sentinel: bool) -> None:
        self.mixture, self.decision, self.number, self.protect = mixture, decision, number, protect
        self.mode: Mode = "skip"
        self.relaxation = Relaxation()
        self.counts: Tensor | None = None  # int64 [k + 1] while counting: tokens that ran so many experts
        self.attention: Tensor | None = None  # [batch, length], received; set by the block's attention, taken by the next call
        self.rows: tuple[Tensor, int] | None = (
            None  # between the two hooks: the token of every slot that runs, and how many tokens
        )
        self._sentinel = sentinel
        self._packed = isinstance(mixture.module, DispatchedExperts)  # its own loop, whatever the configuration names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the experts: what they are called with instead, or None to leave the call as it is."""
        experts: Any = module
        self.rows = None
        if experts._is_expert_parallel:
            experts._is_expert_parallel = False
        if self.mode == "off":
            return None
        hidden, index, weights = call_arguments(args, kwargs, self.mixture.name)
        k = index.shape[1]
        if k != self.mixture.top_k:
            raise UsageError(
                f"{self.mixture.name} runs {k} experts a token now, and its routing was made for {self.mixture.top_k}"
            )
        # The order of the slots is kept: a token that drops nothing goes on with the bits that it came with.
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        chosen = index.gather(-1, order)
        if self.mode == "relaxed":
            keep = self._draw(hidden, ordered, chosen)
            return (hidden, index, self._scaled(weights, torch.zeros_like(keep).scatter(-1, order, keep))), {}
        kept = self._kept(hidden, ordered, chosen)  # [T]
        if self.counts is not None:
            self.counts += torch.bincount(kept, minlength=k + 1).to(self.counts.device)
        dispatch = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if len(hidden) == 1 and _host_sees(hidden):
            count = int(kept)
            if count == k:
                return None
            first = ordered[:, :count]
            if self.mixture.renormalise:  # by a number, where tensors of one token would take five operations
                values = ordered[0].tolist()
                first = first * (sum(values) / sum(values[:count]))
            return (hidden, chosen[:, :count], first), {}
        within = torch.arange(k, device=weights.device) < kept.unsqueeze(-1)
        runs = torch.zeros_like(within).scatter_(-1, order, within)
        one_by_one = not self._packed and dispatch in ("grouped_mm", "batched_mm")
        if _host_sees(hidden) and (one_by_one or not self._sentinel):
            if bool(within.all()):
                return None
            token, slot = runs.nonzero(as_tuple=True)
            self.rows = (token, len(hidden))
            return (hidden[token], index[token, slot, None], self._scaled(weights, runs)[token, slot, None]), {}
        if not self._sentinel and dispatch == "eager":
            raise UsageError(
                f"the eager loop of {type(module).__name__} cannot skip experts on {hidden.device}; load the model with "
                "experts_implementation='grouped_mm'"
            )
        experts._is_expert_parallel = True
        return (hidden, index.masked_fill(~runs, self.mixture.experts), self._scaled(weights, runs)), {}

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Behind the experts: the sum of each token's slots, where they were called one by one."""
        if self.rows is None:
            return None
        (token, tokens), self.rows = self.rows, None
        wide = torch.promote_types(output.dtype, torch.float32)
        total = torch.zeros(tokens, output.shape[-1], dtype=wide, device=output.device)
        return total.index_add_(0, token, output.to(wide)).to(output.dtype)

    def _kept(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        self._follow(hidden.device)
        kept = self.decision(hidden, weights, experts)
        if not self.protect:
            return kept
        received, self.attention = self.attention, None
        if received is None or received.numel() != len(hidden):
            raise CompressError(
                f"{self.mixture.name} protects tokens by the attention that they receive, but its layer returned no attention weights; "
                "the model must run with attn_implementation='eager' (or set protect to 0)"
            )
        important = rules.most_important(rules.importance(hidden.unflatten(0, received.shape), received), self.protect)
        return kept.masked_fill(important.flatten(), self.mixture.top_k)

    def _draw(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """A differentiable mask over the slots in falling order, `[T, k]`, in the dtype of the routing weights."""
        assert isinstance(self.decision, TopAnyRouter)
        self._follow(hidden.device)
        logits = self.decision.logits(hidden, weights, experts)
        seed = (self.relaxation.seed * 0x9E3779B97F4A7C15 + self.number + 1) % (1 << 63)
        generator = torch.Generator(logits.device).manual_seed(seed)
        noise = gumbel_noise(tuple(logits.shape), logits.dtype, logits.device, generator)
        self.relaxation.shares.append(expected_share(logits).mean())
        return straight_through_keep(logits, self.relaxation.temperature, noise)

    def _scaled(self, weights: Tensor, keep: Tensor) -> Tensor:
        """The routing weights of the slots that run, the others 0, `[T, k]`, scaled where the model renormalises to the sum that all had, in
        their dtype; bit for bit the same for tokens all of whose slots run."""
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        kept = wide * keep
        if self.mixture.renormalise:
            kept = kept * (wide.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
        return kept.to(weights.dtype)

    def _follow(self, device: torch.device) -> None:
        """The model may have been moved since."""
        buffer = next(self.decision.buffers())
        if buffer.device != device:
            self.decision.to(device)


class Routing:
    """All gates of one model, in the order of its layers. `attach` makes one; `detach` takes it off, `reattach` puts it back."""

    def __init__(self, model: nn.Module, gates: list[Gate], method: str) -> None:
        self.model, self.gates, self.method = model, gates, method
        self._handles: list[Any] = []

    @property
    def mixtures(self) -> list[Mixture]:
        return [gate.mixture for gate in self.gates]

    def reattach(self) -> None:
        """Put the gates (again) before the experts. Raises UsageError when the model has a routing already."""
        if routing_of(self.model) is not None:
            raise UsageError("the model has a routing already; detach it first")
        model: Any = self.model
        for gate in self.gates:
            module: Any = gate.mixture.module
            self._handles.append(module.register_forward_pre_hook(gate, with_kwargs=True))
            self._handles.append(module.register_forward_hook(gate.after))
            module._compress_gate = gate
            if gate.protect:
                for child in gate.mixture.block.children():
                    if all(inner is not module for inner in child.modules()):
                        self._handles.append(child.register_forward_hook(functools.partial(_hand_over, gate)))
        if any(gate.protect for gate in self.gates):
            model.set_attn_implementation("eager")
        model._compress_routing = self

    def detach(self) -> None:
        """Take the gates off the model: every token runs all its experts again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for gate in self.gates:
            module: Any = gate.mixture.module
            module._is_expert_parallel = False
            del module._compress_gate
        holder: Any = self.model
        del holder._compress_routing

    @contextmanager
    def using(self, mode: Mode) -> Iterator[None]:
        """Within it all gates are in a mode: "skip" (inference), "relaxed" (training; nothing is skipped) or "off" (unpruned)."""
        before = [gate.mode for gate in self.gates]
        try:
            for gate in self.gates:
                gate.mode = mode
            yield
        finally:
            for gate, mode_before in zip(self.gates, before, strict=True):
                gate.mode = mode_before

    @contextmanager
    def relaxed(self, temperature: float, seed: int) -> Iterator[Relaxation]:
        """Mode "relaxed" for one forward pass; the expected shares of its mixtures are in `shares` afterwards."""
        relaxation = Relaxation(temperature, seed)
        for gate in self.gates:
            gate.relaxation = relaxation
        with self.using("relaxed"):
            yield relaxation

    @contextmanager
    def counting(self) -> Iterator[dict[str, Tensor]]:
        """Count, by mixture, how many tokens run how many experts: int64 `[k + 1]`, filled while inside."""
        for gate in self.gates:
            gate.counts = torch.zeros(gate.mixture.top_k + 1, dtype=torch.int64)
        try:
            yield {gate.mixture.name: gate.counts for gate in self.gates if gate.counts is not None}
        finally:
            for gate in self.gates:
                gate.counts = None


def attach(
    model: nn.Module, mixtures: list[Mixture], decisions: Mapping[str, Decision], method: str, protect: float = 0.0
) -> Routing:
    """Put a decision in front of every mixture, by name; from now on the model skips.

    protect: share of the tokens of a sequence, the most important ones (`rules.importance`), that run all experts whatever the decision
    says. It needs the attention weights, so the model is switched to eager attention, which takes memory quadratic in the length.
    Raises UsageError when the model has a routing already.
    """
    gates = [
        Gate(mixture, decisions[mixture.name], number, protect, takes_sentinel(model, mixture))
        for number, mixture in enumerate(mixtures)
    ]
    routing = Routing(model, gates, method)
    routing.reattach()
    return routing


def routing_of(model: nn.Module) -> Routing | None:
    """The routing that is attached to a model."""
    return getattr(model, "_compress_routing", None)


def _host_sees(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device, or breaking a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _hand_over(gate: Gate, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After a child of the decoder layer: when it returned attention weights `[batch, heads, queries, keys]`, keep what tokens receive."""
    if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].dim() == 4:
        gate.attention = rules.received_attention(output[1])
