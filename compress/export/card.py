"""The model card (`README.md`) of an export: what was done, what was measured, where it loads, and the recipe verbatim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compress import __version__
from maskllm.patterns import Pattern

if TYPE_CHECKING:
    from compress.export.packed24 import PackedExport
    from compress.export.source import MatrixSource
    from compress.models import LoadedModel

_LOADS = """| software | loads | faster for the sparsity |
| --- | --- | --- |
| transformers | yes, as any checkpoint | no: dense kernels multiply the zeros too |
| vLLM, SGLang | yes, as any checkpoint | no; vLLM dropped its 2:4 kernels in 2026 |
| vLLM with torchao's online FP8 2:4 (GPUs from sm_90 on, 2:4 only) | by its documentation; not tried here | by its documentation; not tried here |
| llama.cpp, after its converter | yes | no |
"""


_LOADS_PACKED = """| software | loads | faster for the sparsity |
| --- | --- | --- |
| this tool: `compress generate`, `compress eval`, `compress.load` | yes | yes, with a compiled kernel (`compress doctor`) |
| transformers after `import compress.hf`, and what loads through it (lm-eval) | yes | as above |
| transformers without that import | no: it warns of an unknown quantization type and leaves the packed weights at random values | no |
| vLLM, SGLang, TensorRT-LLM, llama.cpp | no; export with `--format dense` for them | no |
"""

LOADS_PACKED_MOE = """| software | loads | smaller in memory |
| --- | --- | --- |
| this tool: `compress generate`, `compress eval`, `compress.load` | yes | yes: a matrix is dequantised when a token needs it |
| transformers after `import compress.hf`, and what loads through it (lm-eval) | yes | as above |
| transformers without that import | no: it warns of an unknown quantization type and leaves the packed weights at random values | no |
| vLLM, SGLang, TensorRT-LLM, llama.cpp | no; export with `--format compressed-tensors` for vLLM | no |
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
    notes: str = "",
) -> None:
    """Write the card of a dense export. notes: a section of its own, in Markdown."""
    pruned = sum(mask.numel() for mask in masks.values())
    zeros = pruned - sum(int(mask.sum()) for mask in masks.values())
    total = sum(p.numel() for p in loaded.model.parameters())
    kept = (
        "The weights that remain were updated by SparseGPT."
        if updated
        else "The weights that remain are those of the original, bit for bit."
    )
    what = (
        f"In every group of {pattern.m} weights along the inputs of a matrix at most {pattern.n} are not zero, in {len(masks)} parameters: "
        f"{zeros:,} of {total:,} weights are zero. {kept}"
    )
    title = f"{Path(loaded.source).name.removeprefix('asset:')}, {pattern} sparse"
    _write(
        folder, loaded.source, loaded.folder is None, title, what, _LOADS + ("\n" + notes if notes else ""), recipe_text, metrics
    )


def write_updated_card(folder: Path, loaded: LoadedModel, notes: str) -> None:
    """Write the card of a dense checkpoint whose weights were changed and none pruned. notes: a sentence on how."""
    title = f"{Path(loaded.source).name.removeprefix('asset:')}, updated"
    _write(
        folder,
        loaded.source,
        loaded.folder is None,
        title,
        notes,
        "transformers, as any checkpoint.\n",
        None,
        None,
        tags="compress",
        masked=False,
    )


def write_packed_card(
    folder: Path,
    source: MatrixSource,
    made: PackedExport,
    values: str,
    activations: str,
    *,
    recipe_text: str | None,
    metrics: list[dict[str, Any]] | None,
) -> None:
    """Write the card of a packed-24 export."""
    matrices, zeros = made.matrices, made.zeros
    weights = sum(matrix.weights for matrix in matrices)
    nbytes = sum(matrix.nbytes for matrix in matrices)
    total = sum(p.numel() for p in source.model.parameters())
    kept = {
        "int8": "The weights that remain are rounded to int8, with one scale a row"
        + ("; each token is rounded to int8 too before a product." if activations == "int8" else ".")
    }.get(values, f"The weights that remain are those of the original, as {values}.")
    what = (
        f"In every group of 4 weights along the inputs of a matrix at most 2 are not zero, in {len(matrices)} parameters: "
        f"{zeros:,} of {total:,} weights are zero. {kept} The zeros are not stored: these {weights:,} weights take {nbytes:,} bytes, "
        f"{8 * nbytes / weights:.2f} bits each with codes and scales."
    )
    if made.tables:
        names = " and ".join(table.name for table in made.tables)
        what += f" Rounded to int8, with one scale a row: {names}, {sum(table.nbytes for table in made.tables):,} bytes."
    title = f"{Path(source.name).name.removeprefix('asset:')}, 2:4 sparse, packed as {values}"
    _write(folder, source.name, source.on_hub, title, what, _LOADS_PACKED, recipe_text, metrics)


