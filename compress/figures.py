"""What the HTML reports share: the page, and figures in one style. One file a report, no network."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
INK, ACCENT, MUTED = "#1c2430", "#0b7a4b", "#9fb0c3"


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML page around its parts, which are HTML already."""
    return "\n".join([f"<!doctype html><meta charset=utf-8><title>{title}</title>", f"<style>{_STYLE}</style>", *parts])


def figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """A figure with one row of axes; sizes in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)


def svg(drawn: Figure) -> str:
    """The figure as an SVG element; it is closed."""
    from matplotlib import pyplot

    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg")
    pyplot.close(drawn)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def plain(axes: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    """Axes with little around them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    return axes
