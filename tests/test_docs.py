"""The pages are true: commands and code that use the default backbone, as printed (see pages, test_docs_other)."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import newcomer_folder, python, shell, typed
from pages import ANSWER, AUDITED, DEFAULT, EVALUATED, EXPECTED, blocks_at, commands_at


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages suppose it, made from what ``featdiff demo`` leaves."""
    folder = tmp_path_factory.mktemp("newcomer")
    done = shell("featdiff demo 2>&1 | tee demo.txt", folder)
    assert done.returncode == 0, done.stdout
    newcomer_folder(folder, folder / "featdiff-demo" / "images")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for file in sorted((folder / "images").glob("*.png"))[:5]:
            archive.write(file, file.name)
    return folder


def test_demo_separates_digits_and_keeps_tiles(newcomer: Path) -> None:
    """The main job of the first command: results, not only files."""
    rows = (newcomer / "featdiff-demo" / "scores.csv").read_text().splitlines()
    assert rows[0].startswith("path,status,reason,ood_score,p_value,is_ood,layer_")
    flagged = {kind: [",true," in row for row in rows[1:] if f"/{kind}/" in row] for kind in ("test", "digits")}
    assert len(flagged["test"]) == 130
    assert len(flagged["digits"]) == 200
    assert sum(flagged["digits"]) >= 190
    assert sum(flagged["test"]) <= 16  # 5 % of 130 is 6.5; both kinds of scatter allowed for
    assert (newcomer / "featdiff-demo" / "histograms.png").read_bytes().startswith(b"\x89PNG")


def test_demo_audits_first(newcomer: Path) -> None:
    """What a stranger reads: a question, the command that answers it, and the odd ones on top."""
    lines = (newcomer / "demo.txt").read_text().splitlines()
    assert lines[0].startswith("1. Which images are odd? featdiff-demo/mixed has 120 digits and 8 photo tiles")
    assert lines[1] == "$ featdiff audit featdiff-demo/mixed --top 10"
    assert lines[2] == "8 of 128 images stand apart (score above 3). The 10 oddest:"
    assert lines[3].split() == ["verdict", "p-value", "score", "path"]
    assert not any("/digit_" in _row(line).path for line in lines[4:12])
    assert all("/digit_" in _row(line).path for line in lines[12:14])
    assert lines[15].startswith("2. Is a new image like those before?")


def test_demo_tells_what_it_found(newcomer: Path) -> None:
    """The counts are those of the rows, and the verdict comes before the table."""
    told = (newcomer / "demo.txt").read_text().partition("2. Is a new image like those before?")[2]
    rows = (newcomer / "featdiff-demo" / "scores.csv").read_text().splitlines()
    found, alarms = (sum(f"/{kind}/" in row and ",true," in row for row in rows) for kind in ("digits", "test"))
    words = " ".join(told.split())
    assert f"featdiff finds {found / 2:.1f} % of the OOD images ({found} of 200)" in words
    assert f"({alarms} of 130), where 5 % were asked for" in words
    assert "the best of 9 baselines" in words
    assert told.index("featdiff finds") < told.index("95 % interval")
    assert "Next: featdiff score featdiff-demo/images/digits -m featdiff-demo/model" in told
    assert "WARNING" not in told


@pytest.mark.timeout(1500)  # four minutes on two idle cores
def test_commands(newcomer: Path) -> None:
    """All of them, in the order of the pages, in one folder."""
    commands = commands_at(DEFAULT)
    assert len(commands) >= 13
    for command in commands:
        result = typed(command, newcomer)
        assert result.returncode == EXPECTED.get(command, 0), f"{command}: {result.stderr}"
        assert "Traceback" not in result.stderr


def test_the_answer_on_the_front_page_is_what_featdiff_says(newcomer: Path) -> None:
    """Verdicts to the letter, numbers but for another machine's rounding; needs the model of the commands above."""
    (block,) = blocks_at(ANSWER, language="text")
    assert block.page == "README.md"
    _compare(block.text, typed("featdiff score images/ --format table", newcomer).stdout)


def test_the_audit_on_the_front_page_is_what_featdiff_says(newcomer: Path) -> None:
    """The tiles among the digits come first, and stand apart."""
    (block,) = blocks_at(AUDITED, language="text")
    assert block.page == "README.md"
    done = typed("featdiff audit featdiff-demo/mixed --format table", newcomer)
    _compare(block.text, done.stdout)
    rows = [_row(line) for line in done.stdout.splitlines()[1:]]
    assert len(rows) == 128
    assert all("digit_" not in row.path and row.score > 3 for row in rows[:8])
    assert all("digit_" in row.path and row.score < 3 for row in rows[8:])


def test_the_verdict_on_the_page_is_what_featdiff_says(newcomer: Path) -> None:
    """Words to the letter; numbers but for another machine's rounding, and but for which of several equal baselines."""
    (block,) = blocks_at(EVALUATED, language="text")
    printed = typed("featdiff eval --id test/ --ood digits=digits/", newcomer).stdout.split("\n\n")[0]
    numbers = r"\d+(?:\.\d+)?"
    texts = [re.sub(r"\(Mahalanobis.*?:", "(", " ".join(text.split())) for text in (block.text, printed)]
    assert re.sub(numbers, "#", texts[0]) == re.sub(numbers, "#", texts[1])
    expected, found = ([float(number) for number in re.findall(numbers, text)] for text in texts)
    assert found == pytest.approx(expected, abs=3)


def _compare(expected: str, printed: str) -> None:
    """Every expected row of a table is there, and means the same."""
    header, *rows = expected.splitlines()
    lines = printed.splitlines()
    assert header == lines[0]
    by_path = {row.path: row for row in map(_row, lines[1:])}
    assert len(rows) >= 5
    for text in rows:
        row = _row(text)
        found = by_path[row.path]
        assert found.verdict == row.verdict, printed
        assert found.p_value == pytest.approx(row.p_value, abs=0.05, nan_ok=True), printed
        assert found.score == pytest.approx(row.score, abs=0.2, rel=0.1, nan_ok=True), printed


class _Row(NamedTuple):
    verdict: str
    p_value: float
    score: float
    path: str


def _row(line: str) -> _Row:
    before, path = re.findall(r"^(.*?) (\S*/\S+)", line)[0]
    verdict, *numbers = before.split()
    p_value, score = map(float, numbers or ("nan", "nan"))
    return _Row(verdict, p_value, score, path)


def test_python_blocks(newcomer: Path) -> None:
    """Those on the models that the commands above leave."""
    blocks = blocks_at(DEFAULT, language="python")
    assert len(blocks) >= 4
    for block in blocks:
        done = python(block.text, newcomer)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_variables_stand_in_for_options(newcomer: Path) -> None:
    """``FEATDIFF_<COMMAND>_<OPTION>`` of the command line's page, seen in what comes of it."""
    line = next(line for line in commands_at(DEFAULT) if line.startswith("FEATDIFF_SCORE_FPR="))
    rate = float(line.partition("=")[2].partition(" ")[0])
    done = typed(f"{line} --format jsonl", newcomer)
    rows = [json.loads(row) for row in done.stdout.splitlines()]
    assert all(row["is_ood"] == (row["p_value"] <= rate + 1e-7) for row in rows)
    assert f"at fpr {rate:g}" in done.stderr
