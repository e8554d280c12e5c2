"""Scores as users meet them: printed, indexed, sorted, in notebooks and data frames."""

from __future__ import annotations

import doctest
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pandas
import pytest
import torch

from featdiff import Scores
from featdiff.exceptions import UsageError
from featdiff.verdicts import results
from featdiff.verdicts.results import Row

NAN = math.nan


@pytest.fixture
def scores() -> Scores:
    """Five images: equal p-values in b and d, the third unreadable."""
    return Scores(
        path=["a.png", "b.png", "c.png", "d.png", "e.png"],
        status=["ok", "ok", "unreadable", "ok", "ok"],
        reason=["", "", "empty file (0 bytes)", "", ""],
        ood_score=np.array([0.5, 3.0, NAN, 4.0, -1.0]),
        p_value=np.array([0.3, 0.02, NAN, 0.02, 0.9]),
        is_ood=np.array([False, True, False, True, False]),
        layers={"one": np.array([0.0, 1.0, NAN, 3.0, 4.0]), "two": np.array([5.0, 6.0, NAN, 8.0, 9.0])},
        fpr=0.05,
    )


def many(n: int, fpr: float | None = 0.05) -> Scores:
    """n images, the i-th with the p-value (i + 1) / n, all readable, none flagged."""
    p_value = np.arange(1, n + 1) / n
    return Scores(
        path=[f"{i}.png" for i in range(n)],
        status=["ok"] * n,
        reason=[""] * n,
        ood_score=1 - p_value,
        p_value=p_value,
        is_ood=np.zeros(n, dtype=bool),
        layers={},
        fpr=fpr,
    )


# ---- printed ----


def test_repr_is_one_line_of_counts(scores: Scores) -> None:
    assert repr(scores) == "Scores(5 images: 2 OOD at fpr 0.05, 1 unreadable)"
    assert repr(many(1234)) == "Scores(1,234 images: 0 OOD at fpr 0.05)"
    assert repr(many(1, fpr=None)) == "Scores(1 image: 0 OOD)"
    assert repr(many(0)) == "Scores(0 images: 0 OOD at fpr 0.05)"


def test_examples_in_docstrings_are_true() -> None:
    tried = doctest.testmod(results)
    assert tried.failed == 0
    assert tried.attempted >= 5


# ---- rows and parts ----


def test_one_row(scores: Scores) -> None:
    row = scores[3]
    assert row == Row("d.png", "ok", "", 4.0, 0.02, True, {"one": 3.0, "two": 8.0})
    assert type(row.ood_score) is float and type(row.is_ood) is bool and type(row.layers["one"]) is float
    assert scores[-2] == scores[np.int64(3)] == row
    with pytest.raises(AttributeError):
        row.path = "other"  # type: ignore[misc]


def test_an_unreadable_row_has_a_reason_and_no_numbers(scores: Scores) -> None:
    row = scores[2]
    assert (row.path, row.status, row.reason, row.is_ood) == ("c.png", "unreadable", "empty file (0 bytes)", False)
    assert np.isnan([row.ood_score, row.p_value, *row.layers.values()]).all()


def test_length_and_iteration(scores: Scores) -> None:
    assert len(scores) == 5
    assert [row.path for row in scores] == scores.path
    assert [row.is_ood for row in scores] == [False, True, False, True, False]
    assert list(many(0)) == []


@pytest.mark.parametrize(
    ("index", "paths"),
    [
        (slice(1, 3), ["b.png", "c.png"]),
        (slice(None, None, -2), ["e.png", "c.png", "a.png"]),
        ([3, 0], ["d.png", "a.png"]),
        ([], []),
        (np.array([4, -4, 4]), ["e.png", "b.png", "e.png"]),
        ([True, False, False, False, True], ["a.png", "e.png"]),
        (np.array([False, True, False, True, False]), ["b.png", "d.png"]),
        (torch.tensor([2, 1]), ["c.png", "b.png"]),
        (pandas.Series([False, True, False, True, False]), ["b.png", "d.png"]),
    ],
)
def test_parts(scores: Scores, index: object, paths: list[str]) -> None:
    part = scores[index]  # type: ignore[call-overload]
    assert isinstance(part, Scores)
    assert part.path == paths
    assert part.fpr == 0.05
    numbers = [scores.path.index(path) for path in paths]
    assert part.status == [scores.status[i] for i in numbers]
    assert part.reason == [scores.reason[i] for i in numbers]
    for name in ("ood_score", "p_value", "is_ood"):
        np.testing.assert_array_equal(getattr(part, name), getattr(scores, name)[numbers])
    for name, values in scores.layers.items():
        np.testing.assert_array_equal(part.layers[name], values[numbers])


@pytest.mark.parametrize(
    "index", [5, -6, [0, 5], np.array([True, False]), np.zeros((2, 2), dtype=int), True, (1, 2), "path", 1.5]
)
def test_what_is_no_index_is_refused(scores: Scores, index: object) -> None:
    with pytest.raises(IndexError):
        scores[index]  # type: ignore[call-overload]


