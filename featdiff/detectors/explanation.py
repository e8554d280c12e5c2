"""An image and a fitted detector -> why the image was judged as it was (:class:`Explanation`)."""

from __future__ import annotations

from ..verdicts.explanation import Contribution, Explanation, Neighbor

__all__ = ["Contribution", "Explanation", "Neighbor"]
