"""The contract of everything that turns features into one number an image, and the register of all that do.

Other packages add scores with the decorator :func:`register`, and name the module that uses it under the entry-point
group ``featdiff.scores``, so that it is found without being imported first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from torch import Tensor, nn

from ..diffusion.training import Recipe
from ..exceptions import FeatdiffError, UsageError, did_you_mean, first_line
from ..features.layout import FeatureLayout
from ..runtime.progress import Progress

#: Packages name their modules of scores under this group of entry points.
ENTRY_POINTS = "featdiff.scores"
#: What stands before the name of a baseline in tables.
BASELINE = "baseline_"
#: Names that detectors use themselves: their own score, and those of diffusion.
RESERVED = ("featdiff", "fused", "layerwise", "mse", "mfsim", "lr")


class Features(Protocol):
    """Rows of features (N, D) that need not be in memory: a :class:`featdiff.features.store.Features`."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray | slice) -> Tensor:
        """Some rows (n, D), on the CPU; ``features[:]`` reads all."""

    def chunks(self, size: int = 1024) -> Iterator[Tensor]:
        """All rows in order, (<= size, D) at a time."""


@dataclass(frozen=True)
class Context:
    """What a score may need to be fitted, besides the features it keeps.

    Parameters
    ----------
    training, validation : Features
        All rows to train on, and rows that train nothing, for early stopping and statistics.
    recipe : Recipe
        How networks are trained.
    seed : int, default 0
        Decides all that is random.
    classifier : nn.Linear or nn.Conv2d, optional
        The layer that gives the logits, where the features are a classifier's.
    checkpoint : Path, optional
        File in which a training is kept.
    progress : callable (stage, done, total), optional
    """

    training: Features
    validation: Features
    recipe: Recipe
    seed: int = 0
    classifier: nn.Linear | nn.Conv2d | None = None
    checkpoint: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Options:
    """Settings that some scores are built with.

    Parameters
    ----------
    rows : int
        Rows of features that a score may keep.
    neighbors : int, default 5
        Nearest neighbours that count.
    backend : str, default "auto"
        How neighbours are searched; see :func:`featdiff.scores.neighbors.make_index`.
    """

    rows: int
    neighbors: int = 5
    backend: str = "auto"


class Score(nn.Module):
    """Turns features into one number an image, higher = more out-of-distribution.

    A subclass defines :meth:`fit` and :meth:`forward`. To be part of a saved detector, it keeps what it has learned in
    buffers that ``__init__`` registers in their final shape.

    Parameters
    ----------
    layout : FeatureLayout
        What a row of features holds.

    Attributes
    ----------
    name : str
        What it is called in tables; the name it was registered under, unless it sets another one.
    weight : float, default 1.0
        Its weight in the fused score, where diffusion has 1 and neighbours have 4 (3 spaces).
    log_scale : bool, default False
        Whether it is a distance (> 0) whose logarithm is what fusion standardises.
    reads_logits : bool, default False
        Whether it needs rows that hold a classifier's logits.
    """

    name: str = ""
    weight: float = 1.0
    log_scale: bool = False
    reads_logits: bool = False

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__()
        self.layout = layout

    def fit(self, features: Features, context: Context | None = None) -> Self:
        """Learn from in-domain features (N, D). Nothing is learned by default."""
        return self

    def fit_further(
        self, older: Self, kept: np.ndarray, added: Features, bank: Features | None, context: Context | None = None
    ) -> Self:
        """Learn from rows that an older score of the same kind has learned from, and from further ones.

        Here by :meth:`fit` on all rows; a score that keeps its rows one by one needs the further ones only.

        Parameters
        ----------
        older : Score
        kept : ndarray of int
            Which of its rows count still, ascending.
        added : Features
            Further in-domain rows.
        bank : Features or None
            Both, end to end; None where the older rows are not at hand.
        context : Context, optional

        Raises
        ------
        UsageError
            The score needs the older rows, and they are not at hand.
        """
        if bank is None:
            raise UsageError(
                f"the score {self.name!r} is fitted on all rows, and the features of the older images are gone from "
                "the cache: give the older images too (old=IMAGES)",
                argument="old",
            )
        return self.fit(bank, context)

    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more out-of-distribution."""
        raise NotImplementedError

    def without(self, features: Tensor, own: Tensor) -> Tensor:
        """As :meth:`forward`, each image compared with all that the score keeps but one row.

        Parameters
        ----------
        features : Tensor of shape (B, D)
        own : Tensor of shape (B,) of int
            Number of the row that is left out, in the order in which :meth:`fit` was given them; -1: none.

        Returns
        -------
        Tensor of shape (B,)
        """
        value: Tensor = self(features)  # a score that keeps no rows
        return value

    @property
    def nbytes(self) -> int:
        """Bytes it needs to keep."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())


