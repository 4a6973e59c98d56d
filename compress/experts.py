"""How many tokens reach each expert of a mixture: an expert that hardly any token reached has learned nothing to speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.calibrate import walk_blocks
from compress.capture import InputCapture
from compress.walk import measuring
from compress.weights import ParameterRef, WeightRef


def count_tokens(model: nn.Module, refs: Sequence[WeightRef], batches: Sequence[Tensor]) -> dict[str, int]:
    """Tokens that reach every expert's matrix of `refs`, by its name, when the model reads `batches`, int64 `[batch, length]`."""
    with measuring(model), InputCapture([ref for ref in refs if ref.expert is not None], gram=False) as capture:
        for batch in batches:
            model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
    return {name: stats.tokens for name, stats in capture.stats().items()}


def count_tokens_walking(model: nn.Module, refs: Sequence[WeightRef], batches: Sequence[Tensor]) -> dict[str, int]:
    """As `count_tokens`, block by block, for a model whose blocks are elsewhere while they do not run. Raises what `walk_blocks` raises."""
    experts = [ref for ref in refs if ref.expert is not None]
    found: dict[str, int] = {}
    for _, stats in walk_blocks(model, experts, batches, gram=False):
        found |= {name: seen.tokens for name, seen in stats.items()}
    return found


def tokens_by_expert(refs: Sequence[WeightRef], seen: Mapping[str, int]) -> dict[str, list[int]]:
    """Group the counts of single matrices: name of the mixture -> tokens of each of its experts, in order."""
    found: dict[str, dict[int, int]] = {}
    for ref in refs:
        if ref.expert is not None and ref.name in seen:
            mixture = ref.name.rpartition(f".{ref.expert}.")[0]
            found.setdefault(mixture, {})[ref.expert] = seen[ref.name]
    return {mixture: [counts[expert] for expert in sorted(counts)] for mixture, counts in found.items()}


def starved_parts(parameters: Sequence[ParameterRef], seen: Mapping[str, int], least: int) -> tuple[dict[str, Tensor], list[str]]:
    """The experts' matrices that fewer than `least` tokens reached.

    Returns, by parameter, bool `[experts]` for a fused parameter and `[]` for the matrix of one expert, True = starved (nothing for
    parameters that are no expert's, or have no starved one); and the names of the matrices.
    """
    parts: dict[str, Tensor] = {}
    names = []
    for p in parameters:
        starved = [ref for ref in p.refs if ref.expert is not None and seen[ref.name] < least]
        if not starved:
            continue
        names += [ref.name for ref in starved]
        parameter = p.refs[0].parameter
        parts[p.name] = torch.zeros(parameter.shape[:1] if parameter.dim() == 3 else (), dtype=torch.bool)
        for ref in starved:
            parts[p.name][ref.expert if parameter.dim() == 3 else ...] = True
    return parts, names
