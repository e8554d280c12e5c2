"""Two detectors, an in-domain set and OOD sets -> how far apart they are on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..data.groups import AUTO, NONE, check_groups, label_images
from ..data.references import ImageRef, list_images
from ..exceptions import UsageError
from ..runtime.progress import Progress
from ..verdicts.calibration import Calibration
from ..verdicts.results import OK, Scores
from ..verdicts.shares import interval_of_share
from .paired import Changes, Difference, auroc_difference, fpr95_difference
from .protocols import label_of

#: What the in-domain set is called beside OOD sets.
IN_DOMAIN = "in-domain"


class Scorer(Protocol):
    """What can be compared: a detector of either mode, or an exported one."""

    @property
    def fpr(self) -> float: ...
    @property
    def calibration_(self) -> Calibration: ...

    def iter_scores(
        self, images: object, fpr: float | None = None, progress: Progress | None = None
    ) -> Iterator[Scores]: ...


@dataclass(frozen=True)
class ComparedSet:
    """The images of a set that both models have a score of.

    Parameters
    ----------
    name : str
    refs : list of ImageRef
        The n images.
    scores : (Scores, Scores)
        By A and by B, row by row of the same image.
    groups : ndarray of shape (n,) of int, optional
        The group of each; None if each counts alone.
    """

    name: str
    refs: list[ImageRef]
    scores: tuple[Scores, Scores]
    groups: np.ndarray | None

    @property
    def flags(self) -> tuple[np.ndarray, np.ndarray]:
        """Which images A and B flag, (n,) each."""
        return self.scores[0].is_ood, self.scores[1].is_ood

    @property
    def ood_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """The ``ood_score`` of each image by A and by B, (n,) each."""
        return self.scores[0].ood_score, self.scores[1].ood_score

    def only(self, which: int) -> np.ndarray:
        """Positions of the images that only A (0) or only B (1) flags, those first whose p-values differ most."""
        own, other = self.scores[which], self.scores[1 - which]
        chosen = np.flatnonzero(own.is_ood & ~other.is_ood)
        times = own.p_value[chosen] / other.p_value[chosen]
        return chosen[np.argsort(times, kind="stable")]

    def rows(self) -> Iterator[dict[str, object]]:
        """A plain dict for each image, as it is written to files."""
        for ref, a, b in zip(self.refs, *(list(scores.rows()) for scores in self.scores), strict=True):
            changed = "" if a["is_ood"] == b["is_ood"] else "only_a" if a["is_ood"] else "only_b"
            row: dict[str, object] = {"path": ref.path, "set": self.name, "changed": changed}
            for letter, by in (("a", a), ("b", b)):
                row |= {f"{name}_{letter}": by[name] for name in ("ood_score", "p_value", "is_ood")}
            yield row


@dataclass(frozen=True)
class Comparison:
    """What came of comparing two models.

    Parameters
    ----------
    sets : list of ComparedSet
        The in-domain set, then the OOD sets.
    result : dict
        The contract of ``featdiff compare --json``: ``{"models": [..], "id": {..}, "pairs": [..], "left_out": {path:
        reason}}``. Numbers of A and B stand in lists of two; differences are B - A.
    """

    sets: list[ComparedSet]
    result: dict[str, Any]


def compare_models(
    model_a: Scorer,
    model_b: Scorer,
    in_domain: object,
    ood: Mapping[str, object] | None = None,
    *,
    fpr: float | None = None,
    groups: str | None = None,
    names: Sequence[str] = ("A", "B"),
    progress: Progress | None = None,
) -> Comparison:
    """Score the same images with two models, and measure how far apart these are.

    Images are read as they are, as with the protocol ``as-published`` of :mod:`featdiff.evaluation.protocols`. One that
    either model has no score of is left out for both.

    Parameters
    ----------
    model_a, model_b : Scorer
        Fitted; they may have other backbones, layers or modes.
    in_domain : images
        Normal images that neither was trained on, as for :func:`featdiff.data.references.list_images`.
    ood : mapping of images, optional
        OOD sets by name. Without any, only false alarms and verdicts are compared.
    fpr : float, optional
        False-alarm rate of both; default: each has its own.
    groups : str, optional
        Which images of a set belong together; see :func:`featdiff.data.groups.label_images`. Intervals then take those
        of a group for one, and the test of changed verdicts, which cannot, is left out.
    names : sequence of two str
        What the models are called in the result.
    progress : callable (stage, done, total), optional

    Returns
    -------
    Comparison

    Raises
    ------
    UsageError
        Fewer than two images of a set that both have a score of; an ``fpr`` that a calibration cannot support.
    """
    check_groups(groups)
    if groups == AUTO:
        raise UsageError(
            "groups='auto' looks at features, and each model has its own: say which images belong together",
            argument="groups",
        )
    models = (model_a, model_b)
    rates = [model.fpr if fpr is None else fpr for model in models]
    for model, rate in zip(models, rates, strict=True):
        model.calibration_.check(rate)

    listed = {name: list_images(source) for name, source in {IN_DOMAIN: in_domain, **(ood or {})}.items()}
    known = [0, 0]
    left_out: dict[str, str] = {}
    sets = []
    for name, refs in listed.items():
        scores = [_scores(model, refs, rate, progress) for model, rate in zip(models, rates, strict=True)]
        for i, part in enumerate(scores):
            known[i] += 0 if part.known is None else int(part.known.sum())
        sets.append(_paired(name, refs, scores, groups, left_out))

    facts = [
        {"name": name, "fpr": rate, "calibration": len(model.calibration_), "known": count}
        for name, model, rate, count in zip(names, models, rates, known, strict=True)
    ]
    label = label_of(in_domain, len(sets[0].refs))
    pairs = []
    for number, strange in enumerate(sets[1:], 1):
        pairs.append(_pair(sets[0], strange))
        if progress:  # each has a thousand resamples
            progress("intervals", number, len(sets) - 1)
    result = {"models": facts, "id": {"images": label, **_verdicts(sets[0])}, "pairs": pairs, "left_out": left_out}
    return Comparison(sets, result)


def _scores(model: Scorer, refs: list[ImageRef], fpr: float, progress: Progress | None) -> Scores:
    return Scores.concatenate(model.iter_scores(refs, fpr, progress))


def _paired(
    name: str, refs: list[ImageRef], scores: Sequence[Scores], groups: str | None, left_out: dict[str, str]
) -> ComparedSet:
    """The images that both have a score of; the others are added to ``left_out``."""
    by_a, by_b = scores
    kept = []
    for i, ref in enumerate(refs):
        bad = next((part for part in scores if part.status[i] != OK), None)
        if bad is None:
            kept.append(i)
        else:
            left_out[ref.path] = bad.reason[i]
    if len(kept) < 2:
        why = f"; the first: {next(iter(left_out.items()))}" if left_out else ""
        raise UsageError(f"the set {name!r} has {len(kept)} images that both models can score, and 2 are needed{why}")

    numbers = None
    if groups not in (None, NONE):
        labels = label_images(str(groups), [refs[i].path for i in kept])
        numbers = np.unique([repr(label) for label in labels], return_inverse=True)[1]
    return ComparedSet(name, [refs[i] for i in kept], (by_a[kept], by_b[kept]), numbers)


def _verdicts(images: ComparedSet) -> dict[str, Any]:
    """How many images each flags, and which verdicts changed."""
    n = len(images.refs)
    independent = n if images.groups is None else int(images.groups.max()) + 1
    shares = [float(flags.mean()) for flags in images.flags]
    changes = Changes.of(*images.flags)
    return {
        "n": n,
        "groups": independent,
        "flagged": [int(flags.sum()) for flags in images.flags],
        "flagged_ci": [list(interval_of_share(share, independent)) for share in shares],
        "only_a": [images.refs[i].path for i in images.only(0)],
        "only_b": [images.refs[i].path for i in images.only(1)],
        "mcnemar_p": changes.p if images.groups is None else None,
    }


def _pair(normal: ComparedSet, strange: ComparedSet) -> dict[str, Any]:
    """The metrics of an OOD set."""
    arguments = (normal.ood_scores, strange.ood_scores, normal.groups, strange.groups)
    area, rate = auroc_difference(*arguments), fpr95_difference(*arguments)
    return {"ood": strange.name, **_verdicts(strange), "auroc": _as_json(area), "fpr95": _as_json(rate)}


def _as_json(found: Difference) -> dict[str, Any]:
    return {
        "values": list(found.values),
        "difference": found.difference,
        "difference_ci": list(found.interval),
        "is_shown": found.is_shown,
    }
