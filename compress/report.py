"""The HTML report of a run: one file, no network, pictures where people would rather look than read."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.recipe import LearnMaskRecipe
from compress.recipe_file import dump_recipe
from compress.rundir import RunDir, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2430;max-width:960px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:0}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .9rem;text-align:right;border-bottom:1px solid #dde3ea}
td:first-child,th:first-child{text-align:left}tr.best td{font-weight:600;background:#eaf6ef}
pre{background:#f5f7fa;padding:1rem;overflow:auto;font-size:12px}svg{max-width:100%;height:auto}.note{color:#5b6775}
"""
_INK, _ACCENT, _MUTED = "#1c2430", "#0b7a4b", "#9fb0c3"


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
        parts += ["<h2>Perplexity</h2>", _table(rows), _svg(_bars(rows))]
    if blocks:
        parts += ["<h2>Block by block</h2>", f"<p class=note>{html.escape(_block_note(blocks))}</p>", _svg(_block_bars(blocks))]
    if any("perplexity" in m for m in measures):
        parts += ["<h2>While learning</h2>", _svg(_curves([m for m in measures if "perplexity" in m], recipe))]
    if steps:
        parts += ["<h2>Losses</h2>", _svg(_losses(steps))]
    parts += [
        "<h2>Where the mask moved</h2>",
        "<p class=note>Share of the groups that differ from the prior.</p>",
        _svg(_heat(layers)),
    ]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(dump_recipe(recipe))}</pre>"]
    page = "\n".join(["<!doctype html><meta charset=utf-8><title>compress report</title>", f"<style>{_STYLE}</style>", *parts])
    write_atomic(run.report, page)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]["perplexities"])
    sparse = [r["perplexity"] for r in rows if r["method"] != "dense"]
    lines = ["<table><tr><th>method</th>" + "".join(f"<th>{html.escape(n)}</th>" for n in names) + "</tr>"]
    for row in rows:
        best = " class=best" if sparse and row["perplexity"] == min(sparse) else ""
        cells = "".join(f"<td>{row['perplexities'][n]:.2f}</td>" for n in names)
        lines.append(f"<tr{best}><td>{html.escape(row['method'])}</td>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)


def _svg(figure: Figure) -> str:
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _plain(axes: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left", color=_INK)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    return axes


def _bars(rows: Sequence[dict[str, Any]]) -> Figure:
    names = list(rows[0]["perplexities"])
    figure, grid = _figure(9, 0.6 + 0.32 * len(rows), len(names))
    for axes, name in zip(grid[0], names, strict=True):
        values = [r["perplexities"][name] for r in rows]
        colours = [_ACCENT if r["method"] == "learned" else _INK if r["method"] == "dense" else _MUTED for r in rows]
        bars = axes.barh([r["method"] for r in rows], values, color=colours)
        axes.bar_label(bars, [f"{v:.1f}" for v in values], padding=3, fontsize=8)
        axes.invert_yaxis()
        if max(values) > 8 * min(values):
            axes.set_xscale("log")
        axes.margins(x=0.15)
        _plain(axes, f"{name} (lower is better)")
    return figure


def _curves(measures: Sequence[dict[str, Any]], recipe: LearnMaskRecipe) -> Figure:
    text = next(iter(recipe.evaluate.texts), "perplexity")
    figure, grid = _figure(9, 3, 2)
    values = [m["perplexity"] for m in measures]
    grid[0][0].plot([m["tokens"] for m in measures], values, "o-", color=_ACCENT, markersize=3)
    _plain(grid[0][0], f"{text} of the hard mask", "tokens seen", "perplexity")
    grid[0][1].plot([100 * m["flipped"] for m in measures], values, "o-", color=_ACCENT, markersize=3)
    _plain(grid[0][1], "against what changed", "groups that differ from the prior (%)", "perplexity")
    for axes in grid[0]:
        if max(values) > 4 * min(values):
            axes.set_yscale("log")
    return figure


def _losses(steps: Sequence[dict[str, Any]]) -> Figure:
    figure, grid = _figure(9, 3, 2)
    x = [s["step"] for s in steps]
    grid[0][0].plot(x, [s["cross_entropy"] for s in steps], color=_INK, linewidth=1, label="cross-entropy")
    if any(s["kl"] for s in steps):
        grid[0][0].plot(x, [s["kl"] for s in steps], color=_ACCENT, linewidth=1, label="KL to the dense model")
    grid[0][0].legend(fontsize=8, frameon=False)
    _plain(grid[0][0], "with soft masks", "step", "nats a token")
    grid[0][1].semilogy(x, [s["gradient_norm"] for s in steps], color=_MUTED, linewidth=1, label="gradient norm")
    grid[0][1].semilogy(
        x, [s["temperature"] * 100 / s["scale"] for s in steps], color=_ACCENT, linewidth=1, label="temperature / (scale / 100)"
    )
    grid[0][1].legend(fontsize=8, frameon=False)
    _plain(grid[0][1], "schedule", "step")
    return figure


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
    figure, grid = _figure(9, 3, 2)
    at = range(len(blocks))
    names = [str(m["block"]) for m in blocks]
    grid[0][0].bar(at, [m["error_before"] for m in blocks], color=_MUTED, width=0.8, label="prior")
    grid[0][0].bar(at, [m["error_after"] for m in blocks], color=_ACCENT, width=0.45, label="learned")
    grid[0][0].legend(fontsize=8, frameon=False)
    _plain(grid[0][0], "held-out error", "decoder block")
    grid[0][1].bar(at, [100 * m["flipped"] for m in blocks], color=_ACCENT, width=0.8)
    _plain(grid[0][1], "groups that differ from the prior (%)", "decoder block")
    every = max(1, len(blocks) // 12)
    for axes in grid[0]:
        axes.set_xticks(list(at)[::every], names[::every])
    return figure


def _heat(layers: Sequence[dict[str, Any]]) -> Figure:
    """Layers x kinds of matrix, coloured by the share of groups that changed."""
    import numpy as np

    kinds = list(dict.fromkeys(_kind(x["name"]) for x in layers))
    blocks = sorted({x["layer"] if x["layer"] is not None else -1 for x in layers})
    share = np.full((len(kinds), len(blocks)), np.nan)
    for x in layers:
        row, column = kinds.index(_kind(x["name"])), blocks.index(x["layer"] if x["layer"] is not None else -1)
        share[row, column] = 100 * x["flipped"] / max(x["groups"], 1)
    figure, grid = _figure(9, 0.9 + 0.28 * len(kinds))
    axes = grid[0][0]
    image = axes.imshow(share, aspect="auto", cmap="YlGn", vmin=0)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(len(blocks)), blocks)
    figure.colorbar(image, ax=axes, label="%").ax.tick_params(labelsize=8)
    _plain(axes, x="decoder block")
    return figure


def _kind(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `q_proj`; of a fused expert parameter its own name."""
    parts = name.removesuffix(".weight").split(".")
    return parts[-1]
