"""Rows on disk, teacher and outliers -> what a student learns from at a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..data.splits import evenly
from ..features.layout import FeatureLayout
from ..features.store import Table
from ..outliers.boundary import Beyond, boundary_points, default_k, draw
from ..outliers.space import Space
from .objective import Lesson, Objective
from .teachers import Teacher

# Rows of a class around which outliers are made (as published), outliers of a class in an epoch, and either in all.
_MOST_OF_A_CLASS, _BESIDE_A_CLASS, _IN_ALL = 500, 200, 10_000
#: Rows of a class that have a boundary.
FEWEST = 5
_AT_ONCE = 128  # rows of images as they are


@dataclass
class Curriculum:
    """Draws lessons.

    Parameters
    ----------
    views : for each view of the images, their rows
    shaped : callable
        Rows (B, D) -> (B, ...) as the student takes them.
    labels : (N,) int64
    training : row numbers (n,) to learn from
    teacher, taught : the teacher and, for each view, its pre-logits
    outliers : for each kind, (M, width)
    device : torch.device
    """

    views: Sequence[Table]
    shaped: Callable[[Tensor], Tensor]
    labels: np.ndarray
    training: np.ndarray
    device: torch.device
    teacher: Teacher | None = None
    taught: Sequence[Table] = ()
    outliers: Sequence[Tensor] = ()
    _beside: Tensor | None = field(default=None, init=False)

    def __call__(self, places: np.ndarray, rng: np.random.Generator) -> Lesson:
        """Places (B,) in ``training``, ascending, and a source of chance -> a lesson; each row in a view by chance."""
        rows = self.training[places]
        view = rng.integers(len(self.views), size=len(rows))
        features = logits = None
        if self.teacher is not None:
            features = self._seen(self.taught, rows, view)
            with torch.no_grad():
                logits = self.teacher.logits(features)
        return Lesson(
            self.shaped(self._seen(self.views, rows, view)),
            torch.from_numpy(self.labels[rows]).to(self.device),
            features,
            logits,
            tuple(self._drawn(kind, len(rows), rng) for kind in self.outliers),
            None if self._beside is None else self._drawn(self._beside, len(rows), rng),
        )

    def held_out(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of what the student takes of images as they are, (B, ...), and their labels (B,)."""
        for part in np.array_split(rows, -(-len(rows) // _AT_ONCE)):
            x = self.shaped(self.views[0][part].to(self.device))
            yield x, torch.from_numpy(self.labels[part]).to(self.device)

    @torch.inference_mode()
    def renew(self, objective: Objective, seed: int) -> None:
        """Make outliers just beyond the classes in the student's pre-logits as they are now (NPOS, per class)."""
        objective.eval()
        made = []
        labels = np.unique(self.labels[self.training])
        most, count = (max(FEWEST, min(n, _IN_ALL // len(labels))) for n in (_MOST_OF_A_CLASS, _BESIDE_A_CLASS))
        for label in labels:
            rows = evenly(self.training[self.labels[self.training] == label], most)
            if len(rows) < FEWEST:
                continue
            features = torch.cat([objective.answer(x)[0] for x, _ in self.held_out(rows)]).float()
            space = Space(FeatureLayout.of_stages({"features": features.shape[1]}), features)
            k = default_k(len(rows))
            points = torch.from_numpy(boundary_points(space.join(features), np.zeros(len(rows)), k))
            rounds = Beyond(space, features, points.to(features.device), k)
            made.append(draw(rounds, count, np.random.SeedSequence([seed, int(label)]))[0])
        self._beside = torch.cat(made) if made else None

    def _seen(self, views: Sequence[Table], rows: np.ndarray, view: np.ndarray) -> Tensor:
        parts = [
            (mine, views[number][rows[mine]]) for number in np.unique(view) for mine in [np.flatnonzero(view == number)]
        ]
        out = torch.empty(len(rows), *parts[0][1].shape[1:], dtype=parts[0][1].dtype)
        for mine, found in parts:
            out[torch.from_numpy(mine)] = found
        return out.to(self.device)

    def _drawn(self, outliers: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        return outliers[torch.from_numpy(rng.integers(len(outliers), size=count))].to(self.device)
