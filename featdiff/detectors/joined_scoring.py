"""Rows of several encoders' features -> one score: each encoder's detector scores its own, and they are joined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..features.joined import JoinedExtractor
from ..verdicts.calibration import Calibration
from .bank_images import BankImages
from .base import BaseDetector
from .explanation import Explaining
from .feature import Detector
from .joined_settings import JoinedSettings
from .joining import JOINS, Z_SUM, join


class JoinedScoring(Explaining, BaseDetector[JoinedSettings]):
    """What :class:`featdiff.JoinedDetector` does with rows of features.

    Attributes
    ----------
    extractor_ : JoinedExtractor
        Its rows are those of all encoders, side by side.
    members_ : list of Detector
        The detector of each encoder, fitted and calibrated.
    """

    extractor_: JoinedExtractor
    members_: list[Detector]
    # Mean and standard deviation of the joined score over the calibration images.
    _location: float
    _scale: float

    @property
    def encoders(self) -> list[str]:
        """A name for each encoder, no two alike."""
        names: list[str] = []
        for member in self.members_:
            name = short = member.name.partition(".")[0]
            count = 1
            while name in names:
                count += 1
                name = f"{short}-{count}"
            names.append(name)
        return names

    @property
    def name(self) -> str:
        """The backbones' names and tags."""
        return " + ".join(member.name for member in self.members_)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have a score, ``encoder/layer``."""
        return [f"{name}/{layer}" for name, member in self._named() for layer in member.layers]

    @property
    def parts(self) -> tuple[str, ...]:
        """The encoders."""
        return tuple(self.encoders)

    def _named(self) -> list[tuple[str, Detector]]:
        return list(zip(self.encoders, self.members_, strict=True))

    @property
    def _calibrations(self) -> list[Calibration]:
        return [member.calibration_ for member in self.members_]

    def _scaled(self, joined: np.ndarray) -> np.ndarray:
        return (joined - self._location) / self._scale

    # ---- score ----

    def rows_in_bank(self, digests: Sequence[bytes]) -> np.ndarray:
        """Which row of the bank holds each content (B,), -1: none; it is the same for all encoders."""
        return self.members_[0].rows_in_bank(digests)

    def _measured(
        self, features: Tensor, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        self.check_fitted()
        rows = self.extractor_.split(features)
        measured = [member.layer_scores(part, own) for member, part in zip(self.members_, rows, strict=True)]
        z = np.stack([score for score, _ in measured], axis=1)
        p_values = [calibration.p_values(z[:, i]) for i, calibration in enumerate(self._calibrations)]
        score = self._scaled(join(self.settings.join, z, self._calibrations))
        layers = np.concatenate([layers for _, layers in measured], axis=1)
        return score, layers, dict(zip(self.encoders, p_values, strict=True))

    def all_heads(self, features: Tensor) -> dict[str, np.ndarray]:
        """Rows of features (B, D) -> scores (B,) by name.

        ``featdiff`` is the ood_score, ``z-sum`` or ``min-p`` the other way to join (unscaled), and then come, for each
        encoder, its own score and its other heads, ``encoder/head``.
        """
        self.check_fitted()
        heads: dict[str, np.ndarray] = {}
        z = []
        for (name, member), part in zip(self._named(), self.extractor_.split(features), strict=True):
            own = member.all_heads(part)
            z.append(own.pop("featdiff"))
            heads[name] = z[-1]
            for head, values in own.items():
                heads[_of_encoder(name, head)] = values

        columns = np.stack(z, axis=1)
        joined = {how: join(how, columns, self._calibrations) for how in JOINS}
        return {"featdiff": self._scaled(joined.pop(self.settings.join)), **joined, **heads}

    # ---- explain ----

    @property
    def labels(self) -> dict[str, str]:
        """What each of :meth:`contributions` looks at, by name, in plain words."""
        return {
            _of_encoder(name, head): label for name, member in self._named() for head, label in member.labels.items()
        }

    def contributions(self, features: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What the own score of rows is made of, for each encoder as :meth:`featdiff.Detector.contributions` gives it.

        Parameters
        ----------
        features : Tensor of shape (B, D)

        Returns
        -------
        dict of str to (Tensor of shape (B,), Tensor of shape (B,))
            Named ``layer_<encoder>/<layer>`` and ``<encoder>/<head>``: a score, and its part of the own score. The
            parts add up to that score. Empty where that is no sum (``join="min-p"``, or ``head`` is a single score).
        """
        if self.settings.join != Z_SUM:
            return {}
        found = {}
        for (name, member), part in zip(self._named(), self.extractor_.split(features), strict=True):
            for head, values in member.contributions(part).items():
                found[_of_encoder(name, head)] = values

        factor = 1 / (len(self.members_) ** 0.5 * self._scale)
        shift = -self._location / (self._scale * max(len(found), 1))
        return {name: (score, amount.double() * factor + shift) for name, (score, amount) in found.items()}

    def nearest(self, features: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
        """The nearest rows of the bank as the first encoder sees them; see :meth:`featdiff.Detector.nearest`."""
        return self.members_[0].nearest(self.extractor_.split(features)[0], count)

    @property
    def bank_images_(self) -> BankImages:
        """What is kept of the images of the bank."""
        return self.members_[0].bank_images_

    def heat_scale(self, fpr: float) -> None:
        """There is no local score, so no heat."""


def _of_encoder(encoder: str, head: str) -> str:
    """The name of an encoder's head or of what a layer says (``layer_<name>``), among those of all encoders."""
    if head.startswith("layer_"):
        return f"layer_{encoder}/{head.removeprefix('layer_')}"
    return f"{encoder}/{head}"
