"""`compress export`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.verify import Report
    from maskllm.storage import MaskFile


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Run directory of learn-mask, learn-routing or quantize, a mask file, or a model (hub name, folder, .gguf, asset:NAME).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; for --format mask a .safetensors or .npz file.")],
    format_: Annotated[
        Literal["dense", "packed-24", "torchao-fp8-24", "mask", "packed-moe", "compressed-tensors"],
        typer.Option(
            "--format",
            help="dense: a checkpoint with exact zeros, which loads anywhere. packed-24: two of four weights stored, for this tool's "
            "kernels. torchao-fp8-24: dense, with what vLLM needs to pack it on a Hopper GPU. mask: the mask alone. Of a quantised model, "
            "packed-moe: every matrix at its own width, for this tool. compressed-tensors: one width for all experts of a layer, for vLLM.",
        ),
    ] = "dense",
    model: Annotated[
        str | None, typer.Option("--model", help="The dense model of a run or mask file. Default: the one that it names.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            "--mask", help="Mask file, when SOURCE is a model. Without one packed-24 takes the zeros of a sparse checkpoint."
        ),
    ] = None,
    values: Annotated[
        Literal["auto", "bf16", "fp16", "fp32", "int8"],
        typer.Option(
            "--values", help="packed-24: type of the values that remain; auto is the checkpoint's own, int8 has one scale a row."
        ),
    ] = "auto",
    activations: Annotated[
        Literal["float", "int8"],
        typer.Option(
            "--activations", help="packed-24 with int8 values: int8 rounds each token to int8 before a product, which is faster."
        ),
    ] = "float",
    embedding: Annotated[
        Literal["dense", "int8"],
        typer.Option(
            "--embedding",
            help="packed-24: int8 rounds token embedding and output head, one scale a row; in a small model they are most of what is left.",
        ),
    ] = "dense",
    include: Annotated[
        list[str] | None, typer.Option("--include", help="packed-24 without a mask: glob of matrices to pack; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="packed-24 without a mask: glob of matrices to leave dense; may be repeated."),
    ] = None,
    promote: Annotated[
        bool,
        typer.Option(
            "--promote", help="compressed-tensors: write mixed experts at the width of the layer's widest, values unchanged."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out, when it is an earlier export.")] = False,
) -> None:
    """Export a masked or quantised model as a checkpoint, dense or packed, or the mask as a file.

    Every export is read back and compared bit for bit with what it should be (mask times original, or the quantised values) before it
    gets its name. A run of learn-routing becomes a copy of its model with the routing beside it.

    **Examples**

    - `compress export runs/quickstart --out tiny-24`
    - `compress export mask.safetensors --model meta-llama/Llama-3.2-1B --out llama-24`
    - `compress export runs/quickstart --format packed-24 --out tiny-24-packed`
    - `compress export my-sparse-model --format packed-24 --values int8 --embedding int8 --out my-packed-model`
    - `compress export runs/quickstart --format mask --out mask_compressed.npz`
    - `compress export runs/tiny-moe-routing --out tiny-moe-routed`
    - `compress export runs/tiny-moe --format packed-moe --out tiny-moe-packed`
    - `compress export runs/tiny-moe --format compressed-tensors --promote --out tiny-moe-vllm`
    """
    run = Path(source).expanduser()
    if (run / "routing.json").is_file() and not (run / "config.json").exists():
        if format_ != "dense" or mask is not None:
            raise UsageError(f"{source} is a run of learn-routing, which has no mask; --format and --mask do not go with it")
        _routing(run, out, model, overwrite)
        return
    if format_ != "packed-24" and (values != "auto" or activations != "float" or embedding != "dense" or include or exclude):
        raise UsageError("--values, --activations, --embedding, --include and --exclude go with --format packed-24")
    if format_ == "packed-moe" or format_ == "compressed-tensors":
        if mask is not None:
            raise UsageError(f"--mask does not go with --format {format_}: a quantised matrix holds its own zeros")
        _quantized(run, out, format_, model, promote, overwrite)
        return
    if promote:
        raise UsageError("--promote goes with --format compressed-tensors")
    if (run / "quantized").is_dir() and not (run / "config.json").exists():
        raise UsageError(f"{source} is a run of quantize; give --format packed-moe or --format compressed-tensors")
    job = _job(source, model, mask)
    if format_ == "packed-24":
        _packed(job, out, values, activations, embedding, include or [], exclude or [], overwrite)
        return
    if job.masks is None:
        raise UsageError(f"{source} is a model; give the mask with --mask (without one only --format packed-24 works)")
    if format_ == "mask":
        from compress.export.mask import export_mask

        export_mask(job.masks, out, overwrite=overwrite)
        typer.echo(f"wrote {out} ({out.stat().st_size:,} bytes)")
        return
    from compress import console
    from compress.export import torchao24
    from compress.export.dense import export_dense
    from compress.models import load_model, resolve_source

    with console.log.status(f"exporting {job.model}"):
        place = resolve_source(job.model)
        words = place.folder is None or place.gguf_file is not None  # else the tokenizer's files, if any, are copied as they are
        loaded = load_model(job.model, revision=job.revision, trust_remote_code=job.trust, tokenizer=words)
        torchao = format_ == "torchao-fp8-24"
        if torchao:
            torchao24.check_servable(loaded.model, job.masks.masks, job.masks.pattern)
        reports = export_dense(
            loaded,
            dict(job.masks.masks),
            out,
            pattern=job.masks.pattern,
            contracted=job.masks.contracted,
            recipe_text=job.recipe_text,
            metrics=job.metrics,
            extras={torchao24.CONFIG_NAME: torchao24.config_file()} if torchao else None,
            notes=torchao24.notes() if torchao else "",
            overwrite=overwrite,
        )
    _say(out, reports)
    if torchao:
        typer.echo(f"to serve (not verified on a GPU yet): {torchao24.serve_line(str(out.resolve()))}")


def _routing(run: Path, out: Path, model: str | None, overwrite: bool) -> None:
    from compress.export.routing import export_routing

    description = export_routing(run, out, model=model, overwrite=overwrite)
    typer.echo(f"wrote {out}")
    typer.echo(f"routing by {description['method']}, {len(description['mixtures'])} mixtures")


def _quantized(
    run: Path, out: Path, format_: Literal["packed-moe", "compressed-tensors"], model: str | None, promote: bool, overwrite: bool
) -> None:
    from compress import console
    from compress.export.quantized import export_quantized

    with console.task("packing", 1) as bar:
        result = export_quantized(
            run,
            out,
            format_,
            model=model,
            promote=promote,
            overwrite=overwrite,
            progress=lambda done, total, note: bar.update(done, note, total),
        )
    _say(out, result.reports)
    sizes = result.sizes
    typer.echo(
        f"{sum(count for count, _ in sizes.widths.values()):,} quantised matrices: {sizes.code_bits / sizes.weights:.2f} bits a weight in codes, "
        f"{8 * sizes.nbytes / sizes.weights:.2f} with scales and zeros; whole checkpoint {sizes.whole_nbytes:,} bytes, "
        f"{8 * sizes.whole_nbytes / sizes.whole_weights:.2f} bits a weight"
    )


@dataclass
class _Job:
    """What is to be exported. `masks` is None for a model given without a mask."""

    model: str
    masks: MaskFile | None
    revision: str | None = None
    trust: bool = False
    recipe_text: str | None = None
    metrics: list[dict[str, Any]] | None = None


def _job(source: str, model: str | None, mask: Path | None) -> _Job:
    """Tell a run directory, a mask file and a model apart."""
    from maskllm.storage import load_masks

    path = Path(source).expanduser()
    is_file = path.is_file() and path.suffix != ".gguf"
    is_run = (
        path.is_dir()
        and not (path / "config.json").exists()
        and any((path / n).exists() for n in ("recipe.yaml", "mask.safetensors"))
    )
    if not path.exists() and path.suffix in (".safetensors", ".npz"):
        raise UsageError(f"there is no mask at {path}")
    if not (is_file or is_run):
        if model is not None:
            raise UsageError(f"{source} is a model itself; --model goes with a run directory or a mask file")
        return _Job(source, load_masks(mask) if mask is not None else None)
    if mask is not None:
        raise UsageError(
            f"--mask goes with a model, and {source} is {'a run, which has its own mask' if is_run else 'a mask file itself'}"
        )
    file = path / "mask.safetensors" if is_run else path
    if not file.is_file():
        raise UsageError(f"there is no mask at {file} (is the run finished? `compress learn-mask ... --resume` goes on)")
    masks = load_masks(file)
    job = _Job(model or masks.metadata.get("model", ""), masks)
    if is_run and (path / "recipe.yaml").is_file():
        import yaml

        job.recipe_text = (path / "recipe.yaml").read_text(encoding="utf-8")
        section = yaml.safe_load(job.recipe_text)["model"]
        job.revision, job.trust = section.get("revision"), bool(section.get("trust_remote_code"))
        job.model = model or section["source"]
        if (path / "summary.json").is_file():
            job.metrics = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    if not job.model:
        raise UsageError(f"{file} does not say which model it belongs to; give --model")
    return job


def _packed(
    job: _Job,
    out: Path,
    values: str,
    activations: str,
    embedding: str,
    include: list[str],
    exclude: list[str],
    overwrite: bool,
) -> None:
    from compress import console
    from compress.export.packed24 import export_packed
    from compress.export.source import open_source

    source = open_source(job.model, revision=job.revision, trust_remote_code=job.trust)
    with console.task("packing", 1) as bar:
        result = export_packed(
            source,
            out,
            masks=job.masks,
            values=values,
            activations=activations,
            embedding=embedding,
            include=include,
            exclude=exclude,
            recipe_text=job.recipe_text,
            metrics=job.metrics,
            overwrite=overwrite,
            progress=lambda done, total, note: bar.update(done, note, total),
        )
    _say(out, result.reports)
    weights = sum(matrix.weights for matrix in result.matrices)
    nbytes = sum(matrix.nbytes for matrix in result.matrices)
    typer.echo(f"packed {len(result.matrices)} parameters: {nbytes:,} bytes, {8 * nbytes / weights:.2f} bits a weight")
    for table in result.tables:
        typer.echo(f"rounded {table.name} to int8: {table.nbytes:,} bytes, {8 * table.nbytes / table.weights:.2f} bits a weight")


def _say(out: Path, reports: list[Report]) -> None:
    typer.echo(f"wrote {out}")
    for report in reports:
        typer.echo(f"verified: {report.claim}")
