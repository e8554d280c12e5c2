"""Rows of features -> scores of a detector: those of its heads, joined with the local score where it has one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..data.batches import is_loader
from ..data.references import list_images
from ..data.splits import Plan
from ..features.engines import AUTO, TORCH
from ..features.extraction import Extraction
from ..features.extractor import FeatureExtractor
from ..features.store import FeatureStore
from ..runtime.progress import Progress
from ..scores.fused import Heads
from ..scores.joint import GLOBAL, NAMES
from ..verdicts.results import Scores
from .base import BaseDetector
from .config import FeatureSettings
from .local_fit import LocalFit
from .local_part import LocalPart, decide

#: Images from which on ``engine="auto"`` builds an engine, which takes some seconds.
WORTH_AN_ENGINE = 1000
# Images on which an engine is compared with PyTorch, and the largest change of a score, in standard deviations.
_COMPARED = 32
_MOST_CHANGE = 1e-4


class FeatureScoring(BaseDetector[FeatureSettings]):
    """What :class:`featdiff.Detector` does with rows of features.

    Attributes
    ----------
    extractor_ : FeatureExtractor
        Its rows end with the local score, if there is one.
    heads_ : Heads
        The global scores.
    local_ : LocalPart, optional
        The local score, and how it is joined with the global one.
    local_note_ : str
        Whether there is a local score, and why; known where the detector was fitted.
    engine_note_ : str
        What runs the backbone, and why; empty before anything ran.
    """

    extractor_: FeatureExtractor
    heads_: Heads
    local_: LocalPart | None = None
    local_note_: str = ""
    engine_note_: str = ""

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have a score."""
        return self.heads_.layers

    @property
    def parts(self) -> tuple[str, ...]:
        """``global`` and ``local``, where there is a local score."""
        return NAMES if self.local_ else ()

    # ---- engine ----

    def _choose_engine(self, images: object) -> None:
        """Let the engine that the settings name run the backbone, compared with PyTorch on some of these images."""
        wanted = self.settings.engine
        extractor = self.extractor_
        if wanted == AUTO:
            own = extractor.backbone.source == "module"  # its code may do what no trace shows
            few = not isinstance(images, list) or len(images) < WORTH_AN_ENGINE
            if own or few:
                return
        if not self.engine_note_:
            self.engine_note_ = extractor.choose_engine(wanted, self._some(images))

    def _confirm_engine(self, images: object) -> None:
        """Go back to PyTorch, should the engine change a score by more than rounding.

        Then no verdict changes either, but for a score that lies on the threshold itself.
        """
        extractor = self.extractor_
        if extractor.engine == TORCH:
            return
        pixels = self._some(images)
        given, _ = self.layer_scores(extractor(pixels))
        expected, _ = self.layer_scores(extractor.in_torch()(pixels))
        if not np.abs(given - expected).max() <= _MOST_CHANGE:
            self.engine_note_ = f"torch, for {extractor.engine} changes scores"
            extractor.choose_engine(TORCH, pixels)

    def _some(self, images: object) -> Tensor:
        """Pixels of a few images (B, C, H, W) of one size; made-up ones of a stream."""
        if isinstance(images, list):
            batches, _ = self.batches(images[:_COMPARED])
            for batch in batches:
                if batch.stacks:
                    return max((stack.pixels for stack in batch.stacks), key=len)
        return self.extractor_.probe()

    def _extract(self, images: object, progress: Progress | None) -> tuple[Extraction, FeatureStore]:
        if not is_loader(images):
            images = list_images(images)
        self._choose_engine(images)
        return super()._extract(images, progress)

    # ---- fit ----

    def _fit_local(
        self,
        images: object,
        extraction: Extraction,
        digests: list[bytes],
        store: FeatureStore,
        plan: Plan,
        scores: np.ndarray,
        progress: Progress | None,
    ) -> np.ndarray:
        """Fit the local score where there is to be one; the scores of the calibration images, joined with it."""
        self.local_ = None
        features = store.table(digests)
        wanted, self.local_note_ = decide(self.settings, isinstance(images, list), features, self.extractor_)
        if not wanted:
            return scores

        assert isinstance(images, list)
        refs = [images[position] for position in extraction.first_positions(digests)]
        fit = LocalFit(
            self.extractor_,
            lambda numbers: self.batches([refs[i] for i in numbers])[0],
            digests,
            self.settings.seed,
            store.folder,
            progress,
        )
        self.local_, joined = LocalPart.of(fit.fit(plan), scores, plan.groups)
        self.local_.attach(self.extractor_)
        return joined

    def without_local(self) -> Self:
        """The same detector judged by its global score alone, which pooled features are enough for; itself if it has
        no local score."""
        if self.local_ is None:
            return self
        other = copy.copy(self)
        other.local_ = None
        other.extractor_ = self.extractor_.detached()
        other.calibration_ = self.local_.calibrations[GLOBAL]
        return other

    # ---- score ----

    def iter_scores(
        self,
        images: object,
        fpr: float | None = None,
        progress: Progress | bool | None = None,
        exclude_known: bool = False,
    ) -> Iterator[Scores]:
        """Score images part by part, in their order; see :meth:`featdiff.detectors.base.BaseDetector.iter_scores`."""
        self.check_fitted()
        if not is_loader(images):
            images = list_images(images)
        before = self.extractor_.engine
        self._choose_engine(images)
        if self.extractor_.engine != before:
            self._confirm_engine(images)
        return super().iter_scores(images, fpr, progress, exclude_known)

    def layer_scores(self, features: Tensor, own: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows of features -> scores.

        Parameters
        ----------
        features : Tensor of shape (B, D)
            Of ``extractor_``, on any device.
        own : ndarray of shape (B,) of int, optional
            The row of the bank that each is not compared with; -1: none.

        Returns
        -------
        ood_score : ndarray of shape (B,)
        layer_scores : ndarray of shape (B, L)
            Both higher = more OOD, about 0 +- 1 for in-domain images.
        """
        score, layers, _ = self._measured(features, own)
        return score, layers

    def _measured(
        self, features: Tensor, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        self.check_fitted()
        score, layers, parts = self.measured(features, None if own is None else torch.from_numpy(own))
        numbers = {name: values.double().cpu().numpy() for name, values in parts.items()}
        p_values = self.local_.p_values(numbers) if self.local_ else {}
        return score.double().cpu().numpy(), layers.double().cpu().numpy(), p_values

    def measured(self, features: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same in tensors, on the device of the heads.

        Parameters
        ----------
        features : Tensor of shape (B, D)
        own : Tensor of shape (B,) of int, optional

        Returns
        -------
        ood_score : Tensor of shape (B,)
        layer_scores : Tensor of shape (B, L)
        parts : dict of str to Tensor of shape (B,)
            ``global`` and ``local``, standardised, which the ``ood_score`` joins; empty without a local score.
        """
        score, layers = self.heads_(features, own)
        if self.local_ is None:
            return score, layers, {}
        column = self.extractor_.layout.local
        assert column is not None
        joined, parts = self.local_.joint(score, features[:, column.start].to(score.device))
        return joined, layers, dict(zip(NAMES, parts.T, strict=True))

    def heat_scale(self, fpr: float) -> tuple[float, float] | None:
        """What the heat of :meth:`featdiff.features.extractor.FeatureExtractor.with_heat` means.

        Parameters
        ----------
        fpr : float
            False-alarm rate.

        Returns
        -------
        threshold, top : float
            Above which a place is strange, as only ``fpr`` of the normal images have one; where a colour scale ends.
            None in place of both for a detector without a local score.
        """
        return self.local_.scale_of_heat(fpr) if self.local_ else None

    def all_heads(self, features: Tensor) -> dict[str, np.ndarray]:
        """Rows of features (B, D) -> scores (B,) by name: ``featdiff`` (ood_score), other heads, ``layer_<name>``."""
        self.check_fitted()
        score, layers, parts = self.measured(features)
        scores = {"featdiff": score} | parts | self.heads_.all_scores(features)
        scores.pop(self.settings.head, None)
        scores |= {f"layer_{name}": layers[:, i] for i, name in enumerate(self.heads_.layers)}
        return {name: values.double().cpu().numpy() for name, values in scores.items()}
