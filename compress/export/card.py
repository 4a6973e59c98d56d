"""The model card (`README.md`) of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compress import __version__
from maskllm.patterns import Pattern

if TYPE_CHECKING:
    from compress.models import LoadedModel

_LOADS = """| software | loads | faster for the sparsity |
| --- | --- | --- |
| transformers | yes, as any checkpoint | no: dense kernels multiply the zeros too |
| vLLM, SGLang | yes, as any checkpoint | no; vLLM dropped its 2:4 kernels in 2026 |
| vLLM with torchao's online FP8 2:4 (GPUs from sm_90 on, 2:4 only) | by its documentation; not tried here | by its documentation; not tried here |
| llama.cpp, after its converter | yes | no |
"""


def write_card(
    folder: Path,
    loaded: LoadedModel,
    pattern: Pattern,
    masks: Mapping[str, Tensor],
    *,
    recipe_text: str | None,
    metrics: list[dict[str, Any]] | None,
    updated: bool,
) -> None:
    """Write the card: what was done, what was measured, where it loads, and the recipe verbatim."""
    pruned = sum(mask.numel() for mask in masks.values())
    zeros = pruned - sum(int(mask.sum()) for mask in masks.values())
    total = sum(p.numel() for p in loaded.model.parameters())
    base = f"base_model: {loaded.source}\n" if loaded.folder is None else ""
    lines = [
        f"---\n{base}library_name: transformers\ntags: [sparse, pruned, n-m-sparsity, maskllm]\n---\n",
        f"# {Path(loaded.source).name.removeprefix('asset:')}, {pattern} sparse\n",
        f"In every group of {pattern.m} weights along the inputs of a matrix at most {pattern.n} are not zero, in {len(masks)} parameters: "
        f"{zeros:,} of {total:,} weights are zero. "
        + (
            "The weights that remain were updated by SparseGPT."
            if updated
            else "The weights that remain are those of the original, bit for bit."
        )
        + f" Made by maskllm-compress {__version__} from `{loaded.source}`.\n",
    ]
    rows = [row for row in metrics or [] if row.get("perplexities")]
    if rows:
        names = list(rows[0]["perplexities"])
        lines.append("## Perplexity\n\n| method | " + " | ".join(names) + " |\n| --- |" + " ---: |" * len(names))
        lines += [f"| {row['method']} | " + " | ".join(f"{row['perplexities'][n]:.2f}" for n in names) + " |" for row in rows]
        lines.append("")
    lines.append("## Loads in, is faster in\n\n" + _LOADS)
    if recipe_text:
        lines.append(f"## Recipe\n\n```yaml\n{recipe_text}```\n")
    lines.append("The method of learned masks (MaskLLM) is subject to a patent application, US-2025/0335769-A1.\n")
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
