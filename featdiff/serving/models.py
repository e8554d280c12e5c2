"""A model by its name, whatever kind it is, as a function from images to rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..data.image_refs import ImageRef
from ..exported import ExportedDetector
from ..exported.layout import is_exported
from ..verdicts.results import Scores
from .cluster import Score

if TYPE_CHECKING:
    from ..detectors import ImageDetector


def load_model(name: str, arguments: Mapping[str, Any]) -> ImageDetector | ExportedDetector:
    """A saved detector, the guard's of a hardened student, or an exported one.

    Parameters
    ----------
    name : str
        A folder, or a repository on the hub.
    arguments : mapping
        How it runs: ``device``, ``image_batch``, ``workers`` ..., as far as its kind knows them.

    Raises
    ------
    FeatdiffError
        As for :func:`featdiff.load_detector`.
    """
    if is_exported(name):
        return ExportedDetector(name, **arguments)

    from ..detectors import load_detector
    from ..hardening.layout import find_model, is_hardened

    folder = find_model(name)
    if is_hardened(folder):
        from ..hardening.harden import load_hardened

        return load_hardened(folder, **arguments)[1].detector
    return load_detector(folder, **arguments)


def scoring(detector: ImageDetector | ExportedDetector, fpr: float, exclude_known: bool = False) -> Score:
    """What :meth:`featdiff.serving.cluster.Run.score` asks for the rows of a block.

    Parameters
    ----------
    detector : Detector, PixelDetector or ExportedDetector
    fpr : float
        False-alarm rate.
    exclude_known : bool, default False
        Training images are not compared with themselves; exported models do not know them.
    """

    def score(refs: list[ImageRef]) -> Iterator[Scores]:
        if isinstance(detector, ExportedDetector):
            return detector.iter_scores(refs, fpr)
        return detector.iter_scores(refs, fpr, None, exclude_known)

    return score
