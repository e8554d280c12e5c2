"""``featdiff explain``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .options import load_model, model_option, runtime_options, weights_option
from .progress import Bars
from .speech import say, show

if TYPE_CHECKING:
    from featdiff.data.references import ImageRef
    from featdiff.detectors import Detector, JoinedDetector
    from featdiff.verdicts.explanation import Explanation

#: Where explanations are written unless ``-o`` says otherwise.
FOLDER = "explanations"
# Letters of an image's name that are repeated in the names of its files.
_LONGEST = 80


@click.command("explain")
@click.argument("images", nargs=-1, required=True)
@model_option
@weights_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=FOLDER,
    show_default=True,
    help="Folder for a PNG and a JSON file of each image.",
)
@click.option("--fpr", type=float, help="False-alarm rate [the one given at training].")
@click.option(
    "--nearest", type=click.IntRange(1), default=5, show_default=True, help="How many similar normal images are shown."
)
@runtime_options
def command(
    images: tuple[str, ...],
    model: str,
    output: Path,
    fpr: float | None,
    nearest: int,
    quiet: bool,
    **options: Any,
) -> int:
    """Show why each of IMAGES is judged as it is: files, folders, globs, zip or tar archives, or - for paths on stdin.

    For NAME.png the files NAME-explained.png and NAME-explained.json are written: the original, a heat map if the model
    has a local score, reasons in words, what the score is made of, and the most similar normal images. Files of an
    earlier run are replaced, an image never is.

    \b
    Example: featdiff explain odd.png -m my-model -o why
    """
    from featdiff.data.references import list_images
    from featdiff.detectors import PixelDetector
    from featdiff.exceptions import UsageError
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, and explanations need a folder: choose another one", argument="output")
    detector = load_model(model, options).detector
    if isinstance(detector, PixelDetector):
        raise UsageError(
            f"the model at {model} is of the pixel mode, whose reasons are its inpaintings: "
            "featdiff score --figure shows them"
        )

    refs = list_images(list(images))
    told = _Told()
    try:
        with Bars(quiet) as bars:
            names = FileNames(output, refs)
            for explanation in detector.iter_explanations(refs, fpr, nearest, bars):
                _write(explanation, output, names, told)
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; {told.count:,} explanations are in {output}") from None
    told.summary(detector, output, quiet)
    return EXIT_UNREADABLE if told.failed else 0


def _write(explanation: Explanation, output: Path, names: FileNames, told: _Told) -> None:
    """Both files of an image, and what they say in short on standard output."""
    from featdiff.report.explanations import save_explanation

    files = save_explanation(output, names.of(explanation.path), explanation)
    told.add(explanation)
    if explanation.status != "ok":
        show(f"{explanation.status}: {explanation.path}: {explanation.reason}")
        return
    verdict = "OOD" if explanation.is_ood else "normal"
    show(f"{verdict}, p = {explanation.p_value:.3g}: {explanation.path}")
    for reason in explanation.reasons:
        show(f"  {reason}")
    show(f"  -> {files[-1]}")


class FileNames:
    """A name for the files of each image: none twice, and none that would replace one of the images.

    Letters count as equal to their capitals, as some file systems have it.

    Parameters
    ----------
    folder : Path
        Where the files are written.
    refs : iterable of ImageRef
        The images.
    """

    def __init__(self, folder: Path, refs: Iterable[ImageRef]) -> None:
        self._folder = folder
        self._images = {os.path.realpath(file).casefold() for ref in refs if (file := getattr(ref, "file", None))}
        self._taken: set[str] = set()

    def of(self, path: str) -> str:
        """The name, without an ending."""
        stem = re.split(r"[/\\]", path)[-1].rpartition(".")[0] or re.split(r"[/\\]", path)[-1]
        stem = re.sub(r"[^\w-]+", "_", stem).strip("_")[:_LONGEST] or "image"
        number = 1
        name = f"{stem}-explained"
        while not self._is_free(name):
            number += 1
            name = f"{stem}-explained-{number}"
        self._taken.add(name.casefold())
        return name

    def _is_free(self, name: str) -> bool:
        file = os.path.realpath(self._folder / f"{name}.png")
        return name.casefold() not in self._taken and file.casefold() not in self._images


class _Told:
    """Counts what was explained, for the summary."""

    def __init__(self) -> None:
        self.count = 0
        self.flagged = 0
        self.failed = 0
        self.without_nearest = 0
        self.without_picture = 0
        self.without_heat = 0

    def add(self, explanation: Explanation) -> None:
        self.count += 1
        if explanation.status != "ok":
            self.failed += 1
            return
        self.flagged += explanation.is_ood
        self.without_nearest += not explanation.nearest
        self.without_heat += explanation.heat is None
        self.without_picture += any(other.thumbnail is None for other in explanation.nearest)

    def summary(self, detector: Detector | JoinedDetector, output: Path, quiet: bool) -> None:
        """What was written, and what the model could not show."""
        bad = f", {self.failed:,} without a score" if self.failed else ""
        images = "image" if self.count == 1 else "images"
        say(f"{self.count:,} {images} explained in {output}: {self.flagged:,} OOD{bad}", quiet)
        if self.without_nearest:
            say("no similar images: this model compares with none (it was trained with neighbors = 0)", quiet)
        if self.without_picture and not detector.settings.keep_paths:
            say("similar images have numbers only: this model was trained with --no-paths", quiet)
        elif self.without_picture:
            say("some similar images are not where they were at training, and this model keeps no picture of them: "
                "train with --thumbnails", quiet)  # fmt: skip
