"""`compress learn-mask`: from a recipe to a mask, its measurements and a report."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress import __version__, console
from compress.blocks import learn_blocks
from compress.experts import count_tokens, count_tokens_walking, tokens_by_expert
from compress.fallback import tell_missing
from compress.heap import give_back
from compress.interrupt import Interrupted, StopFlag, stoppable
from compress.processes import Processes
from compress.recipe import LearnMaskRecipe
from compress.recipe_file import dump_recipe
from compress.report import write_report
from compress.rundir import RunDir, write_atomic
from compress.session import Session, prepare
from compress.settings import learn_settings, settled
from compress.start import prior_and_baselines, summary_row
from compress.structure import decoder_blocks
from maskllm.checkpoint import CheckpointStore
from maskllm.learner import Learner, StepRecord
from maskllm.optim import logit_dtype
from maskllm.storage import difference, load_masks, mask_digest, save_masks


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: `rows` as in summary.json, `digest` of the mask, share of groups that differ from the prior."""

    rows: list[dict[str, Any]]
    digest: str
    flipped: float
    run: Path


def learn_mask(recipe: LearnMaskRecipe, out: Path, *, resume: bool, resume_command: str) -> Result | None:
    """Run a recipe in the folder `out`. `resume_command` is printed when it is interrupted: the command line that continues it.

    Of several processes (`compress.processes`) the first returns the result, the others None.
    Raises UsageError before anything is written when the recipe does not fit model or text; Interrupted after SIGINT or SIGTERM,
    with the state saved; and whatever its parts raise.
    """
    processes, recipe = Processes.join(recipe), settled(recipe)
    if not processes.first:
        _learn_along(recipe, RunDir(out), processes)
        return None
    run = RunDir.check(out, dump_recipe(recipe), resume)
    session = prepare(recipe, host_blocks=processes.shard == "weights")
    if session.loaded.model.device.type == "cpu":
        tell_missing("gumbel", "loss")
    run.create(dump_recipe(recipe))
    with stoppable() as stop:
        prior, rows = prior_and_baselines(session, run, stop, resume_command)
        give_back()
        masks = prior
        scores: dict[str, float] | None = None
        if recipe.learn.scope != "model":
            masks = learn_blocks(session, run, prior, stop, resume_command)
        if recipe.learn.scope == "block-then-model" and session.texts:
            rows.append(_block_row(session, run, masks))
        if recipe.learn.scope != "block":
            _note_experts(session, run)
            processes.wait()
            learner = _learner(session, run, processes, prior, masks)
            processes.wait()  # all of them have read what the checkpoint holds
            run.rewind_metrics(learner.step, ("step", "measure"))  # also of a run that was killed before its first checkpoint
            if learner.step:
                console.log.print(f"continuing after step {learner.step} of {recipe.learn.steps}")
            try:
                _train(session, run, learner, processes, stop, resume_command)
                masks = learner.masks()
                scores = _measured_together(session, learner, processes)
            finally:
                learner.close(gather=False)  # one process may end alone here, and none needs the weights again
            del learner
            give_back()
    if scores is None:
        with session.holding(masks):
            scores = session.measure("learned")
    rows.append(summary_row("learned", scores))
    return _finish(session, run, masks, difference(masks, prior, session.pattern, session.contracted), rows)


def _learn_along(recipe: LearnMaskRecipe, run: RunDir, processes: Processes) -> None:
    """What every process but the first does: its share of every step, and of what reads masks that are shared out."""
    session = prepare(recipe, host_blocks=processes.shard == "weights")
    processes.wait()
    prior = dict(load_masks(run.prior).masks)
    learner = _learner(session, run, processes, prior, prior)
    processes.wait()
    with stoppable() as stop:
        _train(session, run, learner, processes, stop, "")
        if processes.sharded:
            learner.masks()
        _measured_together(session, learner, processes)
    learner.close(gather=False)


