"""Pictures of scores, inpaintings and outliers."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..exceptions import UsageError
from ..files.atomic import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_histograms(
    file: str | Path, scores: Mapping[str, np.ndarray], threshold: float, fpr: float, title: str = ""
) -> None:
    """Draw one histogram of ``ood_score`` per set, and the threshold.

    Parameters
    ----------
    file : str or Path
        Ends in .png, .svg or .pdf.
    scores : mapping of str to (N,) float
        By set name, the in-domain set first. NaN and sets without a score are left out.
    threshold : float
        Scores above are flagged.
    fpr : float
        The false-alarm rate of the threshold.
    title : str, default ""

    Raises
    ------
    UsageError
        No set has a score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets = {name: values[np.isfinite(values)] for name, values in scores.items()}
    sets = {name: values for name, values in sets.items() if len(values)}
    if not sets:
        raise UsageError("there are no scores to draw")

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = list(np.histogram_bin_edges(np.concatenate(list(sets.values())), bins=60))
    for name, values in sets.items():
        label = f"{name} ({len(values):,})"
        if label.startswith("_"):  # matplotlib leaves out such labels
            label = f"\u200b{label}"
        share = np.full(len(values), 100 / len(values))
        axes.hist(values, edges, weights=share, alpha=0.55, label=label)

    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold at fpr {fpr:g}")
    axes.set(xlabel="ood_score (higher = more out-of-distribution)", ylabel="share of the set (%)", title=title)
    for text in (*axes.legend().get_texts(), axes.title):
        text.set_parse_math(False)  # a dollar sign in a name is a dollar sign
    _save(figure, file, dpi=150)


def save_inpaintings(
    file: str | os.PathLike[str], x: np.ndarray, masked: np.ndarray, inpainted: np.ndarray, scores: np.ndarray
) -> None:
    """Draw one line per image: original, masked, inpainted, and their difference (black = none).

    Parameters
    ----------
    file : str or Path
        Ends in .png, .svg or .pdf.
    x, masked, inpainted : (N, C, H, W) float
        In [-1, 1].
    scores : (N,) float
        Printed beside the images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = {
        "original": (x + 1) / 2,
        "masked": (masked + 1) / 2,
        "inpainted": (inpainted + 1) / 2,
        "difference": np.abs(inpainted - x) / 2,
    }
    figure = Figure(figsize=(1.6 * len(columns) + 0.8, 1.6 * len(x) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(x), len(columns), squeeze=False)

    for j, (name, images) in enumerate(columns.items()):
        grid[0][j].set_title(name)
        for i, image in enumerate(images):
            shown = np.moveaxis(np.clip(image, 0, 1), 0, -1)
            if shown.shape[-1] == 1:  # grey
                shown = np.repeat(shown, 3, axis=-1)
            grid[i][j].imshow(shown)
            grid[i][j].set(xticks=[], yticks=[])

    for i, score in enumerate(scores):
        grid[i][0].set_ylabel(f"ood_score {score:.1f}")
    _save(figure, file, dpi=120)


def save_projection(
    file: str | os.PathLike[str], points: Mapping[str, np.ndarray], share: float, title: str = ""
) -> None:
    """Draw sets of points in a plane.

    Parameters
    ----------
    file : str or Path
        Ends in .png, .svg or .pdf.
    points : mapping of str to (N, 2) float
        By set name, the in-domain set first, which is drawn in grey.
    share : float
        The share of the in-domain variance that the plane shows, in [0, 1].
    title : str, default ""
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(points.items()):
        x, y = values.T
        colour = "lightgrey" if i == 0 else f"C{i - 1}"
        axes.scatter(x, y, s=8, color=colour, alpha=0.7, linewidths=0, label=f"{name} ({len(x):,})")

    axes.set(xlabel="first component", ylabel=f"second component (both: {share:.0%} of the variance)", title=title)
    axes.legend()
    _save(figure, file, dpi=150)


def _save(figure: Figure, file: str | os.PathLike[str], dpi: int) -> None:
    """Write a picture whole or not at all; the ending of the file's name says what kind."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=dpi, format=Path(file).suffix.removeprefix("."))
    write_output(file, stream.getvalue())
