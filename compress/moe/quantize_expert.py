"""Quantise one expert on the tokens that it gets, and measure what that does to the block's output.

Gate and up share their inputs; what follows them (down) is calibrated on the inputs that the *quantised* gate and up produce, so it
makes up for part of their error. With only this expert quantised the block's output changes by `g_t (E(x_t) - E^q(x_t))` on the tokens t
routed to it and by nothing elsewhere, so the squared Frobenius norm of the change is

    sum_t g_t^2 |E(x_t) - E^q(x_t)|^2

without running the block again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.moe.mixture import Expert, inputs_of
from compress.quantize.gptq import Outcome
from compress.quantize.grid import Quantized
from compress.quantize.quantizer import Quantizer

Widths = Mapping[str, tuple[int, int]]  # role -> bits and group size


@dataclass(frozen=True, eq=False)
class Tokens:
    """What an expert gets: hidden states `[n, hidden]` in the model's type; routing weights `[n]`, None where they are not known;
    gradients of the loss at the block's output for these tokens `[n, hidden]`, None where not asked for."""

    hidden: Tensor
    weights: Tensor | None
    gradients: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)


@contextmanager
def replaced(expert: Expert, values: Mapping[str, Quantized]) -> Iterator[None]:
    """Within it some matrices of the expert have the values of a quantised form."""
    before = {role: expert.refs[role].view().clone() for role in values}
    with torch.no_grad():
        try:
            for role, value in values.items():
                ref = expert.refs[role]
                ref.view().copy_(value.dequantize(ref.parameter.dtype))
            yield
        finally:
            for role, former in before.items():
                expert.refs[role].view().copy_(former)


@torch.no_grad()
def quantize_expert(expert: Expert, tokens: Tokens, widths: Widths, quantizer: Quantizer) -> dict[str, Outcome]:
    """Quantise every matrix of an expert; the model's weights are as before afterwards. Take it within `compress.walk.measuring`.

    An expert without tokens is rounded to nearest, and its outcomes say so.
    """
    if not len(tokens):
        return {role: quantizer.quantize(ref.view(), None, *widths[role], 0) for role, ref in expert.refs.items()}
    inputs, _ = inputs_of(expert, tokens.hidden)
    first = [role for role, x in inputs.items() if x.shape == tokens.hidden.shape and torch.equal(x, tokens.hidden)]
    gram = quantizer.gram(tokens.hidden, tokens.weights)
    done = {role: quantizer.quantize(expert.refs[role].view(), gram, *widths[role], len(tokens)) for role in first}
    rest = [role for role in expert.refs if role not in done]
    if rest:
        if quantizer.method != "published":
            with replaced(expert, {role: outcome.quantized for role, outcome in done.items()}):
                inputs, _ = inputs_of(expert, tokens.hidden)
        for role in rest:
            gram = quantizer.gram(inputs[role], tokens.weights)
            done[role] = quantizer.quantize(expert.refs[role].view(), gram, *widths[role], len(tokens))
    return {role: done[role] for role in expert.refs}


@dataclass(frozen=True)
class Change:
    """By how much the block's output changes: `squared` sum_t g_t^2 |change|^2, `fisher` sum_tc G_tc^2 (g_t change_tc)^2 or None."""

    squared: float
    fisher: float | None


@torch.no_grad()
def measure_change(expert: Expert, tokens: Tokens, output: Tensor, values: Mapping[str, Quantized]) -> Change:
    """What it costs to give some matrices of an expert these values. output: that of the expert as it is, `[n, hidden]`."""
    if not len(tokens):
        return Change(0.0, None if tokens.gradients is None else 0.0)
    with replaced(expert, values):
        change = expert.run(tokens.hidden).double() - output.double()
    if tokens.weights is not None:
        change *= tokens.weights.to(change)[:, None]
    squares = change.square_()
    fisher = None if tokens.gradients is None else float((squares * tokens.gradients.to(squares).square()).sum())
    return Change(float(squares.sum()), fisher)
