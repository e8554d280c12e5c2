"""Figures with a panel for each OOD set, as they stand in a paper."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from ..files.text import for_terminal
from .evaluations import OWN, Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: How the names of scores of layers begin.
LAYER = "layer_"

# Of the palette of Okabe and Ito, which colour-blind people can tell apart; dark and light, so that grey tells, too.
DARK = "#0072B2"
LIGHT = "#E69F00"
GREY = "#8C8C8C"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "featdiff",  # the same result gives the same bytes
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}
# Panels beside each other, and the inches of so many: one fits a column of a paper, three its page.
PANELS = 3
_WIDTHS = {1: 3.4, 2: 4.9, 3: 7.0}
# Letters of a label per inch.
_LETTERS = 14


def panels_of(count: int, height: float, share_x: bool = False, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with so many panels, each ``height`` inches high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, PANELS)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTHS[columns], rows * height + 0.5), layout="constrained")
    FigureCanvasAgg(figure)

    grid = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    for above in axes[max(count - columns, 0) : count]:
        above.xaxis.set_tick_params(labelbottom=True)
    return figure, axes[:count]


def label_axes(figure: Figure, x: str, y: str) -> None:
    """Name both axes of all panels, on several lines where it is narrow."""
    lines = textwrap.wrap(x, int(_LETTERS * figure.get_figwidth()), break_on_hyphens=False)
    figure.set_figheight(figure.get_figheight() + 0.13 * (len(lines) - 1))
    figure.supxlabel("\n".join(lines), fontsize=8)
    figure.supylabel(y, fontsize=8)


def title_of(pair: Pair) -> str:
    """The set, and how many images it has."""
    return f"{short(for_terminal(pair.ood))} ({len(pair.ood_scores[OWN]):,})"


def set_title(axes: Axes, pair: Pair) -> None:
    """Name the set above its panel."""
    axes.set_title(title_of(pair), loc="left", fontweight="bold")


def short(name: str, most: int = 26) -> str:
    """A name of so many letters at most."""
    return name if len(name) <= most else f"{name[: most - 1]}\u2026"
