"""A model loaded for a recipe, with the weights to mask and the texts to learn from and to measure on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import console
from compress.data import TextSource, TokenBlocks, tokenize
from compress.errors import UsageError
from compress.evaluate import EvalText, evaluate_tokens, perplexity, positions, token_windows
from compress.models import LoadedModel, load_model
from compress.prune import Method, Pruned, prune_one_shot
from compress.recipe import LearnMaskRecipe, SourceSection
from compress.text import read_text
from compress.weights import ParameterRef, WeightRef, by_parameter, find_weights
from maskllm.patterns import Pattern

_WINDOW_TOKENS = 2048  # tokens a forward pass when measuring: short windows are taken several at once
_CALIBRATION_BATCH = 8  # sequences calibrated at once


@dataclass
class Session:
    """A loaded model with everything a run reads: the weights to mask, texts to learn from and to measure on."""

    recipe: LearnMaskRecipe
    loaded: LoadedModel
    pattern: Pattern
    refs: list[WeightRef]
    parameters: list[ParameterRef]
    blocks: TokenBlocks
    calibration: list[Tensor]
    texts: dict[str, EvalText]

    @property
    def contracted(self) -> dict[str, int]:
        return {p.name: p.contracted_dim for p in self.parameters}

    def measure(self, name: str) -> dict[str, float]:
        """Perplexity of the model as it is now on every text, for the row `name`."""
        scores = {}
        for label, text in self.texts.items():
            wanted = self.recipe.evaluate.texts[label]
            with console.task(f"{name}: {label}", wanted.limit or 1) as bar:
                found = perplexity(
                    self.loaded.model,
                    self.loaded.tokenizer,
                    text,
                    seqlen=wanted.seqlen,
                    limit=wanted.limit,
                    bos=wanted.bos,
                    batch_size=max(1, _WINDOW_TOKENS // wanted.seqlen),
                    progress=functools.partial(_show, bar),
                )
            scores[label] = found.perplexity
        return scores

    @contextmanager
    def holding(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Within it the masked parameters have these values (a bool tensor masks the original)."""
        originals = {p.name: p.refs[0].parameter.detach().clone() for p in self.parameters}
        with torch.no_grad():
            try:
                for p in self.parameters:
                    value = values[p.name].to(originals[p.name].device)
                    p.refs[0].parameter.copy_(originals[p.name] * value if value.dtype == torch.bool else value)
                yield
            finally:
                for p in self.parameters:
                    p.refs[0].parameter.copy_(originals[p.name])

    def one_shot(self, method: Method) -> Pruned:
        """Prune by one method with a progress bar, and say which matrices no calibration token reached."""
        with console.task(f"{method}, one shot", 1) as bar:
            pruned = prune_one_shot(
                self.loaded.model,
                self.refs,
                self.pattern,
                method,
                self.calibration,
                damping=self.recipe.calibration.damping,
                progress=lambda done, total: bar.update(done, "blocks", total),
            )
        if pruned.starved:
            console.log.print(
                f"[yellow]{len(pruned.starved)} matrices saw no calibration token and were pruned by magnitude: {', '.join(pruned.starved[:4])}"
                f"{' ...' if len(pruned.starved) > 4 else ''}; calibrate on more text[/]"
            )
        return pruned

    def score(self, windows: Tensor) -> float:
        """Perplexity of the model as it is now on token windows `[windows, seqlen]`."""
        batch = max(1, _WINDOW_TOKENS // windows.shape[1])
        return evaluate_tokens(self.loaded.model, windows, batch_size=batch).perplexity

    def watched_windows(self) -> Tensor | None:
        """Token windows `[windows, seqlen]` of the first text, for measuring amid training."""
        recipe = self.recipe
        if not recipe.evaluate.every or not self.texts:
            return None
        name, text = next(iter(self.texts.items()))
        wanted = recipe.evaluate.texts[name]
        windows, _ = token_windows(self.loaded.tokenizer, text, wanted.seqlen, wanted.bos)
        return windows[: recipe.evaluate.every_limit or wanted.limit]


def prepare(recipe: LearnMaskRecipe) -> Session:
    """Load model and texts and check that they fit the recipe. Writes nothing."""
    pattern = Pattern.parse(recipe.pattern)
    wanted = recipe.model
    texts = {name: _eval_text(section.source) for name, section in recipe.evaluate.texts.items()}
    with console.log.status(f"loading {wanted.source}"):
        loaded = load_model(
            wanted.source,
            dtype=wanted.dtype,
            device=wanted.device,
            revision=wanted.revision,
            trust_remote_code=wanted.trust_remote_code,
        )
    refs = find_weights(loaded.model, recipe.weights.include, recipe.weights.exclude)
    for ref in refs:
        pattern.check_divides(ref.shape[1], ref.name)
    parameters = by_parameter(refs)
    seqlen = recipe.calibration.seqlen or recipe.data.seqlen
    longest = max(seqlen, recipe.data.seqlen)
    limit = positions(loaded.model)
    if limit and longest > limit:
        raise UsageError(f"data.seqlen or calibration.seqlen is {longest}, but {wanted.source} has {limit} positions")
    with console.log.status("reading the text"):
        needed = max(recipe.learn.steps * recipe.learn.batch * recipe.data.seqlen, recipe.calibration.samples * seqlen)
        sources = [text_source(s) for s in recipe.data.sources]
        # A stream is read as far as the run needs it; files are read whole, so that every part of them can be drawn.
        limit = recipe.data.max_tokens or (needed if any(s.endless for s in sources) else None)
        tokens = tokenize(sources, loaded.tokenizer, limit)
    calibration = TokenBlocks(tokens, seqlen, recipe.seed)
    samples = recipe.calibration.samples
    if samples > len(calibration):
        raise UsageError(
            f"calibration.samples is {samples}, but the text holds only {len(calibration)} sequences of {seqlen} tokens"
        )
    batches = list(calibration.batch(0, samples).split(_CALIBRATION_BATCH))
    blocks = TokenBlocks(tokens, recipe.data.seqlen, recipe.seed + 1)
    console.log.print(
        f"{wanted.source}: {len(refs)} matrices, {sum(p.refs[0].parameter.numel() for p in parameters):,} weights to mask {pattern}; "
        f"{len(tokens):,} tokens of text, {recipe.learn.steps * recipe.learn.batch * recipe.data.seqlen / len(tokens):.2f} passes"
    )
    return Session(recipe, loaded, pattern, refs, parameters, blocks, batches, texts)


def _show(bar: console.Task, done: int, total: int, value: float) -> None:
    bar.update(done, f"perplexity {value:.2f}", total)


def text_source(section: SourceSection) -> TextSource:
    """The recipe's description of a text as what `compress.data` reads."""
    return TextSource(**section.model_dump())


def _eval_text(section: SourceSection) -> EvalText:
    """A text to measure on: a text file as it is (or its span), records joined by blank lines."""
    source = text_source(section)
    return EvalText.of("\n\n".join(read_text(source)), source.label)