Factory = Callable[[FeatureLayout, Options], Sequence[Score]]
S = TypeVar("S", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """A registered score, or several that belong together.

    ``make`` builds them, ``head`` tells whether a detector's fused score can join them, ``baseline`` whether they are
    printed beside it in evaluations, ``reads_logits`` whether they need a classifier's logits.
    """

    name: str
    make: Factory
    head: bool
    baseline: bool
    reads_logits: bool
    origin: str


_entries: dict[str, Entry] = {}
_loaded: set[str] = set()


def register(name: str, *, head: bool = False, baseline: bool = False, reads_logits: bool = False) -> Callable[[S], S]:
    """Register a score under a name of its own.

    Parameters
    ----------
    name : str
    head : bool, default False
        Whether ``Detector(extra_heads=[name])`` can join it.
    baseline : bool, default False
        Whether evaluations print it as ``baseline_<name>``.
    reads_logits : bool, default False
        Whether it needs a classifier's logits; for functions, as classes say so themselves.

    Returns
    -------
    callable
        A decorator for a subclass of :class:`Score` that is built from a layout alone, or for a function
        ``(layout, options) -> scores``.

    Raises
    ------
    UsageError
        Neither a head nor a baseline, or a name that is taken.

    Examples
    --------
    >>> @register("first_channel", baseline=True)
    ... class FirstChannel(Score):
    ...     def forward(self, features):
    ...         return features[:, 0]
    >>> "first_channel" in baselines()
    True
    """
    if not head and not baseline:
        raise UsageError(f"the score {name!r} must be a head, a baseline, or both")

    if name in RESERVED:
        raise UsageError(f"detectors use the name {name!r} themselves: choose another name")

    def decorate(score: S) -> S:
        origin = f"{score.__module__}.{score.__qualname__}"
        if name in _entries and _entries[name].origin != origin:  # the same again: a module that is loaded anew
            raise UsageError(f"there is a score {name!r} already ({_entries[name].origin}): choose another name")
        make: Factory = score
        if isinstance(score, type):
            kind: Any = score

            def make(layout: FeatureLayout, options: Options) -> list[Score]:
                built: Score = kind(layout)
                built.name = vars(kind).get("name", name)
                return [built]

        needs_logits = reads_logits or getattr(score, "reads_logits", False)
        _entries[name] = Entry(name, make, head, baseline, needs_logits, origin)
        return score

    return decorate


def heads() -> list[str]:
    """Names of all scores that a detector's fused score can join."""
    return [entry.name for entry in _all().values() if entry.head]


def baselines() -> list[str]:
    """Names of all scores that evaluations print beside a detector's."""
    return [entry.name for entry in _all().values() if entry.baseline]


def make_scores(name: str, layout: FeatureLayout, options: Options) -> list[Score]:
    """Build what is registered under a name, unfitted.

    Raises
    ------
    UsageError
        Nothing is; or the score cannot be built for such features.
    """
    check_registered([name])
    scores = list(_entries[name].make(layout, options))
    for score in scores:
        score.name = score.name or name
    return scores


def need_logits(names: Sequence[str]) -> bool:
    """Whether any of these scores needs a classifier's logits; those of diffusion, and ``fused``, do not."""
    return any(_entries[name].reads_logits for name in names if name not in RESERVED)


def check_registered(names: Sequence[str], among: Callable[[], list[str]] | None = None, argument: str = "") -> None:
    """Refuse a name under which there is no score (``UsageError`` names its nearest neighbours)."""
    for name in names:
        if among is None and name in _entries:
            continue
        known = among() if among else list(_all())
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(f"unknown score {name!r}{hint}; known: {', '.join(known)}", argument=argument)


def _all() -> dict[str, Entry]:
    """All scores, with those of installed packages.

    Raises
    ------
    FeatdiffError
        The scores of a package cannot be loaded.
    """
    for point in entry_points(group=ENTRY_POINTS):
        if point.value in _loaded:
            continue
        try:
            point.load()
        except Exception as error:  # somebody else's code
            package = point.dist.name if point.dist else point.value
            raise FeatdiffError(
                f"the scores of the package {package} ({point.value}) cannot be loaded: {first_line(error)}"
            ) from None
        _loaded.add(point.value)
    return _entries
