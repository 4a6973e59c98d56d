"""Quantise a whole model, a layer in memory at a time, into a store.

Every block is calibrated on what the already quantised blocks before it put out. Within a block the matrices that are no routed expert's
(attention, shared experts, dense layers) go first, then the experts on the tokens that the router sends them now. A layer that the store
has is taken from there, so an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from compress.capture import InputCapture
from compress.errors import CompressError
from compress.moe.mixture import find_mixture, joined, observing
from compress.moe.quantize_expert import Tokens, Widths, quantize_expert
from compress.quantize.gptq import Outcome
from compress.quantize.grid import Quantized
from compress.quantize.quantizer import Quantizer
from compress.quantize.store import QuantizedStore
from compress.recipe_quantize import RestSection
from compress.stream import StreamedModel
from compress.structure import Block
from compress.walk import Batch, catch_calls, measuring
from compress.weights import WeightRef

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Note:
    """What became of one matrix, for the report: its width, relative error of its outputs on the calibration text, tokens, and a remark
    where it was not quantised as asked for."""

    bits: int
    error: float | None
    tokens: int
    remark: str


def rest_widths(refs: Sequence[WeightRef], rules: Sequence[RestSection], group_size: int) -> dict[str, tuple[int, int]]:
    """(bits, group size) of the matrices that are no routed expert's, by name; the first rule that matches counts, none leaves it."""
    found = {}
    for ref in refs:
        if ref.expert is not None:
            continue
        for rule in rules:
            if any(fnmatchcase(ref.name, glob) or fnmatchcase(ref.full_name, glob) for glob in rule.include):
                if rule.bits is not None:
                    found[ref.name] = (rule.bits, rule.group_size or group_size)
                break
    return found


@torch.no_grad()
def quantize_model(
    streamed: StreamedModel,
    refs: Sequence[WeightRef],
    batches: Sequence[Batch],
    widths: Mapping[int, Sequence[Widths]],
    rest: Mapping[str, tuple[int, int]],
    quantizer: Quantizer,
    store: QuantizedStore,
    *,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Quantise all experts (`widths`: layer -> expert -> role -> bits and group size) and the matrices in `rest`.

    batches: calibration token ids, int64 `[batch, length]`, or keyword arguments of the model. A model in memory has its
    weights as before afterwards. Returns False when it was asked to stop. Memory: one block, the hidden states that enter it, and the
    Hessians of one expert or of the block's other matrices.
    """
    model, blocks = streamed.model, streamed.blocks
    with measuring(model):
        caught = list(catch_calls(model, blocks, list(batches)))
    states, calls = [state for state, _ in caught], [call for _, call in caught]
    del caught
    for block in blocks:
        if asked_to_stop():
            return False
        with streamed.holding(block):
            here = [ref for ref in refs if ref.layer == block.index]
            before = {ref.name: ref.view().clone() for ref in here}
            try:
                if store.file(block.index).is_file():
                    _put(here, dict(store.read_layer(block.index)))
                else:
                    matrices, notes = _quantize_block(streamed, block, here, refs, states, calls, widths, rest, quantizer)
                    store.write(block.index, matrices, {"matrices": {name: asdict(note) for name, note in notes.items()}})
                with measuring(model):
                    for i, call in enumerate(calls):
                        states[i] = call[block.index].run(states[i])
            finally:
                if not streamed.streamed:
                    for ref in here:
                        ref.view().copy_(before[ref.name])
        if progress:
            progress(block.index + 1, len(blocks), "layers")
    return True


def _quantize_block(
    streamed: StreamedModel,
    block: Block,
    here: Sequence[WeightRef],
    refs: Sequence[WeightRef],
    states: Sequence[Tensor],
    calls: Sequence[Sequence[object]],
    widths: Mapping[int, Sequence[Widths]],
    rest: Mapping[str, tuple[int, int]],
    quantizer: Quantizer,
) -> tuple[dict[str, Quantized], dict[str, Note]]:
    """Quantise one block and leave the quantised values in the model."""
    model = streamed.model
    outcomes: dict[str, Outcome] = {}
    tokens: dict[str, int] = {}

    def run() -> None:
        for i, state in enumerate(states):
            calls[i][block.index].run(state)  # type: ignore[attr-defined]

    others = [ref for ref in here if ref.name in rest]
    if others:
        with measuring(model), InputCapture(others) as capture:
            run()
        if unseen := capture.unseen():
            raise CompressError(
                f"{', '.join(unseen)}: the model ran without any product with this weight that is recognised; exclude it"
            )
        for ref in others:
            stats = capture.stats()[ref.name]
            tokens[ref.name] = stats.tokens
            outcomes[ref.name] = quantizer.quantize(ref.view(), stats.gram, *rest[ref.name], stats.tokens)
        del capture
        _put(others, {ref.name: outcomes[ref.name].quantized for ref in others})
    mixture = find_mixture(model, block, refs)
    if mixture is not None and block.index in widths:
        with measuring(model), observing(model, mixture) as parts:
            run()
        routed = joined(parts, mixture)
        device = next(mixture.module.parameters()).device
        for expert in mixture.experts:
            token, weights = routed.of(expert.index)
            given = Tokens(routed.hidden[token].to(device), None if weights is None else weights.to(device))
            with measuring(model):
                found = quantize_expert(expert, given, widths[block.index][expert.index], quantizer)
            for role, ref in expert.refs.items():
                outcomes[ref.name], tokens[ref.name] = found[role], len(given)
        _put(here, {ref.name: outcomes[ref.name].quantized for expert in mixture.experts for ref in expert.refs.values()})
    notes = {
        name: Note(outcome.quantized.grid.bits, outcome.error, tokens[name], outcome.note) for name, outcome in outcomes.items()
    }
    return {ref.name: outcomes[ref.name].quantized for ref in here if ref.name in outcomes}, notes


@torch.no_grad()
def _put(refs: Sequence[WeightRef], values: Mapping[str, Quantized]) -> None:
    """Write dequantised values into the model."""
    for ref in refs:
        if ref.name in values:
            ref.view().copy_(values[ref.name].dequantize(ref.parameter.dtype))
