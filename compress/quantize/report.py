"""The HTML reports of a profile and of a quantised model: what was measured, and which expert got how many bits."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress import __version__
from compress.figures import INK, figure, page, plain, svg
from compress.moe.profile_store import LayerProfile
from compress.recipe_file import dump_recipe
from compress.recipe_quantize import QuantizeRecipe
from compress.rundir import RunDir, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Widths = Mapping[int, Sequence[Mapping[str, tuple[int, int]]]]


def write_profile_report(run: RunDir, recipe: QuantizeRecipe, profiles: Sequence[LayerProfile]) -> None:
    """Write `report.html` of a profile: frequency, routing weight, peaks and the error at every width, by layer and expert."""
    parts = [f"<h1>{html.escape(recipe.description or 'Experts')}</h1>", _source(recipe), *_profile_parts(profiles)]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(dump_recipe(recipe))}</pre>"]
    write_atomic(run.report, page("compress profile", parts))


def write_quantize_report(
    run: RunDir,
    recipe: QuantizeRecipe,
    rows: Sequence[Mapping[str, Any]],
    profiles: Sequence[LayerProfile],
    widths: Widths,
    facts: Mapping[str, Any],
    notes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write `report.html` of a quantised model. rows: as in summary.json; facts: sizes; notes: what became of every matrix."""
    parts = [f"<h1>{html.escape(recipe.description or 'Mixed precision')}</h1>", _source(recipe)]
    if rows and rows[0]["perplexities"]:
        parts += ["<h2>What it costs</h2>", _table(rows)]
    parts += ["<h2>Size</h2>", _sizes(facts)]
    parts += [
        "<h2>Bits of the experts</h2>",
        "<p class=note>Average over an expert's matrices, weighted by their size.</p>",
        svg(_heat(_mean_bits(widths, profiles), "bits", "YlGn", integers=True)),
    ]
    remarks = [(name, note["remark"]) for name, note in notes.items() if note["remark"]]
    if remarks:
        cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in remarks[:200])
        parts += ["<h2>Remarks</h2>", f"<table><tr><th>matrix</th><th>remark</th></tr>{cells}</table>"]
    if profiles:
        parts += _profile_parts(profiles)
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(dump_recipe(recipe))}</pre>"]
    write_atomic(run.report, page("compress quantisation report", parts))


def _source(recipe: QuantizeRecipe) -> str:
    images = "" if recipe.images is None else f", {recipe.images.samples} images with text"
    return (
        f"<p class=note>{html.escape(recipe.model.source)}; {recipe.samples} sequences of {recipe.data.seqlen} calibration tokens{images}; "
        f"quantiser {recipe.quantizer.method}. compress {__version__}</p>"
    )


def _profile_parts(profiles: Sequence[LayerProfile]) -> list[str]:
    frequency = _rows([p.frequency / max(1.0, p.frequency.sum()) * p.experts for p in profiles])
    parts = [
        "<h2>How often experts are chosen</h2>",
        "<p class=note>Relative to an even share of the layer's tokens.</p>",
        svg(_heat(frequency, "times even", "Blues")),
        "<h2>Error by width</h2>",
        "<p class=note>Norm of the change of the block's output when one expert alone is quantised, relative to the norm of the block's "
        "output; logarithm to base 10.</p>",
    ]
    for c, (bits, group) in enumerate(profiles[0].candidates):
        with np.errstate(divide="ignore"):
            relative = [np.log10(np.maximum(np.sqrt(p.squared[:, c]) / p.residual, 1e-8)) for p in profiles]
        parts += [svg(_heat(_rows(relative), f"{bits} bits, groups of {group}", "OrRd"))]
    return parts


def _rows(values: Sequence[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """One matrix `[layers, experts]`, NaN where a layer has fewer experts, without labels of its own."""
    most = max(len(v) for v in values)
    grid = np.full((len(values), most), np.nan)
    for i, v in enumerate(values):
        grid[i, : len(v)] = v
    return grid, []


def _mean_bits(widths: Widths, profiles: Sequence[LayerProfile]) -> tuple[np.ndarray, list[str]]:
    shapes = {p.layer: p.shapes for p in profiles}
    values = []
    for layer, experts in widths.items():
        sizes = {role: rows * columns for role, (rows, columns) in shapes.get(layer, {}).items()}
        values.append(
            np.array([np.average([bits for bits, _ in e.values()], weights=[sizes.get(role, 1) for role in e]) for e in experts])
        )
    return _rows(values)[0], [str(layer) for layer in widths]


def _heat(values: tuple[np.ndarray, list[str]], label: str, colours: str, integers: bool = False) -> Figure:
    grid, names = values
    drawn, axes = figure(9, 0.9 + 0.28 * min(len(grid), 40))
    ax = plain(axes[0][0], "", "expert", "layer")
    image = ax.imshow(grid, aspect="auto", cmap=colours, interpolation="nearest")
    if names and len(names) <= 40:
        ax.set_yticks(range(len(names)), names)
    if integers and grid.size <= 400:
        dark = np.nanmin(grid) + 0.65 * (np.nanmax(grid) - np.nanmin(grid))  # of these maps the upper end
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                shown = f"{value:g}" if value == int(value) else f"{value:.1f}"
                ax.text(j, i, shown, ha="center", va="center", fontsize=6, color="white" if value > dark else INK)
    bar = drawn.colorbar(image, ax=ax, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return drawn


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0]["perplexities"])
    head = "<tr><th>text</th><th>model</th><th>perplexity</th><th>KL</th><th>same prediction</th><th>slots routed elsewhere</th></tr>"
    lines = [f"<table>{head}"]
    for name in names:
        for row in rows:
            kl, top1, moved = (row[key].get(name) for key in ("kl", "top1_agreement", "rerouted"))
            cells = [
                f"{row['perplexities'][name]:.3f}",
                "" if kl is None else f"{kl:.4f}",
                "" if top1 is None else f"{100 * top1:.1f} %",
                "" if moved is None else f"{100 * moved:.1f} %",
            ]
            lines.append(
                f"<tr><td>{html.escape(name)}</td><td>{row['method']}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
            )
    return "".join([*lines, "</table>"])


def _sizes(facts: Mapping[str, Any]) -> str:
    rows = [
        ("average bits of the experts (codes alone)", f"{facts['average_bits']:.4f}"),
        ("bytes of the experts, with scales and zeros", f"{facts['expert_bytes']:,}"),
        ("bytes of the whole model", f"{facts['bytes']:,}"),
        ("bits per weight of the whole model", f"{facts['bits_per_weight']:.4f}"),
        ("bytes before", f"{facts['original_bytes']:,}"),
    ]
    if "allocation" in facts:
        found = facts["allocation"]
        rows.append(("allocation", f"cost {found['objective']:.6g}, gap {100 * found['gap']:.5f} %, {found['seconds']:.2f} s"))
    if facts.get("super_experts"):
        rows.append(("super experts, protected", ", ".join(facts["super_experts"])))
    return "<table>" + "".join(f"<tr><td>{a}</td><td>{html.escape(b)}</td></tr>" for a, b in rows) + "</table>"
