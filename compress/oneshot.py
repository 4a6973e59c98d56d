"""`compress prune`: one-shot pruning from a model source to a checkpoint or a mask file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import __version__, console
from compress.data import TokenBlocks, tokenize
from compress.device import tell_slow
from compress.errors import UsageError
from compress.evaluate import positions
from compress.export.dense import export_dense, export_updated
from compress.models import LoadedModel, fingerprint, load_model
from compress.prune import Method, prune_one_shot
from compress.text import TextSource
from compress.weights import by_parameter, find_weights
from maskllm.patterns import Pattern
from maskllm.storage import mask_digest, save_masks, save_npz

MASK_SUFFIXES = (".safetensors", ".npz")
_UPDATED = (
    "Every weight that SparseGPT's mask keeps has the value that SparseGPT gave it, every other one its own: nothing is zero yet, and as it "
    "stands the model is of no use. It is to learn a mask on, starting from that mask (`compress learn-mask RECIPE model.source=FOLDER "
    "prior.mask=FILE`)."
)


def run_one_shot(
    source: str,
    out: Path,
    *,
    method: Method,
    update_weights: bool,
    mask_out: Path | None = None,
    pattern: str,
    data: str,
    samples: int,
    seqlen: int | None,
    include: list[str],
    exclude: list[str],
    dtype: str,
    device: str,
    seed: int,
) -> dict[str, Any]:
    """Prune the model at `source` and write `out`: a mask file by its suffix, else a checkpoint folder. Returns what was done.

    mask_out: write the mask into this file, and into `out` a model to learn a mask on from there: the weights that stay as
    SparseGPT updated them, the others the model's own.
    """
    n_m = Pattern.parse(pattern)
    with console.log.status(f"loading {source}"):
        loaded = load_model(source, dtype=dtype, device=device)
    tell_slow(loaded.model)
    refs = find_weights(loaded.model, include, exclude)
    parameters = by_parameter(refs)
    batches = []
    if method != "magnitude":
        limit = positions(loaded.model)
        length = seqlen or min(512, limit or 512)
        if limit and length > limit:
            raise UsageError(f"--seqlen {length} is beyond the {limit} positions of {source}")
        blocks = TokenBlocks(tokenize(calibration_text(data), loaded.tokenizer, None), length, seed)
        if samples > len(blocks):
            raise UsageError(f"--samples is {samples}, but {data} holds only {len(blocks)} sequences of {length} tokens")
        batches = list(blocks.batch(0, samples).split(8))
    with console.task(method, 1) as bar:
        pruned = prune_one_shot(
            loaded.model, refs, n_m, method, batches, progress=lambda done, total: bar.update(done, "blocks", total)
        )
    contracted = {p.name: p.contracted_dim for p in parameters}
    description = f"{method}, one shot" + (", weights updated" if update_weights else "")
    if mask_out is not None:
        own = {p.name: p.refs[0].parameter.detach().cpu() for p in parameters}
        merged = {name: torch.where(mask, pruned.weights[name].cpu(), own[name]) for name, mask in pruned.masks.items()}
        export_updated(loaded, merged, out, _UPDATED)
    if (file := mask_out or out).suffix in MASK_SUFFIXES:
        _write_mask(file, pruned.masks, loaded, n_m, contracted, description)
    else:
        export_dense(
            loaded, pruned.masks, out, pattern=n_m, contracted=contracted, weights=pruned.weights if update_weights else None
        )
    return {
        "out": str(out),
        "method": description,
        "pattern": pattern,
        "matrices": len(refs),
        "starved": pruned.starved,
        "mask_sha256": mask_digest(pruned.masks),
    }


def _write_mask(
    file: Path, masks: dict[str, Tensor], loaded: LoadedModel, pattern: Pattern, contracted: dict[str, int], method: str
) -> None:
    if file.suffix == ".npz":
        save_npz(file, masks)
        return
    metadata = {
        "method": method,
        "model": loaded.source,
        "model_fingerprint": fingerprint(loaded.model),
        "tool": f"maskllm-compress {__version__}",
    }
    save_masks(file, masks, pattern, contracted, metadata)


def calibration_text(data: str) -> TextSource:
    """`--data`: a local path or asset, else a hub data set as DATASET[:CONFIG[:SPLIT[:FIELD]]]."""
    if data.startswith("asset:") or Path(data).exists() or "*" in data:
        return TextSource(path=data)
    dataset, config, split, field = (data.split(":") + [""] * 4)[:4]
    return TextSource(
        dataset=dataset, name=config or None, split=split or "train", field=field or "text", streaming=True, documents=4096
    )
