"""`--format dense`: an ordinary checkpoint whose masked weights are exact zeros.

Original names, shapes and types, the config.json of the original without any quantization_config: what transformers, vLLM,
SGLang and llama.cpp's converter load, and torchao packs online. All that is not masked is copied from the source's files, not
from the model in memory, so nothing that loading rounds or leaves out is lost.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress import __version__
from compress.checkpoint import INDEX_NAME, SIDECAR_NAME, UPDATED_FORMAT, Checkpoint, as_stored, read_json, stored_name
from compress.errors import UsageError
from compress.export.card import write_card, write_updated_card
from compress.export.folder import output_folder
from compress.export.source import copy_companions
from compress.verify import Report, masked, stored_dim, verify_against, verify_checkpoint
from maskllm.patterns import Pattern
from maskllm.safefile import DTYPES, Entry, write_safetensors
from maskllm.storage import mask_digest

if TYPE_CHECKING:
    from compress.models import LoadedModel


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
    extras: Mapping[str, str] | None = None,
    notes: str = "",
    overwrite: bool = False,
) -> list[Report]:
    """Write mask * original as a checkpoint folder, load it back and compare every bit.

    masks: parameter name -> bool of the parameter's shape; contracted: its dimension that products sum over. weights: values that
    replace the masked parameters instead (already zero where masked), as SparseGPT with weight update makes them.
    recipe_text, metrics (rows of summary.json), notes (a section more): for the model card. extras: further text files, name -> content.
    Everything is written to `<out>.partial` and renamed when it has been verified. Returns the reports of the verification.
    Raises UsageError when `out` is in the way or a mask does not belong to the model, VerificationError when the proof fails.
    """
    parameters = dict(loaded.model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise UsageError(f"the mask of {name} {list(mask.shape)} does not belong to {loaded.source}")
    with _written(loaded, masks, weights, out, overwrite) as partial:
        _sidecar(loaded, partial, masks, pattern, contracted, weights is not None)
        for name, text in (extras or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        reports = [
            verify_checkpoint(partial, pattern),
            verify_against(partial, masks, loaded, pattern=pattern, contracted=contracted),
        ]
        for report in reports:
            report.raise_if_bad()
            report.claim = report.claim.replace(str(partial), str(out))
        updated = weights is not None
        write_card(partial, loaded, pattern, masks, recipe_text=recipe_text, metrics=metrics, updated=updated, notes=notes)
    return reports


def export_updated(loaded: LoadedModel, weights: Mapping[str, Tensor], out: Path, notes: str) -> None:
    """Write the model with other values of some parameters, none of them pruned, load it back and compare every bit.

    weights: parameter name -> values, of the parameter's shape; rounded to the type of the source's files. notes: what the card says of
    them. Its compress.json has the format UPDATED_FORMAT, by which learning knows a model that is not to be imitated. Raises as
    `export_dense`.
    """
    whole = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in weights.items()}
    with _written(loaded, whole, weights, out, overwrite=False) as partial:
        facts = {"tool": f"maskllm-compress {__version__}", "format": UPDATED_FORMAT, "source": loaded.source}
        (partial / SIDECAR_NAME).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        verify_against(partial, {}, loaded).raise_if_bad()
        write_updated_card(partial, loaded, notes)


@contextmanager
def _written(
    loaded: LoadedModel, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None, out: Path, overwrite: bool
) -> Iterator[Path]:
    """The folder that becomes `out`, with the checkpoint in it; within it the model's weights are the ones that were written, to compare with."""
    source = _source_checkpoint(loaded)
    source_folder = None if loaded.gguf_file else loaded.folder
    with output_folder(out, overwrite=overwrite, source=source_folder) as partial, _replaced(loaded, source, masks, weights):
        if source is not None:
            _write_from_source(loaded, source, masks, partial)
        else:
            _write_from_model(loaded, masks, partial)
        yield partial


@contextmanager
def _replaced(
    loaded: LoadedModel, source: Checkpoint | None, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None
) -> Iterator[None]:
    """While it lasts the masked parameters have the values of `weights`, rounded to what the source's files can hold."""
    if weights is None:
        yield
        return
    originals = {name: loaded.model.get_parameter(name).detach().clone() for name in masks}
    with torch.no_grad():
        for name in masks:
            parameter = loaded.model.get_parameter(name)
            kind = parameter.dtype if source is None else _stored_dtype(loaded, source, name, parameter)
            parameter.copy_(weights[name].to(kind))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in originals.items():
                loaded.model.get_parameter(name).copy_(value)


