"""Datasets and streams of images -> references: torch datasets, ImageFolder, rows of Hugging Face, generators.

An item is a picture, a tuple that begins with one (image, label), a mapping with one under ``image`` or ``img``, the
bytes of an image file, an open file, a path, or an array of one image. Needs neither torch nor the libraries that make
the datasets.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from ..exceptions import UnreadableImage, UsageError
from .image_refs import FileRef, HeldRef, ImageRef, MissingRef, printable
from .limits import MAX_BYTES
from .memory import is_array, is_file_content, is_open_file, is_tensor, picture_of, stream_ref

#: Keys under which a mapping may hold its picture.
PICTURE_KEYS = ("image", "img")


@dataclass(frozen=True)
class DatasetRef(ImageRef):
    """An item of a dataset, which is read in order on one thread: a dataset need not be safe on several."""

    dataset: Any = field(compare=False, repr=False)
    index: int
    sequential: ClassVar[bool] = True

    @property
    def identity(self) -> Hashable:
        return id(self.dataset), self.index  # a dataset may name an image twice, and has a row for each

    def read(self) -> bytes | Image.Image:
        return self.held().read()

    def held(self, max_bytes: int = MAX_BYTES) -> ImageRef:
        item = self.dataset[self.index]
        ref = ref_to(item, name_of(item) or self.path)
        return ref.held(max_bytes) if ref.sequential else ref


@dataclass(frozen=True)
class DatasetFileRef(FileRef):
    """The file behind an item of a dataset that adds nothing to it."""

    index: int

    @property
    def identity(self) -> Hashable:
        return self.file, self.index


def is_map_style(source: object) -> bool:
    """Whether ``source`` is a dataset with a length and items by number, and no list, array or mapping.

    Parameters
    ----------
    source : object

    Returns
    -------
    bool

    Examples
    --------
    >>> is_map_style(range(3)), is_map_style([1, 2, 3]), is_map_style({"a": 1})
    (True, False, False)
    """
    other = isinstance(source, str | os.PathLike | list | tuple | Mapping | Image.Image)
    if other or is_array(source) or is_file_content(source):
        return False
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")


def dataset_refs(dataset: Any, label: str = "dataset") -> list[ImageRef]:
    """A reference to each item of a map-style dataset.

    Parameters
    ----------
    dataset : object with ``__len__`` and ``__getitem__``
        The first item is read, to see what it is.
    label : str, default "dataset"
        Items without a file are named ``label[17]``.

    Returns
    -------
    list of ImageRef
        As many as the dataset has items. Where it lists its files (``samples`` or ``imgs``), these are the names.

    Raises
    ------
    UsageError
        The items are tensors that a transform has prepared already.
    """
    count = len(dataset)
    if count:
        try:
            first = dataset[0]
        except Exception:  # becomes a row with a reason, like any other item
            first = None
        check_not_prepared(first)

    files = _files_of(dataset)
    if files is None or len(files) != count:
        return [DatasetRef(f"{label}[{i}]", dataset, i) for i in range(count)]
    if _gives_plain_files(dataset):
        return [DatasetFileRef(printable(file), os.fspath(file), i) for i, file in enumerate(files)]
    return [DatasetRef(printable(file), dataset, i) for i, file in enumerate(files)]


def iter_refs(items: Iterable[object], label: str = "dataset") -> Iterator[ImageRef]:
    """References to the items of a stream, as they come; each holds its image.

    Parameters
    ----------
    items : iterable
    label : str, default "dataset"
        Items without a name of their own are named ``label[17]``.

    Yields
    ------
    ImageRef

    Raises
    ------
    UsageError
        The first item is a tensor that a transform has prepared already.
    """
    for i, item in enumerate(items):
        if isinstance(item, ImageRef):
            yield item
            continue
        if i == 0:
            check_not_prepared(item)

        name = name_of(item) or f"{label}[{i}]"
        try:
            yield ref_to(item, name)
        except UnreadableImage as error:
            yield MissingRef(name, str(error))


def is_image(item: object) -> bool:
    """Whether an item of a stream is one image, of whatever kind; its content may still be bad."""
    if isinstance(item, ImageRef):
        return True
    picture = _picture_in(item)
    if is_tensor(picture) and picture.is_floating_point():
        return picture.ndim == 3  # two dimensions would be a batch of vectors
    if is_array(picture):
        return picture.ndim in (2, 3)
    named_or_open = isinstance(picture, Image.Image | str | os.PathLike) or is_file_content(picture)
    return named_or_open or _is_encoded(picture)


def check_not_prepared(item: object) -> None:
    """Refuse an item with float tensors, whose scale is not known (``UsageError``)."""
    tensor = item.get("pixel_values") if isinstance(item, Mapping) else None
    if tensor is None:
        tensor = _picture_in(item)

    if is_tensor(tensor) and tensor.is_floating_point() and tensor.ndim >= 3:
        raise UsageError(
            f"the items are float tensors of shape {tuple(tensor.shape)}: wrap the dataset in a DataLoader, so that "
            "batches (B, C, H, W) come, or drop its transform, so that pictures come"
        )


def ref_to(item: object, name: str) -> ImageRef:
    """A reference to the picture in an item of a dataset.

    Parameters
    ----------
    item : object
    name : str

    Returns
    -------
    ImageRef
        Of a path, to its file; else it holds the picture, or the bytes of its file.

    Raises
    ------
    UnreadableImage
        The item holds no image.

    Examples
    --------
    >>> ref_to((Image.new("L", (4, 2)), 7), "first").read().size
    (4, 2)
    """
    picture = _picture_in(item)
    if _is_encoded(picture):
        picture = picture["path"] if picture["bytes"] is None else picture["bytes"]

    if isinstance(picture, Image.Image | bytes):
        return HeldRef(name, picture)
    if isinstance(picture, bytearray | memoryview):
        return HeldRef(name, bytes(picture))
    if isinstance(picture, str | os.PathLike):
        return FileRef(name, os.fspath(picture))
    if is_open_file(picture):
        return stream_ref(picture, name)

    if is_tensor(picture) and picture.is_floating_point() and picture.ndim == 3:
        raise UnreadableImage("a float tensor, which a transform has prepared: give it in a DataLoader")
    if is_array(picture):
        return HeldRef(name, picture_of(picture))
    if isinstance(item, Mapping):
        raise UnreadableImage(f"no picture under {' or '.join(map(repr, PICTURE_KEYS))}")
    raise UnreadableImage(f"not an image but a {type(picture).__name__}")


def name_of(item: object) -> str:
    """The path in an item of a dataset; empty if it has none."""
    picture = _picture_in(item)
    if _is_encoded(picture):
        picture = picture["path"]
    if isinstance(picture, str | os.PathLike):
        return printable(picture)

    path = item.get("path") if isinstance(item, Mapping) else None
    return printable(path) if isinstance(path, str | os.PathLike) else ""


def _picture_in(item: Any) -> Any:
    """What an item has in the place of the picture."""
    if isinstance(item, tuple | list) and item:
        item = item[0]  # (image, label)

    if isinstance(item, Mapping):
        for key in PICTURE_KEYS:
            if item.get(key) is not None:
                return item[key]
    return item


def _is_encoded(picture: object) -> bool:
    """Whether it is what Hugging Face gives for an image that is not decoded."""
    if not isinstance(picture, Mapping):
        return False
    return "bytes" in picture and "path" in picture


def _files_of(dataset: Any) -> Sequence[str | os.PathLike[str]] | None:
    """The files of a dataset's items, where it lists them in ``samples`` or ``imgs``; of a part of it as well."""
    whole = getattr(dataset, "dataset", None)
    indices = getattr(dataset, "indices", None)
    if whole is not None and indices is not None:  # a torch Subset
        all_files = _files_of(whole)
        return None if all_files is None else [all_files[i] for i in indices]

    samples = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if not isinstance(samples, list | tuple):
        return None

    files: list[str | os.PathLike[str]] = []
    for sample in samples:
        if not isinstance(sample, tuple | list) or not sample or not isinstance(sample[0], str | os.PathLike):
            return None
        files.append(sample[0])
    return files


def _gives_plain_files(dataset: Any) -> bool:
    """Whether a dataset is torchvision's own folder of images, without a transform or a loader of the user's."""
    if hasattr(dataset, "indices"):
        dataset = getattr(dataset, "dataset", None)

    module = type(dataset).__module__
    loader = getattr(dataset, "loader", None)
    is_default = (getattr(loader, "__module__", ""), getattr(loader, "__name__", "")) == (module, "default_loader")
    return module == "torchvision.datasets.folder" and is_default and getattr(dataset, "transforms", None) is None
