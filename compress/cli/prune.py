"""`compress prune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.errors import UsageError


def prune(
    model: Annotated[str, typer.Argument(help="Hub name, folder, .gguf file, or asset:tiny-llama.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the pruned model, or a mask file ending in .safetensors or .npz.")
    ],
    method: Annotated[
        Literal["magnitude", "wanda", "ria", "sparsegpt"], typer.Option("--method", help="One-shot method.")
    ] = "sparsegpt",
    update_weights: Annotated[
        bool, typer.Option("--update-weights", help="SparseGPT only: also update the weights that stay.")
    ] = False,
    pattern: Annotated[str, typer.Option("--pattern", help="N:M.")] = "2:4",
    data: Annotated[
        str, typer.Option("--data", help="Calibration text: a file, a folder, asset:NAME, or a hub data set.")
    ] = "asset:wikipedia",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration sequences.")] = 128,
    seqlen: Annotated[
        int | None,
        typer.Option("--seqlen", help="Tokens a calibration sequence. Default: 512, or all positions of a model with fewer."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", help="Glob of weights; may be repeated. Default: every matrix of the decoder blocks."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Glob of weights to leave dense; may be repeated.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "fastest", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Load the weights as this: auto is their own."),
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of calibration sequences.")] = 0,
) -> None:
    """Prune a model in one shot: the baselines that a learned mask is compared with, as a checkpoint or a mask.

    **Examples**

    - `compress prune asset:tiny-llama --method wanda --out tiny-wanda`
    - `compress prune asset:tiny-llama --method sparsegpt --update-weights --out tiny-sparsegpt`
    - `compress prune Qwen/Qwen3-0.6B --method ria --pattern 4:8 --out ria.safetensors`
    """
    if update_weights and method != "sparsegpt":
        raise UsageError(f"--update-weights belongs to sparsegpt; {method} only chooses a mask")
    as_mask = out.suffix in (".safetensors", ".npz")
    if as_mask and update_weights:
        raise UsageError("updated weights do not fit in a mask file; give --out a folder")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UsageError(f"{out} exists; choose another --out")
    from compress.oneshot import run_one_shot

    report = run_one_shot(
        model,
        out,
        method=method,
        update_weights=update_weights,
        pattern=pattern,
        data=data,
        samples=samples,
        seqlen=seqlen,
        include=include or ["*"],
        exclude=exclude or [],
        dtype=dtype,
        device=device,
        seed=seed,
    )
    typer.echo(json.dumps(report))
