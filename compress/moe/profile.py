"""Measure what every width would cost every expert: one streamed pass over the calibration text, a layer in memory at a time.

Inputs are those of the unquantised model. The error of each candidate is measured with the real quantiser on the tokens routed to the
expert (`compress.moe.quantize_expert`): a probe by rounding alone finds two bits hardly better than one, and so misleads the allocation.

For the Fisher cost the hidden states of all layers are kept on the way up, and gradients of the summed next-token loss are taken on the
way down, a block at a time; a layer is measured when its gradient is there (the cost of GEMQ, arXiv 2605.23078).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compress.activations import Activations, Where
from compress.errors import UsageError
from compress.moe.mixture import Mixture, Routed, find_mixture, inputs_of, joined, observing
from compress.moe.profile_store import LayerProfile, ProfileStore
from compress.moe.quantize_expert import Tokens, measure_change, quantize_expert
from compress.quantize.quantizer import Quantizer
from compress.stream import StreamedModel
from compress.structure import Block
from compress.walk import Batch, BlockCall, catch_calls, eager_experts, evaluating, measuring, skipped
from compress.weights import WeightRef

Progress = Callable[[int, int, str], None]  # experts done, experts in all, what is being done
Pairs = Sequence[tuple[int, int]]


def profile_experts(
    streamed: StreamedModel,
    refs: Sequence[WeightRef],
    batches: Sequence[Batch],
    pairs: Pairs,
    quantizer: Quantizer,
    store: ProfileStore,
    *,
    fisher: bool = False,
    cache: Where = "memory",
    scratch: Path | None = None,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Measure all experts of a model into `store`; layers that it has are passed over. Returns False when it was asked to stop.

    batches: calibration token ids, int64 `[batch, length]`, or keyword arguments of the model; with `fisher` token ids of one length.
    pairs: candidates, (bits, group size). scratch: folder for hidden states with cache "disk". Memory: one block, the hidden states of one
    layer (with `fisher` of all), one expert's Hessians.
    """
    model, blocks = streamed.model, streamed.blocks
    texts = [batch for batch in batches if isinstance(batch, Tensor)]
    if fisher and len(texts) < len(batches):
        raise UsageError("gradients are measured on token ids alone: take the images out, or the fisher cost")
    with measuring(model):
        caught = list(catch_calls(model, blocks, list(batches)))
    calls = [call for _, call in caught]
    mixtures = {block.index: found for block in blocks if (found := find_mixture(model, block, refs)) is not None}
    total = sum(len(mixture.experts) for mixture in mixtures.values())
    done = 0

    def measure(block: Block, states: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        nonlocal done
        mixture = mixtures.get(block.index)
        if mixture is None:
            return
        if not store.has(block.index):
            with measuring(model), observing(model, mixture) as parts:
                outputs = [calls[i][block.index].run(state) for i, state in enumerate(states)]
            residual = float(torch.stack([out.double().square().sum() for out in outputs]).sum().sqrt())
            del outputs
            flat = None if gradients is None else torch.cat([g.reshape(-1, g.shape[-1]) for g in gradients])

            def tell(expert: int) -> None:
                if progress:
                    progress(done + expert, total, f"layer {block.index}")

            with measuring(model):
                store.write(_measure_layer(mixture, joined(parts, mixture), flat, residual, pairs, quantizer, tell))
        done += len(mixture.experts)
        if progress:
            progress(done, total, f"layer {block.index}")

    last = max(mixtures, default=-1)
    if not fisher:
        states = [state for state, _ in caught]
        del caught
        for block in blocks[: last + 1]:
            if asked_to_stop():
                return False
            with streamed.holding(block):
                measure(block, states, None)
                if block.index < last:
                    with measuring(model):
                        for i, call in enumerate(calls):
                            states[i] = call[block.index].run(states[i])
        return True
    kept = _States(len(blocks) + 1, [state for state, _ in caught], cache, scratch)
    del caught
    for block in blocks:
        with streamed.holding(block), measuring(model):
            for i, call in enumerate(calls):
                kept.put(block.index + 1, i, call[block.index].run(kept.get(block.index, i)))
    gradients = [_loss_gradient(model, blocks, ids, kept.get(len(blocks), i)) for i, ids in enumerate(texts)]
    for block in reversed(blocks):
        if asked_to_stop():
            return False
        with streamed.holding(block):
            measure(block, kept.layer(block.index), gradients)
            if block.index > min(mixtures, default=0):
                for i, call in enumerate(calls):
                    gradients[i] = _pulled_back(model, call[block.index], kept.get(block.index, i), gradients[i])
    return True


def _measure_layer(
    mixture: Mixture,
    routed: Routed,
    gradients: Tensor | None,
    residual: float,
    pairs: Pairs,
    quantizer: Quantizer,
    tell: Callable[[int], None],
) -> LayerProfile:
    """All candidates of all experts of one mixture. gradients: `[T, hidden]`."""
    count, roles = len(mixture.experts), mixture.roles
    frequency, weight, peak = np.zeros(count), np.zeros(count), np.zeros(count)
    squared, fisher = np.zeros((count, len(pairs))), np.zeros((count, len(pairs)))
    by_role = {role: (np.zeros((count, len(pairs))), np.zeros((count, len(pairs)))) for role in roles}
    device = next(mixture.module.parameters()).device
    for expert in mixture.experts:
        e = expert.index
        token, weights = routed.of(e)
        frequency[e] = len(token)
        if routed.probabilities is not None:
            weight[e] = float(routed.probabilities[routed.index == e].double().sum())
        given = None if gradients is None else gradients[token.to(gradients.device)].to(device)
        tokens = Tokens(routed.hidden[token].to(device), None if weights is None else weights.to(device), given)
        output = inputs_of(expert, tokens.hidden)[1] if len(token) else tokens.hidden
        peak[e] = float(output.abs().max()) if len(token) else 0.0
        for c, pair in enumerate(pairs):
            outcomes = quantize_expert(expert, tokens, dict.fromkeys(roles, pair), quantizer)
            values = {role: outcome.quantized for role, outcome in outcomes.items()}
            change = measure_change(expert, tokens, output, values)
            squared[e, c], fisher[e, c] = change.squared, change.fisher or 0.0
            for role in roles:
                change = measure_change(expert, tokens, output, {role: values[role]})
                by_role[role][0][e, c], by_role[role][1][e, c] = change.squared, change.fisher or 0.0
        tell(e + 1)
    measured = gradients is not None
    return LayerProfile(
        mixture.layer,
        frequency,
        weight if routed.probabilities is not None else None,
        peak,
        residual,
        squared,
        fisher if measured else None,
        {role: (a, b if measured else None) for role, (a, b) in by_role.items()},
        {role: ref.shape for role, ref in mixture.experts[0].refs.items()},
        tuple(pairs),
    )


class _States:
    """Hidden states of every layer, a row a layer, in memory or in a file."""

    def __init__(self, layers: int, first: Sequence[Tensor], cache: Where, scratch: Path | None) -> None:
        file = scratch / "states" if cache == "disk" and scratch is not None else None
        self._rows, self._device = len(first), first[0].device
        self._sequences = [len(state) for state in first]  # the last batch may have fewer
        largest = (max(self._sequences), *first[0].shape[1:])
        self._data = Activations(layers * len(first), largest, first[0].dtype, file)
        for i, state in enumerate(first):
            self.put(0, i, state)

    def put(self, layer: int, index: int, state: Tensor) -> None:
        self._kept(layer, index).copy_(state)

    def get(self, layer: int, index: int) -> Tensor:
        return self._kept(layer, index).to(self._device)

    def _kept(self, layer: int, index: int) -> Tensor:
        return self._data[layer * self._rows + index][: self._sequences[index]]

    def layer(self, layer: int) -> list[Tensor]:
        return [self.get(layer, i) for i in range(self._rows)]


@contextmanager
def _with_gradients(model: nn.Module) -> Iterator[None]:
    with torch.enable_grad(), eager_experts(model), evaluating(model):
        yield


def _loss_gradient(model: nn.Module, blocks: Sequence[Block], batch: Tensor, state: Tensor) -> Tensor:
    """Gradient of the next-token loss, summed over the batch, at the last block's output `state [batch, length, hidden]`."""
    leaf = state.detach().requires_grad_(True)
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(skipped(block.module))
        # The hidden states that leave the last block are these, whatever entered the first.
        hook = blocks[-1].module.register_forward_hook(lambda module, args, output: leaf)
        try:
            stack.enter_context(_with_gradients(model))
            logits = model(input_ids=batch.to(leaf.device), use_cache=False).logits
            targets = batch[:, 1:].to(logits.device)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        finally:
            hook.remove()
    return gradient.detach()


def _pulled_back(model: nn.Module, call: BlockCall, state: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at a block's input from that at its output."""
    leaf = state.detach().requires_grad_(True)
    with _with_gradients(model):
        (pulled,) = torch.autograd.grad(call.run(leaf), leaf, gradient)
    return pulled.detach()
