"""What each choice of mask learning is worth: one factor at a time around a recipe, at several budgets and seeds.

    python scripts/benchmarks/ablation.py --out ablation.jsonl [--steps 30 120] [--seeds 3] [--only base "the paper's"]
    python scripts/benchmarks/ablation.py --out ablation.jsonl --table
    python scripts/benchmarks/ablation.py --out smollm2.jsonl --recipe smollm2-135m --text c4.txt --steps 120 --seeds 1

Every choice below changes only the keys that stand beside it, and all schedules are stretched to the number of steps. Two recipes can be the base:

- `quickstart`, with the learning rate that it had before this comparison, 4e-3; a step has 2,048 tokens. Learned from the first 90 % of the
  embedded Wikipedia text and of WikiText-2 validation; `held out` is the remaining 10 % of both.
- `smollm2-135m`, at a rate of 1e-3 for 120 steps, for others scaled by one over the root of their number; a step has 512 tokens. Learned from the
  first 96 % of `--text`, three parts to one with those of the embedded Wikipedia text; `held out` is WikiText-2 validation and the last 2 % of
  `--text`.

The column to choose by, `held out`, is the geometric mean of the perplexities on these two, so that WikiText-2 test, the second column, decides
nothing. A seed orders the text and draws the noise; the prior is the same for all seeds, and kept beside the output file.

Every run is a line of the output file as soon as it is finished, so an interrupted series goes on where it was; lines of other recipes are kept
and not read. Seeds are the outer loop: whenever it is stopped, all choices have been run equally often, up to one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from compress.data import TokenBlocks
from compress.recipe import LearnMaskRecipe, LearnSection
from compress.recipe_file import dump_recipe, load_recipe, recipe_path
from compress.session import Session, prepare
from compress.settings import learn_settings, settled
from maskllm.learner import Learner
from maskllm.storage import difference, load_masks, mask_digest, save_masks

PAPER_SCHEDULES = ["learn.temperature={start: 4, end: 0.05, curve: linear}", "learn.scale={start: 100, end: 500, curve: linear}"]
PAPER = [
    "learn.parametrization=patterns",
    "learn.noise=true",
    "prior.noise=true",
    *PAPER_SCHEDULES,
    "learn.betas=[0.9, 0.95]",
    "learn.regulariser=1e-5",
    "learn.weight_decay=0.1",
    "learn.warmup=0",
    "learn.cross_entropy=1",
    "learn.distillation=0",
]
CE, KL = ["learn.cross_entropy=1", "learn.distillation=0"], ["learn.cross_entropy=0", "learn.distillation=1"]
BOTH = ["learn.cross_entropy=0.5", "learn.distillation=0.5"]
TO_10000 = ["learn.temperature.end=0.05", "learn.scale={start: 100, end: 500, curve: linear}"]
Choice = tuple[str, str, list[str]]  # factor, choice, what it changes
SHARED: list[Choice] = [
    ("parametrization", "patterns", ["learn.parametrization=patterns"]),
    ("annealing", "temperature linear", ["learn.temperature.curve=linear"]),
    ("annealing", "sharpness to 10,000", TO_10000),
    ("annealing", "the paper's schedules", PAPER_SCHEDULES),
    ("noise", "Gumbel", ["learn.noise=true"]),
    ("regulariser", "1e-5", ["learn.regulariser=1e-5"]),
    ("prior", "magnitude", ["prior.method=magnitude"]),
    ("prior", "Wanda", ["prior.method=wanda"]),
    ("prior", "strength 1", ["prior.strength=1"]),
    ("prior", "strength 5", ["prior.strength=5"]),
]


@dataclass(frozen=True)
class Base:
    """A recipe to vary. rate: its learning rate by the number of steps; held_out: the texts to choose by."""

    common: Callable[[Path | None], list[str]]
    rate: Callable[[int], float]
    held_out: tuple[str, str]
    choices: list[Choice]


def quickstart(text: Path | None) -> list[str]:
    """Both embedded texts, the end of each held out."""
    part = "seqlen: 256, limit: 64"
    return [
        "data.sources.0.span=[0, 0.9]",
        "data.sources.1.span=[0, 0.9]",
        f"evaluate.texts.wikipedia={{source: {{path: 'asset:wikipedia', span: [0.9, 1]}}, {part}}}",
        f"evaluate.texts.wikitext2-valid={{source: {{path: 'asset:wikitext2-valid', span: [0.9, 1]}}, {part}}}",
        f"evaluate.texts.wikitext2={{source: {{path: 'asset:wikitext2-test'}}, {part}}}",
    ]


def smollm2(text: Path | None) -> list[str]:
    """The embedded Wikipedia text and three times as much of `text`, whose end is held out."""
    if text is None:
        raise SystemExit("this recipe learns from a text of yours beside the embedded one, for example C4: give --text FILE.txt")
    part = "seqlen: 1024, limit: 8, bos: none"
    return [
        f"data.sources=[{{path: 'asset:wikipedia', span: [0, 0.96], weight: 1}}, {{path: '{text}', span: [0, 0.96], weight: 3}}]",
        f"evaluate.texts={{wikitext2: {{source: {{path: 'asset:wikitext2-test'}}, {part}}}, "
        f"wikitext2-valid: {{source: {{path: 'asset:wikitext2-valid'}}, {part}}}, text: {{source: {{path: '{text}', span: [0.98, 1]}}, {part}}}}}",
    ]


# The paper's learning rate is that of its smallest models, 843 M and 2 B parameters.
BASES = {
    "quickstart": Base(
        quickstart,
        lambda steps: 4e-3,
        ("wikipedia", "wikitext2-valid"),
        [
            ("", "base", []),
            ("", "the paper's", [*PAPER, "learn.learning_rate=1e-3"]),
            ("", "the paper's, rate 2e-3 and warm-up", [*PAPER, "learn.warmup=0.1", "learn.learning_rate=2e-3"]),
            ("", "the paper's, rate 4e-3 and warm-up", [*PAPER, "learn.warmup=0.1"]),
            ("learning rate", "2e-3", ["learn.learning_rate=2e-3"]),
            ("learning rate", "1e-3", ["learn.learning_rate=1e-3"]),
            ("loss", "distillation", KL),
            ("loss", "both, 1 : 1", BOTH),
            *SHARED,
        ],
    ),
    "smollm2-135m": Base(
        smollm2,
        lambda steps: 1e-3 * math.sqrt(120 / steps),
        ("text", "wikitext2-valid"),
        [
            ("", "base", []),
            ("", "the paper's", [*PAPER, "learn.learning_rate=1e-3"]),
            ("loss", "cross-entropy", CE),
            ("loss", "both, 1 : 1", BOTH),
            ("sequence", "1 of 512 tokens", ["data.seqlen=512", "learn.batch=1", "learn.micro_batch=1"]),
            ("annealing", "sharpness from 50", ["learn.temperature.start=2"]),
            ("annealing", "sharpness from 300", ["learn.temperature.start=0.3333"]),
            *SHARED,
        ],
    ),
}


def main() -> None:
    """Run what is missing in the output file, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, a line a run")
    parser.add_argument("--recipe", choices=BASES, default="quickstart", help="the base")
    parser.add_argument("--text", type=Path, help="with smollm2-135m: a text to learn from beside the embedded one")
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 120], help="budgets")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--only", nargs="+", metavar="CHOICE", help="run these choices only")
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown, and run nothing")
    arguments = parser.parse_args()
    rows, choices = read_rows(arguments.out), BASES[arguments.recipe].choices
    make = functools.partial(variant, arguments.recipe, arguments.text)
    if arguments.table:
        print(table(arguments.recipe, make, rows, arguments.steps))
        return
    unknown = set(arguments.only or []) - {choice for _, choice, _ in choices}
    if unknown:
        parser.error(f"no choice {', '.join(sorted(unknown))}; there are {', '.join(c for _, c, _ in choices)}")
    known = {row["key"] for row in rows}
    runs = []
    for seed in range(arguments.seeds):
        for steps in sorted(arguments.steps):
            for _, choice, changes in choices:
                recipe = make(changes, steps, seed)
                if (not arguments.only or choice in arguments.only) and key_of(recipe) not in known:
                    runs.append((choice, recipe))
    print(f"{len(runs)} runs to do, {len(known)} lines known", file=sys.stderr)
    if runs:
        ablation = Ablation(make([], arguments.steps[0], 0), arguments.out)
        for method in ("dense", *dict.fromkeys(recipe.prior.method for _, recipe in runs)):
            ablation.reference(method, known)
        for choice, recipe in runs:
            ablation.run(choice, recipe)


