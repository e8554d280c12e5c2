"""Held-out in-domain scores -> conformal p-values, flags and thresholds. Knows no images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..exceptions import UsageError

if TYPE_CHECKING:
    from torch import Tensor

# k / (n + 1) and the same rate written as a decimal may differ in the last bits.
_SLACK = 1e-9
#: The same where p-values are float32; two of them are never so close, for n is at most 10,000.
ROUNDING = 1e-7

Array = TypeVar("Array", np.ndarray, "Tensor")


def check_fpr(fpr: object) -> float:
    """A false-alarm rate (``UsageError`` unless it lies between 0 and 1)."""
    if not isinstance(fpr, int | float | np.floating) or not 0 < fpr < 1:
        raise UsageError(f"fpr, the false-alarm rate, must lie between 0 and 1, not {fpr}", argument="fpr")
    return float(fpr)


def is_supported(fpr: float, n: int) -> bool:
    """Whether ``n`` held-out scores support a false-alarm rate: one of at least 1 / (n + 1)."""
    return (check_fpr(fpr) + _SLACK) * (n + 1) >= 1


def needed_for(fpr: float) -> int:
    """The number of held-out scores that a false-alarm rate needs."""
    return math.ceil(1 / (check_fpr(fpr) + _SLACK)) - 1


def check_supported(fpr: float, n: int, what: str = "held-out images") -> None:
    """Refuse a false-alarm rate that ``n`` held-out scores cannot support: one below 1 / (n + 1).

    Parameters
    ----------
    fpr : float
        False-alarm rate.
    n : int
        Number of independent held-out scores.
    what : str, default "held-out images"
        What they are called in the message.

    Raises
    ------
    UsageError
        Naming the number that would do.
    """
    if is_supported(fpr, n):
        return
    raise UsageError(
        f"fpr {fpr:g} needs at least {needed_for(fpr):,} {what} for calibration, and there are {n:,}: "
        f"train on more images, or ask for {offered(n)}",
        argument="fpr",
    )


def smallest_rate(n: int) -> str:
    """The smallest rate that ``n`` >= 1 held-out scores support, in two digits, rounded up so that it is one."""
    smallest = 1 / (n + 1)
    unit = 10.0 ** (math.floor(math.log10(smallest)) - 1)
    return f"{math.ceil(smallest / unit - _SLACK) * unit:.2g}"


def offered(n: int) -> str:
    """The smallest rate that ``n`` held-out scores support, as advice."""
    return f"fpr {smallest_rate(n)} or more" if n else "nothing yet"


class Calibration:
    """Scores of in-domain images that took no part in training: what a new score is compared with.

    Split-conformal: if an image comes from the distribution of the held-out images, P(p <= a) <= a for every a (Vovk et
    al. 2005; Bates et al. 2023, arXiv 2104.08279). The guarantee is on average over held-out sets.

    Images of one group (a burst, a patient) are no independent evidence. With G groups of n images in all,
    p = (1 + G/n #{held-out scores >= score}) / (G + 1): exact for an image of a new group where groups are equally
    large (Lee, Barber and Willett 2023, arXiv 2306.06342), and the formula above where each image is a group.

    Parameters
    ----------
    scores : array of shape (n,)
        Higher = more OOD, in any order; at least one, all finite.
    groups : int, optional
        How many independent groups the scores come from, 1 .. n. Default: each is a group of its own.
    layers : mapping of str to array of shape (n,), optional
        The scores of each layer, of the same images.

    Attributes
    ----------
    scores : ndarray of shape (n,)
        Sorted ascending, float64, read-only.
    groups : int
        As above.
    layers : dict of str to Calibration
        That of each layer, where it is known.

    Raises
    ------
    UsageError
        No score, one that is not finite, or an impossible number of groups.

    Examples
    --------
    >>> calibration = Calibration([0.1, 0.2, 0.3, 0.4])
    >>> calibration.p_values(np.array([0.0, 0.25, 9.0]))
    array([1. , 0.6, 0.2])
    >>> calibration.threshold(fpr=0.4)
    0.3
    """

    def __init__(
        self,
        scores: np.ndarray | Sequence[float],
        groups: int | None = None,
        layers: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        values = np.asarray(scores, dtype=np.float64)
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise UsageError("calibration needs a list of at least one score, all finite")
        self.scores = np.sort(values)
        self.scores.flags.writeable = False
        self.groups = len(values) if groups is None else groups
        if not 1 <= self.groups <= len(values):
            raise UsageError(f"{len(values)} scores cannot come from {groups} groups", argument="groups")
        self.layers = {name: Calibration(column, self.groups) for name, column in (layers or {}).items()}
        self._weight = self.groups / len(values)
        self._tensors: dict[Any, Tensor] = {}

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        groups = "" if self.groups == len(self) else f", groups={self.groups}"
        return f"Calibration(n={len(self)}{groups}, smallest_fpr={self.smallest_fpr:.2g})"

    def __deepcopy__(self, memo: object) -> Calibration:
        return self  # nothing about it changes

    @property
    def smallest_fpr(self) -> float:
        """The smallest false-alarm rate that so many held-out images, or groups of them, support: 1 / (groups + 1)."""
        return 1 / (self.groups + 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved of it: ``calibration`` (n,) float64 and, if known, ``calibration_of_layers`` (L, n) float32."""
        arrays = {"calibration": self.scores.copy()}
        if self.layers:
            columns = [layer.scores for layer in self.layers.values()]
            arrays["calibration_of_layers"] = np.array(columns, dtype=np.float32)
        return arrays

    def check(self, fpr: float) -> None:
        """Refuse a false-alarm rate below :attr:`smallest_fpr`; see :func:`check_supported`."""
        what = "held-out images" if self.groups == len(self) else "held-out groups of images"
        check_supported(fpr, self.groups, what)

    def p_values(self, scores: Array) -> Array:
        """Conformal p-values: (1 + #{held-out scores >= score}) / (n + 1); with groups, as the class says.

        Parameters
        ----------
        scores : ndarray or Tensor of shape (B,)
            Higher = more OOD. One that is not finite counts as the strangest of all, so that a failed computation never
            passes as ordinary. A tensor may be on any device, and the computation can be traced.

        Returns
        -------
        ndarray or Tensor of shape (B,)
            In (0, 1]; small = out-of-distribution.
        """
        if hasattr(scores, "detach"):  # a tensor, told without importing torch
            return self._p_values_of_tensor(scores)

        n = len(self)
        at_least = np.where(np.isfinite(scores), n - np.searchsorted(self.scores, scores, side="left"), 0)
        p_values: Any = (1 + self._weight * at_least) / (self.groups + 1)
        return p_values

    def _p_values_of_tensor(self, scores: Any) -> Any:
        import torch

        reached = (self._like(scores) >= scores[:, None]) & scores.isfinite()[:, None]
        precise = torch.promote_types(scores.dtype, torch.float32)
        return (1 + self._weight * reached.sum(1).to(precise)) / (self.groups + 1)

    def flags(self, scores: Array, fpr: float) -> tuple[Array, Array]:
        """Scores -> p-values and verdicts.

        Parameters
        ----------
        scores : ndarray or Tensor of shape (B,)
        fpr : float
            False-alarm rate, not below :attr:`smallest_fpr`.

        Returns
        -------
        p_value, is_ood : ndarrays or Tensors of shape (B,)
            ``is_ood`` where ``p_value <= fpr``, and so for every score that is not finite.
        """
        p_value = self.p_values(scores)
        is_ood: Any = p_value <= fpr + ROUNDING
        return p_value, is_ood

    def threshold(self, fpr: float) -> float:
        """The largest score that is not flagged at this rate: ``score > threshold`` is the same as ``p <= fpr``.

        Raises
        ------
        UsageError
            A rate that so few held-out images cannot support.
        """
        self.check(fpr)
        n = len(self)
        # p-values of a score that 0, 1 ... held-out ones reach
        ranks = (1 + self._weight * np.arange(n)) / (self.groups + 1)
        reached = int((ranks <= fpr + ROUNDING).sum()) - 1
        return float(self.scores[n - 1 - reached])

    def _like(self, scores: Tensor) -> Tensor:
        """The held-out scores (n,) where ``scores`` are, in their precision."""
        import torch

        place = (scores.device, scores.dtype)
        if place not in self._tensors:
            with torch.inference_mode(False):  # it outlives this call
                self._tensors[place] = torch.tensor(self.scores, dtype=scores.dtype, device=scores.device)
        return self._tensors[place]
