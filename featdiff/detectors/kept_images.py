"""What a model keeps of the images it was fitted on, so that others can be added to it later.

An update must know three things of the older images. Who was on which side of the split, so that nothing that has
trained ever calibrates: the digests of all images say so, 16 bytes each. Which of them belong together: a number each.
And features to train on and to calibrate with again. These lie in the cache; for the day that it is gone, the model
keeps those of some images in 8 bits, about 1 MB of them. With a local score it keeps none: then the images themselves
are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.splits import Split
from ..exceptions import ModelError
from ..features.digests import DIGEST_BYTES
from ..features.layout import FeatureLayout
from ..features.store import Features

#: Sides of a split, in the order in which images are kept.
SIDES = TRAINING, VALIDATION, CALIBRATION = range(3)
#: Bytes of the features that a model keeps.
MOST_BYTES = 1_100_000
# Of these rows, shares for those that calibrate (which need the most: they decide the threshold) and that validate.
_CALIBRATION_SHARE, _VALIDATION_SHARE = 0.5, 0.1
_LEVELS = 127
_SMALLEST = torch.finfo(torch.float32).tiny
# Tensors of a saved model.
_DIGESTS, _COUNTS, _GROUPS = "kept_digests", "kept_counts", "kept_groups"
_CHOSEN, _CODES, _SCALES = "kept_chosen", "kept_codes", "kept_scales"


@dataclass(frozen=True, eq=False)
class KeptImages:
    """The images of a fit: those that trained, then those that validated, then those that only calibrated.

    Parameters
    ----------
    digests : ndarray of shape (n, 16) of uint8
        Their contents.
    training, validation : int
        How many trained and validated. The others calibrated: none if calibration was by folds.
    groups : ndarray of shape (n,) of int32, optional
        Images of one number belong together; None where each is a group of its own.
    chosen : ndarray of shape (m,) of int64
        Images whose features are kept, ascending.
    codes : int8 Tensor of shape (m, D)
        Signed roots of their features, as whole numbers.
    scales : float32 Tensor of shape (m, parts)
        The largest feature of each part of a row.
    """

    digests: np.ndarray
    training: int
    validation: int
    groups: np.ndarray | None
    chosen: np.ndarray
    codes: Tensor
    scales: Tensor

    @classmethod
    def of_split(
        cls,
        digests: Sequence[bytes],
        features: Features,
        split: Split,
        groups: np.ndarray | None,
        layout: FeatureLayout,
    ) -> KeptImages:
        """What to keep of a fit.

        Parameters
        ----------
        digests : sequence of bytes
            Contents of the different images.
        features : Features
            Their rows (N, D).
        split : Split
            Of the final scores.
        groups : ndarray of shape (N,) of int, optional
        layout : FeatureLayout
            What a row holds.
        """
        parts = (split.training, split.validation, split.calibration)
        rows = np.concatenate(parts)
        sides = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        contents = [digests[i] for i in rows]
        numbers = None if groups is None else groups[rows]
        return cls.of(contents, sides, numbers, np.arange(len(rows)), features.select(rows), layout)

    @classmethod
    def of(
        cls,
        digests: Sequence[bytes],
        sides: np.ndarray,
        groups: np.ndarray | None,
        at_hand: np.ndarray,
        features: Features,
        layout: FeatureLayout,
    ) -> KeptImages:
        """What to keep of images in any order.

        Parameters
        ----------
        digests : sequence of bytes
        sides : ndarray of shape (n,) of int
            As :attr:`sides`.
        groups : ndarray of shape (n,) of int, optional
        at_hand : ndarray of int
            Images with features.
        features : Features
            Their rows.
        layout : FeatureLayout
        """
        order = np.argsort(sides, kind="stable")
        place = np.argsort(order)[at_hand]  # where these come to stand
        by_place = np.argsort(place)
        counts = np.bincount(sides[at_hand], minlength=len(SIDES)).tolist()
        chosen = by_place[_choose(counts, MOST_BYTES // (layout.width + 4 * len(layout.parts)))]
        codes, scales = _encoded(features[chosen], layout)

        contents = np.frombuffer(bytearray().join(digests[i] for i in order), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        numbers = None if groups is None else groups[order].astype(np.int32)
        training, validation, _ = np.bincount(sides, minlength=len(SIDES)).tolist()
        return cls(contents, training, validation, numbers, place[chosen], codes, scales)

    def without_rows(self) -> KeptImages:
        """The same without features."""
        return replace(self, chosen=self.chosen[:0], codes=self.codes[:0], scales=self.scales[:0])

    @property
    def by_folds(self) -> bool:
        """Whether all images have trained the final scores."""
        return len(self.digests) == self.training + self.validation

    @property
    def contents(self) -> list[bytes]:
        """The digests (n), each as bytes."""
        return [digest.tobytes() for digest in self.digests]

    @property
    def sides(self) -> np.ndarray:
        """The side of each image (n,), one of :data:`SIDES`."""
        return np.searchsorted([self.training, self.training + self.validation], np.arange(len(self.digests)), "right")

    def rows(self, layout: FeatureLayout) -> Tensor:
        """The features that are kept (m, D), within about a hundredth of the largest of their part."""
        roots = self.codes.float() / _LEVELS
        return roots * roots.abs() * _spread(self.scales, layout)

    # ---- save and load ----

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored."""
        tensors = {
            _DIGESTS: torch.from_numpy(self.digests),
            _COUNTS: torch.tensor([self.training, self.validation]),
            _CHOSEN: torch.from_numpy(self.chosen),
            _CODES: self.codes,
            _SCALES: self.scales,
        }
        return tensors if self.groups is None else tensors | {_GROUPS: torch.from_numpy(self.groups)}

    @classmethod
    def take(
        cls, tensors: dict[str, Tensor], layout: FeatureLayout, images: Mapping[str, int], folder: Path
    ) -> KeptImages:
        """Remove them from a saved model's tensors, and check them (``ModelError``)."""
        names = (_DIGESTS, _COUNTS, _GROUPS, _CHOSEN, _CODES, _SCALES)
        digests, counts, groups, chosen, codes, scales = (tensors.pop(name, None) for name in names)
        if digests is None or counts is None or chosen is None or codes is None or scales is None:
            raise _damaged(folder)

        n, m = len(digests), len(chosen)
        expected = [
            (digests, torch.uint8, (n, DIGEST_BYTES)),
            (counts, torch.int64, (2,)),
            (chosen, torch.int64, (m,)),
            (codes, torch.int8, (m, layout.width)),
            (scales, torch.float32, (m, len(layout.parts))),
        ]
        if groups is not None:
            expected.append((groups, torch.int32, (n,)))
        if any(value.dtype != kind or value.shape != shape for value, kind, shape in expected):
            raise _damaged(folder)

        training, validation = counts.tolist()
        in_order = m == 0 or (int(chosen[0]) >= 0 and int(chosen[-1]) < n and bool((chosen.diff() > 0).all()))
        in_parts = training > 0 and validation > 0 and training + validation <= n <= images["different"]
        if not in_order or not in_parts:
            raise _damaged(folder)
        numbers = None if groups is None else groups.numpy()
        return cls(digests.numpy(), training, validation, numbers, chosen.numpy(), codes, scales)


