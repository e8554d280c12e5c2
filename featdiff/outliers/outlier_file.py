"""Outliers, and the file they are saved in.

One safetensors file, whose metadata describe the outliers and hold a SHA-256 of all else in the file. No pickle; read
strictly; written atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ModelError, UsageError, first_line
from ..features.layout import FeatureLayout
from ..files.atomic import write_atomically
from ..files.strict_json import parse_json

#: Raised when the format of the file changes; others are refused.
FORMAT_VERSION = 2
#: Key of the metadata for the SHA-256 of all else in the file.
DIGEST = "sha256"
_FORMAT = "featdiff outliers"
# Metadata besides the format, and their types.
_KINDS: dict[str, type] = {"method": str, "fingerprint": str, "classes": list, "layers": list, "columns": dict}


@dataclass(frozen=True)
class Outliers:
    """Synthetic outliers in the feature space of a detector.

    Parameters
    ----------
    vectors : Tensor of float32, shape (n, D)
        Features as the detector's extractor returns them, so that ``detector.score_features`` accepts them.
    labels : Tensor of int64, shape (n,)
        The class beyond whose boundary each lies, as an index into ``classes``.
    classes : list of str
    layout : FeatureLayout
        Which columns of ``vectors`` belong to which layer; ``columns`` in the file.
    method : str
        How they were made.
    fingerprint : str
        SHA-256 of the weights of the backbone whose features these are.
    layers : list of str
        Layers of the backbone.
    latents : Tensor of float32, shape (n, ...), optional
        What an image generator made from them and can decode to images.

    Examples
    --------
    >>> layout = FeatureLayout.of_stages({"layer1": 3})
    >>> labels = torch.tensor([0, 1])
    >>> outliers = Outliers(torch.zeros(2, 3), labels, ["cat", "dog"], layout, "boundary", "ab", ["layer1"])
    >>> len(outliers)
    2
    """

    vectors: Tensor
    labels: Tensor
    classes: list[str]
    layout: FeatureLayout
    method: str
    fingerprint: str
    layers: list[str]
    latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write one safetensors file, completely or not at all.

        Parameters
        ----------
        file : path

        Raises
        ------
        ModelError
            The disk is full or the folder cannot be written; an older file stays as it was.
        """
        from safetensors.torch import save

        description = {
            "method": self.method,
            "fingerprint": self.fingerprint,
            "classes": self.classes,
            "layers": self.layers,
            "columns": self.layout.to_json(),
        }
        metadata = {
            "format": _FORMAT,
            "format_version": str(FORMAT_VERSION),
            "outliers": json.dumps(description),
        }
        tensors = {"vectors": self.vectors, "labels": self.labels}
        if self.latents is not None:
            tensors["latents"] = self.latents

        plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
        metadata[DIGEST] = digest_of(save(plain, metadata))
        try:
            write_atomically(Path(file), save(plain, metadata))
        except OSError as error:
            raise ModelError(f"the outliers could not be written to {file}: {error.strerror or error}") from None


def load_outliers(file: str | os.PathLike[str]) -> Outliers:
    """Read what :meth:`Outliers.save` wrote, and check it.

    Parameters
    ----------
    file : path

    Returns
    -------
    Outliers

    Raises
    ------
    ModelError
        No such file, no outliers of featdiff, a newer format, a damaged file, or NaN in it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = Path(file).read_bytes()
        metadata = _split(content)[0].get("__metadata__", {})
        tensors: dict[str, Any] = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{file} is no file of outliers, or a damaged one: {first_line(error)}") from None
    except OSError as error:
        reason = f"no such file; make one with: featdiff outliers IMAGES -o {file}"
        if not isinstance(error, FileNotFoundError):
            reason = str(error.strerror)
        raise ModelError(f"the outliers {file} cannot be read: {reason}") from None

    _check_format(metadata, Path(file))
    if metadata.get(DIGEST) != digest_of(content):
        raise _damaged(Path(file), "they are not what was saved there")
    description = _description(metadata, Path(file))
    layout = _layout(description.pop("columns"), Path(file))
    _check_tensors(tensors, layout.width, len(description["classes"]), Path(file))
    return Outliers(layout=layout, **tensors, **description)


def digest_of(content: bytes) -> str:
    """SHA-256 of all that a file holds, but this digest itself.

    Parameters
    ----------
    content : bytes
        Of a safetensors file, with or without a digest among its metadata.

    Raises
    ------
    ValueError
        It is none.
    """
    header, data = _split(content)
    metadata = header.get("__metadata__", {})
    header["__metadata__"] = {name: text for name, text in metadata.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + data).hexdigest()


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    if len(content) < 8:
        raise ValueError("it has no header")
    (length,) = struct.unpack("<Q", content[:8])
    header = parse_json(content[8 : 8 + length])
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("its header is no table")
    return header, content[8 + length :]


def _check_format(metadata: dict[str, str], file: Path) -> None:
    if metadata.get("format") != _FORMAT:
        raise ModelError(f"{file} holds no outliers of featdiff: make some with featdiff outliers")
    if (version := metadata.get("format_version")) != str(FORMAT_VERSION):
        raise ModelError(
            f"the outliers {file} have format {version}, this featdiff reads {FORMAT_VERSION}: make them again, or "
            "pip install -U featdiff"
        )


def _description(metadata: dict[str, str], file: Path) -> dict[str, Any]:
    """The metadata of this format, by the names in ``_KINDS``."""
    try:
        description = parse_json(metadata.get("outliers", ""))
    except ValueError:
        description = None
    if not isinstance(description, dict) or set(description) != set(_KINDS):
        raise _damaged(file, "its metadata are not those it was saved with")

    for name, kind in _KINDS.items():
        value: Any = description[name]
        names_in_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not isinstance(value, kind) or (kind is list and not names_in_list):
            raise _damaged(file, f"{name} is not what it should be")
    return description


def _layout(columns: dict[str, Any], file: Path) -> FeatureLayout:
    for name, ends in columns.items():
        if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, int) for end in ends):
            raise _damaged(file, f"the columns of {name} are not what they should be")
    try:
        return FeatureLayout.from_json(columns)
    except UsageError as error:
        raise _damaged(file, str(error)) from None


def _check_tensors(tensors: dict[str, Tensor], width: int, classes: int, file: Path) -> None:
    vectors = tensors.get("vectors")
    labels = tensors.get("labels")
    latents = tensors.get("latents")
    if vectors is None or labels is None or set(tensors) - {"vectors", "labels", "latents"}:
        raise _damaged(file, f"it holds {', '.join(sorted(tensors)) or 'nothing'}, not vectors and labels")

    if vectors.dtype != torch.float32 or vectors.dim() != 2 or vectors.shape[1] != width:
        raise _damaged(file, f"its vectors are not of shape (n, {width})")
    if labels.dtype != torch.int64 or labels.shape != vectors.shape[:1]:
        raise _damaged(file, "not one label for each vector")
    if bool((labels < 0).any()) or bool((labels >= classes).any()):
        raise _damaged(file, f"labels must lie in 0 .. {classes - 1}")
    if latents is not None and (latents.dtype != torch.float32 or latents.shape[:1] != vectors.shape[:1]):
        raise _damaged(file, "not one latent for each vector")

    for name, values in tensors.items():
        if not torch.isfinite(values).all():
            raise _damaged(file, f"{name} hold NaN or infinite values")


def _damaged(file: Path, what: str) -> ModelError:
    return ModelError(f"the outliers {file} are damaged: {what}")
