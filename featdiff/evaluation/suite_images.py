"""A source of a suite and the data folder -> references of its images."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.references import ZIP_SUFFIXES, FileRef, ImageRef, list_images, printable, split_archive
from ..exceptions import UsageError, did_you_mean
from .suites import Source


class NotThere(UsageError):
    """The images of a source are not where it says."""


def find_images(source: Source, data: Path, download: bool = False) -> list[ImageRef]:
    """The images of a source.

    Parameters
    ----------
    source : Source
        Where they are.
    data : Path
        Folder that paths and downloads start from.
    download : bool, default False
        Whether torchvision may download what is missing.

    Returns
    -------
    list of ImageRef

    Raises
    ------
    NotThere
        The images are missing; the message says where they should be.
    UsageError
        A class or data set that does not exist.
    """
    images = _all_images(source, data, download)
    if not source.skip and not source.limit:
        return images

    order = np.random.default_rng(0).permutation(len(images))[source.skip :]
    chosen = np.sort(order[: source.limit] if source.limit else order)
    if not len(chosen):
        raise NotThere(f"there are {len(images):,} images, and {source.skip:,} are left out")
    return [images[i] for i in chosen]


def _all_images(source: Source, data: Path, download: bool) -> list[ImageRef]:
    for path in source.path:
        if (data / path).exists() or split_archive(str(data / path)):
            return _from_path(data / path, source.classes)
    if source.imglist and (data / source.imglist).exists():
        return _from_imglist(data / source.imglist, data / source.root)
    if source.torchvision:
        return _from_torchvision(source, data, download)
    if source.sklearn:
        return _from_sklearn(source.sklearn)

    places = [*source.path]
    if source.imglist:
        places.append(source.imglist)
    raise NotThere(f"not below {data}: {' or '.join(places) or 'no place is named'}")


def everything_else(data: Path) -> dict[str, Source]:
    """The folders and zip archives of a data folder, except ``train`` and ``test``.

    Parameters
    ----------
    data : Path
        The data folder.

    Returns
    -------
    dict
        Sources by the name of the folder, or of the archive without ``.zip``.
    """
    sources: dict[str, Source] = {}
    for entry in sorted(data.iterdir()):
        is_zip = entry.is_file() and entry.name.lower().endswith(ZIP_SUFFIXES)
        if entry.name.startswith(".") or not (is_zip or entry.is_dir()):
            continue

        name = entry.name[: -len(".zip")] if is_zip else entry.name
        if name in ("train", "test"):
            continue
        if name in sources:  # a folder and an archive of one name: the archive is listed with its ending
            name = entry.name
        sources[name] = Source(path=(entry.name,))
    return sources


def _from_path(path: Path, classes: tuple[str, ...]) -> list[ImageRef]:
    if classes:
        # a class without images is a mistake in the suite, not a missing set: the error is passed on
        return [ref for name in classes for ref in list_images(str(path / name))]
    try:
        return list_images(str(path))
    except UsageError as error:
        raise NotThere(str(error)) from None


def _from_imglist(file: Path, root: Path) -> list[ImageRef]:
    """The files of an OpenOOD list: a path, which may contain spaces, and a label on each line."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = [line.rpartition(" ")[0] or line for line in lines]
    if not any((root / name).exists() for name in names):
        raise NotThere(f"none of the {len(names):,} files of {file} is below {root}")
    return [FileRef(printable(root / name), str(root / name)) for name in names]


def _from_sklearn(name: str) -> list[ImageRef]:
    if name != "digits":
        raise UsageError(f"scikit-learn has no set of pictures {name!r}; known: digits")
    from sklearn.datasets import load_digits

    grey = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    return list_images([Image.fromarray(digit) for digit in grey])


@dataclass(frozen=True)
class DatasetRef(ImageRef):
    """One picture of a torchvision data set, read when it is needed.

    Parameters
    ----------
    path : str
        Its name in reports: ``NAME[INDEX]``.
    dataset : torchvision data set
        The set that it belongs to.
    index : int
        Its index there.
    """

    dataset: Any
    index: int

    def read(self) -> Image.Image:
        """The decoded picture."""
        picture: Image.Image = self.dataset[self.index][0]
        return picture


def _from_torchvision(source: Source, data: Path, download: bool) -> list[ImageRef]:
    from torchvision import datasets

    options = dict(source.torchvision)
    name = str(options.pop("name", ""))
    if name not in datasets.__all__:
        raise UsageError(f"torchvision has no data set {name!r}{did_you_mean(name, list(datasets.__all__))}")
    dataset_class = getattr(datasets, name)
    if "download" in inspect.signature(dataset_class).parameters:
        options["download"] = download

    try:
        dataset = dataset_class(str(data), **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        hint = "" if download else ", or let it be downloaded with download=True"
        raise NotThere(f"torchvision's {name} is not below {data} ({reason}): put it there{hint}") from None

    indices = _of_classes(dataset, name, source.classes) if source.classes else range(len(dataset))
    return [DatasetRef(f"{name}[{i}]", dataset, i) for i in indices]


def _of_classes(dataset: Any, name: str, classes: tuple[str, ...]) -> list[int]:
    """Indices of the pictures of these classes."""
    targets: Any = []
    for attribute in ("targets", "labels", "_labels"):  # torchvision has no common name for them
        if hasattr(dataset, attribute):
            targets = getattr(dataset, attribute)
            break
    if len(targets) != len(dataset):
        raise UsageError(f"torchvision's {name} does not tell the classes of its pictures")

    known = list(getattr(dataset, "classes", []))
    for label in classes:
        if label not in known:
            raise UsageError(f"torchvision's {name} has no class {label!r}{did_you_mean(label, known)}")
    numbers = {known.index(label) for label in classes}
    return [i for i, target in enumerate(targets) if int(target) in numbers]
