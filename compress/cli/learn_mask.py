"""`compress learn-mask`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer


def learn_mask(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe (see `compress recipes ls`).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Change keys of the recipe: learn.steps=100")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run directory. Default: runs/NAME-OF-RECIPE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, without loading the weights; write nothing.")
    ] = False,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="With --dry-run: of how many processes to plan the memory of one.")
    ] = 1,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Learn an N:M mask on the frozen weights of a model.

    The weights never change: what is learned is which of them to keep. The run directory gets `mask.safetensors`,
    `summary.json`, `report.html`, `metrics.jsonl` and the resolved `recipe.yaml`. Interrupt it at any time; `--resume` goes on.

    **Examples**

    - `compress learn-mask quickstart`
    - `compress learn-mask recipes/smollm2-135m.yaml learn.steps=1100 learn.learning_rate=3e-4 --out runs/longer`
    - `compress learn-mask quickstart --dry-run`
    - `compress learn-mask llama-2-7b learn.shard=weights --dry-run --processes 4`
    - `accelerate launch --multi_gpu -m compress learn-mask llama-2-7b learn.batch=8 learn.micro_batch=1`
    - `compress learn-mask smollm2-domains prior.mask=runs/smollm2-135m`
    """
    from compress.errors import UsageError
    from compress.recipe import LearnMaskRecipe
    from compress.recipe_file import load_recipe_of, recipe_path

    path = recipe_path(recipe)
    loaded = load_recipe_of(LearnMaskRecipe, path, overrides)
    folder = out or Path("runs") / path.stem
    if processes > 1 and not dry_run:
        raise UsageError("--processes is for --dry-run; start several processes with accelerate launch or torchrun")
    if dry_run:
        from compress.plan import plan

        found = plan(loaded, processes)
        typer.echo(json.dumps(found.to_json()) if json_ else found.describe())
        return
    from compress.cli.tables import print_perplexities

    again = shlex.join(["compress", "learn-mask", recipe, *(overrides or []), "--out", str(folder), "--resume"])
    if loaded.domains:
        from compress.domains import learn_domains

        rows = learn_domains(loaded, folder, resume=resume, resume_command=again)
        if json_:
            typer.echo(json.dumps({"run": str(folder), "summary": rows}))
        else:
            print_perplexities(rows)
            typer.echo(f"masks and reports: {', '.join(str(folder / name) for name in loaded.domains)}", err=True)
        return
    from compress.learn import learn_mask as run

    result = run(loaded, folder, resume=resume, resume_command=again)
    if result is None:
        return  # one of several processes, and not the first
    if json_:
        typer.echo(
            json.dumps({"run": str(result.run), "mask_sha256": result.digest, "flipped": result.flipped, "summary": result.rows})
        )
        return
    print_perplexities(result.rows)
    typer.echo(
        f"mask: {result.run / 'mask.safetensors'} ({100 * result.flipped:.2f} % of the groups differ from the prior)", err=True
    )
    typer.echo(f"report: {result.run / 'report.html'}", err=True)
    typer.echo(f"next: compress export {result.run} --out MODEL_FOLDER", err=True)
