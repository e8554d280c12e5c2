"""The space in which distances between features are measured: every layer scaled to length 1, all counting alike."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..exceptions import UsageError
from ..features.layout import FeatureLayout, Kind, Part


class Space:
    """Converts features to vectors in which distances are measured, and back.

    Each part of a feature vector (a layer, or its spatial standard deviations) is scaled to length 1, and all parts
    are divided by the square root of their number. So a joined vector has length 1, and Euclidean distances lie in
    [0, 2].

    Parameters
    ----------
    layout : FeatureLayout
        The parts of the features. Logits, which come last, are left out: they follow from the pre-logits.
    features : Tensor of shape (N, D)
        In-domain features. A part without negative values here (the mean behind a ReLU, a standard deviation) is kept
        free of negative values: no image produces any.

    Attributes
    ----------
    layout : FeatureLayout
        The parts without logits.
    width : int
        Length of a joined vector.

    Examples
    --------
    >>> layout = FeatureLayout.of_stages({"layer1": 2, "layer2": 3})
    >>> features = torch.tensor([[3.0, 4.0, 0.0, 5.0, 12.0]])
    >>> space = Space(layout, features)
    >>> joined = space.join(features)
    >>> round(float(joined.norm()), 3)
    1.0
    >>> [round(value, 3) for value in space.restore(joined, features)[0].tolist()]
    [3.0, 4.0, 0.0, 5.0, 12.0]
    """

    def __init__(self, layout: FeatureLayout, features: Tensor) -> None:
        self.layout = layout.without(Kind.LOGITS)
        self.width = self.layout.width
        self._widths = (self.width, layout.width)
        self._signed = {part: bool((features[:, part.columns] < 0).any()) for part in self.parts}

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of a joined vector, in order."""
        return self.layout.parts

    @property
    def widths(self) -> list[int]:
        """Length of each part."""
        return [part.width for part in self.parts]

    def split(self, vectors: Tensor) -> Iterator[Tensor]:
        """Cut vectors or features (N, D) into their parts, each (N, part width)."""
        return (vectors[:, part.columns] for part in self.parts)

    def join(self, features: Tensor) -> Tensor:
        """Convert features to joined vectors.

        Parameters
        ----------
        features : Tensor of shape (N, D)
            With or without logits.

        Returns
        -------
        Tensor of shape (N, width)

        Raises
        ------
        UsageError
            Features of another width, or with NaN or infinite values.
        """
        if features.dim() != 2 or features.shape[1] not in self._widths:
            raise UsageError(f"features must have shape (N, {self._widths[1]}), not {tuple(features.shape)}")
        invalid = (~torch.isfinite(features).all(1)).nonzero()
        if len(invalid):
            raise UsageError(f"features hold NaN or infinite values, first in row {int(invalid[0])}")

        unit_parts = [F.normalize(values, dim=1) for values in self.split(features)]
        return torch.cat(unit_parts, 1) / len(self.parts) ** 0.5

    def restore(self, vectors: Tensor, like: Tensor) -> Tensor:
        """Convert vectors of any length back to features.

        Parameters
        ----------
        vectors : Tensor of shape (N, width)
        like : Tensor of shape (N, D)
            Features whose parts have the lengths that the result gets.

        Returns
        -------
        Tensor of shape (N, width)
        """
        restored = []
        for part in self.parts:
            restored.append(self.restore_part(part, vectors[:, part.columns], like[:, part.columns]))
        return torch.cat(restored, 1)

    def restore_part(self, part: Part, vectors: Tensor, like: Tensor) -> Tensor:
        """The same for one part: (..., part width) and (..., part width) -> (..., part width)."""
        return F.normalize(self.clamp(part, vectors), dim=-1) * like.norm(dim=-1, keepdim=True)

    def clamp(self, part: Part, values: Tensor) -> Tensor:
        """Set negative values to 0 in a part where no image produces any."""
        return values if self._signed[part] else values.clamp_min(0)
