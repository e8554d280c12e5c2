"""``--features FILE`` of ``train`` and ``score``: the same on vectors that are already there, without images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .progress import Bars, list_unreadable, say

if TYPE_CHECKING:
    import numpy as np

    from featdiff import FeatureDiffusion, Scores
    from featdiff.data.vector_files import Arrays

# Options that ask for something to do with images.
_OF_IMAGES = {
    **{"backbone": "--backbone", "weights": "--weights", "mode": "--mode", "pretrained": "--pretrained"},
    **{"distances": "--distances", "config": "--config", "no_pretrained": "--no-pretrained", "figure": "--figure"},
    **{"cache": "--cache", "max_pixels": "--max-pixels", "workers": "--workers", "image_batch": "--batch-size"},
    "device": "--device",
}
_AT_ONCE = 8192

features_option = click.option(
    "--features",
    metavar="FILE",
    help="Vectors in place of images: .npy, .safetensors or .parquet, one row each.",
)


def train_on_vectors(file: str, images: Sequence[str], output: Path, quiet: bool, options: dict[str, Any]) -> int:
    """Learn what is normal from the rows of a file, and save the model."""
    import numpy as np

    from featdiff import FeatureDiffusion
    from featdiff.data.vector_files import open_arrays
    from featdiff.exceptions import TooFewRows

    _refuse_images(images, options)
    given = {"fpr": options["fpr"], "random_state": options["seed"]}
    given = {name: value for name, value in given.items() if value is not None}
    arrays = open_arrays(file)
    layers = _parse_layers(options["layers"]) if options["layers"] else arrays.layers
    detector = FeatureDiffusion(layers=layers, **given)
    bars = Bars(quiet)
    try:
        with bars, warnings.catch_warnings():
            warnings.simplefilter("error", TooFewRows)
            rows, unreadable = _good_rows(arrays)
            detector.fit(rows, progress=bars)
    except KeyboardInterrupt:
        raise Stopped("interrupted; no model is written") from None
    if arrays.columns:
        detector.feature_names_in_ = np.array(arrays.columns, dtype=object)
    detector.save_pretrained(output)
    _summary(detector, arrays, len(unreadable), output, bars, quiet)
    list_unreadable(unreadable, quiet)
    return EXIT_UNREADABLE if unreadable else 0


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


def score_vectors(detector: FeatureDiffusion, arrays: Arrays, fpr: float | None, progress: Bars) -> Iterator[Scores]:
    """The rows of a file, part by part, in their order."""
    for start in range(0, len(arrays), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(arrays))
        part = detector.verdicts(arrays.rows(start, stop), [arrays.name(i) for i in range(start, stop)], fpr)
        progress("scoring", stop, len(arrays))
        yield part


def _refuse_images(images: Sequence[str], options: dict[str, Any]) -> None:
    from featdiff.exceptions import UsageError

    given = [option for name, option in _OF_IMAGES.items() if options.get(name)]
    if found := [*(["IMAGES"] if images else []), *given]:
        raise UsageError(f"{', '.join(found)} cannot go with --features, which needs no images: give one or the other")


def _parse_layers(text: str) -> list[slice]:
    """``0:192,192:320`` -> slices; which columns there are is checked later."""
    from featdiff.exceptions import UsageError

    layers = []
    for part in text.split(","):
        start, colon, stop = part.strip().partition(":")
        if not colon or not all(end == "" or (end.isascii() and end.isdigit()) for end in (start, stop)):
            raise UsageError(f"--layers {text}: with --features, layers are columns, like 0:192,192:320")
        layers.append(slice(int(start) if start else None, int(stop) if stop else None))
    return layers


def _good_rows(arrays: Arrays) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Rows that are numbers throughout, and the names of the others with a reason each."""
    import numpy as np

    from featdiff.detectors.estimator import NOT_FINITE
    from featdiff.exceptions import UsageError

    starts = range(0, len(arrays), _AT_ONCE)
    good = np.concatenate([np.isfinite(arrays.rows(i, min(i + _AT_ONCE, len(arrays)))).all(axis=1) for i in starts])
    if not good.any():
        raise UsageError(f"none of the rows of {arrays.file} can be used; the first: {arrays.name(0)}: {NOT_FINITE}")
    rows = arrays.rows(0, len(arrays))
    return (rows if good.all() else rows[good]), [(arrays.name(int(i)), NOT_FINITE) for i in np.flatnonzero(~good)]


def _check_same(detector: FeatureDiffusion, arrays: Arrays, model: str) -> None:
    """Whether columns mean what they meant at training, as far as the file tells."""
    from featdiff.exceptions import UsageError

    if arrays.width != detector.n_features_in_:
        raise UsageError(
            f"{arrays.file} has {arrays.width:,} columns, and the model {model} was trained on "
            f"{detector.n_features_in_:,}: give vectors of the same network, or train again"
        )
    known = [str(name) for name in getattr(detector, "feature_names_in_", ())]
    if arrays.columns and known and list(arrays.columns) != known:
        seen, expected = next((a, b) for a, b in zip(arrays.columns, known, strict=True) if a != b)
        raise UsageError(f"{arrays.file} has a column {seen!r} where the model {model} was trained on {expected!r}")
    if arrays.layers and isinstance(detector.layers, dict) and arrays.layers != detector.layers:
        told = [", ".join(f"{n} ({s.stop - s.start})" for n, s in x.items()) for x in (arrays.layers, detector.layers)]
        raise UsageError(f"{arrays.file} has the layers {told[0]}, and the model {model} was trained on {told[1]}")


def _summary(
    detector: FeatureDiffusion, arrays: Arrays, unreadable: int, output: Path, bars: Bars, quiet: bool
) -> None:
    calibration = detector.calibration_
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    duplicates = f", {detector.n_duplicates_:,} duplicates left out" if detector.n_duplicates_ else ""
    bad = f", {unreadable:,} unreadable" if unreadable else ""
    say(f"{detector.n_rows_:,} rows of {arrays.width:,} numbers{duplicates}{bad}", quiet)
    say(f"trained {bars.seconds['training']:.0f} s", quiet)
    least = f"--fpr from {calibration.smallest_fpr:.2g} up"
    say(f"calibrated on {len(calibration):,} held-out rows: {least}", quiet)
    say(f"model: {output} ({size:.1f} MB). Next: featdiff score --features FILE -m {output}", quiet)
