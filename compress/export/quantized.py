"""Export a run that quantised a model: its recipe names the model, its folder `quantized/` holds the codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import UsageError
from compress.export.source import open_source
from compress.quantize.store import QuantizedStore

if TYPE_CHECKING:
    from compress.export.compressed_tensors import CompressedTensorsExport
    from compress.export.lowbit import Progress
    from compress.export.packed_moe import PackedMoeExport

Format = Literal["packed-moe", "compressed-tensors"]


def is_quantize_run(folder: Path) -> bool:
    """Whether a folder is the run directory of `compress quantize` or `run`, quantised or not yet."""
    return (folder / "quantized").is_dir() and (folder / "recipe.yaml").is_file()


def export_quantized(
    run: Path,
    out: Path,
    format_: Format,
    *,
    model: str | None = None,
    promote: bool = False,
    metrics: list[dict[str, Any]] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackedMoeExport | CompressedTensorsExport:
    """Write what a run quantised as a checkpoint folder, read it back and compare it.

    model: the dense model, where it is no longer what the recipe names. promote: see `export_compressed_tensors`. metrics: rows for the model
    card, by default those of summary.json. Raises UsageError for a run without codes, and as the exports of the formats do.
    """
    import yaml

    if not is_quantize_run(run):
        raise UsageError(
            f"{run} is no finished run of `compress quantize`: it has no quantized/ beside a recipe.yaml; resume the run"
        )
    if promote and format_ != "compressed-tensors":
        raise UsageError("--promote goes with --format compressed-tensors; packed-moe stores every matrix at its own width")
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    section = yaml.safe_load(text)["model"]
    if metrics is None and (run / "summary.json").is_file():
        metrics = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    source = open_source(
        model or section["source"],
        revision=None if model else section.get("revision"),
        trust_remote_code=bool(section.get("trust_remote_code")),
    )
    store = QuantizedStore(run / "quantized")
    if format_ == "packed-moe":
        from compress.export.packed_moe import export_packed_moe

        return export_packed_moe(source, store, out, recipe_text=text, metrics=metrics, overwrite=overwrite, progress=progress)
    from compress.export.compressed_tensors import export_compressed_tensors

    return export_compressed_tensors(
        source, store, out, promote=promote, recipe_text=text, metrics=metrics, overwrite=overwrite, progress=progress
    )
