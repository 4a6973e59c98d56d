"""`compress profile-experts`, `compress quantize` and `compress run`: three lengths of one chain, driven by one recipe."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from compress.quantize.run import QuantizeResult, Stage

Recipe = Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, for example allocate.average_bits=2.0."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run directory. Default: runs/<name of the recipe>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, without loading the weights; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def profile_experts(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Measure what every width would cost every expert of a mixture-of-experts model: the first stage of `compress run`.

    One pass over the calibration text, a layer at a time: how often an expert is chosen, its routing weight, and the error of each
    candidate, measured with the real quantiser on the tokens routed to it. The run directory gets `profile/` (safetensors),
    `experts.json` for `compress allocate-bits --stats`, and `report.html` with heat maps. `compress quantize` with the same recipe and
    `--out` goes on from there.

    **Examples**

    - `compress profile-experts tiny-moe`
    - `compress profile-experts tiny-moe "candidates=[1,2,3,4]" --out runs/profile`
    - `compress allocate-bits --stats runs/tiny-moe/experts.json --average-bits 2 --mode error`
    """
    _chain("profile", "profile-experts", recipe, overrides, out, resume, dry_run, json_)


def quantize(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Profile, allocate bits, quantise and measure a mixture-of-experts model: `compress run` without the export.

    The run directory gets what `profile-experts` writes, `bits.json` (the width of every matrix), `quantized/` (codes), `summary.json` and
    `report.html`. Interrupt it at any time; `--resume` goes on with the first layer that is missing.

    **Examples**

    - `compress quantize tiny-moe`
    - `compress quantize tiny-moe allocate.average_bits=1.5 --out runs/tiny-15`
    - `compress quantize tiny-moe allocate.average_bits=null allocate.bits_file=bits.json --out runs/mine`
    - `compress export runs/tiny-moe --format packed-moe --out tiny-moe-packed`
    """
    _chain("quantize", "quantize", recipe, overrides, out, resume, dry_run, json_)


def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Make a mixture-of-experts model smaller, the whole chain: profile, allocate, quantise, tune routers, measure, export.

    What `compress quantize` does, and then the checkpoint in `model/` of the run directory, verified.

    **Examples**

    - `compress run tiny-moe`
    - `compress run tiny-moe --dry-run`
    - `compress run tiny-moe allocate.average_bits=2.0 tune.steps=100 --out runs/tiny-2`
    - `compress run qwen3-30b-a3b-bits stream=true`
    - `compress generate runs/tiny-moe/model --prompt "The city"`
    """
    _chain("run", "run", recipe, overrides, out, resume, dry_run, json_)


def _chain(
    stage: Stage,
    command: str,
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    json_: bool,
) -> None:
    from compress.recipe_file import load_recipe_of, recipe_path
    from compress.recipe_quantize import QuantizeRecipe

    path = recipe_path(recipe)
    loaded = load_recipe_of(QuantizeRecipe, path, overrides)
    folder = out or Path("runs") / path.stem
    if dry_run:
        from compress.quantize.plan import plan_quantize

        plan = plan_quantize(loaded)
        typer.echo(json.dumps(plan.to_json()) if json_ else plan.describe())
        return
    from compress.quantize.run import run_recipe

    again = shlex.join(["compress", command, recipe, *(overrides or []), "--out", str(folder), "--resume"])
    result = run_recipe(loaded, folder, stage=stage, resume=resume, resume_command=again)
    if json_:
        facts = {"run": str(result.run), "summary": result.rows, **result.facts}
        if stage == "profile":
            facts["layers"] = {str(p.layer): _profile_json(p) for p in result.profiles}
        typer.echo(json.dumps(facts))
    elif stage == "profile":
        _print_profile(result)
    else:
        _print_rows(result.rows)
    typer.echo(f"report: {result.run / 'report.html'}", err=True)
    if stage == "profile":
        typer.echo(
            f"next: compress allocate-bits --stats {result.run / 'experts.json'} --average-bits 2.5 --mode error", err=True
        )
    elif stage == "quantize":
        typer.echo(f"next: compress export {result.run} --format {_format(loaded)} --out MODEL_FOLDER", err=True)
    elif loaded.export.format != "none":
        typer.echo(f"model: {result.run / 'model'}", err=True)


def _format(recipe: Any) -> str:
    return "packed-moe" if recipe.export.format == "none" else recipe.export.format


def _profile_json(profile: Any) -> dict[str, Any]:
    return {
        "tokens": profile.frequency.tolist(),
        "weight": None if profile.weight is None else profile.weight.tolist(),
        "relative_error": (profile.squared**0.5 / profile.residual).tolist(),
        "candidates": profile.candidates,
    }


def _print_profile(result: QuantizeResult) -> None:
    """Experts by layer: how unevenly they are used, and the mean error of every candidate."""
    from rich.table import Table

    from compress.cli.tables import stdout

    pairs = result.profiles[0].candidates
    table = Table("layer", "experts", "fewest tokens", "most tokens", *[f"{b} bits (g{g})" for b, g in pairs])
    for column in table.columns[1:]:
        column.justify = "right"
    for p in result.profiles:
        relative = (p.squared**0.5).mean(0) / p.residual
        table.add_row(
            str(p.layer),
            str(p.experts),
            f"{p.frequency.min():,.0f}",
            f"{p.frequency.max():,.0f}",
            *[f"{x:.5f}" for x in relative],
        )
    console = stdout()
    console.print(table)
    console.print(
        "mean over a layer's experts: change of the block's output when one expert is quantised, relative to the output",
        style="dim",
    )


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """Perplexity and divergence on every text; nothing where nothing was measured."""
    if not rows or not rows[0]["perplexities"]:
        return
    from rich.table import Table

    from compress.cli.tables import stdout

    table = Table("text", "model", "perplexity", "KL", "same prediction", "routed elsewhere")
    for column in table.columns[2:]:
        column.justify = "right"
    for text in rows[0]["perplexities"]:
        for row in rows:
            kl, top1, moved = (row[key].get(text) for key in ("kl", "top1_agreement", "rerouted"))
            table.add_row(
                text,
                row["method"],
                f"{row['perplexities'][text]:.2f}",
                "" if kl is None else f"{kl:.4f}",
                "" if top1 is None else f"{100 * top1:.1f} %",
                "" if moved is None else f"{100 * moved:.1f} %",
            )
        table.add_section()
    stdout().print(table)
