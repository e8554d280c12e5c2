"""The answer for a set of images: one row per image, columns that stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..exceptions import UsageError

#: Columns of every table that featdiff writes; ``layer_<name>`` follow, one per layer.
COLUMNS = ("path", "status", "reason", "ood_score", "p_value", "is_ood")
OK, UNREADABLE = "ok", "unreadable"


@dataclass
class Scores:
    """Scores of N images, in the order they were given.

    path : names as printed. status : ``ok`` or ``unreadable``. reason : why, for unreadable ones.
    ood_score : (N,) float, higher = more OOD, about 0 +- 1 for in-domain images. p_value : (N,) conformal, in (0, 1].
    is_ood : (N,) bool, p_value <= fpr. layers : for each layer (N,), in in-domain standard deviations.
    Unreadable images have NaN scores and are not flagged.
    """

    path: list[str]
    status: list[str]
    reason: list[str]
    ood_score: np.ndarray
    p_value: np.ndarray
    is_ood: np.ndarray
    layers: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.path)

    @property
    def columns(self) -> list[str]:
        """Column names of :meth:`rows`."""
        return [*COLUMNS, *(f"layer_{name}" for name in self.layers)]

    def rows(self) -> Iterator[dict[str, object]]:
        """One plain dict per image; numbers that an unreadable image lacks are None."""
        for i, path in enumerate(self.path):
            good = self.status[i] == OK
            numbers: list[object] = [
                _plain(self.ood_score[i]),
                _plain(self.p_value[i]),
                bool(self.is_ood[i]),
                *(_plain(values[i]) for values in self.layers.values()),
            ]
            cells = [path, self.status[i], self.reason[i], *(numbers if good else [None] * len(numbers))]
            yield dict(zip(self.columns, cells, strict=True))

    @classmethod
    def concatenate(cls, parts: Iterable[Scores]) -> Scores:
        """Parts of one run, end to end (``UsageError`` if there are none)."""
        several = list(parts)
        if not several:
            raise UsageError("there were no images to score")

        def rows(name: str) -> list[str]:
            return [value for part in several for value in getattr(part, name)]

        def stack(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in several])

        layers = {name: np.concatenate([part.layers[name] for part in several]) for name in several[0].layers}
        numbers = (stack("ood_score"), stack("p_value"), stack("is_ood"))
        return cls(rows("path"), rows("status"), rows("reason"), *numbers, layers)


def _plain(value: float) -> float:
    return float(f"{value:.7g}")  # float32 carries seven digits; more would be noise in the file
