"""The result for a set of images: one row per image, columns that stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, overload

import numpy as np

from ..exceptions import UsageError
from .fdr import fdr_threshold

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

#: Columns of every table that featdiff writes; ``p_value_<name>`` follow where the verdict joins several scores, then
#: ``layer_<name>``, one per layer.
COLUMNS = ("path", "status", "reason", "ood_score", "p_value", "is_ood")
#: A further column, where the flags of a whole batch were asked for; see :meth:`Scores.fdr_flags`.
FDR_FLAG = "fdr_flag"
OK = "ok"
UNREADABLE = "unreadable"
ERROR = "error"
#: Rows that a notebook shows.
_MOST_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """The result for one image.

    Attributes
    ----------
    path : str
        The name of the image.
    status : {"ok", "unreadable", "error"}
    reason : str
        Why the image is unreadable or an error. Of one that is ``ok``, a note if there is one: "page 1 of 3 was read".
    ood_score : float
        Higher = more OOD; NaN for an unreadable image, not finite for an error.
    p_value : float
        In (0, 1], small = OOD; NaN for an unreadable image.
    is_ood : bool
        Whether the image was flagged. An error is.
    layers : dict of str to float
        The score of each layer, in in-domain standard deviations.
    extra : dict of str to str
        Further columns of text.
    p_values : dict of str to float
        Of the scores that the verdict joins (``global``, ``local``), where it joins any.
    """

    path: str
    status: str
    reason: str
    ood_score: float
    p_value: float
    is_ood: bool
    layers: dict[str, float]
    extra: dict[str, str] = field(default_factory=dict)
    p_values: dict[str, float] = field(default_factory=dict)


@dataclass(repr=False)
class Scores:
    """Scores of N images, in the order in which the images were given.

    Rows are read by number (``scores[3]``) or one after the other (``for row in scores``); slices, masks and arrays of
    numbers give a part of the result.

    Attributes
    ----------
    path : list of str
        Names of the images.
    status : list of str
        ``ok``, ``unreadable`` or ``error``. Unreadable images have NaN scores and are not flagged. An error is an image
        that was read, but whose score is not finite: it is flagged with the smallest p-value, lest it pass as ordinary.
    reason : list of str
        Why an image is unreadable or an error. Empty for most others; of some, a note such as ``page 1 of 3 was read``.
    ood_score : (N,) float
        Higher = more OOD, about 0 +- 1 for in-domain images.
    p_value : (N,) float
        Conformal p-values, in (0, 1]; small = OOD.
    is_ood : (N,) bool
        ``p_value <= fpr``.
    layers : dict of str to (N,) float
        The score of each layer, in in-domain standard deviations.
    fpr : float, optional
        The false-alarm rate behind ``is_ood``.
    extra : dict of str to list of str
        Further columns of text, for example ``group`` and ``nearest`` of an audit.
    known : (N,) bool, optional
        Which images the model has in its bank of training images; not written to files.
    p_values : dict of str to (N,) float
        Where the verdict joins several scores (``global``, ``local``): the p-value of each, by name.

    Examples
    --------
    >>> import numpy as np
    >>> from featdiff import Scores
    >>> scores = Scores(
    ...     path=["cat.png", "sign.png", "torn.png"],
    ...     status=["ok", "ok", "unreadable"],
    ...     reason=["", "", "empty file (0 bytes)"],
    ...     ood_score=np.array([0.2, 7.5, np.nan]),
    ...     p_value=np.array([0.4, 0.01, np.nan]),
    ...     is_ood=np.array([False, True, False]),
    ...     layers={"stage4": np.array([0.1, 6.0, np.nan])},
    ...     fpr=0.05,
    ... )
    >>> scores
    Scores(3 images: 1 OOD at fpr 0.05, 1 unreadable)
    >>> scores[1].path, scores[1].p_value
    ('sign.png', 0.01)
    >>> scores[scores.is_ood].path
    ['sign.png']
    >>> [row.path for row in scores.sorted()]
    ['sign.png', 'cat.png', 'torn.png']
    """

    path: list[str]
    status: list[str]
    reason: list[str]
    ood_score: np.ndarray
    p_value: np.ndarray
    is_ood: np.ndarray
    layers: dict[str, np.ndarray]
    fpr: float | None = None
    extra: dict[str, list[str]] = field(default_factory=dict)
    known: np.ndarray | None = None
    p_values: dict[str, np.ndarray] = field(default_factory=dict)

    def __repr__(self) -> str:
        rate = "" if self.fpr is None else f" at fpr {self.fpr:g}"
        others = ""
        for status, word in ((UNREADABLE, "unreadable"), (ERROR, "failed")):
            count = self.status.count(status)
            others += f", {count:,} {word}" if count else ""
        return f"Scores({counted(len(self))}: {self.flagged:,} OOD{rate}{others})"

    @property
    def flagged(self) -> int:
        """How many images have a valid score and are flagged."""
        return sum(bool(flag) and status == OK for flag, status in zip(self.is_ood, self.status, strict=True))

    def _unreadable(self) -> np.ndarray:
        """(N,) bool."""
        return np.array([status == UNREADABLE for status in self.status], dtype=bool)

    # ---- rows and parts ----

    def __len__(self) -> int:
        return len(self.path)

    def __iter__(self) -> Iterator[Row]:
        for i in range(len(self)):
            yield self._row(i)

    @overload
    def __getitem__(self, index: int | np.integer) -> Row: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | Sequence[bool] | np.ndarray) -> Scores: ...
    def __getitem__(
        self, index: int | np.integer | slice | Sequence[int] | Sequence[bool] | np.ndarray
    ) -> Row | Scores:
        """One row, or a part of the result.

        Parameters
        ----------
        index : int, slice, (N,) bool, or (n,) int
            As for a NumPy array of one dimension.

        Returns
        -------
        Row or Scores
            A row for a single number, else the chosen rows in the chosen order.

        Raises
        ------
        IndexError
            There is no such row, or a mask has another length.
        """
        positions = np.arange(len(self))[index]
        if isinstance(index, int | np.integer) and not isinstance(index, bool):
            return self._row(int(positions))
        if positions.ndim != 1:
            raise IndexError(f"rows are chosen by a number, a slice, a mask or a list of numbers, not by {index!r}")
        return self._take(positions)

    def _row(self, i: int) -> Row:
        return Row(
            path=self.path[i],
            status=self.status[i],
            reason=self.reason[i],
            ood_score=float(self.ood_score[i]),
            p_value=float(self.p_value[i]),
            is_ood=bool(self.is_ood[i]),
            layers={name: float(values[i]) for name, values in self.layers.items()},
            extra={name: texts[i] for name, texts in self.extra.items()},
            p_values={name: float(values[i]) for name, values in self.p_values.items()},
        )

    def _take(self, positions: np.ndarray) -> Scores:
        return Scores(
            path=[self.path[i] for i in positions],
            status=[self.status[i] for i in positions],
            reason=[self.reason[i] for i in positions],
            ood_score=self.ood_score[positions],
            p_value=self.p_value[positions],
            is_ood=self.is_ood[positions],
            layers={name: values[positions] for name, values in self.layers.items()},
            fpr=self.fpr,
            extra={name: [texts[i] for i in positions] for name, texts in self.extra.items()},
            known=None if self.known is None else self.known[positions],
            p_values={name: values[positions] for name, values in self.p_values.items()},
        )

    def sorted(self) -> Scores:
        """The same rows, strangest first.

        By p-value, small ones first; equal ones by score, high ones first; then in their present order. Unreadable
        images come last, and errors before others of the same p-value.
        """
        return self._take(strangest_first(self.ood_score, self.p_value, self._unreadable()))

    def fdr_flags(self, level: float) -> np.ndarray:
        """Flags of the whole batch, among which the share of false ones is at most ``level`` on average.

        Where ``is_ood`` bounds the share of normal images that are flagged, this bounds the share of normal images
        among the flagged ones; see :func:`featdiff.verdicts.fdr.fdr_threshold`.

        Parameters
        ----------
        level : float
            In (0, 1).

        Returns
        -------
        (N,) bool
            False for unreadable images.

        Raises
        ------
        UsageError
            A level outside (0, 1).
        """
        return np.asarray(self.p_value <= fdr_threshold(self.p_value, level))

    # ---- tables ----

    @property
    def columns(self) -> list[str]:
        """Column names of :meth:`rows` and :meth:`to_pandas`."""
        return columns_of(self.layers, self.extra, self.p_values)

    def rows(self) -> Iterator[dict[str, object]]:
        """One plain dict per image, as it is written to files.

        Numbers have seven digits; those that are missing or not finite are None.
        """
        for i, path in enumerate(self.path):
            cells: list[object] = [path, self.status[i], self.reason[i]]
            cells += [_plain(self.ood_score[i]), _plain(self.p_value[i])]
            cells.append(None if self.status[i] == UNREADABLE else bool(self.is_ood[i]))
            cells += [_plain(values[i]) for values in self.p_values.values()]
            cells += [texts[i] for texts in self.extra.values()]
            cells += [_plain(values[i]) for values in self.layers.values()]
            yield dict(zip(self.columns, cells, strict=True))

    def to_pandas(self) -> pandas.DataFrame:
        """A data frame of one row per image.

        Returns
        -------
        pandas.DataFrame
            With the columns :attr:`columns`. Of unreadable images, numbers are NaN and ``is_ood`` (of the type
            ``boolean``) is missing.

        Raises
        ------
        UsageError
            pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UsageError("to_pandas needs pandas: pip install pandas") from None

        unreadable = self._unreadable()
        is_ood = pandas.array(self.is_ood.astype(bool), dtype="boolean")
        is_ood[unreadable] = None

        data = {
            "path": self.path,
            "status": self.status,
            "reason": self.reason,
            "ood_score": np.where(unreadable, np.nan, self.ood_score),
            "p_value": np.where(unreadable, np.nan, self.p_value),
            "is_ood": is_ood,
        }
        for name, values in self.p_values.items():
            data[f"p_value_{name}"] = np.where(unreadable, np.nan, values)
        data |= self.extra
        for name, values in self.layers.items():
            data[f"layer_{name}"] = np.where(unreadable, np.nan, values)

        return pandas.DataFrame(data, columns=self.columns)

    def _repr_html_(self) -> str:
        """The strangest images as a table, for notebooks."""
        lines = [f"<p>{escape(repr(self))}</p>", "<table>"]
        lines.append("<tr><th>verdict</th><th>p_value</th><th>ood_score</th><th>path</th></tr>")
        lines += [_html_row(row) for row in self.sorted()[:_MOST_SHOWN]]
        lines.append("</table>")

        if len(self) > _MOST_SHOWN:
            lines.append(f"<p>... and {len(self) - _MOST_SHOWN:,} more</p>")
        return "\n".join(lines)

    @classmethod
    def concatenate(cls, parts: Iterable[Scores]) -> Scores:
        """Join the parts of one run, end to end.

        Parameters
        ----------
        parts : iterable of Scores
            All with the same layers.

        Returns
        -------
        Scores
            Its ``fpr`` is None if the parts differ in theirs.

        Raises
        ------
        UsageError
            There are no parts.
        """
        several = list(parts)
        if not several:
            raise UsageError("there were no images to score")

        def texts(name: str) -> list[str]:
            return [text for part in several for text in getattr(part, name)]

        def numbers(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in several])

        rates = {part.fpr for part in several}
        return cls(
            path=texts("path"),
            status=texts("status"),
            reason=texts("reason"),
            ood_score=numbers("ood_score"),
            p_value=numbers("p_value"),
            is_ood=numbers("is_ood"),
            layers={name: np.concatenate([part.layers[name] for part in several]) for name in several[0].layers},
            fpr=rates.pop() if len(rates) == 1 else None,
            extra={name: [text for part in several for text in part.extra[name]] for name in several[0].extra},
            known=None if several[0].known is None else numbers("known"),
            p_values={name: np.concatenate([part.p_values[name] for part in several]) for name in several[0].p_values},
        )


