"""``--features FILE`` of ``train``, ``score`` and ``recalibrate``: the same on precomputed vectors, without images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .progress import Bars, calibrated, list_unreadable
from .speech import say, without_duplicates

if TYPE_CHECKING:
    import numpy as np

    from featdiff import FeatureDiffusion, Scores
    from featdiff.data.groups import Groups
    from featdiff.data.vector_files import Arrays
    from featdiff.detectors.recalibration import Recalibration

# Options that make sense only for images.
_OF_IMAGES = {
    "backbone": "--backbone",
    "weights": "--weights",
    "view": "--view",
    "size": "--size",
    "mode": "--mode",
    "pretrained": "--pretrained",
    "distances": "--distances",
    "config": "--config",
    "no_pretrained": "--no-pretrained",
    "no_paths": "--no-paths",
    "thumbnails": "--thumbnails",
    "figure": "--figure",
    "exclude_known": "--exclude-known",
    "cache": "--cache",
    "max_pixels": "--max-pixels",
    "max_bytes": "--max-bytes",
    "workers": "--workers",
    "image_batch": "--batch-size",
    "device": "--device",
}
_AT_ONCE = 8192

features_option = click.option(
    "--features",
    metavar="FILE",
    help="Vectors in place of images: .npy, .safetensors or .parquet, one row each.",
)


def train_on_vectors(
    file: str, images: Sequence[str], groups: str | None, output: Path, quiet: bool, options: dict[str, Any]
) -> int:
    """Learn what is normal from the rows of a file, and save the model."""
    import numpy as np

    from featdiff import FeatureDiffusion
    from featdiff.data.vector_files import open_arrays
    from featdiff.exceptions import TooFewRows
    from featdiff.runtime.run_log import logged_to

    _refuse_images(images, options)
    arrays = open_arrays(file)
    arguments: dict[str, Any] = {"layers": arrays.layers}
    if options["layers"]:
        arguments["layers"] = _parse_layers(options["layers"])
    if options["fpr"] is not None:
        arguments["fpr"] = options["fpr"]
    if options["seed"] is not None:
        arguments["random_state"] = options["seed"]
    detector = FeatureDiffusion(**arguments)

    bars = Bars(quiet)
    try:
        with bars, logged_to(options["log_to"], detector.get_params()), warnings.catch_warnings():
            warnings.simplefilter("error", TooFewRows)
            rows, names, unreadable = _good_rows(arrays)
            detector.fit(rows, progress=bars, groups=_row_groups(groups, names))
    except KeyboardInterrupt:
        raise Stopped("interrupted; no model is written") from None

    if arrays.columns:
        detector.feature_names_in_ = np.array(arrays.columns, dtype=object)
    detector.save_pretrained(output)
    _summary(detector, arrays, len(unreadable), output, bars, quiet)
    list_unreadable(unreadable, quiet)
    return EXIT_UNREADABLE if unreadable else 0


def recalibrate_on_vectors(
    file: str, images: Sequence[str], model: str, fpr: float | None, groups: str | None, options: dict[str, Any]
) -> tuple[Recalibration[FeatureDiffusion], list[tuple[str, str]]]:
    """Calibrate a saved model of vectors with the rows of a file; also the rows that cannot be used, and why."""
    from featdiff.detectors.row_recalibration import recalibrate_rows

    detector, arrays = open_vectors(file, images, model, options)
    rows, names, unreadable = _good_rows(arrays)
    with warnings.catch_warnings():  # scikit-learn asks for names of columns, which are compared already
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        return recalibrate_rows(detector, rows, fpr=fpr, groups=_row_groups(groups, names)), unreadable


def open_vectors(
    file: str, images: Sequence[str], model: str, options: dict[str, Any]
) -> tuple[FeatureDiffusion, Arrays]:
    """A saved model of vectors, and a file that it can score."""
    from featdiff import FeatureDiffusion
    from featdiff.data.vector_files import open_arrays

    _refuse_images(images, options)
    detector = FeatureDiffusion.from_pretrained(model)
    arrays = open_arrays(file)
    _check_same(detector, arrays, model)
    return detector, arrays


def score_vectors(
    detector: FeatureDiffusion, arrays: Arrays, fpr: float | None, progress: Bars, first: int = 0
) -> Iterator[Scores]:
    """The rows of a file from the ``first`` on, part by part, in their order."""
    for start in range(first, len(arrays), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(arrays))
        names = [arrays.name(i) for i in range(start, stop)]
        part = detector.verdicts(arrays.rows(start, stop), names, fpr)
        progress("scoring", stop, len(arrays))
        yield part


def _refuse_images(images: Sequence[str], options: dict[str, Any]) -> None:
    from featdiff.exceptions import UsageError

    refused = ["IMAGES"] if images else []
    for name, option in _OF_IMAGES.items():
        if options.get(name):
            refused.append(option)
    if refused:
        raise UsageError(
            f"{', '.join(refused)} cannot go with --features, which needs no images: give one or the other"
        )


def _parse_layers(text: str) -> list[slice]:
    """``0:192,192:320`` -> slices; which columns there are is checked later."""
    from featdiff.exceptions import UsageError

    layers = []
    for part in text.split(","):
        start, colon, stop = part.strip().partition(":")
        ends_are_whole = _is_whole_or_empty(start) and _is_whole_or_empty(stop)
        if not colon or not ends_are_whole:
            raise UsageError(f"--layers {text}: with --features, layers are columns, like 0:192,192:320")
        layers.append(slice(int(start) if start else None, int(stop) if stop else None))
    return layers


def _is_whole_or_empty(text: str) -> bool:
    return text == "" or (text.isascii() and text.isdigit())


def _row_groups(groups: str | None, names: list[str]) -> Groups | None:
    """Groups as the estimator takes them: a word, or a label for each row."""
    from featdiff.data.groups import AUTO, NONE, label_images

    return groups if groups in (None, AUTO, NONE) else label_images(groups, names)


def _good_rows(arrays: Arrays) -> tuple[np.ndarray, list[str], list[tuple[str, str]]]:
    """Finite rows and their names, and the names of the others with a reason each."""
    import numpy as np

    from featdiff.detectors.estimator import NOT_FINITE
    from featdiff.exceptions import UsageError

    good = np.empty(len(arrays), dtype=bool)
    for start in range(0, len(arrays), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(arrays))
        good[start:stop] = np.isfinite(arrays.rows(start, stop)).all(axis=1)
    if not good.any():
        raise UsageError(f"none of the rows of {arrays.file} can be used; the first: {arrays.name(0)}: {NOT_FINITE}")

    rows = arrays.rows(0, len(arrays))
    names = [arrays.name(int(i)) for i in np.flatnonzero(good)]
    if good.all():
        return rows, names, []
    unreadable = [(arrays.name(int(i)), NOT_FINITE) for i in np.flatnonzero(~good)]
    return rows[good], names, unreadable


def _check_same(detector: FeatureDiffusion, arrays: Arrays, model: str) -> None:
    """Refuse columns or layers other than those of training, as far as the file names them (``UsageError``)."""
    from featdiff.exceptions import UsageError

    if arrays.width != detector.n_features_in_:
        raise UsageError(
            f"{arrays.file} has {arrays.width:,} columns, and the model {model} was trained on "
            f"{detector.n_features_in_:,}: give vectors of the same network, or train again"
        )

    trained_names = [str(name) for name in getattr(detector, "feature_names_in_", ())]
    if arrays.columns and trained_names:
        for name, expected in zip(arrays.columns, trained_names, strict=True):
            if name != expected:
                raise UsageError(
                    f"{arrays.file} has a column {name!r} where the model {model} was trained on {expected!r}"
                )

    if arrays.layers and isinstance(detector.layers, dict) and arrays.layers != detector.layers:
        raise UsageError(
            f"{arrays.file} has the layers {_widths(arrays.layers)}, and the model {model} was trained on "
            f"{_widths(detector.layers)}"
        )


def _widths(layers: dict[str, slice]) -> str:
    """Names and widths of layers, like ``early (8), late (16)``."""
    return ", ".join(f"{name} ({part.stop - part.start})" for name, part in layers.items())


def _summary(
    detector: FeatureDiffusion, arrays: Arrays, unreadable: int, output: Path, bars: Bars, quiet: bool
) -> None:
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    duplicates = without_duplicates(detector.n_duplicates_)
    bad = f", {unreadable:,} unreadable" if unreadable else ""

    say(f"{detector.n_rows_:,} rows of {arrays.width:,} numbers{duplicates}{bad}", quiet)
    say(f"trained {bars.seconds['training']:.0f} s", quiet)
    say(calibrated(detector.calibration_, detector.grouping_, "rows"), quiet)
    say(f"model: {output} ({size:.1f} MB). Next: featdiff score --features FILE -m {output}", quiet)
