"""One-shot pruning of a whole model: the priors of mask learning, and the methods it is compared with.

All methods walk the decoder blocks in order, each block calibrated on what the already pruned blocks before it put out, as the
papers do. The model comes back with the weights it had; masks and, for SparseGPT, updated weights are returned beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from compress.calibrate import walk_blocks
from compress.capture import InputStats
from compress.weights import WeightRef, by_parameter
from maskllm import priors
from maskllm.patterns import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

Method = Literal["magnitude", "wanda", "ria", "sparsegpt"]
METHODS: tuple[Method, ...] = ("magnitude", "wanda", "ria", "sparsegpt")


@dataclass
class Pruned:
    """Result of one method. Keys are parameter names.

    masks: bool, True = kept, of the parameter's shape. weights: what SparseGPT made of the parameters (pruned and updated, the
    parameter's dtype), empty for other methods. starved: matrices that no calibration token reached (experts that were never
    chosen); they were pruned by magnitude.
    """

    method: Method
    masks: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    starved: list[str] = field(default_factory=list)


@torch.no_grad()
def prune_one_shot(
    model: nn.Module,
    refs: Sequence[WeightRef],
    pattern: Pattern,
    method: Method,
    batches: Sequence[Tensor],
    *,
    damping: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Prune every matrix of `refs` to `pattern` by `method`.

    batches: calibration token ids, int64 `[batch, length]` each; magnitude needs none. damping: SparseGPT's, as a share of the mean
    diagonal. progress: called with (blocks done, blocks to prune). The model's weights are unchanged afterwards, whatever happens.
    Raises MaskError where M does not divide a contracted dimension, and what `walk_blocks` raises.
    """
    parameters = by_parameter(refs)
    for ref in refs:
        pattern.check_divides(ref.shape[1], ref.name)
    result = Pruned(method)
    originals = {p.name: p.refs[0].parameter.detach().clone() for p in parameters}
    for p in parameters:
        result.masks[p.name] = torch.zeros(originals[p.name].shape, dtype=torch.bool)
    layers = {ref.layer for ref in refs}
    try:
        for done, (stats, here) in enumerate(_walk(model, refs, method, batches), start=1):
            for ref in here:
                _prune_matrix(ref, stats.get(ref.name), pattern, method, damping, result)
            if progress and here:
                progress(min(done, len(layers)), len(layers))
        if method == "sparsegpt":
            result.weights = {p.name: p.refs[0].parameter.detach().clone() for p in parameters}
    finally:
        for p in parameters:
            p.refs[0].parameter.copy_(originals[p.name])
    return result


def _walk(
    model: nn.Module, refs: Sequence[WeightRef], method: Method, batches: Sequence[Tensor]
) -> Iterator[tuple[dict[str, InputStats], list[WeightRef]]]:
    if method == "magnitude":
        for layer in dict.fromkeys(ref.layer for ref in refs):
            yield {}, [ref for ref in refs if ref.layer == layer]
        return
    for block, stats in walk_blocks(model, refs, batches, gram=method == "sparsegpt"):
        yield stats, [ref for ref in refs if ref.layer == block.index]


def _prune_matrix(
    ref: WeightRef, stats: InputStats | None, pattern: Pattern, method: Method, damping: float, result: Pruned
) -> None:
    """Decide one matrix, write its pruned form into the model, its mask into `result`."""
    weight = ref.view()  # [out, in]
    if method != "magnitude" and (stats is None or stats.tokens == 0):
        result.starved.append(ref.name)
    if method == "magnitude" or stats is None or stats.tokens == 0:
        mask = pattern.best_of(priors.magnitude(weight))
        pruned = weight * mask
    elif method == "wanda":
        mask = pattern.best_of(priors.wanda(weight, stats.sum_squares, stats.tokens))
        pruned = weight * mask
    elif method == "ria":
        mask = pattern.best_of(priors.ria(weight, stats.sum_squares))
        pruned = weight * mask
    else:
        assert stats.gram is not None
        found = priors.sparsegpt(weight, stats.gram, pattern, damping=damping)
        mask, pruned = found.mask, found.weight
    weight.copy_(pruned)
    ref.slice_of(result.masks[ref.full_name]).copy_(mask)
