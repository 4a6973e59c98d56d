"""Prove that a checkpoint is what it claims to be: N:M sparse, and bit for bit its mask times the original."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.checkpoint import SIDECAR_NAME, Checkpoint, as_stored, read_json, stored_name
from compress.errors import CompressError, UsageError, VerificationError
from maskllm.errors import MaskError
from maskllm.patterns import Pattern
from maskllm.storage import MaskFile, group_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.models import LoadedModel


@dataclass(frozen=True)
class Row:
    """What was found of one tensor. `groups` is 0 where no pattern was asked of it."""

    name: str
    shape: tuple[int, ...]
    contracted_dim: int | None = None
    groups: int = 0
    bad_groups: int = 0  # groups of M with more than N non-zeros
    differing: int = 0  # elements that differ from what they should be
    max_difference: float = 0.0
    note: str = ""  # says what is wrong when no count does
    wrong: bool = False

    @property
    def ok(self) -> bool:
        return not (self.bad_groups or self.differing or self.wrong)


@dataclass
class Report:
    """The outcome of a verification: `claim` says in words what was checked."""

    claim: str
    pattern: str | None
    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    def raise_if_bad(self) -> None:
        """Raise VerificationError naming the first tensors at fault."""
        if not self.rows:
            raise VerificationError(f"{self.claim}: no tensor to check was found")
        bad = [row for row in self.rows if not row.ok]
        if bad:
            first = "; ".join(f"{row.name}: {describe(row, self.pattern)}" for row in bad[:3])
            raise VerificationError(f"{self.claim}: {len(bad)} of {len(self.rows)} tensors fail. {first}")


def describe(row: Row, pattern: str | None) -> str:
    """What is wrong with a row, in words."""
    parts = []
    if row.bad_groups:
        parts.append(
            f"{row.bad_groups} of {row.groups} groups along {row.contracted_dim} have more non-zeros than {pattern} allows"
        )
    if row.differing:
        parts.append(f"{row.differing} elements differ (by at most {row.max_difference:g})")
    if row.note:
        parts.append(row.note)
    return ", ".join(parts) or "ok"


def verify_checkpoint(
    folder: Path,
    pattern: Pattern | None = None,
    *,
    masks: MaskFile | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    dim: int = -1,
) -> Report:
    """Check the tensors of a checkpoint folder (or one .safetensors file) against an N:M pattern, one tensor in memory at a time.

    Each matrix must have at most N non-zeros in every group of M along its contracted dimension. Which matrices: those of `masks`
    when given, which must then also be zero wherever the mask drops; else those that `compress.json` lists; else every matrix of the
    decoder layers but routers, along `dim`. `include` and `exclude` are globs on the tensor's name. The pattern is that of `masks` or
    `compress.json` unless given. Raises UsageError when there is no pattern or no matrix to check.
    """
    checkpoint = Checkpoint(folder)
    sidecar = read_json(folder / SIDECAR_NAME) if (folder / SIDECAR_NAME).is_file() else {}
    stored: dict[str, Tensor | None]
    if masks is not None:
        dims, stored = _stored_masks(folder, checkpoint, masks)
        pattern = pattern or masks.pattern
        which = "the matrices of the mask file"
    elif sidecar.get("matrices"):
        dims = {row["name"]: int(row["contracted_dim"]) for row in sidecar["matrices"]}
        which = f"the matrices listed in {SIDECAR_NAME}"
    else:
        dims = dict.fromkeys(_decoder_matrices(checkpoint), dim)
        which = f"the matrices of the decoder layers, along dimension {dim}"
    if masks is None:
        stored = dict.fromkeys(dims)
    if pattern is None:
        if not sidecar.get("pattern"):
            raise UsageError(f"{folder} does not say which pattern it has; give one, for example --pattern 2:4")
        pattern = Pattern.parse(sidecar["pattern"])
    report = Report(f"{folder} is {pattern} in {which}", str(pattern))
    chosen = [name for name in dims if _matches(name, include) and not _matches(name, exclude)]
    if not chosen:
        raise UsageError(f"{folder}: no matrix to check; include {list(include)} and exclude {list(exclude)} leave none")
    for name in chosen:
        if name not in checkpoint.tensors:
            report.rows.append(Row(name, (), note="is not in the checkpoint", wrong=True))
            continue
        report.rows.append(_check_pattern(name, checkpoint.read(name), pattern, dims[name], stored[name]))
    return report


def verify_against(
    folder: Path,
    masks: Mapping[str, Tensor],
    original: LoadedModel,
    *,
    pattern: Pattern | None = None,
    contracted: Mapping[str, int] | None = None,
) -> Report:
    """Load `folder` as anyone would, with transformers' auto classes, and compare every parameter and persistent buffer with the original.

    Masked ones must equal mask * original bit for bit, +0.0 where masked, all others the original. With `pattern` and `contracted`
    (name -> dimension) the groups of the masked ones are counted too.
    """
    expected = original.model.state_dict()
    if unknown := sorted(masks.keys() - expected.keys()):
        raise UsageError(f"the mask set has {unknown[0]}, which the model {original.source} does not have")
    report = Report(f"{folder} is the mask times {original.source}, bit for bit", str(pattern) if pattern else None)
    actual = _load(folder, original.model).state_dict()
    for name in sorted(actual.keys() ^ expected.keys()):
        report.rows.append(Row(name, (), note="is in only one of the two models", wrong=True))
    for name in expected:
        if name in actual:
            mask = masks.get(name)
            row = compare(name, actual[name], expected[name], mask)
            if mask is not None and pattern and contracted and row.ok:
                row = _check_pattern(name, actual[name], pattern, contracted[name], None)
            report.rows.append(row)
    return report


def verify_masks(file: MaskFile) -> Report:
    """Read every mask of a mask file: each must decode to exactly N kept of every M."""
    report = Report(f"every group of the mask file keeps exactly {file.pattern}", str(file.pattern))
    for name in file.masks:
        dim, shape = file.contracted[name], file.shapes[name]
        try:
            counts = group_counts(file.masks[name], file.pattern.m, dim)
        except MaskError as error:
            report.rows.append(Row(name, shape, dim, note=str(error), wrong=True))
            continue
        report.rows.append(Row(name, shape, dim, counts.numel(), int((counts != file.pattern.n).sum())))
    return report


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """mask * weight with +0.0 where masked. (A product would leave -0.0 there for negative weights, and NaN for infinite ones.)"""
    return torch.where(mask.to(weight.device), weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def _check_pattern(name: str, tensor: Tensor, pattern: Pattern, dim: int, mask: Tensor | None) -> Row:
    shape = tuple(tensor.shape)
    if tensor.ndim < -dim or shape[dim] % pattern.m:
        return Row(name, shape, dim, note=f"has no groups of {pattern.m} along dimension {dim}", wrong=True)
    nonzero = nonzeros(tensor)
    counts = group_counts(nonzero, pattern.m, dim)
    bad = int((counts > pattern.n).sum())
    note = ""
    other = -3 - dim  # -1 <-> -2
    if bad and tensor.ndim >= 2 and dim in (-1, -2) and shape[other] % pattern.m == 0:
        fits = not bool((group_counts(nonzero, pattern.m, other) > pattern.n).any())
        note = f"it is {pattern} along dimension {other}" if fits else ""
    kept = 0
    if mask is not None:
        if mask.shape != tensor.shape:
            return Row(name, shape, dim, note=f"its mask has shape {list(mask.shape)}", wrong=True)
        kept = int((nonzero & ~mask).sum())
        note = note or ("not zero where the mask drops" if kept else "")
    return Row(name, shape, dim, counts.numel(), bad, differing=kept, note=note)


def nonzeros(tensor: Tensor) -> Tensor:
    """Bool of the tensor's shape: which elements are not (plus or minus) zero."""
    # Not every operator knows the 8-bit floats.
    return tensor.float() != 0 if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor != 0


