"""A suite file and a data folder -> what to train on, what to test on, and what others have published.

A suite is TOML. ``[sources.NAME]`` says where images are, ``[[tasks]]`` which of them are in-domain and which are not,
``[detectors.NAME]`` which detectors stand beside the default one, ``[students.NAME]`` which classifiers are trained
(:mod:`featdiff.evaluation.students`), ``[[published]]`` what papers report.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.references import ZIP_SUFFIXES, FileRef, ImageRef, list_images, printable, split_archive
from ..exceptions import UsageError, did_you_mean
from ..files.toml import check_keys, read_toml
from .protocols import PROTOCOLS

#: In ``ood``: every folder and zip archive below the data folder that is neither ``train`` nor ``test``.
EVERYTHING_ELSE = "*"


class NotThere(UsageError):
    """The images of a source are not where it says."""


@dataclass(frozen=True)
class Source:
    """Where the images of a set are.

    Parameters
    ----------
    path : paths below the data folder; the first that exists is taken
    imglist, root : an OpenOOD list (``path label`` on each line), and the folder its paths count from
    torchvision : ``name`` of a class of ``torchvision.datasets`` and its keyword arguments
    sklearn : name of a set of pictures that scikit-learn brings: digits
    classes : keep only these class folders, or these classes of a torchvision data set
    skip, limit : leave out so many images, and take at most so many of the rest, in an order that is shuffled the same
        way every time: with them, one set can serve for training and testing. 0: all.
    """

    path: tuple[str, ...] = ()
    imglist: str = ""
    root: str = ""
    torchvision: Mapping[str, Any] = field(default_factory=dict)
    sklearn: str = ""
    classes: tuple[str, ...] = ()
    skip: int = 0
    limit: int = 0


@dataclass(frozen=True)
class Task:
    """Train on ``train``, test on ``test`` against each of ``ood`` (names of sources)."""

    name: str
    train: str
    test: str
    ood: tuple[str, ...]
    protocols: tuple[str, ...] = ("matched",)


@dataclass(frozen=True)
class Published:
    """A number from the literature, in percent, for one set or (``ood`` empty) for the mean of a task's sets."""

    method: str
    task: str
    auroc: float
    source: str
    protocol: str = "as-published"
    ood: str = ""
    fpr95: float | None = None


@dataclass(frozen=True)
class Suite:
    """What a benchmark runs."""

    title: str
    sources: Mapping[str, Source]
    tasks: tuple[Task, ...]
    detectors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    students: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def load_suite(file: Path) -> Suite:
    """Read a suite.

    Raises
    ------
    UsageError
        No such file, not TOML, an unknown or missing key, or a task that names an unknown source.
    """
    content = read_toml(file)
    check_keys(content, [*inspect.signature(Suite).parameters], str(file))
    sources = {name: _make(Source, part, f"{file}: sources.{name}") for name, part in _table(content, "sources", file)}
    tasks = [_make(Task, part, f"{file}: tasks") for part in _list(content, "tasks", file)]
    published = [_make(Published, part, f"{file}: published") for part in _list(content, "published", file)]
    if not tasks:
        raise UsageError(f"{file}: a suite needs at least one task, [[tasks]]")
    for name, source in sources.items():
        if source.imglist and source.classes:
            raise UsageError(f"{file}: sources.{name}: classes cannot be chosen from an imglist")
    for task in tasks:
        _check_task(task, list(sources), file)
    for number in published:
        _check_published(number, {task.name: task for task in tasks}, file)
    return Suite(
        content.get("title", file.stem),
        sources,
        tuple(tasks),
        dict(_table(content, "detectors", file)),
        tuple(published),
        dict(_table(content, "students", file)),
    )


def _table(content: dict[str, Any], name: str, file: Path) -> list[tuple[str, Any]]:
    found = content.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(part, dict) for part in found.values()):
        raise UsageError(f"{file}: {name} must be tables, [{name}.NAME]")
    return list(found.items())


def _list(content: dict[str, Any], name: str, file: Path) -> list[Any]:
    found = content.get(name, [])
    if not isinstance(found, list):
        raise UsageError(f"{file}: {name} must be a list of tables, [[{name}]]")
    return found


def _make(kind: Callable[..., Any], content: Any, where: str) -> Any:
    """A dataclass from its TOML table."""
    fields = inspect.signature(kind).parameters
    if not isinstance(content, dict):
        raise UsageError(f"{where}: must be a table")
    check_keys(content, list(fields), where)
    for name, parameter in fields.items():
        if parameter.default is inspect.Parameter.empty and name not in content:
            raise UsageError(f"{where}: lacks {name}")
    return kind(**{name: _checked(value, str(fields[name].annotation), name, where) for name, value in content.items()})


def _checked(value: Any, annotation: str, name: str, where: str) -> Any:
    """A value of the annotated kind; a single text may stand for a list of one."""
    if annotation.startswith("tuple"):
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(part, str) for part in values):
            raise UsageError(f"{where}: {name} must be text or a list of texts, not {value!r}")
        return tuple(values)
    kinds: dict[str, tuple[Any, str]] = {
        "str": (str, "text"),
        "Mapping": (dict, "a table"),
        "int": (int, "a whole number"),
    }
    kind, what = kinds.get(annotation.partition("[")[0], ((int, float), "a number"))
    if not isinstance(value, kind) or (annotation == "int" and (value is True or value is False or value < 0)):
        raise UsageError(f"{where}: {name} must be {what}, not {value!r}")
    return value


