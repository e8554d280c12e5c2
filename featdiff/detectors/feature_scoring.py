"""Rows of features -> scores of a detector: those of its heads, joined with the local score where it has one."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.listing import Listing
from ..data.loaders import is_loader
from ..data.references import ImageRef, list_images
from ..data.splits import Plan
from ..exceptions import OtherEngine
from ..features.conversions import COMPILE
from ..features.engines import AUTO, TORCH, installed
from ..features.extraction import Extraction
from ..features.extractor import FeatureExtractor
from ..features.store import FeatureStore
from ..runtime.progress import Progress
from ..scores.compiled import CompiledHeads
from ..scores.fused import Heads
from ..scores.joint import GLOBAL, NAMES
from ..scores.nearest import NearestNeighbors
from .bank_images import BankImages
from .base import BaseDetector
from .config import FeatureSettings
from .explanation import Explaining
from .kept_images import KeptImages
from .local_fit import FittedLocal, LocalFit
from .local_part import LocalPart, decide
from .reasons import labels

#: Images from which on ``engine="auto"`` builds an engine, which takes some seconds.
WORTH_AN_ENGINE = 1000
# Images on which an engine is compared with PyTorch, and the largest change of a score, in standard deviations.
_COMPARED = 32
_MOST_CHANGE = 1e-4
# In bfloat16 no two engines give the same: how much farther from float32 than PyTorch one may be, on the average.
_MOST_ERROR = 0.1


class FeatureScoring(Explaining, BaseDetector[FeatureSettings]):
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
    engine_ : str
        What ran it when it was fitted: ``torch``, or another engine and its version.
    bank_digests_ : ndarray of shape (n, 16) of uint8
        Contents of the training images that the heads keep.
    bank_images_ : BankImages
        What is kept to show them.
    kept_ : KeptImages
        What an update needs to know of the images it was fitted on.
    """

    extractor_: FeatureExtractor
    heads_: Heads
    local_: LocalPart | None = None
    local_note_: str = ""
    engine_note_: str = ""
    engine_: str
    bank_digests_: np.ndarray
    bank_images_: BankImages
    kept_: KeptImages
    _compiled: CompiledHeads | None = None

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have a score."""
        return self.heads_.layers

    @property
    def parts(self) -> tuple[str, ...]:
        """``global`` and ``local``, where there is a local score."""
        return NAMES if self.local_ else ()

    # ---- engine ----

    def _ready(self, images: object) -> object:
        """References to the images, after the engine was chosen that runs the backbone for them."""
        if not is_loader(images):
            images = list_images(images)
        some = images.first(WORTH_AN_ENGINE) if isinstance(images, Listing) else images
        self._choose_engine(some, isinstance(some, list) and len(some) >= WORTH_AN_ENGINE)
        return images

    def ready_for_many(self) -> None:
        """Choose the engine as for many images, before any of them is there."""
        self._choose_engine(None, True)

    def _choose_engine(self, images: object, many: bool) -> None:
        wanted = self._wanted_engine(many)
        if wanted and not self.engine_note_:
            pixels, digests = self._some(images)
            folder = self.settings.cache_folder / "engines"
            self.engine_note_ = self.extractor_.choose_engine(wanted, pixels, folder)
            if self.is_fitted:
                self._confirm_engine(pixels, digests)

    def _wanted_engine(self, many: bool) -> str:
        """What is to run the backbone, or to be chosen from; empty: what runs it now."""
        if self.settings.engine != AUTO:
            return self.settings.engine
        if self.extractor_.backbone.source == "module":  # its code may do what no trace shows
            return ""
        if self.is_fitted and self.settings.precision == "bf16":
            return self._engine_of_fit()
        return AUTO if many else ""

    def _engine_of_fit(self) -> str:
        """In bfloat16 each engine rounds in its own way, and the calibration images were seen through one of them."""
        name = self.engine_.split()[0]
        if name == TORCH:
            return ""
        if installed(name):
            return name
        if not self.engine_note_:
            self.engine_note_ = f"torch, for {name} is not installed"
            message = f"this model was fitted in bfloat16 by {name}, and PyTorch rounds otherwise: install {name}"
            warnings.warn(OtherEngine(message, argument="engine"), stacklevel=5)
        return ""

    def _confirm_engine(self, pixels: Tensor, digests: Sequence[bytes]) -> None:
        """Go back to PyTorch, should the engine change a score of these images by more than rounding.

        Then no verdict changes either, but for a score that lies on the threshold itself.
        """
        extractor = self.extractor_
        # an image that met itself in the bank would be at distance 0, where rounding decides everything
        own = self.rows_in_bank(digests)
        given, by_torch = (self.layer_scores(each(pixels), own)[0] for each in (extractor, extractor.in_torch()))
        if extractor.precision == "float32":
            fine = np.abs(given - by_torch).max() <= _MOST_CHANGE
        else:
            exact, _ = self.layer_scores(extractor.in_torch(mixed=False)(pixels), own)
            errors = [np.abs(scores - exact).mean() for scores in (given, by_torch)]
            fine = errors[0] <= errors[1] + _MOST_ERROR
        if not fine:
            self.engine_note_ = f"torch, for {extractor.engine} changes scores"
            extractor.choose_engine(TORCH, pixels)

    def _some(self, images: object) -> tuple[Tensor, list[bytes]]:
        """Pixels of a few images (B, C, H, W) of one size, and their digests; made-up ones of a stream."""
        if isinstance(images, list):
            batches, _ = self.batches(images[:_COMPARED])
            for batch in batches:
                if batch.stacks:
                    stack = max(batch.stacks, key=lambda stack: len(stack.positions))
                    return stack.pixels, [batch.loaded[i].digest for i in stack.positions]
        return self.extractor_.probe(), [b""]

    def training_store(self) -> FeatureStore:
        """Where :meth:`fit` left the features of the training images, whatever engine runs the backbone now."""
        return self._store_of(self.extractor_.key(engine=self.engine_))

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
        return self.join_local(self.local_fit([refs], digests, store.folder, progress).fit(plan), scores, plan.groups)

    def local_fit(
        self, lists: Sequence[Sequence[ImageRef]], digests: Sequence[bytes], folder: Path, progress: Progress | None
    ) -> LocalFit:
        """What fits a local score on images of one or more lists, end to end; trainings are kept in the folder.

        ``digests`` say what the images hold.
        """

        def read(numbers: Sequence[int]) -> Iterator[Batch]:
            start = 0
            for refs in lists:  # pictures of two lists may have the same name
                chosen = [refs[i - start] for i in numbers if start <= i < start + len(refs)]
                start += len(refs)
                if chosen:
                    yield from self.batches(chosen)[0]

        return LocalFit(self.extractor_, read, digests, self.settings.seed, folder, progress)

    def join_local(self, fitted: FittedLocal, scores: np.ndarray, groups: int) -> np.ndarray:
        """Take a local score; the joint scores (n,) of the images that calibrate, given their global ones (n,)."""
        self.local_, joined = LocalPart.of(fitted, scores, groups)
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

    def rows_in_bank(self, digests: Sequence[bytes]) -> np.ndarray:
        """Which row of the bank holds each content (B,), -1: none."""
        rows = _row_of_each(self.bank_digests_.tobytes())
        return np.array([rows.get(digest, -1) for digest in digests], dtype=np.int64)

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
        score, layers = self._run_heads(features, own)
        if self.local_ is None:
            return score, layers, {}
        column = self.extractor_.layout.local
        assert column is not None
        joined, parts = self.local_.joint(score, features[:, column.start].to(score.device))
        return joined, layers, dict(zip(NAMES, parts.T, strict=True))

    def _run_heads(self, features: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """The heads; compiled where the backbone is, on a GPU (on a CPU that gains nothing)."""
        compiles = self.extractor_.engine.startswith(COMPILE) and self.heads_.mean.device.type != "cpu"
        if not compiles:
            return self.heads_(features, own)
        if self._compiled is None or self._compiled.heads is not self.heads_:
            self._compiled = CompiledHeads(self.heads_)
        return self._compiled(features.to(self.heads_.mean.device), own)

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

    @property
    def labels(self) -> dict[str, str]:
        """What each of :meth:`contributions` looks at, by name, in plain words."""
        return labels(self.heads_)

    def contributions(self, features: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What the global score of rows is made of; see :meth:`featdiff.scores.fused.Heads.contributions`."""
        return self.heads_.contributions(features)

    def nearest(self, features: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
        """Distances (B, count) to the nearest rows of the bank, and which these are; None where none are looked up."""
        search = next((score for score in self.heads_.scores.values() if isinstance(score, NearestNeighbors)), None)
        return None if search is None else search.nearest(features, count)

    def all_heads(self, features: Tensor) -> dict[str, np.ndarray]:
        """Rows of features (B, D) -> scores (B,) by name: ``featdiff`` (ood_score), other heads, ``layer_<name>``."""
        self.check_fitted()
        score, layers, parts = self.measured(features)
        scores = {"featdiff": score} | parts | self.heads_.all_scores(features)
        scores.pop(self.settings.head, None)
        scores |= {f"layer_{name}": layers[:, i] for i, name in enumerate(self.heads_.layers)}
        return {name: values.double().cpu().numpy() for name, values in scores.items()}


@functools.lru_cache(maxsize=4)
def _row_of_each(bank: bytes) -> dict[bytes, int]:
    """Digests of 16 bytes, end to end -> the row of each; kept, for it is asked for with every batch."""
    return {bank[start : start + 16]: start // 16 for start in range(0, len(bank), 16)}
