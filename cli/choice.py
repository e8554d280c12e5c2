"""Which rows of a run are written, and in which order."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from .rates import Batch

if TYPE_CHECKING:
    import numpy as np

    from featdiff import Scores

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Choice:
    """Rows that are wanted: all in their order, or the strangest first, the ``top`` strangest, the flagged ones.

    ``batch``: marks some of the rows when all are there.
    """

    sort: bool = False
    top: int | None = None
    only_ood: bool = False
    batch: Batch | None = None

    def __str__(self) -> str:
        """The options, as they are typed."""
        words = ["--sort"] if self.sort else []
        words += ["--top", str(self.top)] if self.top else []
        words += ["--only-ood"] if self.only_ood else []
        words += [f"--fdr {self.batch.level:g}"] if self.batch else []
        return " ".join(words) or "all rows"

    @property
    def everything(self) -> bool:
        """Whether all rows are written, in their order."""
        return self == Choice()

    @property
    def in_order_of_strangeness(self) -> bool:
        """Whether the strangest row is the first."""
        return self.sort or self.top is not None

    @property
    def waits_for_all(self) -> bool:
        """Whether the first row is known only when all are scored."""
        return self.in_order_of_strangeness or self.batch is not None

    def columns(self, columns: Sequence[str]) -> list[str]:
        """Those of the rows that are written."""
        from featdiff.verdicts.results import FDR_FLAG

        return [*columns, *([FDR_FLAG] if self.batch else [])]

    def of_part(self, part: Scores) -> Scores:
        """The rows of a part that are wanted, in their order."""
        return part[part.is_ood.astype(bool)] if self.only_ood else part

    def of_lines(self, source: IO[bytes]) -> Iterator[dict[str, Any]]:
        """The wanted rows of a file of JSON lines."""
        from featdiff.verdicts.results import FDR_FLAG

        largest = self.batch.largest() if self.batch else 0.0
        for row in self._strangest(source) if self.in_order_of_strangeness else self._in_order(source):
            if self.batch:
                p_value = row["p_value"]
                row[FDR_FLAG] = None if p_value is None else p_value <= largest
            yield row

    def _in_order(self, source: IO[bytes]) -> Iterator[dict[str, Any]]:
        for line in source:
            row = json.loads(line)
            if row["is_ood"] or not self.only_ood:
                yield row

    def _strangest(self, source: IO[bytes]) -> Iterator[dict[str, Any]]:
        """One number each is held in memory for score, p-value and place; rows are read again in their new order."""
        import numpy as np

        from featdiff.verdicts.results import UNREADABLE, strangest_first

        places = array("q")
        scores = array("d")
        p_values = array("d")
        unreadable = array("b")
        place = source.tell()
        for line in source:
            row = json.loads(line)
            if row["is_ood"] or not self.only_ood:
                places.append(place)
                scores.append(_number(row["ood_score"]))
                p_values.append(_number(row["p_value"]))
                unreadable.append(row["status"] == UNREADABLE)
            place += len(line)

        columns: list[np.ndarray] = [np.array(column) for column in (scores, p_values, unreadable)]
        for position in strangest_first(columns[0], columns[1], columns[2].astype(bool))[: self.top]:
            source.seek(places[position])
            yield json.loads(source.readline())


def choice_options(function: F) -> F:
    """``--sort``, ``--top`` and ``--only-ood``, as arguments of :class:`Choice`."""
    for option in (
        click.option("--only-ood", is_flag=True, help="Write flagged rows only; all are counted."),
        click.option("--top", type=click.IntRange(1), metavar="N", help="Write the N strangest rows, strangest first."),
        click.option("--sort", is_flag=True, help="Write the strangest rows first, when all are scored."),
    ):
        function = option(function)
    return function


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
