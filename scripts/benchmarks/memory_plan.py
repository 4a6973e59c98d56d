"""Compare the memory that `compress learn-mask --dry-run` plans with what the stages of a run take.

    python scripts/benchmarks/memory_plan.py recipes/smollm2-135m.yaml
    python scripts/benchmarks/memory_plan.py recipes/smollm2-135m.yaml --json learn.state=8bit learn.step_in_backward=true \
        learn.clip_by=weight learn.checkpoint_activations=true

Every stage runs in a process of its own, on a few steps: what is measured is the most resident memory of that process (VmHWM, or
ru_maxrss where there is no /proc). Other work on the machine does not disturb it. Learning starts from a mask by magnitude, whatever the prior of the
recipe, because that changes no byte of it. Bytes a weight: what a stage adds to the process with the model loaded, over the weights to mask.
CPU only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = 3  # moments exist from the second step on


def main() -> None:
    """Print a table, or with --json one object a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="key=value, as for compress learn-mask")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--stages", nargs="*", help="only stages whose names begin so")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # a stage, in the process that is measured
    arguments = parser.parse_args()
    overrides = [*arguments.overrides, "model.device=cpu"]
    if arguments.run:
        print(json.dumps(run_stage(arguments.recipe, overrides, arguments.run)))
        return
    planned = json.loads(
        _python(["-m", "compress", "learn-mask", arguments.recipe, *overrides, "--dry-run", "--json"]).splitlines()[-1]
    )
    rows = []
    for stage in planned["stages"]:
        if arguments.stages and not any(stage["name"].startswith(name) for name in arguments.stages):
            continue
        if stage["name"] == "learning block by block":
            continue  # needs a run directory; not measured here
        command = [str(Path(__file__)), arguments.recipe, *overrides, "--run", stage["name"]]
        measured = json.loads(_python(command).splitlines()[-1])
        rows.append(
            {
                "stage": stage["name"],
                "planned": stage["bytes"],
                "measured": measured["peak"],
                "ratio": stage["bytes"] / measured["peak"],
                "bytes_a_weight": (measured["peak"] - measured["before"]) / planned["weights"],
                "parts": stage["parts"],
            }
        )
        if not arguments.json:
            row = rows[-1]
            print(
                f"{row['stage']:24s} planned {row['planned']:15,}  measured {row['measured']:15,}  ratio {row['ratio']:.3f}  "
                f"{row['bytes_a_weight']:6.2f} bytes a weight",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(rows, indent=1))


def _python(command: list[str]) -> str:
    return subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True).stdout


def run_stage(recipe_name: str, overrides: list[str], stage: str) -> dict[str, int]:
    """Run one stage here. Returns its peak, and what the process held before it, with the model loaded."""
    from compress.heap import give_back, peak, resident, restart_peak
    from compress.recipe_file import load_recipe, recipe_path
    from compress.session import prepare
    from compress.settings import settled

    # Learning repeats its steps, and scoring its windows: a few show the peak.
    recipe = settled(load_recipe(recipe_path(recipe_name), overrides))
    texts = {name: text.model_copy(update={"limit": 2}) for name, text in recipe.evaluate.texts.items()}
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"texts": texts})})
    session = prepare(recipe)
    if stage == "loading":
        return {"peak": peak(), "before": resident()}
    give_back()
    before = resident()
    restart_peak()
    kind, _, method = stage.partition(" ")
    if kind == "one-shot":
        session.one_shot(method)  # type: ignore[arg-type]
    elif kind == "evaluation":
        wanted = "sparsegpt-update" in recipe.evaluate.baselines
        evaluate(session, updated=wanted)
    else:
        learn(session)
    return {"peak": peak(), "before": before}


def evaluate(session: Any, updated: bool) -> None:
    """Score the model with masks held, with updated weights beside them where the recipe scores those."""
    masks = {p.name: p.refs[0].parameter.detach() != 0 for p in session.parameters}
    weights = {p.name: p.refs[0].parameter.detach().clone() for p in session.parameters} if updated else masks
    with session.holding(weights):
        session.measure("held")
    del masks


def learn(session: Any) -> None:
    """A few steps from a mask by magnitude, then the masks."""
    from accelerate import Accelerator

    from compress.heap import give_back
    from compress.settings import learn_settings
    from compress.structure import decoder_blocks
    from maskllm.learner import Learner
    from maskllm.optim import logit_dtype

    recipe = session.recipe
    settings = learn_settings(recipe.learn, recipe.seed)
    prior = session.one_shot("magnitude").masks
    give_back()
    logits = session.start_logits(prior, session.parameters, recipe.seed, logit_dtype(settings.state))
    blocks = [block.module for block in decoder_blocks(session.loaded.model)]
    targets = session.targets(session.parameters)
    learner = Learner(
        session.loaded.model, targets, session.pattern, settings, logits, prior, Accelerator(cpu=True), blocks=blocks
    )
    for record in learner.steps(session.blocks.batch):
        print(record, file=sys.stderr)
        if record.step == STEPS:
            break
    watch = session.watched_windows()
    if watch is not None:
        give_back()
        with learner.final():
            session.score(watch[:2])
    learner.masks()
    learner.close()


if __name__ == "__main__":
    main()
