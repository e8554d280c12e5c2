"""A fitted detector -> a repository on the Hugging Face hub, with a card that says what it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..exceptions import ModelError
from ..files.hub import push_folder
from ..files.model_folder import CONFIG, TENSORS, load
from .model_card import model_card

#: Name of the card in a folder and in a repository.
CARD = "README.md"
# What a model folder may hold beside these: pictures that training leaves.
_FILES = (TENSORS, CONFIG, CARD, "inpaintings.png")


class Pushable:
    """A mix-in for what has ``save_pretrained``: :meth:`push_to_hub`."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        raise NotImplementedError

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        license: str | None = None,
        results: Mapping[str, Any] | None = None,
        message: str = "featdiff model",
    ) -> str:
        """Save into a repository on the Hugging Face hub, with a model card, in one commit.

        A model holds paths of training images, and small pictures of them if it was told to
        (``keep_paths``, ``keep_thumbnails``): who can read the repository can read those.

        Parameters
        ----------
        name : str
            ``org/name``; made when it is missing.
        private : bool, optional
            Whether a new repository is private; default: as the organisation has it. True refuses a public one.
        revision : str, optional
            Branch, made when it is missing; default: the main one.
        token : str or bool, optional
            With write access; default: ``HF_TOKEN``, or that of ``hf auth login``. It is not stored.
        license : str, optional
            Of the model, by the hub's names (``apache-2.0`` ...); default: the card names none.
        results : mapping, optional
            What was measured, for the card: the JSON of ``featdiff eval --json``, and ``"self_check"``, the share that
            :func:`featdiff.outliers.synthesis.self_check` returns.
        message : str, default "featdiff model"
            Of the commit.

        Returns
        -------
        str
            Address of the commit.

        Raises
        ------
        NotFittedError
            There is nothing to save.
        UsageError
            A name that no repository can have; a public repository where a private one is wanted; results that are
            not those of featdiff.
        ModelError
            The hub refuses it, or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_model(
                folder,
                name,
                private=private,
                revision=revision,
                token=token,
                license=license,
                results=results,
                message=message,
            )


def push_model(
    folder: str | os.PathLike[str],
    name: str,
    *,
    license: str | None = None,
    results: Mapping[str, Any] | None = None,
    **options: Any,
) -> str:
    """Push the model saved in a folder; its files are checked first, and not loaded.

    A ``README.md`` in the folder is pushed as it is; without one, the card is written anew.

    Parameters
    ----------
    folder : path
        As ``save_pretrained`` wrote it.
    name, license, results, **options
        As for :meth:`Pushable.push_to_hub`.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    UsageError, ModelError
        As for :meth:`Pushable.push_to_hub`; no model, or a damaged one.
    """
    config, tensors = load(Path(folder))

    def card() -> str:
        return model_card(config, name, license=license, results=results, held=kept_images(tensors))

    return push_files(Path(folder), _FILES, name, card, **options)


def push_files(folder: Path, files: Sequence[str], name: str, card: Callable[[], str], **options: Any) -> str:
    """Push those of these files that a folder has, and what ``card`` gives where the folder has no card.

    ``options``, the result and errors are those of :meth:`Pushable.push_to_hub`.
    """
    with tempfile.TemporaryDirectory() as place:
        for file in files:
            target = Path(place) / file
            target.parent.mkdir(exist_ok=True)
            if (folder / file).is_file():
                target.symlink_to((folder / file).absolute())
        if not (folder / CARD).is_file():
            (Path(place) / CARD).write_text(card(), encoding="utf-8")
        return push_folder(place, files, name, _refused, **options)


def _refused(why: str) -> ModelError:
    """The error for what the hub says."""
    return ModelError(f"the model is not on the hub: {why}")


def kept_images(tensors: Mapping[str, Any]) -> str:
    """What a model holds of its training images beside features, in words; empty if there is nothing of the kind."""
    names = {name.removeprefix("0.") for name in tensors}  # several encoders share those of the first
    held = [what for name, what in (("bank_paths", "paths"), ("bank_thumbnails", "small pictures")) if name in names]
    return " and ".join(held)
