"""Tables on stdout."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def stdout() -> Console:
    """A console on stdout that never cuts or folds a table where the output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(200, shutil.get_terminal_size().columns))


def print_perplexities(rows: Sequence[dict[str, Any]]) -> None:
    """Methods against perplexities, the best sparse one in bold; nothing where nothing was measured."""
    measured = [row for row in rows if row["perplexities"]]
    if not measured:
        return
    names = list(measured[0]["perplexities"])
    table = Table("method", *[f"{name} perplexity" for name in names])
    for column in table.columns[1:]:
        column.justify = "right"
    best = min((row["perplexity"] for row in measured if row["method"] != "dense"), default=None)
    for row in measured:
        style = "bold green" if row["perplexity"] == best and row["method"] != "dense" else ""
        table.add_row(row["method"], *[f"{row['perplexities'][name]:.2f}" for name in names], style=style)
    stdout().print(table)
