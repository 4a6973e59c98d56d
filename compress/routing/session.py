"""A model loaded for a routing recipe, with the texts to learn from, to calibrate on and to measure on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from compress import console
from compress.data import IntArray, TokenBlocks, tokenize
from compress.device import tell_slow
from compress.errors import UsageError
from compress.evaluate import EvalText, positions
from compress.measure import eval_texts, measure_text, text_source
from compress.models import LoadedModel, fingerprint, load_model
from compress.recipe import SourceSection
from compress.recipe_file import dump_recipe
from compress.recipe_routing import LearnRoutingRecipe
from compress.routing.calibrate import activation, mean_experts
from compress.routing.gate import Routing, routing_of
from compress.routing.mixtures import Mixture, Seen, observe
from compress.routing.rules import check_target


@dataclass
class RoutingSession:
    """A loaded model with everything a run reads. calibration: token ids int64 `[batch, length]`; seen: what they showed of the mixtures."""

    recipe: LearnRoutingRecipe
    loaded: LoadedModel
    blocks: TokenBlocks | None  # to learn from; None where nothing is learned
    calibration: list[Tensor]
    mixtures: list[Mixture]
    seen: Mapping[str, Seen]
    texts: dict[str, EvalText]

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What a continued run must share with the one that saved a checkpoint."""
        tokens = hashlib.sha256(b"".join(batch.numpy().tobytes() for batch in self.calibration))
        return {
            "model": fingerprint(self.loaded.model),
            "data": (self.blocks.fingerprint if self.blocks else "") + tokens.hexdigest(),
            "recipe": hashlib.sha256(dump_recipe(self.recipe).encode()).hexdigest(),
        }

    def measure(self, name: str, routing: Routing | None) -> dict[str, Any]:
        """One line of the summary: perplexity on every text, and with a routing the divergence from the unpruned model and the experts
        that run. `perplexity` is that on the first text."""
        row: dict[str, Any] = {
            "method": name,
            "perplexity": None,
            "perplexities": {},
            "kl": {},
            "activation": {},
            "experts_per_token": {},
        }
        for label, text in self.texts.items():
            wanted = self.recipe.evaluate.texts[label]
            row["kl"][label], row["activation"][label] = 0.0, 1.0
            row["experts_per_token"][label] = {m.name: float(m.top_k) for m in self.mixtures}
            if routing is None:
                found = measure_text(name, label, self.loaded.model, self.loaded, text, wanted)
            else:
                reference = Unpruned(self.loaded.model, routing)
                with routing.counting() as counts:
                    found = measure_text(name, label, self.loaded.model, self.loaded, text, wanted, reference)
                experts = {mixture: mean_experts(count) for mixture, count in counts.items()}
                row["kl"][label], row["experts_per_token"][label] = found.kl, experts
                row["activation"][label] = activation(self.mixtures, experts)
            row["perplexities"][label] = found.perplexity
        row["perplexity"] = next(iter(row["perplexities"].values()), None)
        return row


class Unpruned(nn.Module):
    """A routed model as it is without its routing, for comparison: the same weights, every expert of a token runs."""

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.model, self.routing = model, routing

    @property
    def config(self) -> Any:
        return self.model.config

    def get_input_embeddings(self) -> Any:
        inner: Any = self.model
        return inner.get_input_embeddings()

    def forward(self, **inputs: Any) -> Any:
        with self.routing.using("off"):
            return self.model(**inputs)


def prepare(recipe: LearnRoutingRecipe) -> RoutingSession:
    """Load model and texts, observe the mixtures and check that they fit the recipe. Writes nothing."""
    wanted = recipe.model
    texts = eval_texts(recipe.evaluate.texts)
    with console.log.status(f"loading {wanted.source}"):
        loaded = load_model(
            wanted.source,
            dtype=wanted.dtype,
            device=wanted.device,
            revision=wanted.revision,
            trust_remote_code=wanted.trust_remote_code,
        )
    tell_slow(loaded.model)
    if routing_of(loaded.model) is not None:
        raise UsageError(f"{wanted.source} has a routing already; start from the checkpoint that it was made from")
    limit = positions(loaded.model)
    if limit and recipe.data.seqlen > limit:
        raise UsageError(f"data.seqlen is {recipe.data.seqlen}, but {wanted.source} has {limit} positions")
    with console.log.status("reading the text"):
        blocks, calibration = _tokens(recipe, loaded)
    with console.log.status("observing the mixtures"):
        mixtures, seen = observe(loaded.model, calibration)
    for mixture in mixtures:
        if recipe.target_activation is not None:
            check_target(recipe.target_activation, mixture.top_k)
        if recipe.keep is not None and recipe.keep > mixture.top_k:
            raise UsageError(f"keep is {recipe.keep}, but {mixture.name} runs {mixture.top_k} experts a token")
    counts = sorted({m.top_k for m in mixtures})
    console.log.print(
        f"{wanted.source}: {len(mixtures)} mixtures, {'/'.join(map(str, counts))} of {mixtures[0].experts} experts a token, routing weights "
        f"{'renormalised' if mixtures[0].renormalise else 'as the router gives them'}; "
        f"{sum(batch.numel() for batch in calibration):,} tokens to calibrate on"
    )
    return RoutingSession(recipe, loaded, blocks, calibration, mixtures, seen, texts)


def _tokens(recipe: LearnRoutingRecipe, loaded: LoadedModel) -> tuple[TokenBlocks | None, list[Tensor]]:
    """What is learned from, and the calibration sequences, which are no part of it."""
    length, section = recipe.data.seqlen, recipe.calibration
    learns = recipe.method == "otp"
    trained = recipe.learn.steps * recipe.learn.batch * length if learns else 0
    needed = section.samples * length

    def read(sections: Sequence[SourceSection], count: int) -> IntArray:
        sources = [text_source(s) for s in sections]
        # A stream is read as far as the run needs it; files are read whole, so that every part of them can be drawn.
        return tokenize(sources, loaded.tokenizer, recipe.data.max_tokens or (count if any(s.endless for s in sources) else None))

    apart = bool(section.sources)
    cut = TokenBlocks(
        read(section.sources if apart else recipe.data.sources, needed + (0 if apart else trained)), length, recipe.seed
    )
    if section.samples > len(cut):
        raise UsageError(
            f"calibration.samples is {section.samples}, but the text holds only {len(cut)} sequences of {length} tokens"
        )
    calibration = list(cut.batch(0, section.samples).split(section.batch))
    if not learns:
        return None, calibration
    if apart:
        return TokenBlocks(read(recipe.data.sources, trained), length, recipe.seed + 1), calibration
    if len(cut) == section.samples:
        raise UsageError(f"calibration.samples takes all {len(cut)} sequences of the text; none is left to learn from")
    rest = [cut.batch(index, 1)[0].numpy() for index in range(section.samples, len(cut))]
    return TokenBlocks(np.concatenate(rest), length, recipe.seed + 1), calibration
