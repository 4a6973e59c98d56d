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
    mask_out: Annotated[
        Path | None,
        typer.Option(
            "--mask-out",
            help="With --update-weights: write the mask here (.safetensors or .npz), and into --out a model whose pruned weights have their own "
            "values, to learn a mask on from there.",
        ),
    ] = None,
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
    - `compress prune asset:tiny-llama --update-weights --out tiny-updated --mask-out tiny-updated.safetensors`
    - `compress prune Qwen/Qwen3-0.6B --method ria --pattern 4:8 --out ria.safetensors`
    """
    if update_weights and method != "sparsegpt":
        raise UsageError(f"--update-weights belongs to sparsegpt; {method} only chooses a mask")
    as_mask = out.suffix in (".safetensors", ".npz")
    if as_mask and update_weights:
        raise UsageError("updated weights do not fit in a mask file; give --out a folder")
    if mask_out is not None and not update_weights:
        raise UsageError("--mask-out goes with --update-weights; for a mask alone give --out a name in .safetensors or .npz")
    if mask_out is not None and mask_out.suffix not in (".safetensors", ".npz"):
        raise UsageError(f"--mask-out {mask_out} is to end in .safetensors or .npz")
    for path in (out, mask_out):
        if path is not None and path.exists() and (path.is_file() or any(path.iterdir())):
            raise UsageError(f"{path} exists; choose another name")
    from compress.oneshot import run_one_shot

    report = run_one_shot(
        model,
        out,
        method=method,
        update_weights=update_weights,
        mask_out=mask_out,
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
