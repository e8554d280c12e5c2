"""Outliers <-> one safetensors file whose metadata say what they are. No pickle; strict; atomic."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ModelError
from ..files.atomic import write_atomically

#: Raised when the layout of the file changes; a newer one is refused.
FORMAT_VERSION = 1
_FORMAT = "featdiff outliers"
# What the metadata must say besides the format.
_KINDS: dict[str, type] = {"method": str, "fingerprint": str, "classes": list, "layers": list, "columns": dict}


@dataclass(frozen=True)
class Outliers:
    """Synthetic outliers in the feature space of a detector.

    Parameters
    ----------
    vectors : (n, D) float32
        Rows such as the detector's extractor gives, so that ``detector.score_features`` takes them.
    labels : (n,) int64
        Position in ``classes`` of the class that each lies beyond.
    classes : list of str
    columns : dict of slices
        Where each layer's vector lies in a row: :attr:`featdiff.features.extractor.FeatureExtractor.columns`.
    method : str
        How they were made.
    fingerprint : str
        SHA-256 of the weights of the backbone whose features these are.
    layers : list of str
        Layers of the backbone.
    latents : (n, ...) float32, optional
        Where an image generator was involved: what it can decode to pictures.
    """

    vectors: Tensor
    labels: Tensor
    classes: list[str]
    columns: dict[str, slice]
    method: str
    fingerprint: str
    layers: list[str]
    latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all.

        Raises
        ------
        ModelError
            The disk is full or the place cannot be written; an older file stays whole.
        """
        from safetensors.torch import save

        known: dict[str, Any] = {name: getattr(self, name) for name in _KINDS}
        known["columns"] = {name: [part.start, part.stop] for name, part in self.columns.items()}
        metadata = {"format": _FORMAT, "format_version": str(FORMAT_VERSION), "outliers": json.dumps(known)}
        tensors = {"vectors": self.vectors, "labels": self.labels}
        if self.latents is not None:
            tensors["latents"] = self.latents
        data = save({name: value.cpu().contiguous() for name, value in tensors.items()}, metadata)
        try:
            write_atomically(Path(file), data)
        except OSError as error:
            raise ModelError(f"the outliers could not be written to {file}: {error.strerror or error}") from None


def load_outliers(file: str | os.PathLike[str]) -> Outliers:
    """Read what :meth:`Outliers.save` wrote, and check that it is whole.

    Raises
    ------
    ModelError
        No such file, not one of ours, a newer or a damaged one, or NaN in it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ModelError(f"{file} is no file of outliers, or a damaged one: {error}") from None
    except OSError as error:
        reason = error.strerror or f"no such file; make one with: featdiff outliers IMAGES -o {file}"
        raise ModelError(f"the outliers {file} cannot be read: {reason}") from None
    _check_format(metadata, Path(file))
    known = _known(metadata, Path(file))
    columns = known.pop("columns")
    _check(tensors, columns, known["classes"], Path(file))
    return Outliers(columns=columns, **tensors, **known)


def _check_format(metadata: dict[str, str], file: Path) -> None:
    if metadata.get("format") != _FORMAT:
        raise ModelError(f"{file} holds no outliers of featdiff: make some with featdiff outliers")
    if (version := metadata.get("format_version")) != str(FORMAT_VERSION):
        raise ModelError(
            f"the outliers {file} have format {version}, this featdiff reads {FORMAT_VERSION}: pip install -U featdiff"
        )


def _known(metadata: dict[str, str], file: Path) -> dict[str, Any]:
    """The metadata of this format, with slices for columns."""
    try:
        known = json.loads(metadata.get("outliers", ""))
    except ValueError:
        known = None
    if not isinstance(known, dict) or set(known) != set(_KINDS):
        raise _damaged(file, "its metadata are not those it was saved with")
    for name, kind in _KINDS.items():
        if not isinstance(known[name], kind) or (kind is list and not all(isinstance(n, str) for n in known[name])):
            raise _damaged(file, f"{name} is not what it should be")
    start = 0
    for name, ends in known["columns"].items():  # one behind the other, without gaps
        if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, int) for end in ends):
            raise _damaged(file, f"the columns of {name} are not what they should be")
        if ends[0] != start or ends[1] <= start:
            raise _damaged(file, f"the columns of {name} do not follow those before")
        start = ends[1]
    known["columns"] = {name: slice(*ends) for name, ends in known["columns"].items()}
    return known


def _check(tensors: dict[str, Tensor], columns: dict[str, slice], classes: list[str], file: Path) -> None:
    vectors, labels, latents = (tensors.get(name) for name in ("vectors", "labels", "latents"))
    if vectors is None or labels is None or set(tensors) - {"vectors", "labels", "latents"}:
        raise _damaged(file, f"it holds {', '.join(sorted(tensors)) or 'nothing'}, not vectors and labels")
    width = max((part.stop for part in columns.values()), default=0)
    if vectors.dtype != torch.float32 or vectors.dim() != 2 or vectors.shape[1] != width:
        raise _damaged(file, f"its vectors are not of shape (n, {width})")
    if labels.dtype != torch.int64 or labels.shape != vectors.shape[:1]:
        raise _damaged(file, "not one label for each vector")
    if bool((labels < 0).any()) or bool((labels >= len(classes)).any()):
        raise _damaged(file, f"labels must lie in 0 .. {len(classes) - 1}")
    if latents is not None and (latents.dtype != torch.float32 or latents.shape[:1] != vectors.shape[:1]):
        raise _damaged(file, "not one latent for each vector")
    for name, values in tensors.items():
        if not torch.isfinite(values).all():
            raise _damaged(file, f"{name} hold NaN or infinite values")


def _damaged(file: Path, what: str) -> ModelError:
    return ModelError(f"the outliers {file} are damaged: {what}")
