"""What the mean score of a set is made of -> a figure with a bar for each part, named in plain words."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files.text import for_terminal
from .evaluations import Pair
from .panels import DARK, GREY, LAYER, LIGHT, PANELS, label_axes, panels_of, set_title, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A score among the heads of a detector that has a local one as well.
_GLOBAL = "global"
# The height of a part in inches, and how far its two bars are from its middle, as a share of it.
_PART = 0.4
_BESIDE = 0.19
# Letters of a line of its name, and the height of a line in points.
_LABEL = 24
_LINE = 7.8
_FAINT = "#666666"


def draw_contributions(pairs: Sequence[Pair]) -> Figure:
    """What the mean score of each set is made of: a bar for each part, in-domain beside OOD, and their sums."""
    parts = list(pairs[0].id_contributions)
    which = "global score" if _GLOBAL in pairs[0].id_scores else "score"
    bottom = len(parts) - 0.4
    figure, panels = panels_of(len(pairs), 0.75 + _PART * len(parts), share_x=True)
    for axes, pair in zip(panels, pairs, strict=True):
        for contributions, offset, colour, label in (
            (pair.id_contributions, -_BESIDE, DARK, "in-domain"),
            (pair.ood_contributions, _BESIDE, LIGHT, "OOD"),
        ):
            means = [float(values.mean()) for values in contributions.values()]
            _draw_bars(axes, means, np.arange(len(parts)) + offset, colour, label)
            _write_sum(axes, sum(means), bottom + 0.5 + offset, colour)

        axes.grid(axis="x", color=GREY, alpha=0.3, linewidth=0.4)
        axes.vlines(0, -0.55, bottom, color="black", linewidth=0.6)
        axes.axhline(bottom, color=GREY, linewidth=0.6)
        axes.set(yticks=[], ylim=(bottom + 1, -0.55))
        axes.spines.left.set_visible(False)
        axes.margins(x=0.2)
        set_title(axes, pair)

    for axes in panels[::PANELS]:  # the first of each row
        _name_parts(axes, parts, pairs[0].labels)
        _write_beside(axes, bottom + 0.5, f"sum = mean\n{which}", fontweight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, handlelength=1.2, columnspacing=1.2)

    x = f"mean contribution to the {which} (in-domain standard deviations)"
    x += f"; the bars of a set add up to its mean {which}"
    if _GLOBAL in pairs[0].id_scores:
        x += "; the verdict joins the global and the local score"
    label_axes(figure, x, "")
    return figure


def _draw_bars(axes: Axes, means: Sequence[float], rows: np.ndarray, colour: str, label: str) -> None:
    """A bar for each part, and how long it is beyond its end."""
    axes.barh(rows, means, 2 * _BESIDE, color=colour, edgecolor="black", linewidth=0.4, label=label)
    for row, mean in zip(rows, means, strict=True):
        side = "left" if mean >= 0 else "right"
        shift = (2 if mean >= 0 else -2, 0)
        axes.annotate(_signed(mean), (mean, row), shift, textcoords="offset points", ha=side, va="center", fontsize=5.5)


def _write_sum(axes: Axes, value: float, row: float, colour: str) -> None:
    """The mean score of a set, below its bars."""
    axes.plot(0, row, "s", color=colour, markeredgecolor="black", markeredgewidth=0.4, markersize=4)
    text: Any = {"textcoords": "offset points", "va": "center", "fontsize": 6.5, "fontweight": "bold"}
    axes.annotate(_signed(value), (0, row), (5, -0.3), **text)


def _name_parts(axes: Axes, parts: Sequence[str], labels: Mapping[str, str]) -> None:
    """Left of a panel: what each part looks at, in words, and below in grey which part it is."""
    for row, name in enumerate(parts):
        own = short(for_terminal(name.removeprefix(LAYER)), _LABEL)
        lines = textwrap.wrap(labels.get(name, ""), _LABEL)
        if not lines:
            _write_beside(axes, row, own)
            continue
        _write_beside(axes, row, "\n".join(lines), up=_LINE / 2)
        _write_beside(axes, row, own, up=-len(lines) * _LINE / 2, color=_FAINT)


def _write_beside(axes: Axes, row: float, text: str, up: float = 0.0, **style: Any) -> None:
    """Left of a panel, at a row, or so many points above it."""
    place: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate(text, (0, row), (-4, up), ha="right", va="center", fontsize=6.5, **place, **style)


def _signed(value: float) -> str:
    """In two digits; what rounds to nothing has no sign."""
    text = f"{value:+.2f}".replace("-", "\u2212")
    return "0.00" if text[1:] == "0.00" else text
