"""The HTML report of a routing: what it costs in perplexity, and how many experts a token runs by layer and by text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.figures import ACCENT, INK, MUTED, figure, page, plain, svg
from compress.recipe_file import dump_recipe
from compress.recipe_routing import LearnRoutingRecipe
from compress.routing.mixtures import Mixture
from compress.rundir import RunDir, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_routing_report(
    run: RunDir, recipe: LearnRoutingRecipe, rows: Sequence[dict[str, Any]], mixtures: Sequence[Mixture], met: float
) -> None:
    """Write `report.html`. rows: as in summary.json, the unpruned model first; met: share of experts run on the calibration text."""
    steps = run.read_metrics_of("step")
    k = "/".join(map(str, sorted({m.top_k for m in mixtures})))
    learned = (
        f"{len(steps)} steps, {steps[-1]['tokens']:,} tokens, {sum(s['seconds'] for s in steps) / 60:.1f} minutes; "
        if steps
        else ""
    )
    parts = [
        f"<h1>{html.escape(recipe.description or 'Top-any routing')}</h1>",
        f"<p class=note>{html.escape(recipe.model.source)}, method {recipe.method}, {len(mixtures)} mixtures of {k} experts a token; {learned}"
        f"{100 * met:.1f} % of the routed experts run on the calibration text. compress {__version__}</p>",
    ]
    own = next(row for row in rows if row["method"] == recipe.method)
    if own["perplexities"]:
        parts += ["<h2>What it costs</h2>", _table(rows, recipe.method)]
        parts += [
            "<h2>Experts a token</h2>",
            "<p class=note>By layer and by text, on average over tokens.</p>",
            svg(_heat(own, mixtures)),
            _layer_table(own, mixtures),
        ]
    if steps:
        parts += ["<h2>While learning</h2>", svg(_curves(steps))]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(dump_recipe(recipe))}</pre>"]
    write_atomic(run.report, page("compress routing report", parts))


def _table(rows: Sequence[dict[str, Any]], method: str) -> str:
    names = list(rows[0]["perplexities"])
    head = "".join(f"<th>{html.escape(n)} perplexity</th><th>KL</th><th>experts run</th>" for n in names)
    lines = [f"<table><tr><th>method</th>{head}</tr>"]
    for row in rows:
        best = " class=best" if row["method"] == method else ""
        cells = "".join(
            f"<td>{row['perplexities'][n]:.3f}</td><td>{row['kl'][n]:.4f}</td><td>{100 * row['activation'][n]:.1f} %</td>"
            for n in names
        )
        lines.append(f"<tr{best}><td>{html.escape(row['method'])}</td>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _layer_table(row: dict[str, Any], mixtures: Sequence[Mixture]) -> str:
    texts = list(row["experts_per_token"])
    lines = ["<table><tr><th>mixture</th>" + "".join(f"<th>{html.escape(t)}</th>" for t in texts) + "</tr>"]
    for mixture in mixtures:
        cells = "".join(f"<td>{row['experts_per_token'][t][mixture.name]:.2f}</td>" for t in texts)
        lines.append(f"<tr><td>{html.escape(mixture.name)}</td>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _heat(row: dict[str, Any], mixtures: Sequence[Mixture]) -> Figure:
    """Texts x layers, coloured by experts a token; beside it the layers' average as bars."""
    texts = list(row["experts_per_token"])
    values = [[row["experts_per_token"][text][m.name] for m in mixtures] for text in texts]
    drawn, grid = figure(9, 1.6 + 0.3 * len(texts), 2)
    most = max(m.top_k for m in mixtures)
    image = grid[0][0].imshow(values, aspect="auto", cmap="YlGn", vmin=1, vmax=most)
    grid[0][0].set_yticks(range(len(texts)), texts)
    drawn.colorbar(image, ax=grid[0][0]).ax.tick_params(labelsize=8)
    plain(grid[0][0], "experts a token", x="mixture")
    for text, line, colour in zip(
        texts, values, [ACCENT, INK, MUTED, "#c97b12", "#7a4bb0", "#2f6fb0"] * len(texts), strict=False
    ):
        grid[0][1].plot(range(len(mixtures)), line, "o-", color=colour, markersize=3, linewidth=1, label=text)
    grid[0][1].set_ylim(0.9, most + 0.1)
    grid[0][1].legend(fontsize=8, frameon=False)
    plain(grid[0][1], x="mixture", y="experts a token")
    return drawn


def _curves(steps: Sequence[dict[str, Any]]) -> Figure:
    drawn, grid = figure(9, 3, 2)
    x = [s["step"] for s in steps]
    grid[0][0].plot(x, [s["kl"] for s in steps], color=ACCENT, linewidth=1, label="KL from the unpruned model")
    grid[0][0].legend(fontsize=8, frameon=False)
    plain(grid[0][0], "drawn masks", "step", "nats a token")
    grid[0][1].plot(x, [100 * s["activation"] for s in steps], color=ACCENT, linewidth=1, label="expected to run")
    if any(s["target"] for s in steps):
        grid[0][1].plot(x, [100 * s["target"] for s in steps], color=MUTED, linewidth=1, label="target")
    grid[0][1].legend(fontsize=8, frameon=False)
    plain(grid[0][1], "activation", "step", "% of the routed experts")
    return drawn