def _damaged(folder: Path) -> ModelError:
    return ModelError(f"the model at {folder} is damaged: what it keeps of its images is not what was saved")


def _choose(counts: Sequence[int], most: int) -> np.ndarray:
    """Which images to keep features of, given how many train, validate and calibrate; all of them if they are few."""
    n = sum(counts)
    if n <= most:
        return np.arange(n)
    wanted = [0, round(_VALIDATION_SHARE * most), round(_CALIBRATION_SHARE * most)]
    wanted[0] = most - sum(min(count, share) for count, share in zip(counts[1:], wanted[1:], strict=True))
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *counts[:-1]])
    parts = [start + rng.permutation(count)[:share] for start, count, share in zip(starts, counts, wanted, strict=True)]
    return np.sort(np.concatenate(parts))


def _encoded(rows: Tensor, layout: FeatureLayout) -> tuple[Tensor, Tensor]:
    """Rows (m, D) -> codes and scales.

    Roots are rounded, since the smallest features of a part tell as much as the largest: pre-logits are compared by
    their roots.
    """
    scales = torch.stack([rows[:, part.columns].abs().amax(1) for part in layout.parts], dim=1)
    shares = rows / _spread(scales.clamp_min(_SMALLEST), layout)
    return (shares.sign() * shares.abs().sqrt() * _LEVELS).round().to(torch.int8), scales


def _spread(scales: Tensor, layout: FeatureLayout) -> Tensor:
    """Scales of parts (m, parts) -> of columns (m, D)."""
    widths = torch.tensor([part.width for part in layout.parts])
    return scales.repeat_interleave(widths, dim=1)