def _check_task(task: Task, sources: list[str], file: Path) -> None:
    for name in (task.train, task.test, *(name for name in task.ood if name != EVERYTHING_ELSE)):
        if name not in sources:
            raise UsageError(
                f"{file}: task {task.name!r} names an unknown source {name!r}{did_you_mean(name, sources)}"
            )
    for protocol in task.protocols:
        if protocol not in PROTOCOLS:
            raise UsageError(f"{file}: unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")


def _check_published(number: Published, tasks: Mapping[str, Task], file: Path) -> None:
    """A number that belongs to no table would silently never show."""
    task = tasks.get(number.task)
    if task is None or number.protocol not in task.protocols or number.ood not in ("", *task.ood):
        where = f"task {number.task!r}, ood {number.ood!r}, protocol {number.protocol!r}"
        raise UsageError(f"{file}: published {number.method!r}: the suite has no {where}")


def find_images(source: Source, data: Path, download: bool = False) -> list[ImageRef]:
    """The images of a source.

    Parameters
    ----------
    data : folder that paths and downloads count from
    download : bool
        Whether torchvision may fetch what is not there.

    Raises
    ------
    NotThere
        They are not there, and how they could be had.
    UsageError
        The source makes no sense: a class or data set that does not exist.
    """
    found = _all_images(source, data, download)
    if not source.skip and not source.limit:
        return found
    order = np.random.default_rng(0).permutation(len(found))[source.skip :]
    chosen = np.sort(order[: source.limit] if source.limit else order)
    if not len(chosen):
        raise NotThere(f"there are {len(found):,} images, and {source.skip:,} are left out")
    return [found[i] for i in chosen]


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
    wanted = " or ".join([*source.path, *([source.imglist] if source.imglist else [])])
    raise NotThere(f"not below {data}: {wanted or 'no place is named'}")


def everything_else(data: Path) -> dict[str, Source]:
    """Folders and zip archives of the data folder, but for ``train`` and ``test``, by name."""
    found: dict[str, Source] = {}
    for entry in sorted(data.iterdir()):
        zipped = entry.is_file() and entry.name.lower().endswith(ZIP_SUFFIXES)
        name = entry.name[: -len(".zip")] if zipped else entry.name
        if (zipped or entry.is_dir()) and not entry.name.startswith(".") and name not in ("train", "test"):
            found[entry.name if name in found else name] = Source(path=(entry.name,))
    return found


def _from_path(path: Path, classes: tuple[str, ...]) -> list[ImageRef]:
    if classes:  # a class without images is a mistake that must not pass
        return [ref for name in classes for ref in list_images(str(path / name))]
    try:
        return list_images(str(path))
    except UsageError as error:
        raise NotThere(str(error)) from None


def _from_imglist(file: Path, root: Path) -> list[ImageRef]:
    names = [line.rpartition(" ")[0] or line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not any((root / name).exists() for name in names):
        raise NotThere(f"none of the {len(names):,} files of {file} is below {root}")
    return [FileRef(printable(root / name), str(root / name)) for name in names]


def _from_sklearn(name: str) -> list[ImageRef]:
    if name != "digits":
        raise UsageError(f"scikit-learn brings no set of pictures {name!r}; known: digits")
    from sklearn.datasets import load_digits

    grey = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    return list_images([Image.fromarray(digit) for digit in grey])


@dataclass(frozen=True)
class DatasetRef(ImageRef):
    """One picture of a torchvision data set, read when it is needed."""

    dataset: Any
    index: int

    def read(self) -> Image.Image:
        picture: Image.Image = self.dataset[self.index][0]
        return picture


def _from_torchvision(source: Source, data: Path, download: bool) -> list[ImageRef]:
    from torchvision import datasets

    options = dict(source.torchvision)
    name = str(options.pop("name", ""))
    if name not in datasets.__all__:
        raise UsageError(f"torchvision has no data set {name!r}{did_you_mean(name, list(datasets.__all__))}")
    kind = getattr(datasets, name)
    if "download" in inspect.signature(kind).parameters:
        options["download"] = download
    try:
        dataset = kind(str(data), **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        hint = "" if download else ", or let it be fetched with --download"
        reason = " ".join(str(error).split())
        raise NotThere(f"torchvision's {name} is not below {data} ({reason}): put it there{hint}") from None
    wanted = _labels(dataset, name, source.classes)
    return [DatasetRef(f"{name}[{i}]", dataset, i) for i in range(len(dataset)) if wanted is None or wanted(i)]


def _labels(dataset: Any, name: str, classes: tuple[str, ...]) -> Callable[[int], bool] | None:
    """Which pictures are of these classes; None: all are wanted."""
    if not classes:
        return None
    known = getattr(dataset, "classes", [])
    targets: Any = next(
        (getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), []
    )
    if len(targets) != len(dataset):
        raise UsageError(f"torchvision's {name} does not tell the classes of its pictures")
    for label in classes:
        if label not in known:
            raise UsageError(f"torchvision's {name} has no class {label!r}{did_you_mean(label, list(known))}")
    numbers = {known.index(label) for label in classes}
    return lambda i: int(targets[i]) in numbers
