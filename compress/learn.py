"""`compress learn-mask`: from a recipe to a mask, its measurements and a report."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from compress import __version__, console
from compress.data import TextSource, TokenBlocks, tokenize
from compress.errors import CompressError, UsageError
from compress.evaluate import EvalText, evaluate_tokens, perplexity, token_windows
from compress.models import LoadedModel, fingerprint, load_model
from compress.prune import Method, Pruned, prune_one_shot
from compress.recipe import LearnMaskRecipe, LearnSection, ScheduleSection, SourceSection, dump_recipe
from compress.report import write_report
from compress.rundir import RunDir, write_atomic
from compress.text import read_text
from compress.weights import ParameterRef, WeightRef, by_parameter, find_weights
from maskllm.checkpoint import CheckpointStore
from maskllm.gumbel import Schedule, prior_logits
from maskllm.learner import Learner, LearnSettings, StepRecord
from maskllm.parametrization import MaskTarget
from maskllm.patterns import Pattern
from maskllm.storage import load_masks, mask_digest, save_masks

_WINDOW_TOKENS = 2048  # tokens a forward pass when measuring: short windows are taken several at once
_CALIBRATION_BATCH = 8  # sequences calibrated at once


class Interrupted(CompressError):
    """The user stopped the run; its state is saved (exit code 130)."""

    exit_code = 130


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: `rows` as in summary.json, `digest` of the mask, share of groups that differ from the prior."""

    rows: list[dict[str, Any]]
    digest: str
    flipped: float
    run: Path


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


def learn_mask(recipe: LearnMaskRecipe, out: Path, *, resume: bool, command: tuple[str, list[str]]) -> Result:
    """Run a recipe in the folder `out`. `command` (recipe, overrides) is what the user typed, to print how to resume.

    Raises UsageError before anything is written when the recipe does not fit model or text; Interrupted after SIGINT or SIGTERM,
    with the state saved; and whatever its parts raise.
    """
    session = prepare(recipe)
    run = RunDir.open(out, dump_recipe(recipe), resume)
    if run.summary.exists():
        raise UsageError(f"the run in {out} is complete; its result is in {run.summary}")
    with _stoppable() as stop:
        prior, rows = _prior_and_baselines(session, run, stop, command)
        learner = _learner(session, run, prior)
        try:
            _train(session, run, learner, stop, command)
            masks, flips = learner.masks(), learner.flipped()
        finally:
            learner.close()
    with session.holding(masks):
        scores = session.measure("learned")
    rows.append(_row("learned", scores))
    return _finish(session, run, masks, flips, rows)


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
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if positions and longest > positions:
        raise UsageError(f"data.seqlen or calibration.seqlen is {longest}, but {wanted.source} has {positions} positions")
    with console.log.status("reading the text"):
        needed = max(recipe.learn.steps * recipe.learn.batch * recipe.data.seqlen, recipe.calibration.samples * seqlen)
        sources = [text_source(s) for s in recipe.data.sources]
        # A stream is read as far as the run needs it; files are read whole, so that every part of them can be drawn.
        limit = recipe.data.max_tokens or (needed if any(s.endless for s in sources) else None)
        tokens = tokenize(sources, loaded.tokenizer, limit)
    calibration = TokenBlocks(tokens, seqlen, recipe.seed)
    batches, left = [], recipe.calibration.samples
    if left > len(calibration):
        raise UsageError(
            f"calibration.samples is {left}, but the text holds only {len(calibration)} sequences of {seqlen} tokens"
        )
    whole = calibration.batch(0, left)
    batches = list(whole.split(_CALIBRATION_BATCH))
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


def learn_settings(section: LearnSection, seed: int) -> LearnSettings:
    """The recipe's `learn` section as what `maskllm` takes."""

    def schedule(s: ScheduleSection) -> Schedule:
        return Schedule(s.start, s.end, s.curve)

    return LearnSettings(
        steps=section.steps,
        batch=section.batch,
        micro_batch=section.micro_batch,
        parametrization=section.parametrization,
        noise=section.noise,
        hard=section.hard,
        temperature=schedule(section.temperature),
        scale=schedule(section.scale),
        learning_rate=section.learning_rate,
        warmup=section.warmup,
        final_rate=section.final_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        clip=section.clip,
        regulariser=section.regulariser,
        ce_weight=section.cross_entropy,
        kl_weight=section.distillation,
        bf16=section.precision == "bf16",
        seed=seed,
    )


