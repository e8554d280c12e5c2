"""An explanation -> one picture: original, heat map, reasons, contributions and the most similar normal images."""

from __future__ import annotations

import io
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..files.text import for_terminal
from ..verdicts.explanation import Explanation
from .heatmaps import colours_of, overlay, scale_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of the page.
_INK = "#1b1f24"
_MUTED = "#57606a"
_LINE = "#d0d7de"
_FLAGGED = "#b42318"
_NORMAL = "#1f6f43"
_MORE = "#d2602f"
_LESS = "#8ea6c1"
# Inches: the page, its margin, a picture, a bar of the contributions, the number beside it, a small picture.
_PAGE = 10.0
_MARGIN = 0.5
_PANEL = 4.0
_BAR = 0.36
_NUMBER = 0.52
_SMALL = 1.25
_DPI = 130
# Pictures that are thinner are drawn wider than they are.
_THINNEST = 8.0
# Bars and small pictures that there is room for.
_MOST_BARS = 8
_MOST_NEAREST = 5
_BULLET = "• "


def draw(explanation: Explanation) -> bytes:
    """The whole explanation as a PNG file."""
    page = Page(explanation)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a path in another script
        page.draw().savefig(stream, dpi=_DPI, format="png")
    return stream.getvalue()


class Page:
    """Draws an explanation from top to bottom; all sizes are inches.

    Parameters
    ----------
    explanation : Explanation
    """

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation
        self.heat = overlay(explanation)
        self.bars = _bars_of(explanation)[:_MOST_BARS]
        self.nearest = explanation.nearest[:_MOST_NEAREST]
        self.text_width = 4.1 if self.heat else _PAGE - 2 * _MARGIN - _PANEL - 0.45
        self.reasons = _wrapped(explanation.reasons, int(self.text_width / 0.082))

    def draw(self) -> Figure:
        """The figure, as high as it needs to be."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        picture = self._panel_height()
        words = 0.4 + 0.21 * len(self.reasons)
        bars = 0.75 + _BAR * len(self.bars) if self.bars else 0.0
        if self.heat is not None:
            middle = picture + 0.45 + max(words, bars)
        else:
            middle = max(picture + 0.25, words + 0.25 + bars)
        bottom = _SMALL + 1.15 if self.nearest else 0.0
        self.height = 1.2 + middle + bottom + 0.25
        self.figure = Figure(figsize=(_PAGE, self.height), facecolor="white")
        FigureCanvasAgg(self.figure)

        self._title()
        top = 1.2
        if self.heat is not None:
            self._pictures(top, picture)
            below = top + picture + 0.45
            self._words(_MARGIN, below)
            self._contributions(_PAGE / 2 + 0.1, below)
        else:
            left = _MARGIN + _PANEL + 0.45
            self._picture(self.explanation.picture, _MARGIN, top, picture, self._original_title())
            self._words(left, top - 0.1)
            self._contributions(left, top + words + 0.1)
        if self.nearest:
            self._nearest(top + middle + 0.1)
        return self.figure

    def _panel_height(self) -> float:
        picture = self.explanation.picture
        if picture is None:
            return 0.6
        return float(np.clip(_PANEL * picture.height / picture.width, 1.2, 4.2))

    def _shown_width(self, height: float) -> float:
        """How wide the picture is in a panel of this height."""
        picture = self.explanation.picture
        return min(_PANEL, height / _shape(picture)) if picture else _PANEL

    # ---- parts ----

    def _title(self) -> None:
        found = self.explanation
        colour = _FLAGGED if found.is_ood else _NORMAL
        verdict = "Out-of-distribution" if found.is_ood else "Normal"
        self._text(_MARGIN, 0.48, verdict, size=17, weight="bold", color=colour)

        parts = ", ".join(f"{name} {value:.3g}" for name, value in found.p_values.items())
        facts = [f"p = {found.p_value:.3g}" + (f" ({parts})" if parts else "")]
        facts += [f"score {found.ood_score:.2f} (threshold {found.threshold:.2f})", f"false-alarm rate {found.fpr:g}"]
        self._text(_PAGE - _MARGIN, 0.48, "   ".join(facts), size=8.5 if parts else 9.5, color=_MUTED, ha="right")
        self._text(_MARGIN, 0.78, _shortened(found.path, 105), size=9.5, color=_MUTED)

        self._axes(_MARGIN, 0.9, _PAGE - 2 * _MARGIN, 0.01).set_facecolor(_LINE)

    def _pictures(self, top: float, height: float) -> None:
        right = _MARGIN + _PANEL + 0.35
        self._picture(self.explanation.picture, _MARGIN, top, height, self._original_title())
        self._picture(self.heat, right, top, height, "Where it is strange")
        self._scale(right + self._shown_width(height) + 0.1, top, height)

    def _original_title(self) -> str:
        width, height = self.explanation.size
        return f"Original ({width} x {height} pixels)" if width else "Original"

    def _picture(self, picture: Image.Image | None, left: float, top: float, height: float, title: str) -> None:
        axes = self._axes(left, top, _PANEL, height)
        if picture is None:
            axes.text(0.5, 0.5, "the original is not at hand", ha="center", va="center", color=_MUTED, size=9.5)
            axes.set_facecolor("#f6f8fa")
            return
        _show(axes, picture)
        axes.set_title(title, loc="left", size=9.5, color=_MUTED)

    def _scale(self, left: float, top: float, height: float) -> None:
        """The colour bar, with the threshold in its middle."""
        found = self.explanation
        low, high = scale_ends(found)
        axes = self._axes(left, top, 0.15, height)
        column = colours_of(np.linspace(1, 0, 400)[:, None])[..., :3]
        axes.imshow(column, aspect="auto", extent=(0, 1, low, high))
        axes.axhline((low + high) / 2, color=_INK, linewidth=1.5)

        axes.yaxis.tick_right()
        axes.set_yticks([low, (low + high) / 2, high], [f"{low:.3g}", "", f"{high:.3g}"], size=7.5, color=_MUTED)
        axes.tick_params(length=0, pad=3)
        axes.annotate("threshold", (1.3, 0.5), xycoords="axes fraction", size=7.5, color=_INK, va="center")
        axes.annotate("normal", (1.3, 0.25), xycoords="axes fraction", size=7.5, color=_MUTED, va="center")
        axes.annotate("strange", (1.3, 0.75), xycoords="axes fraction", size=7.5, color=_FLAGGED, va="center")
        if found.heat is not None and np.isnan(found.heat).any():
            axes.annotate("grey: not seen", (1.0, -0.02), xycoords="axes fraction", size=7.5, color=_MUTED,
                          va="top", ha="right")  # fmt: skip

    def _words(self, left: float, top: float) -> None:
        self._text(left, top + 0.15, "Why", size=11, weight="bold")
        for i, line in enumerate(self.reasons):
            indent = 0.0 if line.startswith(_BULLET) else 0.14
            self._text(left + indent, top + 0.45 + 0.21 * i, line, size=10)

    def _contributions(self, left: float, top: float) -> None:
        """A bar for each part of the score, or for each layer where the score is no sum."""
        if not self.bars:
            return
        found = self.explanation
        which = "global score" if found.p_values else "score"
        title = f"What the {which} is made of" if found.heads else "Layers"
        self._text(left, top + 0.15, title, size=11, weight="bold")
        width = _PAGE - _MARGIN - left
        named = 2.55
        axes = self._axes(left + named, top + 0.4, width - named, _BAR * len(self.bars))
        values = [amount for _, _, amount in self.bars]
        axes.barh(range(len(values)), values, height=0.62, color=[_MORE if value > 0 else _LESS for value in values])
        axes.axvline(0, color=_MUTED, linewidth=0.8)

        # small parts must look small: the scale reaches at least as far as the score of a flagged image
        least = min(*values, 0.0)
        most = max(*values, 0.0, min(max(self.explanation.threshold, 1.0), 4.0))
        span = most - least
        before = _NUMBER if least < 0 else 0.1
        inch = span / (width - named - before - _NUMBER)
        axes.set_xlim(least - before * inch, most + _NUMBER * inch)
        axes.set_ylim(len(values) - 0.5, -0.5)
        for row, value in enumerate(values):
            side = "left" if value >= 0 else "right"
            shift = 0.02 * span if value >= 0 else -0.02 * span
            axes.text(value + shift, row, _signed(value), ha=side, va="center", size=8.5, color=_INK)

        for row, (label, name, _) in enumerate(self.bars):
            middle = top + 0.4 + _BAR * (row + 0.5)
            self._text(left, middle - 0.01, label, size=9)
            self._text(left, middle + 0.12, name, size=6.5, color=_MUTED)
        if found.heads:
            total = f"together {found.ood_score:.2f}; more than {found.threshold:.2f} is flagged"
            if found.p_values:  # the verdict joins this sum with the local score
                p_values = ", ".join(f"{name} p = {value:.3g}" for name, value in found.p_values.items())
                total = f"together {sum(head.amount for head in found.heads):.2f}; {p_values}"
            self._text(left, top + 0.62 + _BAR * len(self.bars), total, size=8.5, color=_MUTED)

    def _nearest(self, top: float) -> None:
        self._text(_MARGIN, top + 0.15, "The most similar normal images", size=11, weight="bold")
        step = (_PAGE - 2 * _MARGIN) / _MOST_NEAREST
        for i, other in enumerate(self.nearest):
            left = _MARGIN + i * step
            axes = self._axes(left, top + 0.32, step - 0.15, _SMALL)
            if other.thumbnail is None:
                axes.set_facecolor("#f6f8fa")
                axes.text(0.5, 0.5, "no picture at hand", ha="center", va="center", color=_MUTED, size=8)
            else:
                _show(axes, other.thumbnail)
                axes.set_anchor("W")
            self._text(left, top + _SMALL + 0.5, _shortened(other.path, 24), size=7.5)
            self._text(left, top + _SMALL + 0.67, f"distance {other.distance:.3g}", size=7.5, color=_MUTED)

    # ---- tools ----

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without ticks and frame, their upper left corner this far from the page's."""
        bounds = (left / _PAGE, 1 - (top + height) / self.height, width / _PAGE, height / self.height)
        axes = self.figure.add_axes(bounds)
        axes.set(xticks=[], yticks=[])
        for side in axes.spines.values():
            side.set_visible(False)
        return axes

    def _text(self, left: float, top: float, text: str, size: float, color: str = _INK, **options: Any) -> None:
        written = self.figure.text(
            left / _PAGE, 1 - top / self.height, for_terminal(text), size=size, color=color, **options
        )
        written.set_parse_math(False)  # a dollar sign in a name is a dollar sign


