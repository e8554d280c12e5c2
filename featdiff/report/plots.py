"""The result of an evaluation -> ROC curves, histograms and contributions to the score, as SVG and PNG for a paper."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..exceptions import FeatdiffError, UsageError
from ..files.atomic import write_together
from ..files.text import for_terminal
from .evaluations import OWN, Evaluated, Pair, best_baseline, in_words
from .panels import DARK, GREY, LAYER, LIGHT, STYLE, label_axes, panels_of, set_title, short, title_of
from .plot_contributions import draw_contributions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
_DPI = 300


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a place where no pictures can be put (``UsageError``), before any long work."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: name a folder for the pictures", argument="plots")
    if not path.parent.is_dir():
        raise UsageError(f"no folder {path.parent} for {path.name}", argument="plots")


def save_evaluations(folder: str | os.PathLike[str], evaluations: Mapping[str, Evaluated]) -> list[Path]:
    """Draw evaluations into a folder: all pictures are written, or none.

    Parameters
    ----------
    folder : path
        Made if it is missing. Pictures of the same name are replaced.
    evaluations : mapping of str to Evaluated
        By what the names of their files begin with, which may be empty.

    Returns
    -------
    list of Path
        The files: ``roc``, ``histograms`` and ``contributions`` (or ``layers``) for each protocol, as SVG and PNG.

    Raises
    ------
    UsageError
        The folder is a file, or lies nowhere.
    FeatdiffError
        The disk is full, or the folder cannot be written.
    """
    check_folder(folder)
    target = Path(folder)
    contents: dict[Path, bytes] = {}
    for beginning, evaluation in evaluations.items():
        for name, data in draw_evaluation(evaluation).items():
            contents[target / f"{beginning}{name}"] = data

    is_new = not target.exists()
    try:
        target.mkdir(exist_ok=True)
        write_together(contents)
    except OSError as error:
        if is_new and target.is_dir():
            target.rmdir()
        raise FeatdiffError(f"{target} cannot be written: {error.strerror or error}", argument="plots") from None
    return list(contents)


def draw_evaluation(evaluation: Evaluated) -> dict[str, bytes]:
    """Draw what an evaluation found: for each protocol three figures, with a panel for each OOD set.

    ``roc`` has the ROC curves of featdiff and of the best baseline, and a dot for the rate that the detector works at;
    ``histograms`` the detector's own score; ``contributions`` what the mean score of a set is made of. Where the score
    is no sum, ``layers`` stands in its place: the scores of the layers, if these have any.

    Parameters
    ----------
    evaluation : Evaluated

    Returns
    -------
    dict of str to bytes
        Pictures by the name of a file, such as ``roc-matched.svg``.
    """
    from matplotlib import rc_context

    pictures: dict[str, bytes] = {}
    for protocol in dict.fromkeys(pair.protocol for pair in evaluation.pairs):
        pairs = [pair for pair in evaluation.pairs if pair.protocol == protocol]
        heads = [pair["heads"] for pair in evaluation.result["pairs"] if pair["protocol"] == protocol]
        with rc_context(STYLE):
            figures = {
                "roc": _roc_curves(pairs, heads, evaluation.fpr),
                "histograms": _histograms(pairs, evaluation.calibration.threshold(evaluation.fpr), evaluation.fpr),
            }
            if pairs[0].id_contributions:
                figures["contributions"] = draw_contributions(pairs)
            elif layers := [name for name in heads[0] if name.startswith(LAYER)]:
                figures["layers"] = _layers(pairs, heads, layers)
            for name, figure in figures.items():
                pictures |= dict(_rendered(f"{name}-{protocol}", figure))
    return pictures


def _rendered(name: str, figure: Figure) -> Iterator[tuple[str, bytes]]:
    for format in FORMATS:
        stream = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else {}
        figure.savefig(stream, format=format, dpi=_DPI, metadata=metadata)
        yield f"{name}.{format}", stream.getvalue()


# ---- ROC curves ----


def _roc_curves(pairs: Sequence[Pair], heads: Sequence[Mapping[str, Any]], fpr: float) -> Figure:
    figure, panels = panels_of(len(pairs), 2.32, share_x=True)
    for axes, pair, metrics in zip(panels, pairs, heads, strict=True):
        axes.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle=":")
        axes.plot(
            *_roc(pair, OWN), color=DARK, label=f"featdiff, AUROC {_auroc(metrics[OWN])}", clip_on=False, zorder=2.7
        )
        baseline = best_baseline(metrics)
        if baseline is not None:
            label = f"{short(for_terminal(in_words(baseline)))}, {_auroc(metrics[baseline])}"
            dashes = (0, (4, 1.5))
            axes.plot(*_roc(pair, baseline), color=LIGHT, linestyle=dashes, label=label, clip_on=False, zorder=2.6)

        works_at = 100 * pair.id_flags.mean(), 100 * pair.ood_flags.mean()
        axes.plot(*works_at, "o", color=DARK, markeredgecolor="white", markersize=5.5, clip_on=False, zorder=3)
        axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", xticks=range(0, 101, 25), yticks=range(0, 101, 25))

        # above the panel, where no curve can be hidden
        place: Any = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.1, "alignment": "left"}
        legend = axes.legend(**place, handlelength=2.2, title=title_of(pair), title_fontproperties={"weight": "bold"})
        legend.get_title().set_fontsize(8)

    x = f"in-domain images flagged (%); the dot: at the threshold for {100 * fpr:g} %"
    label_axes(figure, x, "OOD images flagged (%), higher = better")
    return figure


def _roc(pair: Pair, head: str) -> tuple[np.ndarray, np.ndarray]:
    """Shares of in-domain and OOD images above each threshold, in percent."""
    from sklearn.metrics import roc_curve

    scores = np.concatenate([pair.id_scores[head], pair.ood_scores[head]])
    is_ood = np.repeat([0, 1], [len(pair.id_scores[head]), len(pair.ood_scores[head])])
    false_alarms, found, _ = roc_curve(is_ood, scores)
    return 100 * false_alarms, 100 * found


def _auroc(metrics: Mapping[str, Any]) -> str:
    return f"{100 * metrics['auroc']:.1f}"


# ---- histograms ----


def _histograms(pairs: Sequence[Pair], threshold: float, fpr: float) -> Figure:
    figure, panels = panels_of(len(pairs), 1.75, share_x=True, share_y=False)
    everything = np.concatenate([scores for pair in pairs for scores in (pair.id_scores[OWN], pair.ood_scores[OWN])])
    edges = list(np.histogram_bin_edges(np.append(everything, threshold), bins=30))

    for axes, pair in zip(panels, pairs, strict=True):
        inside, outside = pair.id_scores[OWN], pair.ood_scores[OWN]
        axes.hist(inside, edges, weights=_percent(inside), color=DARK, alpha=0.6, label="in-domain")
        axes.hist(
            outside,
            edges,
            weights=_percent(outside),
            histtype="stepfilled",
            facecolor=(*_rgb(LIGHT), 0.5),
            edgecolor="black",
            linewidth=0.6,
            hatch="//////",
            label="OOD",
        )
        axes.axvline(threshold, color="black", linestyle="--", linewidth=0.9, label=f"threshold for {100 * fpr:g} %")
        set_title(axes, pair)

    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, handlelength=1.6, columnspacing=1.2)
    x = "OOD score (in-domain standard deviations; higher = more OOD)"
    label_axes(figure, x, "share of the set (%)")
    return figure


def _percent(values: np.ndarray) -> np.ndarray:
    """Weights of which all images of a set together have 100."""
    return np.full(len(values), 100 / len(values))


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


# ---- layers ----


def _layers(pairs: Sequence[Pair], heads: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> Figure:
    """What each layer says: medians, and the middle 90 % of the images."""
    figure, panels = panels_of(len(pairs), 0.55 + 0.24 * len(layers))
    rows = np.arange(len(layers))
    for axes, pair, metrics in zip(panels, pairs, heads, strict=True):
        for scores, offset, colour, marker, label in (
            (pair.id_scores, -0.16, DARK, "o", "in-domain"),
            (pair.ood_scores, 0.16, LIGHT, "s", "OOD"),
        ):
            low, middle, high = np.array([np.percentile(scores[name], (5, 50, 95)) for name in layers]).T
            axes.hlines(rows + offset, low, high, color=colour, linewidth=1.6)
            edge: Any = {"markeredgecolor": "black", "markeredgewidth": 0.5}
            axes.plot(middle, rows + offset, marker, color=colour, markersize=4, label=label, **edge)

        place = axes.get_yaxis_transform()
        for row, name in enumerate(layers):
            axes.text(1.17, row, _auroc(metrics[name]), transform=place, ha="right", va="center", fontsize=7)
        axes.text(1.17, -0.75, "AUROC (%)", transform=place, ha="right", va="center", fontsize=7)
        axes.axvline(0, color=GREY, linewidth=0.6, linestyle=":", zorder=0)
        axes.set(yticks=rows, ylim=(len(layers) - 0.5, -1.1))
        axes.set_yticklabels([short(for_terminal(name.removeprefix(LAYER)), 20) for name in layers])
        set_title(axes, pair)

    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, handletextpad=0.2, columnspacing=1.2)
    x = "score of the layer (in-domain standard deviations; higher = more OOD): median and middle 90 %"
    label_axes(figure, x, "layer, from the first to the last")
    return figure
