"""`--format dense`: an ordinary checkpoint whose masked weights are exact zeros.

Original names, shapes and types, the config.json of the original without any quantization_config: what transformers, vLLM,
SGLang and llama.cpp's converter load, and torchao packs online.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from maskllm.patterns import Pattern
from maskllm.storage import mask_digest
from torch import Tensor

from compress import __version__
from compress.checkpoint import SIDECAR_NAME, Checkpoint, as_stored, companion_files, stored_name
from compress.errors import UsageError, VerificationError
from compress.export.card import write_card
from compress.verify import Report, masked, stored_dim, verify_against, verify_checkpoint

if TYPE_CHECKING:
    from compress.models import LoadedModel

_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def export_dense(
    loaded: LoadedModel,
    masks: Mapping[str, Tensor],
    out: Path,
    *,
    pattern: Pattern,
    contracted: Mapping[str, int],
    recipe_text: str | None = None,
    metrics: list[dict[str, Any]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> list[Report]:
    """Write mask * original as a checkpoint folder, load it back and compare every bit.

    masks: parameter name -> bool of the parameter's shape; contracted: its dimension that products sum over. weights: values that
    replace the masked parameters instead (already zero where masked), as SparseGPT with weight update makes them.
    recipe_text, metrics (rows of summary.json): for the model card.
    Everything is written to `<out>.partial` and renamed when it has been verified. Returns the reports of the verification.
    Raises UsageError when `out` is in the way or a mask does not belong to the model, VerificationError when the proof fails.
    """
    parameters = dict(loaded.model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise UsageError(f"the mask of {name} {list(mask.shape)} does not belong to {loaded.source}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise UsageError(f"{out} exists; choose another --out, or --overwrite it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    originals = {name: parameters[name].detach().clone() for name in masks}
    stored_types = _stored_types(loaded)
    try:
        with torch.no_grad():
            for name, mask in masks.items():
                value = masked(originals[name], mask)
                if weights is not None:
                    # Rounded to the type it is stored in, so that the proof below can ask for equality.
                    value = masked(weights[name].to(stored_types.get(name, value.dtype)).to(value), mask)
                parameters[name].copy_(value)
        _save(loaded, partial, stored_types)
        _sidecar(loaded, partial, masks, pattern, contracted, weights is not None)
        reports = [verify_checkpoint(partial, pattern)]
        if weights is not None:
            reports.append(verify_against(partial, {}, loaded))
    finally:
        with torch.no_grad():
            for name, value in originals.items():
                parameters[name].copy_(value)
    if weights is None:
        reports.append(verify_against(partial, masks, loaded, pattern=pattern, contracted=contracted))
    for report in reports:
        report.raise_if_bad()
    write_card(partial, loaded, pattern, masks, recipe_text=recipe_text, metrics=metrics, updated=weights is not None)
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    return reports


def _stored_types(loaded: LoadedModel) -> dict[str, torch.dtype]:
    """The type each parameter has in its source checkpoint; empty where there is none (GGUF) and the loaded type is kept."""
    if loaded.folder is None or loaded.gguf_file:
        return {}
    source = Checkpoint(loaded.folder)
    floats = Counter(_TYPES[t.dtype] for t in source.tensors.values() if t.dtype in _TYPES)
    usual = floats.most_common(1)[0][0] if floats else loaded.model.dtype
    types = {}
    for name, parameter in loaded.model.named_parameters():
        found = stored_name(loaded.model, name, source.tensors)
        types[name] = _TYPES.get(source.tensors[found].dtype, parameter.dtype) if found else usual
    return types


def _save(loaded: LoadedModel, folder: Path, types: Mapping[str, torch.dtype]) -> None:
    """Weights through transformers, which knows how its fused parameters are laid out on disk; the rest copied byte for byte."""
    model = loaded.model
    tensors = {name: t.to(types[name]) if name in types else t for name, t in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=tensors)
    if loaded.folder is not None and not loaded.gguf_file:
        for file in companion_files(loaded.folder):
            shutil.copyfile(file, folder / file.name)
        before, after = set(Checkpoint(loaded.folder).tensors), set(Checkpoint(folder).tensors)
        if before != after:
            # Tied weights may be stored once or twice; both load the same.
            tied = {n for n in before ^ after if n.split(".")[0] == "lm_head" or "embed" in n}
            if odd := sorted((before ^ after) - tied):
                raise VerificationError(f"the export does not have the tensor names of {loaded.source}: {', '.join(odd[:3])} are in only one of them")
    else:
        loaded.tokenizer.save_pretrained(folder)


def _sidecar(
    loaded: LoadedModel, folder: Path, masks: Mapping[str, Tensor], pattern: Pattern, contracted: Mapping[str, int], updated: bool
) -> None:
    """`compress.json`: what was pruned, for `compress verify` and for people."""
    written = Checkpoint(folder).tensors
    matrices = []
    for name, mask in masks.items():
        pieces: Mapping[str, Tensor] = {name: mask} if name in written else as_stored(loaded.model, name, mask)
        for piece, part in pieces.items():
            found = stored_name(loaded.model, piece, written) or piece
            matrices.append({"name": found, "contracted_dim": stored_dim(part.shape, mask.shape, contracted[name])})
    facts = {
        "tool": f"maskllm-compress {__version__}",
        "format": "dense",
        "source": loaded.source,
        "pattern": str(pattern),
        "mask_sha256": mask_digest(masks),
        "weights_updated": updated,
        "matrices": matrices,
    }
    (folder / SIDECAR_NAME).write_text(json.dumps(facts, indent=1), encoding="utf-8")
