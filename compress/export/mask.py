"""`--format mask`: the mask alone, as a base-C mask file or in the published MaskLLM form (`.npz`)."""

from __future__ import annotations

from pathlib import Path

from compress.errors import UsageError
from maskllm.storage import MaskFile, save_masks, save_npz


def export_mask(file: MaskFile, out: Path, *, overwrite: bool = False) -> None:
    """Write a mask file to `out`; the suffix chooses the format. Raises UsageError for another suffix or an `out` in the way."""
    if out.suffix not in (".safetensors", ".npz"):
        raise UsageError(f"a mask goes into a .safetensors or an .npz file, not {out.name}")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another --out, or --overwrite it")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        save_npz(out, file.masks)
    else:
        save_masks(out, file.masks, file.pattern, file.contracted, file.metadata)
