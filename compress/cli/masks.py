"""`compress masks`: what can be asked of mask files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Compare mask files.", rich_markup_mode="markdown")


@app.callback()
def masks() -> None:
    """Compare mask files."""


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Mask file, or the directory of a finished run.")],
    b: Annotated[Path, typer.Argument(help="Mask file or run directory to compare it with.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the share of groups in which two masks differ, per layer and kind of matrix.

    **Examples**

    - `compress masks diff runs/general runs/code`
    - `compress masks diff runs/quickstart/state/prior.safetensors runs/quickstart`
    """
    from compress.masks import diff_masks

    found = diff_masks(a, b)
    if json_:
        typer.echo(json.dumps(found.to_json()))
        return
    from rich.table import Table

    from compress.cli.tables import stdout

    kinds = list(dict.fromkeys(m.kind for m in found.matrices))
    table = Table("layer", *[kind.rsplit(".", 1)[-1] for kind in kinds], "all", title=f"groups that differ, {found.pattern}")
    for column in table.columns:
        column.justify = "right"
    for layer, members in found.by_layer().items():
        shares = {m.kind: f"{100 * m.share:.2f} %" for m in members}
        total = sum(m.differing for m in members) / sum(m.groups for m in members)
        table.add_row("-" if layer is None else str(layer), *[shares.get(kind, "") for kind in kinds], f"{100 * total:.2f} %")
    table.add_section()
    row = []
    for kind in kinds:
        members = [m for m in found.matrices if m.kind == kind]
        row.append(f"{100 * sum(m.differing for m in members) / sum(m.groups for m in members):.2f} %")
    table.add_row("all", *row, f"{100 * found.share:.2f} %")
    stdout().print(table)
