"""Conformal p-values of a stream -> whether the stream has changed. Knows no images.

All p-values are made with one calibration set, so they are not independent, and a test that takes them for even ones
gives a false alarm sooner or later: a share of 1.2 % below 0.01 is no sign of drift where the held-out images happened
to be easy. Here a stream has changed only if its p-values lie where no likely calibration set puts those of normal
images.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from ..exceptions import UsageError
from .calibration import ROUNDING
from .shares import interval_of_share

#: Which way a stream can leave what is normal: too many strange images, or too few.
STRANGE, NORMAL = "strange", "normal"
SIDES = (STRANGE, NORMAL)
# Shares of p-values that are counted: those at most so large.
_LEVELS = {STRANGE: (0.01, 0.05, 0.2), NORMAL: (0.05, 0.2, 0.5)}
# Odds of a bet, in times of the odds at the bound.
_TIMES = (1.5, 3.0, 8.0, 30.0)
_VERSION = 1
# The logarithm of no money; JSON has no infinity.
_NOTHING = -1e9
_AT_ONCE = 10_000
#: Held-out images that one level at least needs.
FEWEST = math.ceil(1 / max(_LEVELS[STRANGE])) - 1
#: Latest p-values that are kept, to say how far a stream has gone.
WINDOW = 1000


class DriftTest:
    """A test of a stream of p-values that may be looked at after each image, for ever.

    Let l = floor(a (n + 1)) for n held-out images. Given these, the share of normal images with p <= a is one number,
    a draw of Beta(l, n + 1 - l) (Vovk 2012, arXiv 1209.2673). Its quantile u at 1 - delta / m bounds it from above,
    for m levels a at once. A bet that p <= a comes at a rate q > u multiplies its stake by q / u, or else by
    (1 - q) / (1 - u), and gains nothing on average while the true share is at most u: a test supermartingale
    (Shafer 2021, doi 10.1111/rssa.12647). Stakes lie on several levels and rates, and a part of the money waits for
    each later image, so that a change after a million images is found nearly as soon as one at the start (a mixture
    over times of change, as in Shin, Ramdas and Rinaldo 2023, arXiv 2203.03532). There is an alarm once all of it has
    grown to 1 / alpha: for normal images with a probability of at most alpha + delta, in all time.

    ``strange`` bets on more small p-values, ``normal`` on fewer, by the lower quantile: a frozen camera, or images
    that were in training.

    Parameters
    ----------
    held_out : int
        Held-out images behind the p-values, or groups of them: ``calibration_.groups``.
    alpha, delta : float, default 0.01
        The chance of a false alarm is at most their sum: ``alpha`` for the stream, ``delta`` for an unlucky
        calibration set. Two sides halve both.
    sides : sequence of str, default ("strange",)
        One or both of :data:`SIDES`.

    Attributes
    ----------
    count : int
        p-values seen since the start.
    alarms : dict of str to int
        Side -> after how many p-values its alarm came. It stays until :meth:`restart`.

    Raises
    ------
    UsageError
        Settings outside their range; fewer held-out images than :data:`FEWEST`.

    Examples
    --------
    >>> import numpy as np
    >>> from featdiff.verdicts.drift import DriftTest
    >>> test = DriftTest(1000)
    >>> normal = np.random.default_rng(0).uniform(size=5000)
    >>> test.update(normal), test.update(normal[:100] / 5), test.alarms["strange"] < 5100
    (False, True, True)
    >>> DriftTest.from_json(test.to_json()).count
    5100
    """

    def __init__(
        self, held_out: int, alpha: float = 0.01, delta: float = 0.01, sides: Sequence[str] = (STRANGE,)
    ) -> None:
        for name, value in (("alpha", alpha), ("delta", delta)):
            if not isinstance(value, float) or not 0 < value < 1:
                raise UsageError(f"{name} must lie between 0 and 1, not {value}", argument=name)
        if not sides or not set(sides) <= set(SIDES):
            raise UsageError(f"sides must be one or both of {', '.join(SIDES)}, not {sides}", argument="sides")
        if held_out < FEWEST:
            raise UsageError(
                f"a test of drift needs at least {FEWEST} held-out images, and there are {held_out:,}: train on more",
                argument="held_out",
            )
        self.held_out = held_out
        self.alpha = alpha
        self.delta = delta
        self.sides = tuple(side for side in SIDES if side in sides)
        parts = len(self.sides)
        self._bets = {side: _Bets(side, held_out, delta / parts) for side in self.sides}
        self._enough = -math.log(alpha / parts)
        self.restart()

    def restart(self) -> None:
        """Begin anew: no money made or lost, no alarm."""
        self.count = 0
        self.alarms: dict[str, int] = {}
        self._latest: deque[float] = deque(maxlen=WINDOW)
        for bets in self._bets.values():
            bets.restart()

    # ---- the stream ----

    def update(self, p_values: np.ndarray | Sequence[float] | float) -> bool:
        """See one or many p-values, in the order of the stream; how they are cut into calls does not matter.

        Parameters
        ----------
        p_values : float or array of shape (N,)
            In (0, 1]. Leave out images without a score.

        Returns
        -------
        bool
            Whether an alarm came with these: False if it was there before.

        Raises
        ------
        UsageError
            A value outside (0, 1].
        """
        values = np.asarray(p_values, dtype=np.float64).reshape(-1)
        if not ((values > 0) & (values <= 1)).all():
            raise UsageError("p-values must lie in (0, 1]: leave out images without one")
        before = len(self.alarms)
        for start in range(0, len(values), _AT_ONCE):
            part = values[start : start + _AT_ONCE]
            for side, bets in self._bets.items():
                over = np.flatnonzero(bets.update(part, self.count) >= self._enough)
                if len(over):
                    self.alarms.setdefault(side, self.count + int(over[0]) + 1)
            self.count += len(part)
        self._latest.extend(values[-WINDOW:].tolist())
        return len(self.alarms) > before

    # ---- what it says ----

    @property
    def evidence(self) -> dict[str, float]:
        """Side -> share of what an alarm needs, on a scale of orders of magnitude: 0 none, 1 or more an alarm."""
        return {side: max(0.0, bets.log_wealth(self.count) / self._enough) for side, bets in self._bets.items()}

    @property
    def distance(self) -> float:
        """Kolmogorov-Smirnov distance of the latest p-values, at most :data:`WINDOW`, from even ones, in [0, 1]; NaN
        without any."""
        if not self._latest:
            return math.nan
        even = np.arange(1, self.held_out + 2) / (self.held_out + 1)
        return distance(np.array(self._latest), even)

    def share(self, fpr: float, confidence: float = 0.95) -> tuple[float, float, float]:
        """Share of the latest p-values that are at most ``fpr``, and its interval (Clopper and Pearson 1934).

        Returns
        -------
        share, low, high : float
            In [0, 1]. NaN, 0 and 1 without any. The interval is that of the stream; it leaves out what chance the
            calibration set had.
        """
        n = len(self._latest)
        share = int((np.array(self._latest) <= fpr + ROUNDING).sum()) / n if n else math.nan
        return share, *interval_of_share(share if n else 0.0, n, confidence)

    # ---- state ----

    def to_json(self) -> dict[str, Any]:
        """All of it, as what JSON can hold."""
        return {
            "version": _VERSION,
            "held_out": self.held_out,
            "alpha": self.alpha,
            "delta": self.delta,
            "sides": list(self.sides),
            "count": self.count,
            "alarms": dict(self.alarms),
            "latest": list(self._latest),
            "log_stakes": {side: bets.log_stakes.tolist() for side, bets in self._bets.items()},
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """The test that :meth:`to_json` has written.

        Raises
        ------
        UsageError
            It was written by another version, or is damaged.
        """
        try:
            if state["version"] != _VERSION:
                raise UsageError(f"this state of a drift test has version {state['version']}, not {_VERSION}")
            test = cls(state["held_out"], state["alpha"], state["delta"], state["sides"])
            test.count = int(state["count"])
            test.alarms = {side: int(state["alarms"][side]) for side in test.sides if side in state["alarms"]}
            test._latest.extend(map(float, state["latest"]))
            for side, bets in test._bets.items():
                stakes = np.array(state["log_stakes"][side], dtype=np.float64)
                if stakes.shape != bets.log_stakes.shape or not (stakes < np.inf).all():
                    raise ValueError(side)
                bets.log_stakes = stakes
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"this is no state of a drift test: {error!r}") from None
        return test


class _Bets:
    """Stakes on several levels and rates of one side, in logarithms.

    ``log_stakes`` (K,): what has grown from money that was laid out until now; what waits is known from the count.
    """

    def __init__(self, side: str, held_out: int, delta: float) -> None:
        from scipy.stats import beta  # type: ignore[import-untyped]

        levels = [level for level in _LEVELS[side] if math.floor(level * (held_out + 1)) >= 1]
        rows = []
        for level in levels:
            below = math.floor(level * (held_out + 1))
            quantile = 1 - delta / len(levels) if side == STRANGE else delta / len(levels)
            bound = float(beta.ppf(quantile, below, held_out + 1 - below))
            for times in _TIMES:
                odds = bound / (1 - bound) * (times if side == STRANGE else 1 / times)
                rate = odds / (1 + odds)
                rows.append((level, math.log(rate / bound), math.log((1 - rate) / (1 - bound))))
        self._levels, self._hit, self._miss = np.array(rows).T
        self.restart()

    def restart(self) -> None:
        self.log_stakes = np.full(len(self._levels), _NOTHING)

    def update(self, p_values: np.ndarray, count: int) -> np.ndarray:
        """The logarithm of all money after each of N p-values (N,), of which ``count`` came before."""
        growth = np.where(p_values[:, None] <= self._levels + ROUNDING, self._hit, self._miss)
        path = np.cumsum(growth, axis=0)
        # laid out before an image is seen, and grown from there on
        laid_out = _log_laid_out(count + np.arange(len(p_values)))[:, None] - (path - growth)
        stakes = path + np.logaddexp.accumulate(np.vstack([self.log_stakes, laid_out]))[1:]
        self.log_stakes = stakes[-1]
        return self._money(stakes, count + 1 + np.arange(len(p_values)))

    def log_wealth(self, count: int) -> float:
        """The logarithm of all money after ``count`` p-values."""
        return float(self._money(self.log_stakes[None], np.array([count]))[0])

    def _money(self, stakes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        together = np.logaddexp.reduce(stakes, axis=1) - math.log(stakes.shape[1])
        money: np.ndarray = np.logaddexp(together, np.log(_waiting(counts)))
        return money


def _waiting(counts: np.ndarray) -> np.ndarray:
    """Share of the money that is not laid out after so many images: it falls from 1 more slowly than any power."""
    return 1 / np.log2(counts + 2.0)


def _log_laid_out(counts: np.ndarray) -> np.ndarray:
    """The logarithm of the share that is laid out for the image after so many."""
    first, second = np.log2(counts + 2.0), np.log2(counts + 3.0)
    grown = np.log1p(1 / (counts + 2.0)) / math.log(2)  # second - first, without losing digits
    laid_out: np.ndarray = np.log(grown) - np.log(first * second)
    return laid_out


def distance(sample: np.ndarray, reference: np.ndarray) -> float:
    """How far apart two samples are, as Kolmogorov and Smirnov measure it.

    Parameters
    ----------
    sample : (N,) float
    reference : (M,) float
        Ascending.

    Returns
    -------
    float
        In [0, 1]: the largest difference of their distribution functions.

    Examples
    --------
    >>> distance(np.array([1.0, 2.0]), np.array([1.0, 2.0])), distance(np.array([5.0]), np.array([1.0, 2.0]))
    (0.0, 1.0)
    """
    ordered = np.sort(sample)
    places = np.concatenate([ordered, reference])
    shares = [np.searchsorted(values, places, side="right") / len(values) for values in (ordered, reference)]
    return float(np.abs(shares[0] - shares[1]).max())
