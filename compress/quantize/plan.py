"""What `compress run` will do, from the configuration and the headers of the checkpoint alone: sizes, memory, work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compress.errors import UsageError
from compress.models import meta_model
from compress.moe.mixture import find_mixture
from compress.quantize.model import rest_widths
from compress.recipe_quantize import QuantizeRecipe
from compress.structure import decoder_blocks
from compress.weights import find_weights

_STATE = 4  # bytes of float32, in which Hessians are summed and factorised


@dataclass(frozen=True)
class QuantizePlan:
    """Sizes in bytes. block: the largest decoder block; outside: everything that is in no block; states: hidden states of the calibration
    text that are kept at once; tokens: hidden states and routing of one layer's experts; hessians: those of the largest matrix, with
    factor and inverse; matrices: to be quantised, experts and others; probes: matrices to quantise while profiling."""

    model: str
    layers: int
    experts: int
    expert_weights: int
    weights: int
    calibration_tokens: int
    block: int
    outside: int
    whole: int
    states: int
    tokens: int
    hessians: int
    matrices: int
    probes: int

    @property
    def streamed_peak(self) -> int:
        """Memory of a streamed run."""
        return self.outside + 2 * self.block + self.states + self.tokens + self.hessians

    @property
    def whole_peak(self) -> int:
        """Memory of a run with the model in memory: the model, and while measuring or tuning its quantised copy."""
        return max(self.whole + self.block + self.states + self.tokens + self.hessians, 2 * self.whole)

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {**asdict(self), "streamed_peak": self.streamed_peak, "whole_peak": self.whole_peak}

    def describe(self) -> str:
        """For people."""

        def gb(n: int) -> str:
            return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"

        return "\n".join(
            [
                f"{self.model}: {self.experts:,} experts in {self.layers} layers, {self.expert_weights:,} of {self.weights:,} weights",
                f"calibration: {self.calibration_tokens:,} tokens; {self.probes:,} matrices are quantised to profile the experts, "
                f"{self.matrices:,} for the result",
                f"memory, a block at a time: {gb(self.streamed_peak)}, without the program itself",
                f"  outside the blocks {gb(self.outside)}, a block and its former values {gb(2 * self.block)}, hidden states {gb(self.states)}, "
                f"tokens of one layer's experts {gb(self.tokens)}, Hessians {gb(self.hessians)}",
                f"memory, the model whole: {gb(self.whole_peak)}",
            ]
        )


def plan_quantize(recipe: QuantizeRecipe) -> QuantizePlan:
    """Plan a recipe. Raises UsageError for a dense model, or one with mixtures that cannot be quantised."""
    wanted = recipe.model
    model: Any = meta_model(wanted.source, wanted.revision, wanted.trust_remote_code)
    refs, blocks = find_weights(model), decoder_blocks(model)
    mixtures = [m for b in blocks if (m := find_mixture(model, b, refs)) is not None]
    if not mixtures:
        raise UsageError(f"{wanted.source} has no mixture of experts; it is a dense model")
    # A sample with an image is counted as long as one of text: how long it is only the processor knows. What a model with DeepStack
    # adds between its first blocks is not counted.
    tokens = (recipe.samples + (recipe.images.samples if recipe.images else 0)) * recipe.data.seqlen
    sizes = [sum(p.numel() * p.element_size() for p in b.module.parameters()) for b in blocks]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    hidden = max(e.refs[r].shape[1] for m in mixtures for e in m.experts[:1] for r in m.roles)
    width = model.get_input_embeddings().weight.shape[1]
    one_state = tokens * width * next(model.parameters()).element_size()
    fisher = recipe.allocate.mode == "fisher"
    layers_kept = (len(blocks) + 2) if fisher else 1
    states = one_state * (1 if recipe.cache == "disk" and fisher else layers_kept)
    experts = sum(len(m.experts) for m in mixtures)
    matrices = sum(len(e.refs) for m in mixtures for e in m.experts)
    profiled = recipe.allocate.bits_file is None
    return QuantizePlan(
        wanted.source,
        len(mixtures),
        experts,
        sum(e.weights for m in mixtures for e in m.experts),
        sum(p.numel() for p in model.parameters()),
        tokens,
        max(sizes),
        whole - sum(sizes),
        whole,
        states,
        2 * one_state,
        4 * _STATE * max(hidden, width) ** 2,
        matrices + len(rest_widths(refs, recipe.rest, recipe.quantizer.group_size)),
        matrices * len(recipe.pairs()) if profiled else 0,
    )
