"""The HTML report of a run: one file, no network, pictures where people would rather look than read."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.figures import ACCENT, INK, MUTED, figure, page, plain, svg
from compress.recipe import LearnMaskRecipe
from compress.recipe_file import dump_recipe
from compress.rundir import RunDir, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    run: RunDir, recipe: LearnMaskRecipe, rows: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]], digest: str
) -> None:
    """Write `report.html` of a finished run. rows: as in summary.json. layers: name, layer, flipped, groups of every parameter."""
    metrics = run.read_metrics()
    steps = [m for m in metrics if m["kind"] == "step"]
    measures = [m for m in metrics if m["kind"] == "measure"]
    flipped = sum(x["flipped"] for x in layers) / max(sum(x["groups"] for x in layers), 1)
    blocks = [m for m in metrics if m["kind"] == "block"]
    seconds = sum(m["seconds"] for m in steps + blocks)
    how = [f"{len(blocks)} blocks learned one at a time"] if blocks else []
    how += [f"{len(steps)} steps end to end, {steps[-1]['tokens'] if steps else 0:,} tokens"] if steps or not blocks else []
    parts = [
        f"<h1>{html.escape(recipe.description or 'Learned mask')}</h1>",
        f"<p class=note>{html.escape(recipe.model.source)}, pattern {recipe.pattern}; {'; '.join(how)}; "
        f"{seconds / 60:.1f} minutes of learning; {100 * flipped:.2f} % of the groups differ "
        f"from the {html.escape(recipe.prior.mask or recipe.prior.method)} prior. Mask {digest[:16]}. compress {__version__}</p>",
    ]
    if rows and rows[0]["perplexities"]:
        parts += ["<h2>Perplexity</h2>", _table(rows), svg(_bars(rows))]
    if blocks:
        parts += ["<h2>Block by block</h2>", f"<p class=note>{html.escape(_block_note(blocks))}</p>", svg(_block_bars(blocks))]
    if any("perplexity" in m for m in measures):
        parts += ["<h2>While learning</h2>", svg(_curves([m for m in measures if "perplexity" in m], recipe))]
    if steps:
        parts += ["<h2>Losses</h2>", svg(_losses(steps))]
    parts += [
        "<h2>Where the mask moved</h2>",
        "<p class=note>Share of the groups that differ from the prior.</p>",
        svg(_heat(layers)),
    ]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(dump_recipe(recipe))}</pre>"]
    write_atomic(run.report, page("compress report", parts))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]["perplexities"])
    sparse = [r["perplexity"] for r in rows if r["method"] != "dense"]
    lines = ["<table><tr><th>method</th>" + "".join(f"<th>{html.escape(n)}</th>" for n in names) + "</tr>"]
    for row in rows:
        best = " class=best" if sparse and row["perplexity"] == min(sparse) else ""
        cells = "".join(f"<td>{row['perplexities'][n]:.2f}</td>" for n in names)
        lines.append(f"<tr{best}><td>{html.escape(row['method'])}</td>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _bars(rows: Sequence[dict[str, Any]]) -> Figure:
    names = list(rows[0]["perplexities"])
    drawn, grid = figure(9, 0.6 + 0.32 * len(rows), len(names))
    for axes, name in zip(grid[0], names, strict=True):
        values = [r["perplexities"][name] for r in rows]
        colours = [ACCENT if r["method"] == "learned" else INK if r["method"] == "dense" else MUTED for r in rows]
        bars = axes.barh([r["method"] for r in rows], values, color=colours)
        axes.bar_label(bars, [f"{v:.1f}" for v in values], padding=3, fontsize=8)
        axes.invert_yaxis()
        if max(values) > 8 * min(values):
            axes.set_xscale("log")
        axes.margins(x=0.15)
        plain(axes, f"{name} (lower is better)")
    return drawn


def _curves(measures: Sequence[dict[str, Any]], recipe: LearnMaskRecipe) -> Figure:
    text = next(iter(recipe.evaluate.texts), "perplexity")
    drawn, grid = figure(9, 3, 2)
    values = [m["perplexity"] for m in measures]
    grid[0][0].plot([m["tokens"] for m in measures], values, "o-", color=ACCENT, markersize=3)
    plain(grid[0][0], f"{text} of the hard mask", "tokens seen", "perplexity")
    changed = [100 * m["flipped"] for m in measures]
    grid[0][1].plot(changed, values, "o-", color=ACCENT, markersize=3)
    if not any(changed):
        grid[0][1].set_xlim(-0.05, 1)  # else shares below zero would be on the axis
    plain(grid[0][1], "against what changed", "groups that differ from the prior (%)", "perplexity")
    for axes in grid[0]:
        if max(values) > 4 * min(values):
            axes.set_yscale("log")
    return drawn


def _losses(steps: Sequence[dict[str, Any]]) -> Figure:
    drawn, grid = figure(9, 3, 2)
    x = [s["step"] for s in steps]
    grid[0][0].plot(x, [s["cross_entropy"] for s in steps], color=INK, linewidth=1, label="cross-entropy")
    if any(s["kl"] for s in steps):
        grid[0][0].plot(x, [s["kl"] for s in steps], color=ACCENT, linewidth=1, label="KL to the dense model")
    grid[0][0].legend(fontsize=8, frameon=False)
    plain(grid[0][0], "with soft masks", "step", "nats a token")
    grid[0][1].semilogy(x, [s["gradient_norm"] for s in steps], color=MUTED, linewidth=1, label="gradient norm")
    grid[0][1].semilogy(
        x, [s["temperature"] * 100 / s["scale"] for s in steps], color=ACCENT, linewidth=1, label="temperature / (scale / 100)"
    )
    grid[0][1].legend(fontsize=8, frameon=False)
    plain(grid[0][1], "schedule", "step")
    return drawn


def _block_note(blocks: Sequence[dict[str, Any]]) -> str:
    kept = [str(m["block"]) for m in blocks if not m["improved"]]
    starved = [name for m in blocks for name in m.get("starved", ())]
    note = "Held-out error of each block's outputs, relative to the dense model's, with the prior mask and with the learned one."
    if kept:
        note += f" No better, so the prior was kept: block {', '.join(kept)}."
    if starved:
        note += f" Too few tokens, so the prior was kept: {', '.join(starved[:12])}{f' and {len(starved) - 12} more' if len(starved) > 12 else ''}."
    return note


def _block_bars(blocks: Sequence[dict[str, Any]]) -> Figure:
    drawn, grid = figure(9, 3, 2)
    at = range(len(blocks))
    names = [str(m["block"]) for m in blocks]
    grid[0][0].bar(at, [m["error_before"] for m in blocks], color=MUTED, width=0.8, label="prior")
    grid[0][0].bar(at, [m["error_after"] for m in blocks], color=ACCENT, width=0.45, label="learned")
    grid[0][0].legend(fontsize=8, frameon=False)
    plain(grid[0][0], "held-out error", "decoder block")
    grid[0][1].bar(at, [100 * m["flipped"] for m in blocks], color=ACCENT, width=0.8)
    plain(grid[0][1], "groups that differ from the prior (%)", "decoder block")
    every = max(1, len(blocks) // 12)
    for axes in grid[0]:
        axes.set_xticks(list(at)[::every], names[::every])
    return drawn


def _heat(layers: Sequence[dict[str, Any]]) -> Figure:
    """Layers x kinds of matrix, coloured by the share of groups that changed."""
    import numpy as np

    kinds = list(dict.fromkeys(_kind(x["name"]) for x in layers))
    blocks = sorted({x["layer"] if x["layer"] is not None else -1 for x in layers})
    share = np.full((len(kinds), len(blocks)), np.nan)
    for x in layers:
        row, column = kinds.index(_kind(x["name"])), blocks.index(x["layer"] if x["layer"] is not None else -1)
        share[row, column] = 100 * x["flipped"] / max(x["groups"], 1)
    drawn, grid = figure(9, 0.9 + 0.28 * len(kinds))
    axes = grid[0][0]
    image = axes.imshow(share, aspect="auto", cmap="YlGn", vmin=0, vmax=float(np.nanmax(share)) or 1.0)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(len(blocks)), blocks)
    drawn.colorbar(image, ax=axes, label="%").ax.tick_params(labelsize=8)
    plain(axes, x="decoder block")
    return drawn


def _kind(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `q_proj`; of a fused expert parameter its own name."""
    parts = name.removesuffix(".weight").split(".")
    return parts[-1]