def _stored_dtype(loaded: LoadedModel, source: Checkpoint, name: str, parameter: Tensor) -> torch.dtype:
    for piece in (name, *as_stored(loaded.model, name, parameter.detach().to("meta"))):
        if (found := stored_name(loaded.model, piece, source.tensors)) is not None:
            return DTYPES[source.tensors[found].dtype]
    return parameter.dtype


def _source_checkpoint(loaded: LoadedModel) -> Checkpoint | None:
    """The source folder's own tensors, when it is a folder of safetensors."""
    folder = loaded.folder
    if folder is None or loaded.gguf_file is not None:
        return None
    if (folder / "config.json").is_file() and "quantization_config" in read_json(folder / "config.json"):
        raise UsageError(
            f"{folder} is a quantised checkpoint (its config.json has a quantization_config), whose tensors cannot hold "
            "masked weights of full precision; start from the unquantised model"
        )
    if not ((folder / INDEX_NAME).is_file() or (folder / "model.safetensors").is_file()):
        return None  # weights in another container (.bin): transformers has read them, and writes them
    return Checkpoint(folder)


def _write_from_source(loaded: LoadedModel, source: Checkpoint, masks: Mapping[str, Tensor], out: Path) -> None:
    """Copy the source shard by shard with the masked tensors replaced.

    Whatever the model does not hold (tied copies, old buffers, heads of other tasks) is copied as it is.
    """
    model, parameters = loaded.model, dict(loaded.model.named_parameters())
    origin: dict[str, str] = {}
    layout: dict[str, str] = {}  # stored name -> its name among the parameter's pieces
    for name in masks:
        meta = parameters[name].detach().to("meta")
        direct = stored_name(model, name, source.tensors)
        pieces = {name: meta} if direct and source.tensors[direct].shape == meta.shape else as_stored(model, name, meta)
        for piece_name, piece in pieces.items():
            stored = stored_name(model, piece_name, source.tensors)
            if stored is None:
                raise UsageError(
                    f"{source.path} has no tensor {piece_name}, the name under which transformers saves (part of) {name}, so an "
                    "export could not keep the source's names; save the model with save_pretrained and export from that folder"
                )
            if source.tensors[stored].shape != tuple(piece.shape) or source.tensors[stored].dtype not in (
                "F64",
                "F32",
                "F16",
                "BF16",
            ):
                info = source.tensors[stored]
                raise UsageError(
                    f"{source.path}: {stored} is {info.dtype} {list(info.shape)}, expected floats {list(piece.shape)}"
                )
            origin[stored], layout[stored] = name, piece_name

    @lru_cache(maxsize=3)  # the pieces of a fused parameter lie near each other in the file; make them once
    def pieces_of(name: str) -> dict[str, Tensor]:
        weight = masked(parameters[name].detach().cpu(), masks[name].bool().cpu())
        fused = all(layout[stored] != name for stored, parameter in origin.items() if parameter == name)
        return as_stored(model, name, weight) if fused else {name: weight}

    def make(stored: str) -> Tensor:
        if stored not in origin:
            return source.read(stored)
        # Back to the dtype of the file. Exact unless the weights were changed after loading, which the comparison would tell.
        return pieces_of(origin[stored])[layout[stored]].to(DTYPES[source.tensors[stored].dtype])

    for file, metadata in source.metadata.items():
        entries = []
        for info in source.tensors.values():
            if info.file == file:
                if info.dtype not in DTYPES:
                    raise UsageError(
                        f"{file}: {info.name} has dtype {info.dtype}, which cannot be copied; is this a quantised model?"
                    )
                entries.append(Entry(info.name, DTYPES[info.dtype], info.shape, lambda name=info.name: make(name)))  # type: ignore[misc]
        write_safetensors(out / file.name, entries, metadata)
    if (source.path / INDEX_NAME).is_file():
        shutil.copyfile(source.path / INDEX_NAME, out / INDEX_NAME)
    copy_companions(source.path, out)


def _write_from_model(loaded: LoadedModel, masks: Mapping[str, Tensor], out: Path) -> None:
    """Write through transformers, for models that have no safetensors folder (GGUF, the hub's cache unknown, .bin)."""
    model = loaded.model
    state = {name: masked(value, masks[name]) if name in masks else value for name, value in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    if loaded.folder is not None and not loaded.gguf_file:
        copy_companions(loaded.folder, out)
    else:
        loaded.tokenizer.save_pretrained(out)


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
