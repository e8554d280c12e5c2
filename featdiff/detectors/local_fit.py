"""Normal images -> the local score of a detector and its calibration, after everything else is fitted."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.splits import Plan, Split
from ..exceptions import FeatdiffError
from ..features.extractor import FeatureExtractor
from ..runtime.progress import Progress, part_of
from ..scores.local import RECIPE, Local, worst
from .fitting import further

#: Fewer images say too little about each place.
FEWEST = 40
# Raised when the same places give another training: finished ones in the cache are not used then.
_TRAINING_VERSION = 1
# Images that train. Of as many runs of neighbours, each fifth only says how places differ.
_TRAINING_IMAGES = 2000
_RUNS = 25
_HELD_OUT = 5
# Places of training images in all, and of one image.
_PLACES = 32_768
_FEWEST_PLACES = 4
_MOST_PLACES = 64
# To go on from an older local score: images that train, half of them new ones; new ones that say what is normal; and
# older ones that say how training on has moved errors.
_FURTHER = 120
_COMPARED = 80
_KNOWN = 30
#: Bytes that these places may take.
MOST_BYTES = 1 << 28

#: Numbers of images, ascending -> batches of them, in that order.
ReadBatches = Callable[[Sequence[int]], Iterator[Batch]]


@dataclass(frozen=True)
class FittedLocal:
    """What came of it.

    Attributes
    ----------
    local : Local
    scores : ndarray of shape (n,)
        Of the images that calibrate, in the order of :attr:`featdiff.data.splits.Plan.calibration`.
    heat : ndarray of shape (n,)
        Of the strangest place of each.
    """

    local: Local
    scores: np.ndarray
    heat: np.ndarray


@dataclass(frozen=True)
class _Part:
    """A local score to be fitted.

    ``training`` are the images that train it, ``measured`` those whose errors it gives, ``scored`` those of them that
    calibrate, and ``compared`` those whose errors say what is normal for each place when they are scored.
    """

    local: Local
    training: np.ndarray
    measured: np.ndarray
    scored: np.ndarray
    compared: np.ndarray


class LocalFit:
    """Fits a local score, and one more for each fold of a plan.

    Images are read twice: those that train, to take a few places of each, then those that are held out, as a whole.

    Parameters
    ----------
    extractor : FeatureExtractor
        That keeps maps.
    read : callable
        Numbers of images, ascending -> batches of them, in that order.
    digests : sequence of bytes
        The content that each image had.
    seed : int
    folder : Path
        Where trainings are kept, so that one that is repeated, or was stopped, goes on from there.
    progress : callable (stage, done, total), optional
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        read: ReadBatches,
        digests: Sequence[bytes],
        seed: int,
        folder: Path,
        progress: Progress | None = None,
    ) -> None:
        self.extractor = extractor
        self.read = read
        self.digests = digests
        self.seed = seed
        self.folder = folder
        self.progress = progress
        self.channels = tuple(extractor.maps.values())

    def fit(self, plan: Plan) -> FittedLocal:
        """Fit on a plan's final rows, and score the images that calibrate by fits that have not seen them.

        Parameters
        ----------
        plan : Plan

        Returns
        -------
        FittedLocal

        Raises
        ------
        FeatdiffError
            An image cannot be read any more, or holds something else by now.
        """
        parts = self._of_folds(plan) if plan.folds else self._of_split(plan.final)
        self._train(parts)
        errors = self._errors(parts)
        for part in parts:
            part.local.fit_statistics([errors[row] for row in part.compared])
        return self._scored(parts, errors)

    def fit_further(self, older: Local, split: Split, is_new: np.ndarray) -> FittedLocal:
        """Go on from an older local score, and score the images that calibrate now.

        All of these are read, but only some of the others: the older score has seen most of them.

        Parameters
        ----------
        older : Local
            It stays as it is.
        split : Split
            Of older and new images.
        is_new : ndarray of shape (n,) of bool
            Which images are new.

        Returns
        -------
        FittedLocal

        Raises
        ------
        FeatdiffError
            As :meth:`fit`.
        """
        part, known = self._of_further(older, split, is_new)
        _, places = self._places(part.training, _MOST_PLACES, part.local)
        part.local.fit_further(
            [[values.to(self.extractor.device) for values in layers] for layers in places],
            further(RECIPE, len(places[0][0])),
            part_of(self.progress, 0, 1, "training places"),
        )

        errors: dict[int, Tensor] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        for numbers, maps in self._maps(part.measured, "held-out places"):
            found = part.local.errors(maps).cpu()
            errors |= zip(numbers, found, strict=True)
            own = np.flatnonzero(np.isin(numbers, known)).tolist()
            if own:
                pairs += zip(older.errors([values[own] for values in maps]).cpu(), found[own], strict=True)
        beside = np.concatenate([split.training, split.validation])
        fresh = [errors[row] for row in part.compared]
        part.local.fit_statistics_further(older, pairs, fresh, is_new[beside].mean())
        return self._scored([part], errors)

    def _scored(self, parts: Sequence[_Part], errors: Mapping[int, Tensor]) -> FittedLocal:
        """The end of every fit: the scores of the images that calibrate."""
        scores = []
        hottest = []
        for part in parts:
            for row in part.scored:
                heat = part.local.standardised(errors[row][None].to(part.local.mean.device))
                scores.append(float(worst(heat)))
                hottest.append(float(heat.max()))
        return FittedLocal(parts[-1].local, np.array(scores), np.array(hottest))

    def _of_folds(self, plan: Plan) -> list[_Part]:
        """A part for each fold, then the final one, trained on all images.

        An image is never among those that it is compared with, lest it look too ordinary.
        """
        nothing = np.empty(0, dtype=np.int64)
        rows = np.sort(plan.calibration)  # all images
        parts = []
        for fold in plan.folds:
            others = np.setdiff1d(rows, fold.calibration)
            parts.append(_Part(self._new(), self._some(others), fold.calibration, fold.calibration, others))
        return [*parts, _Part(self._new(), self._some(rows), nothing, nothing, rows)]

    def _of_split(self, split: Split) -> list[_Part]:
        rows = self._some(split.training)
        # runs of neighbours, for bursts are named alike
        run = np.arange(len(rows)) * _RUNS // len(rows)
        is_held_out = run % _HELD_OUT == _HELD_OUT - 1
        compared = np.concatenate([rows[is_held_out], split.validation])
        measured = np.concatenate([compared, split.calibration])
        return [_Part(self._new(), rows[~is_held_out], measured, split.calibration, compared)]

    def _of_further(self, older: Local, split: Split, is_new: np.ndarray) -> tuple[_Part, np.ndarray]:
        """What trains on, with new images to compare with; and older ones that show what training on has changed."""
        rows = np.random.default_rng(self.seed).permutation(split.training)
        new, old = rows[is_new[rows]], rows[~is_new[rows]]
        few = min(_FURTHER // 2, len(new) // 2)
        training = np.sort(np.concatenate([new[:few], old[: _FURTHER // 2]]))
        validating = is_new[split.validation]
        compared = np.concatenate([split.validation[validating], new[few:]])[:_COMPARED]
        known = np.concatenate([split.validation[~validating], old])[:_KNOWN]

        measured = np.sort(np.concatenate([compared, known, split.calibration]))
        local = copy.deepcopy(older).to(self.extractor.device)
        return _Part(local, training, measured, split.calibration, compared), known

    def _new(self) -> Local:
        return Local(self.channels, self.seed).to(self.extractor.device)

    def _some(self, rows: np.ndarray) -> np.ndarray:
        """So many of these images as train at most, ascending."""
        return np.sort(np.random.default_rng(self.seed).permutation(rows)[:_TRAINING_IMAGES])

    # ---- places ----

    def _train(self, parts: Sequence[_Part]) -> None:
        rows = np.unique(np.concatenate([part.training for part in parts]))
        count = _places_of_each(min(len(part.training) for part in parts), sum(self.channels))
        owners, places = self._places(rows, count, parts[0].local)

        for number, part in enumerate(parts):
            own = torch.from_numpy(np.flatnonzero(np.isin(owners, part.training)))
            part.local.fit(
                [[values[own].to(self.extractor.device) for values in layers] for layers in places],
                self._checkpoint(part.training, count),
                part_of(self.progress, number, len(parts), "training places"),
            )

    def _checkpoint(self, rows: np.ndarray, count: int) -> Path:
        """The file of a training on so many places of these images."""
        facts = repr([_TRAINING_VERSION, RECIPE, self.extractor.maps, self.seed, count])
        contents = b"".join(self.digests[row] for row in rows)
        return self.folder / f"local-{hashlib.sha256(facts.encode() + contents).hexdigest()[:16]}.pt"

    def _places(self, rows: np.ndarray, count: int, local: Local) -> tuple[np.ndarray, list[list[Tensor]]]:
        """Random places of these images: the row that each belongs to, and what each view sees of each layer there."""
        owners: list[int] = []
        found: list[list[list[Tensor]]] = []
        for numbers, maps in self._maps(rows, "places"):
            sampled = local.sample(maps, count, numbers)
            found.append(sampled)
            each = len(sampled[0][0]) // len(numbers)
            owners += [number for number in numbers for _ in range(each)]

        places = [
            [torch.cat([part[view][layer] for part in found]) for layer in range(len(self.channels))]
            for view in range(len(local.views))
        ]
        return np.array(owners), places

    def _errors(self, parts: Sequence[_Part]) -> dict[int, Tensor]:
        """Log errors (views, h, w) of each image that is measured."""
        local_of = {row: part.local for part in parts for row in part.measured.tolist()}
        found: dict[int, Tensor] = {}
        for numbers, maps in self._maps(np.array(sorted(local_of)), "held-out places"):
            for local in {id(local_of[row]): local_of[row] for row in numbers}.values():
                own = [i for i, row in enumerate(numbers) if local_of[row] is local]
                errors = local.errors([values[own] for values in maps]).cpu()
                found |= {numbers[i]: values for i, values in zip(own, errors, strict=True)}
        return found

    def _maps(self, rows: np.ndarray, stage: str) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Maps of these images, some at a time, and which images these are."""
        done = 0
        for batch in self.read(rows.tolist()):
            numbers = rows[done : done + len(batch.loaded)].tolist()
            for item, number in zip(batch.loaded, numbers, strict=True):
                if item.reason or item.digest != self.digests[number]:
                    reason = item.reason or "it holds something else than before"
                    raise FeatdiffError(f"{item.ref.path} changed while it was learned: {reason}; train again")
            for stack in batch.stacks:
                yield [numbers[i] for i in stack.positions], self.extractor.maps_of(stack.pixels)
            done += len(numbers)
            if self.progress:
                self.progress(stage, done, len(rows))


def _places_of_each(images: int, channels: int) -> int:
    """How many places of each image train."""
    most = min(_PLACES, MOST_BYTES // (4 * channels))  # two views, two bytes
    return max(_FEWEST_PLACES, min(_MOST_PLACES, most // max(1, images)))
