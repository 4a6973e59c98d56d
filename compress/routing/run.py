"""`compress learn-routing`: from a recipe to a routing, its measurements and a report."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import console
from compress.errors import CompressError
from compress.interrupt import Interrupted, StopFlag, stoppable
from compress.processes import Processes
from compress.recipe_file import dump_recipe
from compress.recipe_routing import LearnRoutingRecipe, RoutingMethod
from compress.routing.calibrate import ATTEMPTS, activation, experts_per_token, meet_target, rule_decisions
from compress.routing.decisions import Decision, make_decision
from compress.routing.gate import Routing, attach
from compress.routing.learn import RoutingLearner
from compress.routing.report import write_routing_report
from compress.routing.router import TopAnyRouter
from compress.routing.session import RoutingSession, prepare
from compress.routing.storage import frozen, save
from compress.rundir import RunDir, write_atomic
from compress.settings import settled
from maskllm.checkpoint import CheckpointStore


@dataclass(frozen=True)
class RoutingResult:
    """What a finished run leaves: `rows` as in summary.json; the share of the routed experts that runs on the calibration text."""

    rows: list[dict[str, Any]]
    activation: float
    run: Path


def learn_routing(recipe: LearnRoutingRecipe, out: Path, *, resume: bool, resume_command: str) -> RoutingResult | None:
    """Run a recipe in the folder `out`. `resume_command` is printed when it is interrupted: the command line that continues it.

    Of several processes (`compress.processes`) the first returns the result, the others None. Raises UsageError before anything is
    written when the recipe does not fit model or text; Interrupted after SIGINT or SIGTERM, with the state saved.
    """
    processes, recipe = Processes.join(recipe), settled(recipe)
    run = RunDir.check(out, dump_recipe(recipe), resume) if processes.first else RunDir(out)
    session = prepare(recipe)
    if processes.first:
        run.create(dump_recipe(recipe))
    processes.wait()
    with stoppable() as stop:
        routing = (
            _learned(session, run, processes, stop, resume_command) if recipe.method == "otp" else _ruled(session, recipe.method)
        )
        if not processes.first:
            return None
        met = _calibrate(session, routing, recipe.target_activation)
        facts = {
            "target_activation": recipe.target_activation,
            "activation": met,
            "model": recipe.model.source,
            "recipe": dump_recipe(recipe),
        }
        save(run.path, routing, facts)
        rows = _measured(session, run, routing, met, stop, resume_command)
    write_routing_report(run, recipe, rows, session.mixtures, met)
    write_atomic(run.summary, json.dumps(rows, indent=1))
    return RoutingResult(rows, met, run.path)


def _ruled(session: RoutingSession, method: RoutingMethod, keep: int | None = None) -> Routing:
    """A training-free rule, attached."""
    decisions = rule_decisions(method, session.mixtures, session.seen, keep or session.recipe.keep)
    decisions = {name: frozen(decision) for name, decision in decisions.items()}
    protect = session.recipe.protect if method == "odp" else 0.0
    return attach(session.loaded.model, session.mixtures, decisions, method, protect)


def new_routers(session: RoutingSession) -> dict[str, Decision]:
    """Routers that prune nothing yet, their features standardised on the calibration text."""
    recipe = session.recipe
    routers: dict[str, Decision] = {}
    for number, mixture in enumerate(session.mixtures):
        seed = recipe.seed * 1_000_003 + number
        router = make_decision("otp", mixture, rank=recipe.router.rank, keep_all=recipe.router.keep_all, seed=seed)
        assert isinstance(router, TopAnyRouter)
        seen = session.seen[mixture.name]
        router.standardise(seen.hidden, seen.weights[: len(seen.hidden)])
        routers[mixture.name] = router
    return routers


def _learned(session: RoutingSession, run: RunDir, processes: Processes, stop: StopFlag, resume_command: str) -> Routing:
    """Trained routers, attached and ready for inference."""
    recipe = session.recipe
    assert session.blocks is not None
    store = CheckpointStore(run.state, session.identity)
    routing = attach(session.loaded.model, session.mixtures, new_routers(session), "otp")
    learner = RoutingLearner(
        session.loaded.model, routing, recipe.learn, recipe.target_activation, processes.accelerator, recipe.seed, store
    )
    learner.resume()
    if processes.first:
        run.rewind_metrics(learner.step, ("step",))
        if learner.step:
            console.log.print(f"continuing after step {learner.step} of {recipe.learn.steps}")
    saved = time.monotonic()
    try:
        with console.task("learning", recipe.learn.steps, learner.step) as bar:
            for record in learner.steps(session.blocks.batch):
                if processes.first:
                    run.append_metric({"kind": "step", **dataclasses.asdict(record)})
                bar.update(record.step, f"KL {record.kl:.4f}, {100 * record.activation:.1f} % of the experts")
                last = record.step == recipe.learn.steps
                stopping = processes.any(stop.asked)
                if stopping or last or time.monotonic() - saved > 60 * recipe.learn.save_minutes:
                    learner.save()
                    saved = time.monotonic()
                if stopping and not last:
                    raise Interrupted(f"stopped after step {record.step}; the state is saved. Continue with:\n  {resume_command}")
    finally:
        learner.close()
    for gate in routing.gates:
        gate.decision = frozen(gate.decision)
    return routing


def _calibrate(session: RoutingSession, routing: Routing, target: float | None) -> float:
    """Meet the target on the calibration text, if there is one; returns the share of experts that runs there."""
    model = session.loaded.model
    if target is None or routing.method == "top-k":
        return activation(routing.mixtures, experts_per_token(model, routing, session.calibration))
    with console.task(f"{routing.method}: meeting the target", ATTEMPTS) as bar:
        return meet_target(
            model, routing, session.calibration, target, lambda done, share: bar.update(done, f"{100 * share:.1f} %")
        )


def _measured(
    session: RoutingSession, run: RunDir, routing: Routing, met: float, stop: StopFlag, resume_command: str
) -> list[dict[str, Any]]:
    """The rows of the summary: unpruned, the routing, then the baselines. A resumed run reads what it already knows."""
    recipe = session.recipe
    rows: list[dict[str, Any]] = run.known("rows") or []

    def record(name: str, measured: Routing | None) -> None:
        if stop.asked:
            raise Interrupted(f"stopped while measuring. Continue with:\n  {resume_command}")
        rows.append(session.measure(name, measured))
        run.know("rows", rows)

    known = {row["method"] for row in rows}
    if recipe.method not in known:
        rows.clear()
        with routing.using("off"):
            record("unpruned", None)
        record(recipe.method, routing)
    if not recipe.evaluate.texts:
        return rows
    for name, method, keep in _baselines(session, met):
        if name in known:
            continue
        with _in_place_of(routing, session, method, keep) as other:
            try:
                if method != "top-k":
                    _calibrate(session, other, met)
            except CompressError as error:
                console.log.print(f"[yellow]{name} is left out: {error}[/]")
                continue
            record(name, other)
    return rows


def _baselines(session: RoutingSession, met: float) -> Iterator[tuple[str, RoutingMethod, int | None]]:
    """Name, rule and, for top-k, the number of experts: those next to the share `met`."""
    k = max(mixture.top_k for mixture in session.mixtures)
    for method in session.recipe.evaluate.baselines:
        if method == "top-k":
            for keep in sorted({math.ceil(met * k - 1e-9), max(1, math.floor(met * k + 1e-9))}, reverse=True):
                if keep < k and not (session.recipe.method == "top-k" and keep == session.recipe.keep):
                    yield f"top-{keep}", "top-k", keep
        elif method != session.recipe.method:
            yield method, method, None


@contextmanager
def _in_place_of(routing: Routing, session: RoutingSession, method: RoutingMethod, keep: int | None) -> Iterator[Routing]:
    """Another routing attached while it lasts."""
    model: Any = session.loaded.model
    attention = model.config._attn_implementation
    routing.detach()
    other = _ruled(session, method, keep)
    try:
        yield other
    finally:
        other.detach()
        model.set_attn_implementation(attention)
        routing.reattach()