def _eval_text(section: SourceSection) -> EvalText:
    """A text to measure on: a text file as it is (or its span), records joined by blank lines."""
    source = text_source(section)
    return EvalText.of("\n\n".join(read_text(source)), source.label)


def _row(method: str, scores: dict[str, float]) -> dict[str, Any]:
    first = next(iter(scores.values()), None)
    return {"method": method, "perplexity": first, "perplexities": scores}


def _prior_and_baselines(
    session: Session, run: RunDir, stop: _StopFlag, command: tuple[str, list[str]]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The prior mask, and one row for every baseline of the recipe. A resumed run reads what it already knows."""
    recipe = session.recipe
    prior_file = run.state / "prior.safetensors"
    known: dict[str, dict[str, Any]] = {r["method"]: r for r in run.known("baselines") or []}
    baselines = recipe.evaluate.baselines if session.texts else []

    def record(method: str, values: dict[str, Tensor] | None) -> None:
        if method not in baselines or method in known:
            return
        if values is None:
            scores = session.measure(method)
        else:
            with session.holding(values):
                scores = session.measure(method)
        known[method] = _row(method, scores)
        run.know("baselines", list(known.values()))
        console.log.print(f"{method}: " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items()))

    record("dense", None)
    prior: dict[str, Tensor] | None = None
    if prior_file.exists():
        prior = dict(load_masks(prior_file).masks)
    methods: list[Method] = ["magnitude", "wanda", "ria", "sparsegpt"]
    for method in methods:
        if stop.asked:
            raise Interrupted(f"stopped before learning. Continue with:\n  {run.resume_command(*command)}")
        updated = "sparsegpt-update" if method == "sparsegpt" else method
        missing = {method, updated} & set(baselines) - known.keys()
        if not missing and not (prior is None and method == recipe.prior.method):
            continue
        pruned = one_shot(session, method)
        record(method, pruned.masks)
        if pruned.weights:
            record("sparsegpt-update", pruned.weights)
        if method == recipe.prior.method:
            prior = pruned.masks
            save_masks(prior_file, prior, session.pattern, session.contracted, {"method": method})
    assert prior is not None
    return prior, [known[m] for m in baselines]


def one_shot(session: Session, method: Method) -> Pruned:
    """Prune by one method with a progress bar, and say which matrices no calibration token reached."""
    blocks = max((r.layer or 0) for r in session.refs) + 1
    with console.task(f"{method}, one shot", blocks) as bar:
        pruned = prune_one_shot(
            session.loaded.model,
            session.refs,
            session.pattern,
            method,
            session.calibration,
            damping=session.recipe.calibration.damping,
            progress=lambda done, _: bar.update(done, "blocks"),
        )
    if pruned.starved:
        console.log.print(
            f"[yellow]{len(pruned.starved)} matrices saw no calibration token and were pruned by magnitude: {', '.join(pruned.starved[:4])}"
            f"{' ...' if len(pruned.starved) > 4 else ''}; calibrate on more text[/]"
        )
    return pruned


def _learner(session: Session, run: RunDir, prior: dict[str, Tensor]) -> Learner:
    recipe = session.recipe
    settings = learn_settings(recipe.learn, recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    logits = {
        p.name: prior_logits(
            prior[p.name].movedim(p.contracted_dim, -1),
            session.pattern,
            settings.parametrization,
            strength=recipe.prior.strength,
            std=recipe.prior.init_std,
            noise=recipe.prior.noise,
            generator=generator,
        )
        for p in session.parameters
    }
    parts = {
        "model": fingerprint(session.loaded.model),
        "data": session.blocks.fingerprint,
        "recipe": hashlib.sha256(dump_recipe(recipe).encode()).hexdigest(),
    }
    targets = [MaskTarget(p.name, p.module, p.parameter_name, p.contracted_dim) for p in session.parameters]
    accelerator = Accelerator(cpu=session.loaded.model.device.type == "cpu")
    store = CheckpointStore(run.state, parts)
    learner = Learner(session.loaded.model, targets, session.pattern, settings, logits, prior, accelerator, store)
    if learner.resume():
        run.rewind_metrics(learner.step)
        console.log.print(f"continuing after step {learner.step} of {settings.steps}")
    return learner


def _train(session: Session, run: RunDir, learner: Learner, stop: _StopFlag, command: tuple[str, list[str]]) -> None:
    recipe = session.recipe
    watch = _watched_windows(session)
    saved = time.monotonic()

    def measure() -> None:
        record: dict[str, Any] = {"step": learner.step, "tokens": learner.step * recipe.learn.batch * recipe.data.seqlen}
        counts = learner.flipped()
        record["flipped"] = sum(a for a, _ in counts.values()) / sum(b for _, b in counts.values())
        if watch is not None:
            with learner.final():
                batch = max(1, _WINDOW_TOKENS // watch.shape[1])
                record["perplexity"] = evaluate_tokens(session.loaded.model, watch, batch_size=batch).perplexity
        run.append_metric({"kind": "measure", **record})

    if recipe.evaluate.every and learner.step == 0 and not run.read_metrics():
        measure()
    with console.task("learning", recipe.learn.steps, learner.step) as bar:
        for record in learner.steps(session.blocks.batch):
            run.append_metric({"kind": "step", **dataclasses.asdict(record)})
            bar.update(record.step, _note(record))
            last = record.step == recipe.learn.steps
            if recipe.evaluate.every and (record.step % recipe.evaluate.every == 0 or last):
                measure()
            if stop.asked or last or time.monotonic() - saved > 60 * recipe.learn.save_minutes:
                learner.save()
                saved = time.monotonic()
            if stop.asked and not last:
                again = run.resume_command(*command)
                raise Interrupted(f"stopped after step {record.step}; the state is saved. Continue with:\n  {again}")


def _watched_windows(session: Session) -> Tensor | None:
    """Token windows `[windows, seqlen]` of the first text, for measuring amid training."""
    recipe = session.recipe
    if not recipe.evaluate.every or not session.texts:
        return None
    name, text = next(iter(session.texts.items()))
    wanted = recipe.evaluate.texts[name]
    windows, _ = token_windows(session.loaded.tokenizer, text, wanted.seqlen, wanted.bos)
    return windows[: recipe.evaluate.every_limit or wanted.limit]


def _note(record: StepRecord) -> str:
    parts = [f"loss {record.loss:.3f}"]
    if record.kl:
        parts.append(f"KL {record.kl:.3f}")
    return " ".join(parts)


def _finish(
    session: Session, run: RunDir, masks: dict[str, Tensor], flips: dict[str, tuple[int, int]], rows: list[dict[str, Any]]
) -> Result:
    digest = mask_digest(masks)
    flipped = sum(a for a, _ in flips.values()) / sum(b for _, b in flips.values())
    metadata = {
        "digest": digest,
        "model": session.recipe.model.source,
        "model_fingerprint": fingerprint(session.loaded.model),
        "tool": f"maskllm-compress {__version__}",
        "recipe": dump_recipe(session.recipe),
    }
    save_masks(run.mask, masks, session.pattern, session.contracted, metadata)
    layers = [
        {"name": p.name, "layer": p.layer, "flipped": flips[p.name][0], "groups": flips[p.name][1]} for p in session.parameters
    ]
    write_report(run, session.recipe, rows, layers, digest)
    write_atomic(run.summary, json.dumps(rows, indent=1))
    return Result(rows, digest, flipped, run.path)


class _StopFlag:
    """Set by the first SIGINT or SIGTERM; a second one ends the process as usual."""

    asked = False


@contextmanager
def _stoppable() -> Iterator[_StopFlag]:
    flag = _StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.asked:
            raise KeyboardInterrupt
        flag.asked = True
        console.log.print("[yellow]stopping after this step (again to stop at once, without saving)[/]")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