def test_a_part_does_not_change_with_the_whole(scores: Scores) -> None:
    part = scores[1:3]
    part.p_value[0] = 1.0
    assert scores.p_value[1] == 0.02


# ---- order ----


def test_sorted_puts_the_strangest_first_and_the_unreadable_last(scores: Scores) -> None:
    ordered = scores.sorted()
    assert ordered.path == ["d.png", "b.png", "a.png", "e.png", "c.png"]
    np.testing.assert_array_equal(ordered.p_value, [0.02, 0.02, 0.3, 0.9, NAN])
    np.testing.assert_array_equal(ordered.layers["two"], [8.0, 6.0, 5.0, 9.0, NAN])
    assert scores.path == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert many(0).sorted().path == []


def test_sorted_keeps_the_order_of_equal_rows() -> None:
    equal = many(40)
    equal.p_value[:] = 0.5
    equal.ood_score[:] = 1.0
    for i in range(0, 40, 7):
        equal.status[i] = "unreadable"
    readable = [f"{i}.png" for i in range(40) if i % 7]
    assert equal.sorted().path == [*readable, *(f"{i}.png" for i in range(0, 40, 7))]


# ---- data frames ----


def test_data_frame(scores: Scores) -> None:
    frame = scores.to_pandas()
    assert list(frame.columns) == scores.columns
    assert list(frame.columns) == [
        *("path", "status", "reason", "ood_score", "p_value", "is_ood", "layer_one", "layer_two"),
    ]
    assert frame["path"].tolist() == scores.path
    assert frame["reason"].tolist() == ["", "", "empty file (0 bytes)", "", ""]
    for name, values in (("ood_score", scores.ood_score), ("layer_two", scores.layers["two"])):
        assert frame[name].dtype == np.float64
        np.testing.assert_array_equal(frame[name], values)
    assert frame["is_ood"].isna().tolist() == [False, False, True, False, False]
    assert frame[frame["is_ood"]]["path"].tolist() == ["b.png", "d.png"]
    assert not scores.is_ood[2]  # the scores themselves stay as they were


def test_data_frame_of_nothing_has_its_columns() -> None:
    assert list(many(0).to_pandas().columns) == list(results.COLUMNS)


def test_numbers_of_unreadable_rows_are_never_in_a_data_frame(scores: Scores) -> None:
    scores.ood_score[2] = 7.0
    assert np.isnan(scores.to_pandas()["ood_score"][2])


def test_without_pandas_a_line_says_what_to_install(scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="^to_pandas needs pandas: pip install pandas$"):
        scores.to_pandas()


# ---- notebooks ----


class Cells(HTMLParser):
    """Texts of the cells of each line, and which lines are marked."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: list[list[str]] = []
        self.marked: list[bool] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.lines.append([])
            self.marked.append("style" in dict(attrs))
        if tag == "td":
            self.lines[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.lines and self.lines[-1]:
            self.lines[-1][-1] += data.strip("\n")


def test_notebook_table_has_the_strangest_first(scores: Scores) -> None:
    page = scores._repr_html_()
    assert "Scores(5 images: 2 OOD at fpr 0.05, 1 unreadable)" in page
    table = Cells(page)
    assert table.lines[1:] == [
        ["OOD", "0.0200", "4.00", "d.png"],
        ["OOD", "0.0200", "3.00", "b.png"],
        ["-", "0.3000", "0.50", "a.png"],
        ["-", "0.9000", "-1.00", "e.png"],
        ["unreadable", "", "", "c.png (empty file (0 bytes))"],
    ]
    assert table.marked == [False, True, True, False, False, False]
    assert "more" not in page


def test_notebook_table_is_short() -> None:
    page = many(1500)._repr_html_()
    assert len(Cells(page).lines) == 1 + 20
    assert "... and 1,480 more" in page
    assert "more" not in many(20)._repr_html_()
    assert len(page) < 5_000


def test_notebook_table_shows_text_as_text(scores: Scores) -> None:
    scores.path[1] = "<script>alert('x')</script>&amp;.png"
    scores.reason[2] = "<b>bad</b>"
    table = Cells(scores._repr_html_())
    assert table.tags == {"p", "table", "tr", "th", "td"}
    assert table.lines[2][3] == "<script>alert('x')</script>&amp;.png"
    assert table.lines[5][3] == "c.png (<b>bad</b>)"
    assert not re.search(r"<script|https?:|<link|<img", scores._repr_html_())


# ---- joined ----


def test_concatenated_parts_are_the_whole(scores: Scores) -> None:
    whole = Scores.concatenate([scores[:2], scores[2:]])
    assert list(map(repr, whole)) == list(map(repr, scores))  # NaN is not equal to itself
    assert whole.fpr == 0.05
    assert Scores.concatenate([many(2), many(3, fpr=0.1)]).fpr is None
    with pytest.raises(UsageError, match="no images to score"):
        Scores.concatenate([])