def counted(images: int) -> str:
    """A number of images in words."""
    return f"{images:,} image{'' if images == 1 else 's'}"


def columns_of(layers: Iterable[str], extra: Iterable[str] = (), p_values: Iterable[str] = ()) -> list[str]:
    """Names of all columns, in the order in which they are written."""
    return [*COLUMNS, *(f"p_value_{name}" for name in p_values), *extra, *(f"layer_{name}" for name in layers)]


def strangest_first(ood_score: np.ndarray, p_value: np.ndarray, unreadable: np.ndarray) -> np.ndarray:
    """The order of :meth:`Scores.sorted`.

    Parameters
    ----------
    ood_score : (N,) float
        Not finite for an error.
    p_value : (N,) float
    unreadable : (N,) bool

    Returns
    -------
    (N,) int
        Positions, the strangest first.

    Examples
    --------
    >>> import numpy as np
    >>> strangest_first(np.array([1.0, 9.0, 2.0]), np.array([0.5, 0.1, 0.1]), np.array([False, False, False]))
    array([1, 2, 0])
    """
    p_value = np.where(unreadable, 0, p_value)
    ood_score = np.where(np.isfinite(ood_score), ood_score, np.inf)
    return np.lexsort((-ood_score, p_value, unreadable))  # the last key counts first


def _html_row(row: Row) -> str:
    """A line of the table; flagged images stand out by a word and a colour."""
    if row.status != OK:
        cells = [row.status, "", "", f"{row.path} ({row.reason})"]
    else:
        cells = ["OOD" if row.is_ood else "-", f"{row.p_value:.4f}", f"{row.ood_score:.2f}", row.path]
    style = ' style="background: #f8d7da; color: #58151c; font-weight: bold"' if row.is_ood else ""
    return f"<tr{style}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _plain(value: float) -> float | None:
    if not np.isfinite(value):
        return None
    return float(f"{value:.7g}")  # float32 carries seven digits; more would be noise in the file
