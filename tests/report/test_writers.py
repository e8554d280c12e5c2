"""The stable output: exact bytes of every format, and the picture."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from featdiff.exceptions import UsageError
from featdiff.files.text import from_spreadsheet
from featdiff.report.figures import save_histograms
from featdiff.report.writers import FORMATS, open_writer
from featdiff.verdicts.results import COLUMNS, Scores

#: Names that a file may have and that break careless writers.
AWKWARD = [
    "a,b.png",
    'say "hi".png',
    "two\nlines.png",
    "carriage\rreturn.png",
    "tab\t.png",
    " spaces ",
    "Zürich/日本/😀.png",
    "line\u2028separator.png",
    "null",
    "nan",
    "=1+1.png",
    "'quoted'",
    "red \x1b[31m and C1 \x9b31m",
    "back\\slash\\xff.png",
    "",
]


def make(paths: list[str], unreadable: dict[int, str] | None = None, layers: tuple[str, ...] = ("l1", "l4")) -> Scores:
    """Rows with scores -1.5, 0.5, 2.5 ...; every other one is flagged."""
    n, bad = len(paths), unreadable or {}
    good = np.array([i not in bad for i in range(n)], dtype=bool)
    score = np.where(good, 2.0 * np.arange(n) - 1.5, np.nan)
    p = np.where(good, 1 / (3.0 + np.arange(n)), np.nan)
    return Scores(
        path=list(paths),
        status=["ok" if ok else "unreadable" for ok in good],
        reason=[bad.get(i, "") for i in range(n)],
        ood_score=score,
        p_value=p,
        is_ood=good & (np.arange(n) % 2 == 1),
        layers={name: np.where(good, score / (k + 2), np.nan) for k, name in enumerate(layers)},
    )


def written(format: str, *parts: Scores, raw_csv: bool = False) -> bytes:
    stream = io.BytesIO()
    writer = open_writer(format, stream, raw_csv=raw_csv)
    for part in parts:
        writer.write(part)
    writer.close()
    return stream.getvalue()


def read(format: str, data: bytes) -> list[dict[str, object]]:
    """Rows as any other program would read them."""
    if format == "csv":
        return list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")))
    if format == "jsonl":
        return [json.loads(line) for line in data.decode("utf-8").split("\n")[:-1]]
    return pq.read_table(io.BytesIO(data)).to_pylist()


PART = make(["a.png", "b.png", "c.png"], {1: "truncated, at byte 7"})


# ---- exact output ----


def test_csv_bytes() -> None:
    assert written("csv", PART) == (
        b"path,status,reason,ood_score,p_value,is_ood,layer_l1,layer_l4\n"
        b"a.png,ok,,-1.5,0.3333333,false,-0.75,-0.5\n"
        b'b.png,unreadable,"truncated, at byte 7",,,,,\n'
        b"c.png,ok,,2.5,0.2,false,1.25,0.8333333\n"
    )


def test_csv_says_true_for_flagged_images() -> None:
    assert written("csv", make(["a", "b"], layers=())).split(b"\n")[2] == b"b,ok,,0.5,0.25,true"


def test_jsonl_bytes() -> None:
    assert written("jsonl", PART) == (
        b'{"path": "a.png", "status": "ok", "reason": "", "ood_score": -1.5, "p_value": 0.3333333, '
        b'"is_ood": false, "layer_l1": -0.75, "layer_l4": -0.5}\n'
        b'{"path": "b.png", "status": "unreadable", "reason": "truncated, at byte 7", "ood_score": null, '
        b'"p_value": null, "is_ood": null, "layer_l1": null, "layer_l4": null}\n'
        b'{"path": "c.png", "status": "ok", "reason": "", "ood_score": 2.5, "p_value": 0.2, '
        b'"is_ood": false, "layer_l1": 1.25, "layer_l4": 0.8333333}\n'
    )


def test_parquet_schema_and_values() -> None:
    table = pq.read_table(io.BytesIO(written("parquet", PART)))
    text, number = pa.string(), pa.float64()
    kinds = [text, text, text, number, number, pa.bool_(), number, number]
    assert table.schema.names == [*COLUMNS, "layer_l1", "layer_l4"]
    assert table.schema.types == kinds
    assert table.to_pylist() == list(PART.rows())
    assert table.column("ood_score").to_pylist() == [-1.5, None, 2.5]
    assert table.column("is_ood").to_pylist() == [False, None, False]
    assert table.column("reason").to_pylist() == ["", "truncated, at byte 7", ""]


def test_parquet_column_types_do_not_depend_on_the_values() -> None:
    """A part in which nothing could be read has the same schema."""
    nothing = make(["a", "b"], {0: "empty file", 1: "empty file"})
    bad, good = (pq.read_schema(io.BytesIO(written("parquet", part))) for part in (nothing, PART))
    assert bad.equals(good)


def test_table_bytes() -> None:
    assert written("table", make(["a.png", "bad.png", "c.png", "d.png"], {1: "not an image"})).decode() == (
        "verdict      p-value    score  path\n"
        "-             0.3333    -1.50  a.png\n"
        "unreadable                     bad.png  (not an image)\n"
        "-             0.2000     2.50  c.png\n"
        "OOD           0.1667     4.50  d.png\n"
    )


# ---- awkward names ----


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", AWKWARD, ids=ascii)
def test_any_path_and_reason_survive(format: str, name: str) -> None:
    part = make([name, "next.png", "bad.png"], {2: f"reason {name}"})
    rows = read(format, written(format, part))
    if format == "csv":
        rows = [{name: from_spreadsheet(str(cell)) for name, cell in row.items()} for row in rows]
    assert [row["path"] for row in rows] == [name, "next.png", "bad.png"]
    assert rows[2]["reason"] == f"reason {name}"
    assert rows[1]["status"] == "ok"


@pytest.mark.parametrize("name", AWKWARD, ids=ascii)
def test_raw_csv_holds_any_path_as_it_is(name: str) -> None:
    rows = read("csv", written("csv", make([name, "next.png"]), raw_csv=True))
    assert [row["path"] for row in rows] == [name, "next.png"]


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1.png", b"'=1+1.png"),
        ("+1.png", b"'+1.png"),
        ("-1.png", b"'-1.png"),
        ("@sum.png", b"'@sum.png"),
        ("'quoted'.png", b"''quoted'.png"),
        ("tab\t.png", rb"'tab\x09.png"),
        ("two\nlines.png", rb"'two\x0alines.png"),
        ("red \x1b[31m.png", rb"'red \x1b[31m.png"),
        ("=C:\\a.png", rb"'=C:\\a.png"),
        ("C:\\a=1-1.png", rb"C:\a=1-1.png"),
        ("mirror \u202egnp.exe", rb"'mirror \u202egnp.exe"),
    ],
)
def test_csv_holds_no_formulas_and_no_control_characters(name: str, cell: bytes) -> None:
    """Numbers stay numbers, also below zero."""
    assert written("csv", make([name], layers=())).split(b"\n")[1] == cell + b",ok,,-1.5,0.3333333,false"


@pytest.mark.parametrize("name", ["c1 \x9b31m", "turned \u202e", "lone \udc9b", "line\u2028separator"], ids=ascii)
def test_jsonl_shows_no_control_characters_and_holds_the_name(name: str) -> None:
    data = written("jsonl", make([name]))
    assert json.loads(data)["path"] == name
    assert data.isascii()


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_unicode_is_written_as_utf8(format: str) -> None:
    assert "Zürich/日本/😀.png".encode() in written(format, make(["Zürich/日本/😀.png"]))


@pytest.mark.parametrize("name", ["two\nlines.png", "carriage\rreturn.png", "red \x1b[31m.png"], ids=ascii)
def test_the_table_keeps_one_line_per_image(name: str) -> None:
    """A file name cannot forge a row, nor send control codes to the terminal."""
    text = written("table", make([name, "next.png"])).decode()
    assert len(text.splitlines()) == 3
    assert "\x1b" not in text


def test_layer_names_with_commas_are_one_column() -> None:
    (row,) = read("csv", written("csv", make(["a"], layers=("x,y",))))
    assert row["layer_x,y"] == "-0.75"


# ---- parts of a run ----


@pytest.mark.parametrize("format", FORMATS)
def test_parts_are_the_same_as_one_piece(format: str) -> None:
    first, second = make(["a", "b"], {0: "gone"}), make(["c", "d", "e"])
    assert written(format, first, second) == written(format, Scores.concatenate([first, second]))


@pytest.mark.parametrize("format", ["table", "csv", "jsonl"])
def test_rows_are_out_when_write_returns(format: str, tmp_path: Path) -> None:
    """Whatever ends the process afterwards, the rows are in the file."""
    file = tmp_path / "scores"
    with file.open("wb") as stream:
        writer = open_writer(format, stream)
        writer.write(make(["a.png"]))
        assert b"a.png" in file.read_bytes()
        writer.write(make(["b.png"]))
        assert b"b.png" in file.read_bytes()


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_a_run_stopped_between_parts_leaves_a_whole_file(format: str) -> None:
    stream = io.BytesIO()
    writer = open_writer(format, stream)
    try:
        writer.write(make(["a", "b"]))
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        writer.close()
    assert [row["path"] for row in read(format, stream.getvalue())] == ["a", "b"]


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_a_part_without_rows_leaves_a_readable_file(format: str) -> None:
    data = written(format, make([]))
    assert read(format, data) == []
    if format == "csv":
        assert data == b"path,status,reason,ood_score,p_value,is_ood,layer_l1,layer_l4\n"
    if format == "parquet":
        assert pq.read_schema(io.BytesIO(data)).names == [*COLUMNS, "layer_l1", "layer_l4"]


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_a_run_stopped_before_its_first_part_leaves_a_readable_file(format: str) -> None:
    assert read(format, written(format)) == []


def test_an_empty_part_before_others_changes_nothing() -> None:
    for format in FORMATS:
        assert written(format, make([]), PART) == written(format, PART)


def test_a_long_parquet_run_is_written_in_groups() -> None:
    """So that memory does not grow with the number of images."""
    parts = [make([f"{k}-{i}" for i in range(4000)]) for k in range(6)]
    file = pq.ParquetFile(io.BytesIO(written("parquet", *parts)))
    assert file.metadata.num_rows == 24_000
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [10_000, 10_000, 4_000]
    assert file.read().column("path").to_pylist() == [path for part in parts for path in part.path]


@pytest.mark.parametrize(("width", "lines"), [(None, 1), (120, 1), (59, 1), (58, 2)])
def test_on_a_narrow_terminal_notes_stand_below(width: int | None, lines: int) -> None:
    scores = replace(make(["日.png"]), extra={"nearest": ["b"], "group": ["7"]})
    stream = io.BytesIO()
    writer = open_writer("table", stream, width=width)
    writer.write(scores)
    writer.close()
    header, *rest = stream.getvalue().decode().splitlines()
    assert len(rest) == lines
    assert "|".join(line[31:] for line in rest).replace("  (", "|(") == "日.png|(nearest b, group 7)"
    assert header.index("path") == 31


def test_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown format 'xml'; known: table, csv, jsonl, parquet"):
        open_writer("xml", io.BytesIO())


# ---- scores ----


def test_columns_are_the_stable_ones() -> None:
    assert COLUMNS == ("path", "status", "reason", "ood_score", "p_value", "is_ood")
    assert PART.columns == [*COLUMNS, "layer_l1", "layer_l4"]
    assert len(PART) == 3


def test_rows_hold_plain_python_values() -> None:
    for row in PART.rows():
        assert all(value is None or type(value) in (str, float, bool) for value in row.values())
        assert list(row) == PART.columns


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.23456789e-5, 1.234568e-05), (np.float32(0.1), 0.1), (1e10 / 3, 3333333000.0)],
)
def test_numbers_carry_seven_digits(value: float, expected: float) -> None:
    part = make(["a"])
    part.ood_score = np.array([value])
    (row,) = part.rows()
    assert row["ood_score"] == expected


def test_concatenate_keeps_order_and_every_column() -> None:
    first, second = make(["a", "b"], {0: "gone"}), make(["c", "d"])
    whole = Scores.concatenate(iter([first, second]))
    assert whole.path == ["a", "b", "c", "d"]
    assert whole.status == ["unreadable", "ok", "ok", "ok"]
    assert whole.reason == ["gone", "", "", ""]
    np.testing.assert_array_equal(whole.ood_score, [np.nan, 0.5, -1.5, 0.5])
    np.testing.assert_array_equal(whole.p_value, np.r_[first.p_value, second.p_value])
    assert whole.is_ood.tolist() == [False, True, False, True]
    assert list(whole.layers) == ["l1", "l4"]
    np.testing.assert_array_equal(whole.layers["l4"], np.r_[first.layers["l4"], second.layers["l4"]])


# ---- the picture ----


def test_histograms_are_a_png_of_1200_by_675(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    file = tmp_path / "histograms.png"
    save_histograms(file, {"test": rng.normal(size=200), "digits": rng.normal(6, 1, 100)}, 1.7, 0.05, "title")
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(file) as image:
        assert image.size == (1200, 675)
        grey = np.asarray(image.convert("L"))
    assert len(np.unique(grey)) > 50  # something is drawn
    assert (grey == 255).mean() > 0.5  # on white


def labels(file: Path) -> str:
    """Matplotlib leaves each text of an SVG in a comment."""
    return file.read_text(encoding="utf-8")


def test_histograms_name_sets_counts_threshold_and_axes(tmp_path: Path) -> None:
    file = tmp_path / "histograms.svg"
    scores = {
        "test": np.zeros(1200),
        "digits": np.array([1.0, np.nan, np.inf, 2.0]),
        "unreadable set": np.full(3, np.nan),
    }
    save_histograms(file, scores, 0.5, 0.05, "my title")
    text = labels(file)
    for expected in ("test (1,200)", "digits (2)", "threshold at fpr 0.05", "ood_score", "my title"):
        assert f"<!-- {expected}" in text
    assert "unreadable set" not in text


@pytest.mark.parametrize("count", [7, 5000])
def test_bars_are_shares_of_the_set(count: int, tmp_path: Path) -> None:
    """So that sets of different size can be compared: one bar of 100 %, however many images."""
    save_histograms(tmp_path / "a.svg", {"test": np.ones(count)}, 0.5, 0.05)
    assert "<!-- 80 -->\n" in labels(tmp_path / "a.svg")
    assert "<!-- 100 -->\n" in labels(tmp_path / "a.svg")


def test_other_threshold_other_picture(tmp_path: Path) -> None:
    pictures = []
    for threshold in (0.5, 1.5, 0.5):
        save_histograms(tmp_path / "a.png", {"test": np.arange(30.0)}, threshold, 0.05)
        with Image.open(tmp_path / "a.png") as image:
            pictures.append(np.asarray(image))
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize("name", ["_private", "a$_$b", "$x", "Zürich"])
def test_any_name_of_a_set_stands_in_the_legend(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.svg"
    save_histograms(file, {name: np.arange(5.0), "other": np.arange(3.0)}, 1, 0.05)
    assert f"{name} (5) -->" in labels(file).replace("\\$", "$")


@pytest.mark.parametrize("values", [np.zeros(5), np.array([3.0]), np.array([-1e6, 1e6])])
def test_histograms_of_few_or_equal_scores(values: np.ndarray, tmp_path: Path) -> None:
    save_histograms(tmp_path / "a.png", {"test": values}, 0.0, 0.05)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1200, 675)


@pytest.mark.parametrize("scores", [{}, {"test": np.array([np.nan])}, {"test": np.empty(0)}])
def test_histograms_of_nothing_are_refused(scores: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="score"):
        save_histograms(tmp_path / "a.png", scores, 0.0, 0.05)
