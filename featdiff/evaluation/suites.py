"""A suite file and a data folder -> the sets of images of a benchmark, and published numbers to compare with.

A suite is TOML. ``[sources.NAME]`` says where images are, ``[[tasks]]`` which of them are in-domain and which are not,
``[detectors.NAME]`` which detectors are compared with the default one, ``[students.NAME]`` which classifiers are
trained (:mod:`featdiff.evaluation.students`), ``[[published]]`` what papers report.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..exceptions import UsageError, did_you_mean
from ..files.toml import check_keys, read_toml
from .protocols import PROTOCOLS

#: In ``ood``: all folders and zip archives of the data folder, except ``train`` and ``test``.
EVERYTHING_ELSE = "*"


@dataclass(frozen=True)
class Source:
    """Where the images of a set are.

    With ``skip`` and ``limit``, one set can serve for both training and testing: its images are shuffled, in the same
    order every time.

    Parameters
    ----------
    path : tuple of str, optional
        Paths below the data folder. The first one that exists is used.
    imglist : str, optional
        An OpenOOD list (``path label`` on each line).
    root : str, optional
        Folder that the paths of ``imglist`` start from.
    torchvision : mapping, optional
        ``name`` of a class of ``torchvision.datasets``, and its keyword arguments.
    sklearn : str, optional
        Name of a set of pictures that comes with scikit-learn: ``digits``.
    classes : tuple of str, optional
        Use only these class folders, or these classes of a torchvision data set.
    skip : int, default 0
        Number of images to leave out.
    limit : int, default 0
        Largest number of images to take of the rest; 0: all.
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
    """One experiment of a suite. Sets are names of sources.

    Parameters
    ----------
    name : str
        Name of the task.
    train : str
        In-domain images to train on.
    test : str
        In-domain images to test on.
    ood : tuple of str
        OOD sets, each tested against ``test``; ``*`` stands for all other folders.
    protocols : tuple of str, default ("matched",)
        Names of protocols, see :mod:`featdiff.evaluation.protocols`.
    """

    name: str
    train: str
    test: str
    ood: tuple[str, ...]
    protocols: tuple[str, ...] = ("matched",)


@dataclass(frozen=True)
class Published:
    """A number from the literature.

    Parameters
    ----------
    method : str
        Name of the method.
    task : str
        Name of the task that it belongs to.
    auroc : float
        AUROC in percent.
    source : str
        Where it was published.
    protocol : str, default "as-published"
        Its protocol.
    ood : str, optional
        The OOD set. Default: the mean over the sets of the task.
    fpr95 : float, optional
        FPR@95TPR in percent.
    """

    method: str
    task: str
    auroc: float
    source: str
    protocol: str = "as-published"
    ood: str = ""
    fpr95: float | None = None


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Parameters
    ----------
    title : str
        Title of its tables.
    sources : mapping
        Sets of images by name.
    tasks : tuple of Task
        Experiments.
    detectors : mapping, optional
        Constructor arguments of detectors by name.
    published : tuple of Published, optional
        Numbers from the literature.
    students : mapping, optional
        Arguments of trained classifiers by name.
    """

    title: str
    sources: Mapping[str, Source]
    tasks: tuple[Task, ...]
    detectors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    students: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def load_suite(file: Path) -> Suite:
    """Read a suite.

    Parameters
    ----------
    file : Path
        A TOML file.

    Returns
    -------
    Suite

    Raises
    ------
    UsageError
        No such file, not TOML, an unknown or missing key, or a task that names an unknown source.
    """
    content = read_toml(file)
    check_keys(content, [*inspect.signature(Suite).parameters], str(file))

    sources = {}
    for name, table in _tables(content, "sources", file).items():
        sources[name] = _make(Source, table, f"{file}: sources.{name}")
        if sources[name].imglist and sources[name].classes:
            raise UsageError(f"{file}: sources.{name}: classes cannot be chosen from an imglist")

    tasks = [_make(Task, table, f"{file}: tasks") for table in _list(content, "tasks", file)]
    if not tasks:
        raise UsageError(f"{file}: a suite needs at least one task, [[tasks]]")
    for task in tasks:
        _check_task(task, list(sources), file)

    published = [_make(Published, table, f"{file}: published") for table in _list(content, "published", file)]
    tasks_by_name = {task.name: task for task in tasks}
    for number in published:
        _check_published(number, tasks_by_name, file)

    return Suite(
        title=content.get("title", file.stem),
        sources=sources,
        tasks=tuple(tasks),
        detectors=_tables(content, "detectors", file),
        published=tuple(published),
        students=_tables(content, "students", file),
    )


def _tables(content: dict[str, Any], name: str, file: Path) -> dict[str, Any]:
    """The tables ``[name.NAME]`` by their names."""
    tables = content.get(name, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise UsageError(f"{file}: {name} must be tables, [{name}.NAME]")
    return dict(tables)


def _list(content: dict[str, Any], name: str, file: Path) -> list[Any]:
    """The tables ``[[name]]`` in order."""
    tables = content.get(name, [])
    if not isinstance(tables, list):
        raise UsageError(f"{file}: {name} must be a list of tables, [[{name}]]")
    return tables


def _make(kind: Callable[..., Any], table: Any, where: str) -> Any:
    """A dataclass from its TOML table."""
    fields = inspect.signature(kind).parameters
    if not isinstance(table, dict):
        raise UsageError(f"{where}: must be a table")
    check_keys(table, list(fields), where)
    for name, parameter in fields.items():
        if parameter.default is inspect.Parameter.empty and name not in table:
            raise UsageError(f"{where}: lacks {name}")

    values = {}
    for name, value in table.items():
        values[name] = _checked(value, str(fields[name].annotation), name, where)
    return kind(**values)


def _checked(value: Any, annotation: str, name: str, where: str) -> Any:
    """A value of the annotated type; a single text may stand for a list of one."""
    if annotation.startswith("tuple"):
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(part, str) for part in values):
            raise UsageError(f"{where}: {name} must be text or a list of texts, not {value!r}")
        return tuple(values)

    types: dict[str, tuple[Any, str]] = {
        "str": (str, "text"),
        "Mapping": (dict, "a table"),
        "int": (int, "a whole number"),
    }
    expected, description = types.get(annotation.partition("[")[0], ((int, float), "a number"))
    is_valid = isinstance(value, expected)
    if annotation == "int" and is_valid:
        is_valid = not isinstance(value, bool) and value >= 0
    if not is_valid:
        raise UsageError(f"{where}: {name} must be {description}, not {value!r}")
    return value


def _check_task(task: Task, sources: list[str], file: Path) -> None:
    ood = [name for name in task.ood if name != EVERYTHING_ELSE]
    for name in (task.train, task.test, *ood):
        if name not in sources:
            hint = did_you_mean(name, sources)
            raise UsageError(f"{file}: task {task.name!r} names an unknown source {name!r}{hint}")
    for protocol in task.protocols:
        if protocol not in PROTOCOLS:
            raise UsageError(f"{file}: unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")


def _check_published(number: Published, tasks: Mapping[str, Task], file: Path) -> None:
    """Refuse a number that belongs to no table: it would never be shown."""
    task = tasks.get(number.task)
    if task is None or number.protocol not in task.protocols or number.ood not in ("", *task.ood):
        where = f"task {number.task!r}, ood {number.ood!r}, protocol {number.protocol!r}"
        raise UsageError(f"{file}: published {number.method!r}: the suite has no {where}")