@dataclass(frozen=True)
class Sizes:
    """Of what was quantised, and of the whole export: numbers of weights and of bytes as written."""

    code_bits: int  # of all codes, without padding, scales and zeros
    weights: int
    nbytes: int
    whole_weights: int
    whole_nbytes: int
    widths: Mapping[int, tuple[int, int]]  # bits -> number of matrices, of weights

    def table(self) -> str:
        """The sizes as two tables in Markdown."""
        rest, rest_nbytes = self.whole_weights - self.weights, self.whole_nbytes - self.nbytes
        lines = ["| bits | matrices | weights |", "| ---: | ---: | ---: |"]
        lines += [f"| {bits} | {count:,} | {weights:,} |" for bits, (count, weights) in sorted(self.widths.items())]
        lines += ["", "| | weights | bytes | bits a weight |", "| --- | ---: | ---: | ---: |"]
        for what, weights, nbytes in (
            ("codes alone", self.weights, self.code_bits / 8),
            ("with scales, zeros and padding", self.weights, self.nbytes),
            ("all that is not quantised", rest, rest_nbytes),
            ("everything", self.whole_weights, self.whole_nbytes),
        ):
            lines.append(f"| {what} | {weights:,} | {nbytes:,.0f} | {8 * nbytes / max(weights, 1):.3f} |")
        return "\n".join(lines) + "\n"


def write_lowbit_card(
    folder: Path,
    source: MatrixSource,
    sizes: Sizes,
    format_name: str,
    loads: str,
    *,
    note: str = "",
    recipe_text: str | None,
    metrics: list[dict[str, Any]] | None,
) -> None:
    """Write the card of a quantised export: loads: the table of software that loads it; note: a further sentence."""
    average = sizes.code_bits / sizes.weights
    count = sum(matrices for matrices, _ in sizes.widths.values())
    what = (
        f"{count:,} matrices are quantised, to {average:.2f} bits a weight on average (codes alone; with scales and zeros "
        f"{8 * sizes.nbytes / sizes.weights:.2f}).{note}"
    )
    title = f"{Path(source.name).name.removeprefix('asset:')}, {average:.2f} bits, {format_name}"
    tags = "quantized, mixed-precision"
    sections = f"## Size\n\n{sizes.table()}"
    _write(
        folder, source.name, source.on_hub, title, what, loads, recipe_text, metrics, tags=tags, sections=sections, masked=False
    )


def _write(
    folder: Path,
    source: str,
    on_hub: bool,
    title: str,
    what: str,
    loads: str,
    recipe_text: str | None,
    metrics: list[dict[str, Any]] | None,
    *,
    tags: str = "sparse, pruned, n-m-sparsity, maskllm",
    sections: str = "",
    masked: bool = True,
) -> None:
    base = f"base_model: {source}\n" if on_hub else ""
    lines = [
        f"---\n{base}library_name: transformers\ntags: [{tags}]\n---\n",
        f"# {title}\n",
        f"{what} Made by maskllm-compress {__version__} from `{source}`.\n",
    ]
    rows = [row for row in metrics or [] if row.get("perplexities")]
    if rows:
        names = list(rows[0]["perplexities"])
        lines.append("## Perplexity\n\n| method | " + " | ".join(names) + " |\n| --- |" + " ---: |" * len(names))
        lines += [f"| {row['method']} | " + " | ".join(f"{row['perplexities'][n]:.2f}" for n in names) + " |" for row in rows]
        lines.append("")
    if sections:
        lines.append(sections)
    lines.append(f"## {'Loads in, is faster in' if masked else 'Loads in'}\n\n" + loads)
    if recipe_text:
        lines.append(f"## Recipe\n\n```yaml\n{recipe_text}```\n")
    if masked:
        lines.append("The method of learned masks (MaskLLM) is subject to a patent application, US-2025/0335769-A1.\n")
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