def variant(base: str, text: Path | None, changes: Sequence[str], steps: int, seed: int) -> LearnMaskRecipe:
    """The recipe of one run."""
    common = [
        *BASES[base].common(text),
        "evaluate.every=0",
        "evaluate.baselines=[]",
        f"learn.learning_rate={BASES[base].rate(steps):.4g}",
    ]
    recipe = load_recipe(recipe_path(base), [*common, *changes, f"learn.steps={steps}", f"seed={seed}"])
    assert isinstance(recipe, LearnMaskRecipe)
    return settled(recipe)


def key_of(recipe: LearnMaskRecipe) -> str:
    """What tells one run from another: all that it is asked to do."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()


class Ablation:
    """Runs on one loaded model and one tokenised text; each prior mask is found once."""

    def __init__(self, base: LearnMaskRecipe, out: Path) -> None:
        self.session, self.out = prepare(base), out
        self.priors: dict[str, dict[str, Tensor]] = {}
        self.accelerator = Accelerator(cpu=self.session.loaded.model.device.type == "cpu")

    def prior(self, method: str) -> dict[str, Tensor]:
        if method not in self.priors:
            session = self.session
            # A prior does not depend on how the mask is learned.
            seen = key_of(session.recipe.model_copy(update={"learn": LearnSection()}))[:8]
            file = self.out.with_name(f"{self.out.name}.{seen}.{method}.safetensors")
            if not file.exists():
                save_masks(file, session.one_shot(method).masks, session.pattern, session.contracted)  # type: ignore[arg-type]
            self.priors[method] = dict(load_masks(file).masks)
        return self.priors[method]

    def reference(self, method: str, known: set[str]) -> None:
        """A line for the dense network, or for what a prior scores unlearned."""
        key = f"{key_of(self.session.recipe)} {method}"
        if key in known:
            return
        if method == "dense":
            scores = self.session.measure("dense")
        else:
            with self.session.holding(self.prior(method)):
                scores = self.session.measure(method)
        self.write({"key": key, "reference": method, "perplexities": scores})

    def run(self, choice: str, recipe: LearnMaskRecipe) -> None:
        """Learn, measure, write the line."""
        base, began = self.session, time.monotonic()
        blocks = TokenBlocks(base.blocks.tokens, recipe.data.seqlen, recipe.seed + 1)
        session: Session = dataclasses.replace(base, recipe=recipe, blocks=blocks)
        prior = self.prior(recipe.prior.method)
        learner = Learner(
            session.loaded.model,
            session.targets(session.parameters),
            session.pattern,
            learn_settings(recipe.learn, recipe.seed),
            session.start_logits(prior, session.parameters, recipe.seed),
            prior,
            self.accelerator,
        )
        try:
            losses = [record.loss for record in learner.steps(blocks.batch)]
            masks = learner.masks()
        finally:
            learner.close()
        flips = difference(masks, prior, session.pattern, session.contracted).values()
        with session.holding(masks):
            scores = session.measure(f"{choice}, {recipe.learn.steps} steps, seed {recipe.seed}")
        self.write(
            {
                "key": key_of(recipe),
                "choice": choice,
                "steps": recipe.learn.steps,
                "seed": recipe.seed,
                "perplexities": scores,
                "flipped": sum(a for a, _ in flips) / sum(b for _, b in flips),
                "last_losses": losses[-5:],
                "digest": mask_digest(masks),
                "seconds": time.monotonic() - began,
                "threads": torch.get_num_threads(),
            }
        )

    def write(self, row: dict[str, Any]) -> None:
        """Append a line; one that a kill cut off is first taken away."""
        text = self.out.read_text(encoding="utf-8") if self.out.exists() else ""
        with self.out.open("a", encoding="utf-8") as file:
            file.truncate(len(text[: text.rfind("\n") + 1].encode()))
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the output file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def held_out(base: str, row: dict[str, Any]) -> float:
    """Geometric mean of the perplexities on the held-out texts."""
    return math.exp(statistics.fmean(math.log(row["perplexities"][name]) for name in BASES[base].held_out))


def table(base: str, make: Callable[..., LearnMaskRecipe], rows: list[dict[str, Any]], budgets: Sequence[int]) -> str:
    """Markdown: a line a choice, mean and range over the seeds, held out and test at each budget; how many seeds, where it is not all."""
    by_key = {row["key"]: row for row in rows}
    lines = [
        "| " + " | ".join(["factor", "choice", *(f"{s} steps: held out | test | flipped" for s in sorted(budgets))]) + " |",
        "| " + " | ".join(["---", "---", *["---: | ---: | ---:"] * len(budgets)]) + " |",
    ]
    reference = key_of(make([], budgets[0], 0))
    for method in ("dense", "sparsegpt", "wanda", "magnitude"):
        row = by_key.get(f"{reference} {method}")
        if row:
            cells = [f"{held_out(base, row):.1f}", f"{row['perplexities']['wikitext2']:.1f}", ""]
            name = method if method == "dense" else f"{method}, not learned"
            lines.append("| " + " | ".join(["", name, *cells * len(budgets)]) + " |")
    choices = BASES[base].choices
    found = {(c, steps): list(_runs(by_key, make, changes, steps)) for _, c, changes in choices for steps in sorted(budgets)}
    most = max(map(len, found.values()))
    for factor, choice, _ in choices:
        cells = [cell for steps in sorted(budgets) for cell in _cells(base, found[choice, steps], most)]
        if any(cells):
            lines.append("| " + " | ".join([factor, choice, *cells]) + " |")
    return "\n".join(lines)


def _runs(
    by_key: dict[str, dict[str, Any]], make: Callable[..., LearnMaskRecipe], changes: Sequence[str], steps: int
) -> Iterator[dict[str, Any]]:
    """What was run of a choice at one budget, by seed."""
    seed = 0
    while row := by_key.get(key_of(make(changes, steps, seed))):
        yield row
        seed += 1


def _cells(base: str, found: Sequence[dict[str, Any]], seeds: int) -> list[str]:
    if not found:
        return ["", "", ""]
    columns = [held_out(base, r) for r in found], [r["perplexities"]["wikitext2"] for r in found]
    texts = [f"{statistics.fmean(c):.1f}" + (f" ({min(c):.1f} to {max(c):.1f})" if len(c) > 1 else "") for c in columns]
    if len(found) < seeds:
        texts[0] += f", {len(found)} seed{'s' if len(found) > 1 else ''}"
    return [*texts, f"{100 * statistics.fmean(r['flipped'] for r in found):.{2 if base != 'quickstart' else 1}f} %"]


if __name__ == "__main__":
    main()
