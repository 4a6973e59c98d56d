"""`compress export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.errors import UsageError


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_MASK", help="Run directory of learn-mask, or a mask file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; for --format mask a .safetensors or .npz file.")],
    format_: Annotated[
        Literal["dense", "mask"],
        typer.Option("--format", help="dense: a checkpoint with exact zeros, which loads anywhere. mask: the mask alone."),
    ] = "dense",
    model: Annotated[str | None, typer.Option("--model", help="The dense model. Default: the one the run or mask names.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
) -> None:
    """Export a learned mask: as a checkpoint that other software loads, or as a mask file.

    A dense export has the original's names, shapes, types and config; it is loaded back and compared bit for bit with mask times
    original before it gets its name.

    **Examples**

    - `compress export runs/quickstart --out tiny-24`
    - `compress export mask.safetensors --model meta-llama/Llama-3.2-1B --out llama-24`
    - `compress export runs/quickstart --format mask --out mask_compressed.npz`
    """
    import yaml

    run = source if source.is_dir() else None
    file = source / "mask.safetensors" if run else source
    if not file.is_file():
        unfinished = (
            " (is the run finished? `compress learn-mask ... --resume` goes on)" if run and (run / "recipe.yaml").exists() else ""
        )
        raise UsageError(f"there is no mask at {file}{unfinished}")
    recipe_text, metrics, dtype, revision, trust = None, None, "auto", None, False
    if run and (run / "recipe.yaml").is_file():
        recipe_text = (run / "recipe.yaml").read_text(encoding="utf-8")
        section = yaml.safe_load(recipe_text)["model"]
        revision, trust = section.get("revision"), bool(section.get("trust_remote_code"))
        model = model or section["source"]
        if (run / "summary.json").is_file():
            metrics = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    from maskllm.storage import load_masks

    masks = load_masks(file)
    if format_ == "mask":
        from compress.export.mask import export_mask

        export_mask(masks, out, overwrite=overwrite)
        typer.echo(f"wrote {out} ({out.stat().st_size:,} bytes)")
        return
    model = model or masks.metadata.get("model")
    if model is None:
        raise UsageError(f"{file} does not say which model it belongs to; give --model")
    from compress import console
    from compress.export.dense import export_dense
    from compress.models import load_model, resolve_source

    with console.log.status(f"exporting {model}"):
        place = resolve_source(model)
        words = place.folder is None or place.gguf_file is not None  # else the tokenizer's files, if any, are copied as they are
        loaded = load_model(model, dtype=dtype, revision=revision, trust_remote_code=trust, tokenizer=words)
        reports = export_dense(
            loaded,
            dict(masks.masks),
            out,
            pattern=masks.pattern,
            contracted=masks.contracted,
            recipe_text=recipe_text,
            metrics=metrics,
            overwrite=overwrite,
        )
    typer.echo(f"wrote {out}")
    for report in reports:
        typer.echo(f"verified: {report.claim}")
