"""Which images belong together: bursts, frames of a video, pictures of one part or of one patient.

Images of one group are never on two sides of a split: near-copies of training images make calibration scores too small,
and false-alarm rates wrong.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..exceptions import UsageError
from ..files.text import from_spreadsheet

#: Ways to say which images belong together: one of the words in :data:`WORDS`, a pattern on the path, ``gap:N``, a CSV
#: file, a label for each image, or labels by path.
Groups = str | os.PathLike[str] | Sequence[Hashable] | Mapping[str, Hashable]
#: Near-copies are looked for; each image is a group of its own; the folder of an image is its group.
AUTO, NONE, FOLDER = "auto", "none", "folder"
WORDS = (AUTO, NONE, FOLDER)
_GAP = "gap:"
_HELP = "auto, none, folder, gap:N, a regular expression with a group in brackets, or a .csv file of path,group"


def check_groups(groups: object) -> None:
    """Refuse what can be no description of groups (``UsageError``)."""
    if groups is None or isinstance(groups, Mapping):
        return
    if isinstance(groups, str | os.PathLike):
        _parsed(os.fspath(groups))
        return
    if not isinstance(groups, Sequence) and not hasattr(groups, "__array__"):
        kind = type(groups).__name__
        raise UsageError(f"groups must be {_HELP}, or a label for each image, not of type {kind}", argument="groups")


def is_word(groups: object, word: str) -> bool:
    """Whether ``groups`` are this word; an array would compare each of its labels with it."""
    return isinstance(groups, str) and groups == word


def label_images(
    groups: Groups, paths: Sequence[str], positions: Sequence[int] | None = None, total: int | None = None
) -> list[Hashable]:
    """The group of each image.

    Parameters
    ----------
    groups : str, path, sequence or mapping
        ``folder``: the folder that the image lies in. ``none``: each image is a group. ``gap:120``: images of a folder
        are sorted by the last number in their names, and where two numbers differ by more than 120 another group
        begins. A regular expression: what its brackets find in the path. A ``.csv`` or ``.tsv`` file: the group that
        it gives for the path (columns ``path`` and ``group``; paths as they are printed, or seen from the file's
        folder; an image without a group is one of its own, as in the table of an audit). A mapping: labels by path. A
        sequence: a label for each image.
    paths : sequence of str
        Names of the images, as :func:`featdiff.data.references.list_images` gives them.
    positions : sequence of int, optional
        Which of ``total`` images these are, where some could not be read; needed for a sequence of labels.
    total : int, optional

    Returns
    -------
    list of hashable
        One label for each path.

    Raises
    ------
    UsageError
        A description that does not fit the images.

    Examples
    --------
    >>> label_images("gap:10", ["a/img_001.jpg", "a/img_002.jpg", "a/img_040.jpg"])
    [('a', 0), ('a', 0), ('a', 1)]
    >>> label_images(r"patient(\\d+)", ["patient7_left.png", "patient7_right.png", "patient8_left.png"])
    [('7',), ('7',), ('8',)]
    """
    if isinstance(groups, Mapping):
        return [_looked_up(groups, path, path) for path in paths]
    if not isinstance(groups, str | os.PathLike):
        return _in_order(groups, positions or range(len(paths)), len(paths) if total is None else total)

    kind, value = _parsed(os.fspath(groups))
    if kind == NONE:
        return list(range(len(paths)))
    if kind == FOLDER:
        return [_folder(path) for path in paths]
    if kind == _GAP:
        return _by_gap(paths, value)
    if kind == "file":
        return _from_file(value, paths)
    if kind == AUTO:
        raise UsageError("groups='auto' looks at features, which there are none of here", argument="groups")
    return [_captured(value, path) for path in paths]


def numbered(labels: Sequence[Hashable], digests: Sequence[bytes]) -> np.ndarray:
    """Labels of N images -> a number for each of the different contents, in the order in which these come first.

    Groups that share a content are one.

    Parameters
    ----------
    labels : sequence of hashable
        Group of each image.
    digests : sequence of bytes
        Content of each image.

    Returns
    -------
    ndarray of int
        One for each different digest.
    """
    contents = {digest: i for i, digest in enumerate(dict.fromkeys(digests))}
    names = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    rows = [contents[digest] for digest in digests]
    columns = [len(contents) + names[label] for label in labels]
    return connected(len(contents) + len(names), rows, columns)[: len(contents)]


def connected(n: int, ends: Sequence[int] | np.ndarray, others: Sequence[int] | np.ndarray) -> np.ndarray:
    """Links between ``n`` things, each from one of ``ends`` to one of ``others`` -> the group of each thing (n,)."""
    from scipy.sparse import coo_array  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    links = coo_array((np.ones(len(ends)), (ends, others)), shape=(n, n))
    return np.asarray(connected_components(links, directed=False)[1])


def _parsed(text: str) -> tuple[str, Any]:
    """What a description means: its kind, and its value."""
    if text in WORDS:
        return text, None
    if text.startswith(_GAP):
        gap = text.removeprefix(_GAP)
        if not gap.isascii() or not gap.isdigit():
            raise UsageError(f"groups {text!r}: a whole number must follow gap:, like gap:120", argument="groups")
        return _GAP, int(gap)
    if Path(text).suffix.lower() in (".csv", ".tsv"):
        return "file", Path(text)

    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UsageError(f"groups {text!r} is none of {_HELP}: {error}", argument="groups") from None
    if not pattern.groups:
        raise UsageError(
            f"groups {text!r} has no brackets that say which part of the path names the group: one of {_HELP}",
            argument="groups",
        )
    return "pattern", pattern


def _folder(path: str) -> str:
    return str(PurePosixPath(path.replace(os.sep, "/")).parent)


def _captured(pattern: re.Pattern[str], path: str) -> Hashable:
    match = pattern.search(path)
    if match is None:
        raise UsageError(f"groups {pattern.pattern!r} is not found in the path {path}", argument="groups")
    return match.groups()


def _by_gap(paths: Sequence[str], gap: int) -> list[Hashable]:
    """The folder, and how many gaps come before the last number in the name."""
    numbers: dict[str, list[int]] = {}
    own = []
    for path in paths:
        digits = re.findall(r"\d+", PurePosixPath(path.replace(os.sep, "/")).stem)
        if not digits:
            raise UsageError(f"groups gap:{gap} needs a number in each name, and {path} has none", argument="groups")
        own.append(int(digits[-1]))
        numbers.setdefault(_folder(path), []).append(own[-1])

    labels: list[Hashable] = []
    starts = {folder: _starts(np.sort(members), gap) for folder, members in numbers.items()}
    for path, number in zip(paths, own, strict=True):
        folder = _folder(path)
        labels.append((folder, int(np.searchsorted(starts[folder], number, side="right"))))
    return labels


def _starts(numbers: np.ndarray, gap: int) -> np.ndarray:
    """Ascending numbers -> those that come after a gap."""
    return numbers[1:][np.diff(numbers) > gap]


def _from_file(file: Path, paths: Sequence[str]) -> list[Hashable]:
    """Labels from the columns ``path`` and ``group`` of a table."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
            reader = csv.DictReader(stream, delimiter=delimiter)
            if not {"path", "group"} <= set(reader.fieldnames or ()):
                raise UsageError(f"{file} needs a first line that names the columns path and group", argument="groups")
            cells: dict[str, Hashable] = {}
            for row in reader:
                if row["path"]:
                    cells[row["path"]] = row["group"] or (row["path"],)
    except OSError as error:
        raise UsageError(f"{file}: {(error.strerror or str(error)).lower()}", argument="groups") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file} is no table of text: {error}", argument="groups") from None

    labels = {os.path.normpath(from_spreadsheet(cell)): label for cell, label in cells.items()}
    for cell, label in cells.items():  # a table that people wrote may hold names as they are
        labels.setdefault(os.path.normpath(cell), label)
    for path in list(labels):  # also as seen from the file's own folder
        labels.setdefault(os.path.normpath(file.parent / path), labels[path])
        labels.setdefault(os.path.abspath(file.parent / path), labels[path])
    return [_looked_up(labels, os.path.normpath(path), f"{path} (of {file})") for path in paths]


def _looked_up(labels: Mapping[str, Hashable], path: str, name: str) -> Hashable:
    if path not in labels:
        raise UsageError(f"groups give no label for {name}", argument="groups")
    return labels[path]


def _in_order(labels: Any, positions: Sequence[int], total: int) -> list[Hashable]:
    if hasattr(labels, "__array__"):  # an array, a column of a table, or a tensor, whose numbers do not compare as keys
        labels = np.asarray(labels).tolist()
    if len(labels) != total:
        raise UsageError(f"groups give {len(labels):,} labels, and there are {total:,} images", argument="groups")
    chosen = [labels[position] for position in positions]
    for label in chosen:
        if not isinstance(label, Hashable):
            raise UsageError(f"groups give the label {label!r}, which cannot name a group", argument="groups")
    return chosen
