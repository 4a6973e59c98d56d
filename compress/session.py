"""A model loaded for a recipe, with the weights to mask and the texts to learn from and to measure on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import console
from compress.checkpoint import SIDECAR_NAME, UPDATED_FORMAT, read_json
from compress.data import TokenBlocks, tokenize
from compress.device import pick_device, tell_slow
from compress.errors import UsageError
from compress.evaluate import EvalText, evaluate_tokens, positions, token_windows
from compress.hosted import HostedBlocks
from compress.measure import WINDOW_TOKENS, eval_texts, measure_text, text_source
from compress.models import LoadedModel, fingerprint, load_model, resolve_source
from compress.prune import Method, Pruned, prune_one_shot
from compress.recipe import LearnMaskRecipe
from compress.recipe_file import dump_recipe
from compress.walk import check_inside
from compress.weights import ParameterRef, WeightRef, by_parameter, find_weights
from maskllm.gumbel import prior_logits
from maskllm.parametrization import MaskTarget
from maskllm.patterns import Pattern

_CALIBRATION_BATCH = 8  # sequences calibrated at once


@dataclass
class Session:
    """A loaded model with everything a run reads: the weights to mask, texts to learn from and to measure on.

    hosted: of a model whose blocks come to its device only to run. Learning closes it: it takes to the device what it needs.
    """

    recipe: LearnMaskRecipe
    loaded: LoadedModel
    pattern: Pattern
    refs: list[WeightRef]
    parameters: list[ParameterRef]
    blocks: TokenBlocks
    calibration: list[Tensor]
    block_batches: list[Tensor]  # to learn from block by block, in micro-batches, those held out last; none with scope `model`
    texts: dict[str, EvalText]
    hosted: HostedBlocks | None = None

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What a continued run must share with the one that saved a checkpoint. Ask first while the weights are the model's own."""
        return {
            "model": fingerprint(self.loaded.model),
            "data": self.blocks.fingerprint,
            "recipe": hashlib.sha256(dump_recipe(self.recipe).encode()).hexdigest(),
        }

    def targets(self, parameters: Sequence[ParameterRef]) -> list[MaskTarget]:
        """These parameters as what `maskllm` masks."""
        return [MaskTarget(p.name, p.module, p.parameter_name, p.contracted_dim) for p in parameters]

    def start_logits(
        self, masks: Mapping[str, Tensor], parameters: Sequence[ParameterRef], seed: int, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Logits that favour `masks` by the recipe's prior strength, for these parameters; `seed` is that of the initial noise."""
        prior, generator = self.recipe.prior, torch.Generator().manual_seed(seed)
        return {
            p.name: prior_logits(
                masks[p.name].movedim(p.contracted_dim, -1),
                self.pattern,
                self.recipe.learn.parametrization,
                strength=prior.strength,
                std=prior.init_std,
                noise=prior.noise,
                generator=generator,
            ).to(dtype)
            for p in parameters
        }

    @property
    def contracted(self) -> dict[str, int]:
        return {p.name: p.contracted_dim for p in self.parameters}

    def measure(self, name: str) -> dict[str, float]:
        """Perplexity of the model as it is now on every text, for the row `name`."""
        loaded, texts = self.loaded, self.recipe.evaluate.texts
        return {
            label: measure_text(name, label, loaded.model, loaded, text, texts[label]).perplexity
            for label, text in self.texts.items()
        }

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
        batch = max(1, WINDOW_TOKENS // windows.shape[1])
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


def prepare(recipe: LearnMaskRecipe, *, host_blocks: bool = False) -> Session:
    """Load model and texts and check that they fit the recipe. Writes nothing.

    host_blocks: leave the decoder blocks in the host's memory, from where they go to the model's device one at a time.
    """
    pattern = Pattern.parse(recipe.pattern)
    wanted = recipe.model
    texts = eval_texts(recipe.evaluate.texts)
    _check_can_be_imitated(recipe)
    with console.log.status(f"loading {wanted.source}"):
        loaded = load_model(
            wanted.source,
            dtype=wanted.dtype,
            device="cpu" if host_blocks else wanted.device,
            revision=wanted.revision,
            trust_remote_code=wanted.trust_remote_code,
        )
    tell_slow(loaded.model)
    if recipe.learn.precision == "bf16":
        tell_slow(loaded.model, torch.bfloat16)
    device = pick_device(wanted.device)
    hosted = HostedBlocks(loaded.model, device) if host_blocks and device.type != "cpu" else None
    refs = find_weights(loaded.model, recipe.weights.include, recipe.weights.exclude)
    for ref in refs:
        pattern.check_divides(ref.shape[1], ref.name)
    parameters = by_parameter(refs)
    learn = recipe.learn
    by_block, end_to_end = learn.scope != "model", learn.scope != "block"
    if by_block:
        check_inside(refs)
    if by_block and learn.block.device:
        pick_device(learn.block.device)
    seqlen, block_seqlen = recipe.calibration.seqlen or recipe.data.seqlen, learn.block.seqlen or recipe.data.seqlen
    longest = max(seqlen, recipe.data.seqlen, block_seqlen if by_block else 0)
    limit = positions(loaded.model)
    if limit and longest > limit:
        raise UsageError(
            f"data.seqlen, calibration.seqlen or learn.block.seqlen is {longest}, but {wanted.source} has {limit} positions"
        )
    kept = learn.block.sequences + learn.block.held_out if by_block else 0
    trained = learn.steps * learn.batch * recipe.data.seqlen if end_to_end else 0
    with console.log.status("reading the text"):
        needed = max(trained, recipe.calibration.samples * seqlen, kept * block_seqlen)
        sources = [text_source(s) for s in recipe.data.sources]
        # A stream is read as far as the run needs it; files are read whole, so that every part of them can be drawn.
        limit = recipe.data.max_tokens or (needed if any(s.endless for s in sources) else None)
        tokens = tokenize(sources, loaded.tokenizer, limit)

    def distinct(count: int, length: int, seed: int, key: str, size: int) -> list[Tensor]:
        """`count` different sequences, `size` at once."""
        available = TokenBlocks(tokens, length, seed)
        if count > len(available):
            raise UsageError(f"{key} is {count}, but the text holds only {len(available)} sequences of {length} tokens")
        return list(available.batch(0, count).split(size))

    calibration = distinct(recipe.calibration.samples, seqlen, recipe.seed, "calibration.samples", _CALIBRATION_BATCH)
    block_batches = []
    if by_block:
        key = "learn.block.sequences and held_out together"
        block_batches = distinct(kept, block_seqlen, recipe.seed + 2, key, learn.block.micro_batch)
    blocks = TokenBlocks(tokens, recipe.data.seqlen, recipe.seed + 1)
    how = [f"{learn.block.sequences * block_seqlen:,} of them block by block"] if by_block else []
    how += [f"{trained / len(tokens):.2f} passes end to end"] if end_to_end else []
    console.log.print(
        f"{wanted.source}: {len(refs)} matrices, {sum(p.refs[0].parameter.numel() for p in parameters):,} weights to mask {pattern}; "
        f"{len(tokens):,} tokens of text, {', '.join(how)}"
    )
    return Session(recipe, loaded, pattern, refs, parameters, blocks, calibration, block_batches, texts, hosted)


def _check_can_be_imitated(recipe: LearnMaskRecipe) -> None:
    """Raise UsageError where the unmasked model is what is to be imitated, but is one whose weights only serve under a mask."""
    if recipe.learn.distillation == 0 and recipe.learn.scope == "model":
        return
    folder = resolve_source(recipe.model.source).folder
    if folder is not None and (file := folder / SIDECAR_NAME).is_file() and read_json(file).get("format") == UPDATED_FORMAT:
        raise UsageError(
            f"{recipe.model.source} has weights that were updated for a mask, so without a mask it is no model to imitate; set "
            "learn.distillation=0 learn.cross_entropy=1 learn.scope=model"
        )