def _measured_together(session: Session, learner: Learner, processes: Processes) -> dict[str, float] | None:
    """The measurements of the learned mask where no process has the weights whole, so that all have to take part; else None."""
    if processes.shard != "weights":
        return None
    give_back()
    with learner.final():
        return session.measure("learned")


def _block_row(session: Session, run: RunDir, masks: dict[str, Tensor]) -> dict[str, Any]:
    """The measurements of what was learned block by block, before learning end to end goes on from it."""
    row: dict[str, Any] | None = run.known("block-wise")
    if row is None:
        with session.holding(masks):
            row = summary_row("block-wise", session.measure("block-wise"))
        run.know("block-wise", row)
    return row


def _note_experts(session: Session, run: RunDir) -> None:
    """Record how many tokens of the calibration text reach each expert: which ones end-to-end learning can say something about."""
    if run.read_metrics_of("experts") or not any(ref.expert is not None for ref in session.refs):
        return
    count = count_tokens_walking if session.hosted else count_tokens
    seen = count(session.loaded.model, session.refs, session.calibration)
    run.append_metric({"kind": "experts", "step": 0, "expert_tokens": tokens_by_expert(session.refs, seen)})


def _learner(session: Session, run: RunDir, processes: Processes, prior: dict[str, Tensor], start: dict[str, Tensor]) -> Learner:
    """Ready to learn end to end from the mask `start`, or from the newest checkpoint; what flips is counted against the prior."""
    recipe = session.recipe
    settings = learn_settings(recipe.learn, recipe.seed)
    logits = session.start_logits(start, session.parameters, recipe.seed, logit_dtype(settings.state))
    targets = session.targets(session.parameters)
    store = CheckpointStore(run.state, session.identity)
    blocks = [block.module for block in decoder_blocks(session.loaded.model)] if settings.checkpoint_activations else []
    model = session.loaded.model
    processes.expect_idle(session.refs)
    if session.hosted is not None:
        session.hosted.close()
        session.hosted = None
    accelerator, shard = processes.accelerator, processes.shard
    learner = Learner(model, targets, session.pattern, settings, logits, prior, accelerator, store, blocks, shard)
    learner.resume()
    return learner


def _train(session: Session, run: RunDir, learner: Learner, processes: Processes, stop: StopFlag, resume_command: str) -> None:
    """Learn to the end. Only the first process records and writes; the others measure and save along where masks are shared out."""
    recipe, first = session.recipe, processes.first
    measuring = first or processes.sharded
    watch = session.watched_windows() if measuring else None
    saved = time.monotonic()

    def measure() -> None:
        if not measuring:
            return
        record: dict[str, Any] = {"step": learner.step, "tokens": learner.step * recipe.learn.batch * recipe.data.seqlen}
        counts = learner.flipped()
        record["flipped"] = sum(a for a, _ in counts.values()) / sum(b for _, b in counts.values())
        if watch is not None:
            give_back()  # the logits of an evaluation do not fit into what a step leaves
            with learner.final():
                record["perplexity"] = session.score(watch)
        if first:
            run.append_metric({"kind": "measure", **record})

    begun = first and bool(run.read_metrics_of("measure"))
    if recipe.evaluate.every and learner.step == 0 and not processes.any(begun):
        measure()
    with console.task("learning", recipe.learn.steps, learner.step) as bar:
        for record in learner.steps(session.blocks.batch):
            if first:
                run.append_metric({"kind": "step", **dataclasses.asdict(record)})
            bar.update(record.step, _note(record))
            last = record.step == recipe.learn.steps
            if recipe.evaluate.every and (record.step % recipe.evaluate.every == 0 or last):
                measure()
            stopping = processes.any(stop.asked)
            if processes.any(stopping or last or time.monotonic() - saved > 60 * recipe.learn.save_minutes):
                learner.save()
                saved = time.monotonic()
            if stopping and not last:
                raise Interrupted(f"stopped after step {record.step}; the state is saved. Continue with:\n  {resume_command}")


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
        "model_fingerprint": session.identity["model"],
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
