"""What a page keeps of a long run."""

from __future__ import annotations

import numpy as np
import pytest
from report_pages import made_up

from featdiff.exceptions import UsageError
from featdiff.report import rows as module
from featdiff.report.rows import ReportRows


def parts_of(scores, size):  # type: ignore[no-untyped-def]
    return [scores[start : start + size] for start in range(0, len(scores), size)]


@pytest.mark.parametrize("most", [7, 100, 10_000])
def test_the_strangest_rows_are_kept_whatever_the_parts(most: int) -> None:
    scores = made_up(500)
    rows = ReportRows(most)
    for part in parts_of(scores, 13):
        rows.add(part)
    kept, positions = rows.strangest()
    readable = [scores.path.index(row.path) for row in scores.sorted() if row.status == "ok"]
    assert positions.tolist() == readable[:most]
    assert kept.path == [scores.path[i] for i in readable[:most]]
    assert (rows.total, rows.unreadable, rows.failed) == (500, 10, 0)
    assert [row.path for row in rows.unreadable_rows] == scores.path[:10]


def test_rows_that_were_written_before_count_as_others() -> None:
    """As JSON lines hold them, and as CSV does, where numbers of layers are text."""
    scores = made_up(100)
    for as_text in (False, True):
        rows = ReportRows()
        for row in scores[:60].rows():
            rows.add_written(
                row | {"layer_stage1": "" if row["layer_stage1"] is None else f"{row['layer_stage1']}"}
                if as_text
                else row
            )
        rows.add(scores[60:])
        kept, positions = rows.strangest()
        assert positions.tolist() == [scores.path.index(row.path) for row in scores.sorted() if row.status == "ok"]
        np.testing.assert_allclose(kept.layers["stage1"], scores.layers["stage1"][positions], rtol=1e-6)
        assert kept.is_ood.tolist() == scores.is_ood[positions].tolist()
        assert (rows.total, rows.unreadable) == (100, 2)


def test_counts_are_of_all_rows() -> None:
    scores = made_up(500)
    rows = ReportRows(most=5)
    for part in parts_of(scores, 64):
        rows.add(part)
    valid = np.isfinite(scores.ood_score)
    levels = rows.levels
    assert levels.p_value.tolist() == sorted(set(scores.p_value[valid].tolist()))
    assert levels.count.sum() == valid.sum() == 490
    for p_value, count, top in zip(levels.p_value, levels.count, levels.top, strict=True):
        alike = scores.ood_score[scores.p_value == p_value]
        assert count == len(alike)
        assert top == alike.max()
    np.testing.assert_allclose(rows.scores, scores.ood_score[valid], rtol=1e-6)


def test_failed_rows_are_counted_and_listed_first() -> None:
    scores = made_up(60)
    scores.status[30] = "error"
    scores.ood_score[30] = np.nan
    scores.p_value[30] = 1 / 201
    rows = ReportRows()
    rows.add(scores)
    kept, _ = rows.strangest()
    assert rows.failed == 1
    assert kept.status[0] == "error"
    assert len(rows.scores) == rows.levels.count.sum() == 58


def test_of_many_unreadable_images_the_first_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_UNREADABLE", 3)
    rows = ReportRows()
    for part in parts_of(made_up(500), 2):
        rows.add(part)
    assert rows.unreadable == 10
    assert len(rows.unreadable_rows) == 3


def test_a_run_without_rows() -> None:
    with pytest.raises(UsageError, match="no images to score"):
        ReportRows().strangest()