def _show(axes: Axes, picture: Image.Image) -> None:
    """Draw a picture in its own shape; one that would be a mere line is drawn wider."""
    few = max(picture.size) < 128
    aspect = _shape(picture) * picture.width / picture.height
    axes.imshow(np.asarray(picture.convert("RGB")), aspect=aspect, interpolation="nearest" if few else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.set_anchor("NW")


def _shape(picture: Image.Image) -> float:
    """Height by width of a picture as it is drawn."""
    return float(np.clip(picture.height / picture.width, 1 / _THINNEST, _THINNEST))


def _bars_of(explanation: Explanation) -> list[tuple[str, str, float]]:
    """Label, name and length of each bar."""
    if explanation.heads:
        return [(head.label, head.name, head.amount) for head in explanation.heads]
    return [(name, "", score) for name, score in explanation.layers.items() if np.isfinite(score)]


def _wrapped(sentences: tuple[str, ...], width: int) -> list[str]:
    """Lines of at most so many characters."""
    lines = []
    for sentence in sentences:
        lines += textwrap.wrap(_BULLET + for_terminal(sentence), width)
    return lines


def _signed(value: float) -> str:
    """A number with its sign and two digits; what rounds to 0 has none."""
    return "0.00" if f"{value:z.2f}" == "0.00" else f"{value:+.2f}"


def _shortened(path: str, length: int) -> str:
    """The end of a path, which says most."""
    return path if len(path) <= length else f"…{path[1 - length :]}"
