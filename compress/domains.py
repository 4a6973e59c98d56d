"""Several domain masks of one model from one recipe: a run for each domain, and every mask measured on every domain."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from compress import console
from compress.errors import UsageError
from compress.learn import learn_mask
from compress.recipe import LearnMaskRecipe
from compress.recipe_file import dump_recipe
from compress.rundir import write_atomic
from compress.settings import settled


def domain_recipes(recipe: LearnMaskRecipe) -> dict[str, LearnMaskRecipe]:
    """The recipe of each domain: the common one with the domain's texts to learn from, measured on the texts of all domains.

    The prior is measured too: it is what a domain's mask has to beat. Raises UsageError when a domain has the name of another text.
    """
    clash = recipe.domains.keys() & recipe.evaluate.texts.keys()
    if clash:
        raise UsageError(f"domains and evaluate.texts share the name {min(clash)!r}; rename one")
    texts = {name: domain.text for name, domain in recipe.domains.items()} | recipe.evaluate.texts
    result = {}
    for name, domain in recipe.domains.items():
        # The domain's own text comes first: it is the one that is watched while learning and charted in the report.
        own = {name: texts[name]} | texts
        baselines = list(dict.fromkeys([*recipe.evaluate.baselines, "prior"]))
        result[name] = recipe.model_copy(
            update={
                "description": f"{recipe.description or 'Domain mask'}: {name}",
                "domains": {},
                "data": recipe.data.model_copy(update={"sources": domain.sources}),
                "evaluate": recipe.evaluate.model_copy(update={"texts": own, "baselines": baselines}),
            }
        )
    return result


def learn_domains(recipe: LearnMaskRecipe, out: Path, *, resume: bool, resume_command: str) -> list[dict[str, Any]]:
    """Learn a mask for every domain under `out` and write `out/summary.json`: one row a mask, as in the summary of a run.

    Domains that are complete are not run again; `resume` continues the others.
    Raises UsageError when a folder in the way belongs to another recipe, and what `learn_mask` raises.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a recipe with domains runs in one process; launch it without accelerate or torchrun")
    recipes = domain_recipes(settled(recipe))
    found: dict[str, list[dict[str, Any]]] = {}
    for name, own in recipes.items():
        folder = out / name
        summary = folder / "summary.json"
        if summary.exists():
            if (folder / "recipe.yaml").read_text(encoding="utf-8") != dump_recipe(own):
                raise UsageError(f"{folder} holds the result of another recipe; choose another --out")
            if not resume:
                raise UsageError(f"{out} already holds a run; continue it with --resume, or choose another --out")
            console.log.print(f"{name}: already learned")
        else:
            console.log.print(f"[bold]{name}[/]")
            begun = (folder / "recipe.yaml").exists()
            learn_mask(own, folder, resume=resume and begun, resume_command=resume_command)
        found[name] = json.loads(summary.read_text(encoding="utf-8"))
    rows = _table(found)
    write_atomic(out / "summary.json", json.dumps(rows, indent=1))
    return rows


def _table(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Baselines that do not depend on the domain (dense, and the prior where all share it) once, then each domain's mask."""
    names = list(found)
    order = list(found[names[0]][0]["perplexities"])
    rows: list[dict[str, Any]] = []
    for name in names:
        for row in found[name]:
            scores = {text: row["perplexities"][text] for text in order}
            label = f"{name} mask" if row["method"] == "learned" else row["method"]
            same = next((r for r in rows if r["method"] == label and r["perplexities"] == scores), None)
            if same is None:
                clash = any(r["method"] == label for r in rows)
                rows.append(
                    {"method": f"{label} ({name})" if clash else label, "perplexity": scores[order[0]], "perplexities": scores}
                )
    learned = [r for r in rows if r["method"].endswith(" mask")]
    return [r for r in rows if r not in learned] + learned
