"""What learning starts from: the prior mask, and the measurements of the methods that the learned mask is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from compress import console
from compress.interrupt import Interrupted, StopFlag
from compress.masks import masks_of_model
from compress.prune import METHODS
from compress.rundir import RunDir
from compress.session import Session
from maskllm.storage import load_masks, save_masks


def summary_row(method: str, scores: dict[str, float]) -> dict[str, Any]:
    """One line of the summary; its perplexity is that on the first text."""
    first = next(iter(scores.values()), None)
    return {"method": method, "perplexity": first, "perplexities": scores}


def prior_and_baselines(
    session: Session, run: RunDir, stop: StopFlag, resume_command: str
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The prior mask, and one row for every baseline of the recipe. A resumed run reads what it already knows."""
    recipe = session.recipe
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
        known[method] = summary_row(method, scores)
        run.know("baselines", list(known.values()))
        console.log.print(f"{method}: " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items()))

    record("dense", None)
    prior: dict[str, Tensor] | None = None
    if run.prior.exists():
        prior = dict(load_masks(run.prior).masks)
    elif recipe.prior.mask is not None:
        prior = masks_of_model(Path(recipe.prior.mask), session.parameters, session.pattern)
        save_masks(run.prior, prior, session.pattern, session.contracted, {"method": recipe.prior.mask})
    for method in METHODS:
        if stop.asked:
            raise Interrupted(f"stopped before learning. Continue with:\n  {resume_command}")
        updated = "sparsegpt-update" if method == "sparsegpt" else method
        missing = {method, updated} & set(baselines) - known.keys()
        if not missing and not (prior is None and method == recipe.prior.method):
            continue
        pruned = session.one_shot(method)
        record(method, pruned.masks)
        if pruned.weights:
            record("sparsegpt-update", pruned.weights)
        if prior is None and method == recipe.prior.method:
            prior = pruned.masks
            save_masks(run.prior, prior, session.pattern, session.contracted, {"method": method})
    assert prior is not None
    record("prior", prior)
    return prior, [known[m] for m in baselines]
