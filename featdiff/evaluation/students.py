"""The students of a suite, trained on one task, to see what distillation, outliers and a margin bring."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..data.references import ImageRef
from ..detectors import Detector
from ..detectors.config import RUNTIME, FeatureSettings
from ..exceptions import UsageError
from ..features.backbones import check_name
from ..files.toml import check_keys
from ..hardening.harden import Hardened, harden
from ..hardening.recipe import HardenRecipe, check_losses
from ..hardening.students import classifier_folder
from ..outliers.synthesis import METHODS, synthesise
from ..runtime.progress import Progress

_OUTLIERS = 10_000
_RECIPE = [field.name for field in fields(HardenRecipe)]
# What harden itself decides of a guard.
_DECIDED = ("fpr", "extra_heads", "transform", "seed", *RUNTIME)
_NETWORKS_OWN = ("backbone", "weights", "pretrained", "model_args", "input_size")
_GUARD = [name for name in ("abstain", *FeatureSettings.names()) if name not in _NETWORKS_OWN]
_NOT_OF_A_SUITE = ("images", "recipe", "progress", "runtime")
_ARGUMENTS = [name for name in inspect.signature(harden).parameters if name not in _NOT_OF_A_SUITE] + [*RUNTIME]


def check_students(students: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse unknown keys and methods, and a teacher that is trained later (``UsageError``)."""
    before: list[str] = []
    for name, own in students.items():
        where = f"the suite's student {name!r}"
        check_keys(own, [*_ARGUMENTS, *_RECIPE], where)
        if "student" not in own:
            raise UsageError(f"{where} lacks student: the name of a backbone")
        if own.get("outliers") not in (None, *METHODS):
            raise UsageError(f"{where}: outliers must be one of {', '.join(METHODS)}, not {own['outliers']!r}")
        if decided := [key for key in own.get("guard", {}) if key in _DECIDED]:
            raise UsageError(f"{where}: {decided[0]} stands beside student, not in guard")
        if own.get("teacher") in students and own["teacher"] not in before:
            raise UsageError(f"{where}: its teacher {own['teacher']!r} must stand before it")
        check_keys(own.get("guard", {}), _GUARD, f"{where}, its guard")
        try:
            check_losses(_recipe(own), own.keys() & {*_RECIPE}, "teacher" in own, "outliers" in own)
            _check_network(own["student"])
            if own.get("teacher") not in (None, *students):
                _check_network(own["teacher"])
        except (UsageError, TypeError) as error:
            raise UsageError(f"{where}: {error}") from None
        before.append(name)


def _check_network(name: str) -> None:
    if classifier_folder(name) is None:
        check_name(name)


def train_students(
    students: Mapping[str, Mapping[str, Any]],
    images: Sequence[ImageRef],
    detector: Detector,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[str, Hardened]]:
    """Harden every student on the same labelled images.

    Parameters
    ----------
    students : by name, arguments of :func:`featdiff.hardening.harden.harden` and fields of its recipe
        ``outliers`` is a method of :func:`featdiff.outliers.synthesis.synthesise`, ``teacher`` may be an earlier one.
    detector : Detector
        Fitted on these images; outliers are made in its features.
    """
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, own in students.items():
            given = {key: value for key, value in own.items() if key not in _RECIPE}
            if method := given.pop("outliers", None):
                if method not in made:
                    made[method] = synthesise(
                        detector, list(images), _OUTLIERS, method, labelled=True, progress=progress
                    ).outliers
                given["outliers"] = made[method]
            if given.get("teacher") in students:
                given["teacher"] = str(Path(folder) / given["teacher"])
            hardened = harden(list(images), recipe=_recipe(own), progress=progress, **given)
            tell(f"  {name}: trained in {hardened.facts['seconds']:.0f} s")
            hardened.save_pretrained(Path(folder) / name)
            yield name, hardened


def _recipe(student: Mapping[str, Any]) -> HardenRecipe:
    return replace(HardenRecipe(), **{key: value for key, value in student.items() if key in _RECIPE})
