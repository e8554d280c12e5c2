"""Which images belong together: every way to say so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from featdiff.data.groups import check_groups, connected, label_images, numbered
from featdiff.exceptions import UsageError


def one_line(error: pytest.ExceptionInfo[UsageError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    assert error.value.argument == "groups"
    return text


# ---- words ----


def test_folder_is_where_an_image_lies_also_inside_an_archive() -> None:
    paths = [
        "a/1.png",
        "a/2.png",
        "a/b/1.png",
        "top.png",
        "shots.zip/x/1.png",
        "shots.zip/y/1.png",
        "shots.zip/x/2.png",
    ]
    assert label_images("folder", paths) == ["a", "a", "a/b", ".", "shots.zip/x", "shots.zip/y", "shots.zip/x"]


def test_none_takes_each_image_for_a_group() -> None:
    assert label_images("none", ["a/1.png", "a/1.png", "b.png"]) == [0, 1, 2]


def test_auto_needs_features() -> None:
    with pytest.raises(UsageError, match="groups='auto' looks at features") as caught:
        label_images("auto", ["a.png"])
    one_line(caught)


# ---- patterns ----


def test_a_pattern_takes_what_its_brackets_find() -> None:
    paths = ["p7/left_01.png", "p7/right_01.png", "p8/left_01.png"]
    assert label_images(r"p(\d+)/", paths) == [("7",), ("7",), ("8",)]
    assert label_images(r"p(\d+)/(left|right)", paths) == [("7", "left"), ("7", "right"), ("8", "left")]
    assert label_images(r"(?P<patient>p\d)", paths) == [("p7",), ("p7",), ("p8",)]


def test_a_pattern_without_brackets_is_refused() -> None:
    for text in ("patient", r"p\d+", "(?:p)", "folders"):
        for use in (check_groups, lambda text: label_images(text, ["p1.png"])):
            with pytest.raises(UsageError, match="has no brackets that say which part of the path") as caught:
                use(text)
            assert "folder, gap:N" in one_line(caught)


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match=r"groups '\(' is none of auto, none, folder") as caught:
        check_groups("(")
    one_line(caught)


def test_a_pattern_that_some_path_lacks_names_the_path() -> None:
    with pytest.raises(UsageError, match=r"groups 'p\(\\\\d\+\)' is not found in the path other.png") as caught:
        label_images(r"p(\d+)", ["p1.png", "other.png"])
    one_line(caught)


# ---- gaps ----


def test_a_gap_begins_a_group() -> None:
    paths = [f"a/img_{number:04d}.jpg" for number in (1, 2, 12, 13, 40, 51)]
    assert label_images("gap:10", paths) == [("a", 0), ("a", 0), ("a", 0), ("a", 0), ("a", 1), ("a", 2)]
    assert label_images("gap:9", paths) == [("a", 0), ("a", 0), ("a", 1), ("a", 1), ("a", 2), ("a", 3)]
    assert label_images("gap:0", ["a/1.png", "a/1.jpg", "a/2.png"]) == [("a", 0), ("a", 0), ("a", 1)]


def test_numbers_of_each_folder_count_for_themselves() -> None:
    """Two cameras that both begin at 1 share no group, and need not be sorted."""
    paths = ["b/9.png", "a/1.png", "b/1.png", "a/100.png", "b/8.png", "z.zip/in/1.png", "z.zip/in/2.png"]
    labels = label_images("gap:5", paths)
    assert labels == [("b", 1), ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("z.zip/in", 0), ("z.zip/in", 0)]


def test_the_last_number_of_the_name_counts() -> None:
    assert label_images("gap:1", ["run2/cam7_5.png", "run9/cam1_6.png"]) == [("run2", 0), ("run9", 0)]
    assert label_images("gap:1", ["x/cam7_5a.png", "x/cam1_6.png", "x/cam6_9.p2"]) == [("x", 0), ("x", 0), ("x", 1)]


def test_a_name_without_a_number_has_no_gap() -> None:
    with pytest.raises(UsageError, match="gap:5 needs a number in each name, and a1/img.png has none") as caught:
        label_images("gap:5", ["a1/7.png", "a1/img.png"])
    one_line(caught)


@pytest.mark.parametrize("text", ["gap:", "gap:x", "gap:1.5", "gap:-3", "gap: 3", "gap:\u0663"])
def test_gaps_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="a whole number must follow gap:, like gap:120") as caught:
        check_groups(text)
    one_line(caught)


# ---- files ----


def write(file: Path, *lines: str, bom: bool = False) -> Path:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8-sig" if bom else "utf-8")
    return file


@pytest.mark.parametrize("bom", [False, True])
def test_a_table_gives_the_group_of_each_path(tmp_path: Path, bom: bool) -> None:
    file = write(tmp_path / "g.csv", "path,group", "x/a.png,1", '"x/b, c.png",2', "x/unused.png,3", bom=bom)
    assert label_images(file, ["x/b, c.png", "x/a.png"]) == ["2", "1"]
    assert label_images(str(file), ["./x//a.png"]) == ["1"]


def test_a_table_of_tabs_with_more_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "g.tsv", "group\tnote\tpath", "left\tsome, thing\tx/a.png", "right\t\tx/b.png")
    assert label_images(file, ["x/a.png", "x/b.png"]) == ["left", "right"]


def test_paths_of_a_table_may_count_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    file = write(tmp_path / "set" / "g.csv", "path,group", "x/a.png,1", "x/b.png,2")
    assert label_images(file, [str(tmp_path / "set" / "x" / "b.png")]) == ["2"]
    monkeypatch.chdir(tmp_path)
    assert label_images("set/g.csv", ["set/x/a.png", "set/x/b.png"]) == ["1", "2"]
    assert label_images("set/g.csv", [str(tmp_path / "set/x/a.png")]) == ["1"]
    monkeypatch.chdir(tmp_path / "set")
    assert label_images(Path("g.csv"), ["x/a.png", str(tmp_path / "set" / "x" / "a.png")]) == ["1", "1"]


def test_a_table_written_from_inside_its_folder_names_images_above_it(tmp_path: Path) -> None:
    file = write(tmp_path / "g.csv", "path,group", "../a.png,1")
    assert label_images(file, [os.path.normpath(tmp_path / ".." / "a.png")]) == ["1"]


def test_a_path_that_a_table_lacks_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "g.csv", "path,group", "a.png,1")
    with pytest.raises(UsageError, match=r"groups give no label for b.png \(of .*g.csv\)") as caught:
        label_images(file, ["a.png", "b.png"])
    one_line(caught)


@pytest.mark.parametrize("lines", [["file,group", "a.png,1"], ["path;group", "a.png;1"], ["a.png,1"], [""]])
def test_a_table_needs_its_columns(tmp_path: Path, lines: list[str]) -> None:
    file = write(tmp_path / "g.csv", *lines)
    with pytest.raises(UsageError, match="g.csv needs a first line that names the columns path and group") as caught:
        label_images(file, ["a.png"])
    one_line(caught)


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone.csv: no such file or directory") as caught:
        label_images(tmp_path / "gone.csv", ["a.png"])
    one_line(caught)
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(UsageError, match=r"dir.csv: is a directory"):
        label_images(tmp_path / "dir.csv", ["a.png"])
    (tmp_path / "bytes.csv").write_bytes(b"path,group\n\xff\xfe\x00,1\n")
    with pytest.raises(UsageError, match=r"bytes.csv is no table of text"):
        label_images(tmp_path / "bytes.csv", ["a.png"])


def test_images_without_a_group_are_alone(tmp_path: Path) -> None:
    """As in the table of an audit; short lines and empty ones do no harm."""
    file = write(tmp_path / "g.csv", "path,group", "a.png,1", "b.png,", "", "c.png", "d.png,1")
    labels = label_images(file, ["a.png", "b.png", "c.png", "d.png"])
    assert labels[0] == labels[3] == "1"
    assert len(set(labels)) == 3
    turned = write(tmp_path / "turned.csv", "group,path", "1,a.png", "2")
    assert label_images(turned, ["a.png"]) == ["1"]


# ---- labels ----


def test_a_mapping_gives_labels_by_path() -> None:
    assert label_images({"a": 1, "b": (2, 3), "c": "x"}, ["b", "a"]) == [(2, 3), 1]
    with pytest.raises(UsageError, match="groups give no label for z") as caught:
        label_images({"a": 1}, ["a", "z"])
    one_line(caught)


LABELS = ["p", "q", "r", "s"]


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        tuple(LABELS),
        np.array(LABELS),
        np.array(LABELS, dtype=object),
        pandas.Series(LABELS, index=[7, 3, 1, 0]),
    ],
)
def test_labels_in_order_skip_images_that_cannot_be_read(labels: Any) -> None:
    assert list(label_images(labels, ["b", "d"], positions=[1, 3], total=4)) == ["q", "s"]
    assert list(label_images(labels, ["a", "b", "c", "d"])) == ["p", "q", "r", "s"]


def test_the_first_images_may_be_the_unreadable_ones() -> None:
    assert label_images([5, 6, 7], ["c"], positions=[2], total=3) == [7]
    assert label_images([5, 6, 7], [], positions=[], total=3) == []


def test_numbers_of_arrays_and_tensors_are_labels() -> None:
    """Two tensors of one number are two keys, unless they are taken for numbers."""
    for labels in (np.array([1, 2, 1]), torch.tensor([1, 2, 1]), pandas.Series([1, 2, 1])):
        found = label_images(labels, ["a", "b", "c"])  # type: ignore[arg-type]
        assert found == [1, 2, 1]
        assert len(set(found)) == 2


def test_labels_that_can_name_no_group() -> None:
    for labels in ([[1], [2]], np.zeros((2, 3)), [{1}, {2}]):
        with pytest.raises(UsageError, match="which cannot name a group") as caught:
            label_images(labels, ["a", "b"])  # type: ignore[arg-type]
        one_line(caught)


@pytest.mark.parametrize(("count", "total"), [(3, 4), (5, 4), (0, 4)])
def test_as_many_labels_as_images(count: int, total: int) -> None:
    with pytest.raises(UsageError, match=f"groups give {count} labels, and there are {total} images") as caught:
        label_images([0] * count, ["a", "b"], positions=[0, 1], total=total)
    one_line(caught)


@pytest.mark.parametrize("groups", [3, 2.5, {1, 2}, object(), True])
def test_what_can_be_no_groups_is_refused(groups: object) -> None:
    with pytest.raises(UsageError, match="groups must be auto, none, folder, gap:N") as caught:
        check_groups(groups)
    one_line(caught)


def test_what_may_be_groups() -> None:
    for groups in (None, "auto", "none", "folder", "gap:0", r"(\d)", "g.csv", Path("g.tsv"), [1, 2], {"a": 1}):
        check_groups(groups)
    for array in (np.arange(3), torch.arange(3), pandas.Series(["a", "b"])):
        check_groups(array)


# ---- numbers ----


def test_numbers_follow_the_first_of_each_content() -> None:
    numbers = numbered(["x", "y", "x", "z"], [b"1", b"2", b"3", b"4"])
    assert numbers.shape == (4,)
    assert numbers[0] == numbers[2]
    assert len(set(numbers.tolist())) == 3


def test_groups_that_share_a_content_are_one() -> None:
    """Copies of an image in two groups join them, and these may join further ones."""
    labels = ["a", "a", "b", "b", "c", "d"]
    digests = [b"1", b"2", b"2", b"3", b"3", b"4"]
    numbers = numbered(labels, digests)
    assert numbers.shape == (4,)  # of the contents 1, 2, 3, 4
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]


def test_labels_of_any_kind_are_numbered() -> None:
    numbers = numbered([("a", 0), None, "0", 0, ("a", 0)], [bytes([i]) for i in range(5)])
    assert numbers[0] == numbers[4]
    assert len(set(numbers.tolist())) == 4


def test_connected_things() -> None:
    groups = connected(6, [0, 1, 4], [1, 2, 4])
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups.tolist())) == 4
    assert len(set(connected(3, [], []).tolist())) == 3
