"""`compress learn-routing`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def learn_routing(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, for example target_activation=0.65."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run directory. Default: runs/<name of the recipe>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, without loading the weights; write nothing.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Decide for every token how many of its experts run, by a learned router (otp) or a calibrated rule (odp, top-p, top-k).

    The model's weights never change. The run directory gets `routing.safetensors` and `routing.json`, `summary.json`, `report.html`
    (experts a token by layer and by text), `metrics.jsonl` and the resolved `recipe.yaml`. Interrupt it at any time; `--resume` goes on.

    **Examples**

    - `compress learn-routing tiny-moe-routing`
    - `compress learn-routing tiny-moe-routing --dry-run`
    - `compress learn-routing tiny-moe-routing target_activation=0.65 --out runs/routing-65`
    - `compress learn-routing tiny-moe-routing method=odp --out runs/odp`
    - `compress learn-routing qwen3-30b-a3b-routing model.source=my-2.5-bit-model`
    - `compress export runs/tiny-moe-routing --out tiny-moe-routed`
    """
    from compress.recipe_file import load_recipe_of, recipe_path
    from compress.recipe_routing import LearnRoutingRecipe

    path = recipe_path(recipe)
    loaded = load_recipe_of(LearnRoutingRecipe, path, overrides)
    folder = out or Path("runs") / path.stem
    if dry_run:
        from compress.routing.plan import plan_routing

        plan = plan_routing(loaded)
        typer.echo(json.dumps(plan.to_json()) if json_ else plan.describe())
        return
    again = shlex.join(["compress", "learn-routing", recipe, *(overrides or []), "--out", str(folder), "--resume"])
    from compress.routing.run import learn_routing as run

    result = run(loaded, folder, resume=resume, resume_command=again)
    if result is None:
        return  # one of several processes, and not the first
    if json_:
        typer.echo(json.dumps({"run": str(result.run), "activation": result.activation, "summary": result.rows}))
        return
    _print_rows(result.rows)
    typer.echo(f"{100 * result.activation:.2f} % of the routed experts run on the calibration text", err=True)
    typer.echo(f"routing: {result.run / 'routing.safetensors'}, {result.run / 'routing.json'}", err=True)
    typer.echo(f"report: {result.run / 'report.html'}", err=True)
    typer.echo(f"next: compress export {result.run} --out MODEL_FOLDER", err=True)


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Perplexity, divergence and experts run of every method on every text; nothing where nothing was measured."""
    if not rows or not rows[0]["perplexities"]:
        return
    from rich.table import Table

    from compress.cli.tables import stdout

    table = Table("text", "method", "perplexity", "KL", "experts run")
    for column in table.columns[2:]:
        column.justify = "right"
    for text in rows[0]["perplexities"]:
        for row in rows:
            share = f"{100 * row['activation'][text]:.1f} %"
            table.add_row(text, row["method"], f"{row['perplexities'][text]:.2f}", f"{row['kl'][text]:.4f}", share)
        table.add_section()
    stdout().print(table)
