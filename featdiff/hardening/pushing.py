"""A hardened student and its guard -> one repository on the Hugging Face hub, with a card that says what they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..detectors.model_card import model_card
from ..detectors.pushing import CARD, kept_images, push_files
from ..exceptions import some_of
from ..files.model_folder import CONFIG, TENSORS, load
from .layout import GUARD, STUDENT
from .students import load_classifier, training_facts

# The list of images that were left out stays here: it holds their paths.
_FILES = (*(f"{part}/{file}" for part in (STUDENT, GUARD) for file in (TENSORS, CONFIG)), CARD)


def push_hardened(
    folder: str | os.PathLike[str],
    name: str,
    *,
    license: str | None = None,
    results: Mapping[str, Any] | None = None,
    **options: Any,
) -> str:
    """Push what :meth:`featdiff.hardening.harden.Hardened.save_pretrained` wrote; its files are checked first.

    A ``README.md`` in the folder is pushed as it is; without one, the card is written anew. The repository has the same
    two folders, so that :func:`featdiff.hardening.harden.load_hardened` takes its name.

    Parameters
    ----------
    folder : path
    name, license, results, **options
        As for :meth:`featdiff.detectors.pushing.Pushable.push_to_hub`.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    UsageError, ModelError
        As there; no student and guard, or damaged ones.
    """
    text = card_of_hardened(folder, name, license=license, results=results)  # this checks the files
    return push_files(Path(folder), _FILES, name, lambda: text, **options)


def card_of_hardened(
    folder: str | os.PathLike[str],
    name: str,
    *,
    license: str | None = None,
    results: Mapping[str, Any] | None = None,
) -> str:
    """The model card of a student and its guard; parameters and errors are those of :func:`push_hardened`."""
    config, tensors = load(Path(folder) / GUARD)
    classifier = load_classifier(Path(folder) / STUDENT)
    facts = training_facts(str(Path(folder) / STUDENT))
    student = {"classifier": f"{classifier.name}, in `{STUDENT}/`", **_rows(facts, classifier.classes)}
    held = kept_images(tensors)
    return model_card(config, name, license=license, results=results, held=held, student=student)


def _rows(facts: Mapping[str, Any], classes: tuple[str, ...]) -> dict[str, str]:
    """What the card says of the training of the student, as far as it is known."""
    rows = {"licence of what it was before": "not known here: look it up before you use it"}
    rows["classes"] = f"{len(classes):,}: {some_of(classes)}"
    if teacher := facts.get("teacher"):
        rows["taught by"] = str(teacher)
    if outliers := facts.get("outliers"):
        rows["synthetic outliers"] = f"{outliers['n']:,}, by the method {outliers['method']}"
    if images := facts.get("images"):
        chosen = f"{facts['accuracy']:.1%} right of the {images['validation']:,} that chose among epochs"
        rows["classifier trained on"] = f"{images['training']:,} images; {chosen}"
    return rows