def compare(name: str, actual: Tensor, original: Tensor, mask: Tensor | None = None) -> Row:
    """Compare the bits of two tensors: `actual` must be the original, or mask * original with +0.0 where masked."""
    shape = tuple(actual.shape)
    if actual.shape != original.shape or actual.dtype != original.dtype:
        note = f"is {actual.dtype} {list(shape)}, the original {original.dtype} {list(original.shape)}"
        return Row(name, shape, note=note, wrong=True)
    expected = (original if mask is None else masked(original, mask)).detach().cpu().contiguous()
    actual = actual.detach().cpu().contiguous()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.dtype.itemsize]
    differ = actual.view(bits) != expected.view(bits)  # also tells -0.0 from +0.0, and one NaN equals itself
    count = int(differ.sum())
    largest = float((actual[differ].double() - expected[differ].double()).abs().max()) if count else 0.0
    return Row(name, shape, differing=count, max_difference=largest)


def _load(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    from compress.models import model_class

    try:
        return model_class(like.config).from_pretrained(
            folder, dtype=like.dtype, local_files_only=True, trust_remote_code=bool(like.is_remote_code())
        )
    except Exception as error:
        raise VerificationError(f"{folder} does not load with transformers: {error}") from error


def _stored_masks(folder: Path, checkpoint: Checkpoint, file: MaskFile) -> tuple[dict[str, int], dict[str, Tensor | None]]:
    """Contracted dimensions and masks under the names of the checkpoint (one fused parameter becomes many tensors there)."""
    dims: dict[str, int] = {}
    stored: dict[str, Tensor | None] = {}
    model: PreTrainedModel | None = None
    for name, mask in file.masks.items():
        if name in checkpoint.tensors:
            pieces = {name: mask}
        else:
            model = model or _skeleton(folder)
            pieces = as_stored(model, name, mask)
        for piece_name, piece in pieces.items():
            found = piece_name if model is None else stored_name(model, piece_name, checkpoint.tensors)
            stored[found or piece_name] = piece
            dims[found or piece_name] = stored_dim(piece.shape, mask.shape, file.contracted[name])
    return dims, stored


def stored_dim(shape: Sequence[int], parameter_shape: Sequence[int], dim: int) -> int:
    """Contracted dimension of a stored tensor that came from a parameter contracted along `dim`; conversions may transpose."""
    return dim if shape[dim] == parameter_shape[dim] else -3 - dim


def _skeleton(folder: Path) -> PreTrainedModel:
    """The model of a folder's config.json without weights (on the meta device)."""
    from transformers import AutoConfig

    from compress.models import model_class

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return model_class(config).from_config(config)
    except Exception as error:
        raise CompressError(f"{folder}: its config.json gives no causal language model ({error})") from error


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, glob) for glob in globs)


def _decoder_matrices(checkpoint: Checkpoint) -> Iterator[str]:
    """Names of the 2-D and 3-D weights within numbered layers, routers left out.

    A router is a matrix lying directly beside a module called `experts`; biases of fused experts end in `bias`.
    """
    with_experts = {name.split(".experts")[0] for name in checkpoint.tensors if ".experts." in name}
    for name, info in checkpoint.tensors.items():
        parent = name.rsplit(".", 2)[0]  # "x.mlp" of "x.mlp.gate.weight"
        numbered = re.search(r"\.\d+\.", f".{name}")
        if not numbered or name.endswith("bias"):
            continue
        expert = len(info.shape) == 3 and ".experts." in name
        if expert or (len(info.shape) in (2, 3) and parent not in with_experts):
            yield name
