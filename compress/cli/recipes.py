"""`compress recipes`, `compress validate`, `compress schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="List, show and copy the shipped recipes.", rich_markup_mode="markdown")


@app.command("ls")
def ls(json_: Annotated[bool, typer.Option("--json", help="One JSON object: name -> description.")] = False) -> None:
    """List the shipped recipes.

    **Example**: `compress recipes ls`
    """
    from compress.recipe_file import load_recipe, shipped_recipes

    listed = {name: load_recipe(path).description for name, path in shipped_recipes().items()}
    if json_:
        typer.echo(json.dumps(listed))
        return
    width = max(map(len, listed))
    for name, description in listed.items():
        typer.echo(f"{name:{width}}  {description}")


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a file.")]) -> None:
    """Print a recipe as it is written.

    **Example**: `compress recipes show quickstart`
    """
    from compress.recipe_file import recipe_path

    typer.echo(recipe_path(name).read_text(encoding="utf-8"), nl=False)


@app.command("cp")
def cp(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    target: Annotated[Path, typer.Argument(help="File or folder to copy it to.")] = Path(),
) -> None:
    """Copy a recipe, to change it.

    **Example**: `compress recipes cp quickstart mine.yaml`
    """
    from compress.recipe_file import recipe_path

    source = recipe_path(name)
    file = target / source.name if target.is_dir() else target
    if file.exists():
        raise UsageError(f"{file} exists; choose another name")
    try:
        file.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error}") from error
    typer.echo(str(file))


def validate(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to check with it.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the resolved recipe as JSON.")] = False,
) -> None:
    """Check a recipe and print it with every default filled in.

    **Examples**

    - `compress validate mine.yaml`
    - `compress validate quickstart learn.steps=10`
    """
    from compress.recipe_file import dump_recipe, load_recipe, recipe_path

    loaded = load_recipe(recipe_path(recipe), overrides)
    typer.echo(json.dumps(loaded.model_dump(mode="json")) if json_ else dump_recipe(loaded), nl=json_)


def schema() -> None:
    """Print the JSON Schema of recipes of all kinds, for editors that complete and check YAML.

    **Example**: `compress schema > recipe.schema.json`
    """
    from compress.recipe_file import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
