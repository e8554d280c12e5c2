"""The students of a suite, trained on one task, to measure the effect of distillation, outliers and a margin."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..data.references import ImageRef
from ..detectors import Detector
from ..detectors.config import FeatureSettings
from ..detectors.run_config import RUNTIME
from ..exceptions import UsageError
from ..features.backbones import check_name
from ..files.toml import check_keys
from ..hardening.harden import Hardened, harden
from ..hardening.recipe import HardenRecipe, check_losses
from ..hardening.students import classifier_folder
from ..outliers.outlier_file import Outliers
from ..outliers.synthesis import METHODS, synthesise
from ..runtime.progress import Progress

_OUTLIERS = 10_000
_RECIPE = [field.name for field in fields(HardenRecipe)]
# Settings of a guard that harden sets by itself, and those that belong to a network with a name.
_SET_BY_HARDEN = ("fpr", "extra_heads", "transform", "seed", *RUNTIME)
_OF_BACKBONES = ("backbone", "weights", "pretrained", "model_args", "view", "size", "input_size")
_GUARD = [name for name in ("abstain", *FeatureSettings.names()) if name not in _OF_BACKBONES]
# Arguments of harden that a suite may set.
_NOT_OF_A_SUITE = ("images", "recipe", "progress", "runtime")
_ARGUMENTS = [name for name in inspect.signature(harden).parameters if name not in _NOT_OF_A_SUITE] + [*RUNTIME]


def check_students(students: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse unknown keys and methods, and a teacher that is trained later (``UsageError``)."""
    earlier: list[str] = []
    for name, settings in students.items():
        where = f"the suite's student {name!r}"
        _check_keys(settings, where)

        teacher = settings.get("teacher")
        if teacher in students and teacher not in earlier:
            raise UsageError(f"{where}: its teacher {teacher!r} must stand before it")
        check_keys(settings.get("guard", {}), _GUARD, f"{where}, its guard")

        try:
            _check_training(settings)
            if teacher is not None and teacher not in students:
                _check_network(teacher)
        except (UsageError, TypeError) as error:
            raise UsageError(f"{where}: {error}") from None
        earlier.append(name)


def _check_keys(settings: Mapping[str, Any], where: str) -> None:
    check_keys(settings, [*_ARGUMENTS, *_RECIPE], where)
    if "student" not in settings:
        raise UsageError(f"{where} lacks student: the name of a backbone")
    if settings.get("outliers") not in (None, *METHODS):
        raise UsageError(f"{where}: outliers must be one of {', '.join(METHODS)}, not {settings['outliers']!r}")
    for key in settings.get("guard", {}):
        if key in _SET_BY_HARDEN:
            raise UsageError(f"{where}: {key} stands beside student, not in guard")


def _check_training(settings: Mapping[str, Any]) -> None:
    recipe_fields = settings.keys() & {*_RECIPE}
    check_losses(_recipe(settings), recipe_fields, "teacher" in settings, "outliers" in settings)
    _check_network(settings["student"])


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
    students : mapping of mappings
        By name: arguments of :func:`featdiff.hardening.harden.harden` and fields of its recipe. ``outliers`` is a
        method of :func:`featdiff.outliers.synthesis.synthesise`, ``teacher`` may be an earlier student.
    images : sequence of ImageRef
        In folders of classes.
    detector : Detector
        Fitted on these images; outliers are made in its features.
    progress : callable (stage, done, total), optional
    tell : callable, optional
        Gets a line for every student.

    Yields
    ------
    name : str
    hardened : Hardened
    """
    outliers: dict[str, Outliers] = {}  # by method: students share them
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, settings in students.items():
            arguments = {key: value for key, value in settings.items() if key not in _RECIPE}
            method = arguments.pop("outliers", None)
            if method and method not in outliers:
                synthesis = synthesise(detector, list(images), _OUTLIERS, method, labelled=True, progress=progress)
                outliers[method] = synthesis.outliers
            if method:
                arguments["outliers"] = outliers[method]

            if arguments.get("teacher") in students:
                arguments["teacher"] = str(folder / arguments["teacher"])

            hardened = harden(list(images), recipe=_recipe(settings), progress=progress, **arguments)
            tell(f"  {name}: trained in {hardened.facts['seconds']:.0f} s")
            hardened.save_pretrained(folder / name)
            yield name, hardened


def _recipe(settings: Mapping[str, Any]) -> HardenRecipe:
    chosen = {key: value for key, value in settings.items() if key in _RECIPE}
    return replace(HardenRecipe(), **chosen)
