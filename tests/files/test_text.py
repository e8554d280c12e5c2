"""Text from outside, made safe for terminals and spreadsheets, and read back."""

from __future__ import annotations

import csv
import io
import json
import random
import unicodedata

import pytest
from rich.cells import cell_len

from featdiff.files.text import columns_on_screen, for_json, for_spreadsheet, for_terminal, from_spreadsheet

#: Signs that mean something to a terminal, a spreadsheet, a CSV reader, or the escapes of this module.
HARD = "=+-@'\"\\xu0159bdnrt,; \t\r\n\x00\x1b\x7f\x9b\u200e\u202e\u2028\u2066\ud800\udc80\uff1dé日😀"


def names(count: int, seed: int) -> list[str]:
    """Seeded text: half of it of hard signs, half of any."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        length = rng.randrange(9)
        if i % 2:
            made.append("".join(rng.choice(HARD) for _ in range(length)))
        else:
            made.append("".join(chr(rng.randrange(0x110000)) for _ in range(length)))
    return made


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat.png", "cat.png"),
        ("Zürich/日本/😀.png", "Zürich/日本/😀.png"),
        ("a\u00a0b\u202fc", "a\u00a0b\u202fc"),  # as macOS names screenshots: to be found by copying the name
        ("red \x1b[31m", r"red \x1b[31m"),
        ("bell\a tab\t line\r\n", r"bell\x07 tab\x09 line\x0d\x0a"),
        ("c1 \x9b2J del \x7f", r"c1 \x9b2J del \x7f"),
        ("gnp.\u202eexe", r"gnp.\u202eexe"),
        ("next\u2028line", r"next\u2028line"),
        ("lone \udcff", r"lone \udcff"),
    ],
)
def test_what_a_terminal_shows(text: str, shown: str) -> None:
    assert for_terminal(text) == shown


def test_nothing_for_a_terminal_can_steer_it() -> None:
    """By Unicode's own classes, on all characters."""
    shown = "".join(for_terminal(chr(code)) for code in range(0x110000))
    assert not {unicodedata.category(sign) for sign in shown} & {"Cc", "Cs", "Zl", "Zp"}
    turning = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    assert not {unicodedata.bidirectional(sign) for sign in shown} & turning


def test_any_text_comes_back_from_a_spreadsheet() -> None:
    for text in names(20_000, seed=0):
        assert from_spreadsheet(for_spreadsheet(text)) == text


def test_no_two_names_share_a_cell() -> None:
    different = set(names(20_000, seed=1))
    assert len({for_spreadsheet(text) for text in different}) == len(different)


def test_no_cell_begins_a_formula_or_holds_a_control_character() -> None:
    for text in names(20_000, seed=2):
        cell = for_spreadsheet(text)
        assert not cell.startswith(tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20"))
        assert for_terminal(cell) == cell


def test_a_csv_reader_finds_the_cell() -> None:
    cells = [for_spreadsheet(text) for text in names(2_000, seed=3)]
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([cell, "end"] for cell in cells)
    stream.seek(0)
    assert [row[0] for row in csv.reader(stream)] == cells


@pytest.mark.parametrize("text", ["", "plain.png", "日本.png", "ｗｉｄｅ", "Zu\u0308rich", "😀", "é\u0301"])
def test_columns_are_those_that_rich_counts(text: str) -> None:
    assert columns_on_screen(text) == cell_len(text)


def test_json_keeps_its_meaning() -> None:
    for name in names(2_000, seed=4):
        text = name.replace("\ud800", "")  # in JSON, two lone surrogates side by side are one character
        line = for_json(json.dumps([text], ensure_ascii=False))
        assert json.loads(line) == [text]
        assert for_terminal(line) == line
