"""`compress inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.errors import UsageError


def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint folder, .safetensors, .gguf, mask file or MaskLLM .npz.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show pattern, sparsity, bits and bytes of every tensor of a checkpoint.

    **Examples**

    - `compress inspect my-sparse-model`
    - `compress inspect runs/quickstart/mask.safetensors`
    - `compress inspect mask_compressed.npz --json`
    """
    from compress.inspect import inspect_checkpoint

    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder")
    rows = list(inspect_checkpoint(path))
    weights = sum(_numel(row.shape) for row in rows)
    nbytes = sum(row.nbytes for row in rows)
    totals = {
        "tensors": len(rows),
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / max(weights, 1),
        "sparsity": sum(row.sparsity * _numel(row.shape) for row in rows) / max(weights, 1),
    }
    if json_:
        typer.echo(json.dumps({"path": str(path), "tensors": [row.to_json() for row in rows], "total": totals}))
        return
    from rich.table import Table

    from compress.cli.tables import stdout

    table = Table("tensor", "shape", "type", "bytes", "bits", "zeros", "pattern")
    for column in table.columns[3:6]:
        column.justify = "right"
    for row in rows:
        shape = "x".join(map(str, row.shape))
        table.add_row(
            row.name, shape, row.dtype, f"{row.nbytes:,}", f"{row.bits:.2f}", f"{100 * row.sparsity:.2f} %", row.pattern
        )
    table.add_section()
    table.add_row(
        f"{len(rows)} tensors",
        f"{weights:,}",
        "",
        f"{nbytes:,}",
        f"{totals['bits_per_weight']:.2f}",
        f"{100 * totals['sparsity']:.2f} %",
        "",
    )
    stdout().print(table)


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
