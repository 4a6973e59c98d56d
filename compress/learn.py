"""`compress learn-mask`: from a recipe to a mask, its measurements and a report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from compress import __version__, console
from compress.interrupt import Interrupted, StopFlag, stoppable
from compress.models import fingerprint
from compress.prune import Method
from compress.recipe import LearnMaskRecipe, LearnSection, ScheduleSection, dump_recipe
from compress.report import write_report
from compress.rundir import RunDir, write_atomic
from compress.session import Session, prepare
from maskllm.checkpoint import CheckpointStore
from maskllm.gumbel import Schedule, prior_logits
from maskllm.learner import Learner, LearnSettings, StepRecord
from maskllm.parametrization import MaskTarget
from maskllm.storage import load_masks, mask_digest, save_masks


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: `rows` as in summary.json, `digest` of the mask, share of groups that differ from the prior."""

    rows: list[dict[str, Any]]
    digest: str
    flipped: float
    run: Path


def learn_mask(recipe: LearnMaskRecipe, out: Path, *, resume: bool, command: tuple[str, list[str]]) -> Result:
    """Run a recipe in the folder `out`. `command` (recipe, overrides) is what the user typed, to print how to resume.

    Raises UsageError before anything is written when the recipe does not fit model or text; Interrupted after SIGINT or SIGTERM,
    with the state saved; and whatever its parts raise.
    """
    run = RunDir.check(out, dump_recipe(recipe), resume)
    session = prepare(recipe)
    run.create(dump_recipe(recipe))
    with stoppable() as stop:
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


def _row(method: str, scores: dict[str, float]) -> dict[str, Any]:
    first = next(iter(scores.values()), None)
    return {"method": method, "perplexity": first, "perplexities": scores}


def _prior_and_baselines(
    session: Session, run: RunDir, stop: StopFlag, command: tuple[str, list[str]]
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
        pruned = session.one_shot(method)
        record(method, pruned.masks)
        if pruned.weights:
            record("sparsegpt-update", pruned.weights)
        if method == recipe.prior.method:
            prior = pruned.masks
            save_masks(prior_file, prior, session.pattern, session.contracted, {"method": method})
    assert prior is not None
    return prior, [known[m] for m in baselines]


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
    resumed = learner.resume()
    run.rewind_metrics(learner.step)  # also of a run that was killed before its first checkpoint
    if resumed:
        console.log.print(f"continuing after step {learner.step} of {settings.steps}")
    return learner


def _train(session: Session, run: RunDir, learner: Learner, stop: StopFlag, command: tuple[str, list[str]]) -> None:
    recipe = session.recipe
    watch = session.watched_windows()
    saved = time.monotonic()

    def measure() -> None:
        record: dict[str, Any] = {"step": learner.step, "tokens": learner.step * recipe.learn.batch * recipe.data.seqlen}
        counts = learner.flipped()
        record["flipped"] = sum(a for a, _ in counts.values()) / sum(b for _, b in counts.values())
        if watch is not None:
            with learner.final():
                record["perplexity"] = session.score(watch)
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
