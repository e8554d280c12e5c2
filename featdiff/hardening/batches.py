"""Batches for training a student.

In: what is stored for each training image, a teacher and outliers. Out: one :class:`TrainingBatch` for each step, and
batches of held-out images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..data.splits import evenly
from ..features.layout import FeatureLayout
from ..features.store import Features
from ..outliers.boundary import BoundaryNoise, boundary_points, default_k, draw_outliers
from ..outliers.space import Space
from .objective import Objective, TrainingBatch
from .teachers import Teacher

#: Images that a class needs for outliers in the student's own features.
MIN_CLASS_SIZE = 5
# Images of a class around which such outliers are made (as published), and outliers of a class in an epoch.
_MAX_CLASS_SIZE = 500
_OUTLIERS_PER_CLASS = 200
# Both, summed over all classes.
_MAX_IN_ALL = 10_000
# Batch size of held-out images.
_HELD_OUT_BATCH = 128


@dataclass
class TrainingBatches:
    """Draws the batches that a student is trained on.

    Parameters
    ----------
    views : sequence of Features
        For each view of the images, the stored input of the student.
    to_input : callable
        Turns stored values (B, D) into the student's input (B, ...).
    labels : ndarray of int, shape (N,)
        Classes of all images.
    training : ndarray of int, shape (n,)
        Indices of the images to train on.
    device : torch.device
    teacher : Teacher, optional
    teacher_features : sequence of Features, default ()
        For each view, the teacher's pre-logits.
    outliers : sequence of Tensor of shape (M, width), default ()
        One tensor for each kind of outliers.
    """

    views: Sequence[Features]
    to_input: Callable[[Tensor], Tensor]
    labels: np.ndarray
    training: np.ndarray
    device: torch.device
    teacher: Teacher | None = None
    teacher_features: Sequence[Features] = ()
    outliers: Sequence[Tensor] = ()
    _student_outliers: Tensor | None = field(default=None, init=False)

    def __call__(self, positions: np.ndarray, rng: np.random.Generator) -> TrainingBatch:
        """Make one batch, each image in a random view.

        Parameters
        ----------
        positions : ndarray of int, shape (B,)
            Positions in ``training``, ascending.
        rng : numpy.random.Generator

        Returns
        -------
        TrainingBatch
        """
        indices = self.training[positions]
        view_of = rng.integers(len(self.views), size=len(indices))

        teacher_features = None
        teacher_logits = None
        if self.teacher is not None:
            teacher_features = self._read(self.teacher_features, indices, view_of)
            with torch.no_grad():
                teacher_logits = self.teacher.logits(teacher_features)

        x = self.to_input(self._read(self.views, indices, view_of))
        labels = torch.from_numpy(self.labels[indices]).to(self.device)
        outliers = tuple(self._random_outliers(kind, len(indices), rng) for kind in self.outliers)
        student_outliers = None
        if self._student_outliers is not None:
            student_outliers = self._random_outliers(self._student_outliers, len(indices), rng)
        return TrainingBatch(x, labels, teacher_features, teacher_logits, outliers, student_outliers)

    def held_out(self, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of unchanged images.

        Parameters
        ----------
        indices : ndarray of int, shape (n,)

        Yields
        ------
        x : Tensor of shape (B, ...)
            Input of the student.
        labels : Tensor of int, shape (B,)
        """
        for batch in np.array_split(indices, -(-len(indices) // _HELD_OUT_BATCH)):
            x = self.to_input(self.views[0][batch].to(self.device))
            yield x, torch.from_numpy(self.labels[batch]).to(self.device)

    @torch.inference_mode()
    def refresh_outliers(self, objective: Objective, seed: int) -> None:
        """Make outliers just beyond the classes in the student's current pre-logits (NPOS, class by class).

        Parameters
        ----------
        objective : Objective
            Has the student; set to eval mode.
        seed : int
        """
        objective.eval()
        training_labels = self.labels[self.training]
        classes = np.unique(training_labels)
        share = _MAX_IN_ALL // len(classes)
        max_images = max(MIN_CLASS_SIZE, min(_MAX_CLASS_SIZE, share))
        count = max(MIN_CLASS_SIZE, min(_OUTLIERS_PER_CLASS, share))

        outliers = []
        for label in classes:
            indices = evenly(self.training[training_labels == label], max_images)
            if len(indices) < MIN_CLASS_SIZE:
                continue
            features = torch.cat([objective.answer(x)[0] for x, _ in self.held_out(indices)]).float()
            space = Space(FeatureLayout.of_stages({"features": features.shape[1]}), features)
            k = default_k(len(indices))
            points = torch.from_numpy(boundary_points(space.join(features), np.zeros(len(indices)), k))

            draw_round = BoundaryNoise(space, features, points.to(features.device), k)
            seeds = np.random.SeedSequence([seed, int(label)])
            outliers.append(draw_outliers(draw_round, count, seeds)[0])
        self._student_outliers = torch.cat(outliers) if outliers else None

    def _read(self, views: Sequence[Features], indices: np.ndarray, view_of: np.ndarray) -> Tensor:
        """What is stored for each image in its view: (B, ...) on the device."""
        batch: Tensor | None = None
        for view in np.unique(view_of):
            positions = np.flatnonzero(view_of == view)
            values = views[view][indices[positions]]
            if batch is None:
                batch = torch.empty(len(indices), *values.shape[1:], dtype=values.dtype)
            batch[torch.from_numpy(positions)] = values
        assert batch is not None
        return batch.to(self.device)

    def _random_outliers(self, outliers: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        chosen = torch.from_numpy(rng.integers(len(outliers), size=count))
        return outliers[chosen].to(self.device)
