"""The quantiser of a recipe: which grid a width gets, and how one matrix is brought onto it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.quantize.gptq import Order, Outcome, output_error, quantize_matrix, rtn, weighted_gram
from compress.quantize.grid import Grid, Kind
from compress.quantize.published import published

Method = Literal["gptq", "rtn", "published"]


@dataclass(frozen=True)
class Quantizer:
    """How matrices are quantised. kind: of the grid from two bits on. token_weights, keep_zeros: see `compress.recipe_quantize`."""

    method: Method = "gptq"
    kind: Kind = "float"
    scale_dtype: torch.dtype = torch.float16
    order: Order = "activation"
    rounds: int = 4
    token_weights: Literal["squared", "linear", "none"] = "squared"
    keep_zeros: Literal["auto", "yes", "no"] = "auto"

    def grid(self, bits: int, group_size: int) -> Grid:
        """The grid of a width. rtn probes and rounds one bit like the others: sign and mean magnitude."""
        return Grid(bits, group_size, "midrise" if bits == 1 and self.kind == "float" else self.kind, self.scale_dtype)

    def gram(self, inputs: Tensor, weights: Tensor | None) -> Tensor:
        """The second moment `[in, in]` of an expert's inputs `[n, in]`, with the routing weights `[n]` of its tokens as the recipe says."""
        if weights is None or self.token_weights == "none" or self.method == "published":
            return weighted_gram(inputs)
        weights = weights.to(inputs.device)
        return weighted_gram(inputs, weights.square() if self.token_weights == "squared" else weights)

    def quantize(self, weight: Tensor, gram: Tensor | None, bits: int, group_size: int, tokens: int | None) -> Outcome:
        """Quantise a matrix `[N, K]`; tokens: how many inputs its gram was summed over. Raises what `quantize_matrix` raises."""
        mask = self.mask(weight)
        grid = self.grid(bits, group_size)
        if mask is not None and not grid.has_zero:
            if bits == 1:
                raise UsageError(
                    "a matrix with pruned weights has no one-bit form: one bit knows no zero; offer two bits or more"
                )
            grid = Grid(bits, group_size, "asymmetric", self.scale_dtype)
        if self.method == "gptq":
            return quantize_matrix(weight, gram, grid, tokens=tokens, order=self.order, rounds=self.rounds, mask=mask)
        if self.method == "published" and gram is not None and tokens:
            made = published(weight, gram, bits, group_size)
            return Outcome(made, "gptq", 0.01, output_error(weight, made.dequantize(), gram), "")
        made = rtn(weight, grid, mask=mask, search=self.method != "published")
        error = output_error(weight, made.dequantize(), gram) if gram is not None else None
        return Outcome(made, "rtn", None, error, "")

    def mask(self, weight: Tensor) -> Tensor | None:
        """Which weights to keep, bool `[N, K]`, or None for all."""
        if self.keep_zeros == "no":
            return None
        kept = weight != 0
        if self.keep_zeros == "yes":
            return None if bool(kept.all()) else kept
        if weight.shape[1] % 4 or int(kept.sum()) > weight.numel() // 2:
            return None
        sparse = kept.reshape(len(weight), -1, 4).sum(-1).max() <= 2
        return kept if bool(sparse) else None
