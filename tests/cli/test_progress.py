"""How a long run shows that it goes on: bars on a terminal, lines in a log, nothing with -q."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console

from featdiff.runtime.waiting import Stopwatch
from featdiff_cli import progress, waiting
from featdiff_cli.progress import Bars, Lines, starting
from featdiff_cli.speech import say

Cli = Callable[..., Result]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def quick_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines after 0.2 s, and then every 0.4 s."""
    monkeypatch.setattr(progress, "_FIRST_LINE", 0.2)
    monkeypatch.setenv("FEATDIFF_LOG_SECONDS", "0.4")
    monkeypatch.setattr(Lines, "_printed", float("-inf"))


def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal gets in place of standard error."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    return stream


# ---- in words ----


def test_a_line_has_rate_and_time_left(clock: Clock) -> None:
    bars = Bars(quiet=True)
    assert bars.line() == "loading the backbone"
    clock.now += 20  # loading: no time of the images'
    bars("features", 100, 10_000)
    clock.now += 10
    bars("features", 300, 10_000)
    assert bars.line() == "features: 300 of 10,000 (3%), 20/s, about 8 min left"
    clock.now += 4
    bars("features", 10_000, 10_000)
    assert bars.line() == "features: 10,000 of 10,000 (100%), 707/s"


def test_one_report_is_enough_for_a_line(clock: Clock) -> None:
    bars = Bars(quiet=True)
    clock.now += 4
    bars("training", 2, 14_402)
    assert bars.line() == "training: 2 of 14,402 (0%), 0.5/s, about 8 h 0 min left"


def test_a_stage_that_comes_again_counts_all_items(clock: Clock) -> None:
    """As in an evaluation, where each set has its features and its scores."""
    bars = Bars(quiet=True)
    for total in (40, 60):
        for stage in ("features", "scoring"):
            clock.now += 1
            bars(stage, 30, total)
            clock.now += 1
            bars(stage, total, total)
    assert bars.counts == {"features": 100, "scoring": 100}
    assert bars.seconds == {"features": 4.0, "scoring": 4.0}
    assert bars.rate("features") == 25.0
    assert bars.line().startswith("scoring: 60 of 60 (100%), 30/s")


def test_a_total_that_grows_is_no_new_round(clock: Clock) -> None:
    """As where a loader does not say how many images it has."""
    bars = Bars(quiet=True)
    for done in (32, 64, 70):
        clock.now += 1
        bars("features", done, done)
    assert bars.counts == {"features": 70}


def test_without_a_total_the_count_is_told(clock: Clock) -> None:
    """As of a listing that goes on."""
    bars = Bars(quiet=True)
    for done in (10, 20, 30):
        clock.now += 1
        bars("scoring", done, 0)
    assert bars.line() == "scoring: 30, 10/s"
    assert bars.counts == {"scoring": 30}


# ---- waiting for images ----


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    watch = Stopwatch()
    monkeypatch.setattr(waiting, "WAITED", watch)
    return watch


@pytest.mark.parametrize(
    ("seconds", "waited", "share"), [(10, 2, "20%"), (100, 87.6, "88%"), (10, 1.9, ""), (9.9, 9.9, ""), (0, 0, "")]
)
def test_long_waiting_gets_a_word(clock: Clock, watch: Stopwatch, seconds: float, waited: float, share: str) -> None:
    """What was waited before the bars begin, or in another stage, does not count."""
    watch.seconds = 50
    bars = Bars(quiet=True)
    clock.now += 5
    watch.seconds += 5
    bars("reading", 1, 1)
    for _ in range(2):
        clock.now += seconds / 2
        watch.seconds += waited / 2
        bars("scoring", 1, 2)
    word = f"for {share} of that time the backbone waited for images: smaller files or more CPUs help" if share else ""
    assert bars.waits.in_words("scoring", bars.seconds["scoring"]) == word
    assert bars.waits.in_words("training", 100) == ""


def test_score_tells_of_waiting(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = ("score", few_images, "-m", tiny_model, "-o", tmp_path / "a.csv")
    assert "waited" not in featdiff_cli(*command).stderr  # too short
    monkeypatch.setattr(waiting, "_LONG", 0)
    monkeypatch.setattr(waiting, "_MUCH", 0)
    found = re.findall(r"^for (\d+)% of that time the backbone waited for images", featdiff_cli(*command).stderr, re.M)
    assert len(found) == 1 and 0 < int(found[0]) <= 100
    assert featdiff_cli(*command, "-q").stderr == ""


# ---- in logs ----


def test_a_log_has_few_lines(quick_lines: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Bars() as bars:
        start = time.monotonic()
        done = 0
        while time.monotonic() - start < 1.2:
            done += 1
            bars("features", done, 1_000_000)
            time.sleep(0.001)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3  # after 0.2, 0.6 and 1.0 s, or fewer where others are busy
    for line in lines:
        assert re.fullmatch(r"features: [\d,]+ of 1,000,000 \(0%\), \d+/s, about .* left", line)


def test_a_silent_step_has_a_line_too(quick_lines: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Bars():
        time.sleep(0.5)
    assert capsys.readouterr().err.splitlines()[0] == "loading the backbone"


def test_short_work_and_quiet_work_print_nothing(quick_lines: None, capsys: pytest.CaptureFixture[str]) -> None:
    with starting(), Bars() as bars:
        bars("features", 1, 1)
    with starting(quiet=True), Bars(quiet=True) as bars:
        bars("features", 1, 1)
        time.sleep(0.5)
    assert capsys.readouterr().err == ""


def test_the_environment_sets_the_pause(
    quick_lines: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, lines in (("0", 0), ("600", 1), ("often", 1)):
        monkeypatch.setenv("FEATDIFF_LOG_SECONDS", value)
        monkeypatch.setattr(Lines, "_printed", float("-inf"))
        with starting():
            time.sleep(0.8)
        assert len(capsys.readouterr().err.splitlines()) == lines, value


def test_only_the_first_of_several_processes_talks(
    quick_lines: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with starting():
        time.sleep(0.5)
    assert capsys.readouterr().err == ""


def test_lines_of_one_command_keep_their_distance(quick_lines: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The libraries, and each of several models, have an object of their own."""
    with starting():
        time.sleep(0.3)
        with Bars():
            time.sleep(0.05)
        with Bars():
            time.sleep(0.05)
    assert capsys.readouterr().err == "loading libraries and the model\n"


def test_a_command_in_a_log_says_how_far_it_is(
    quick_lines: None,
    featdiff_cli: Cli,
    tiny_model: Path,
    few_images: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from featdiff.detectors import base

    featurise = base.featurise

    def slowly(*arguments: Any) -> Iterator[Any]:
        for found in featurise(*arguments):
            time.sleep(0.5)
            yield found

    monkeypatch.setattr(base, "featurise", slowly)
    command = ("score", few_images, "-m", tiny_model, "--batch-size", 1, "-o", tmp_path / "a.csv")
    result = featdiff_cli(*command)
    assert re.search(r"^(scoring: \d+ of \d+|loading )", result.stderr, re.MULTILINE)
    quiet = featdiff_cli(*command, "-q")
    assert (quiet.exit_code, quiet.stderr) == (result.exit_code, "")


def test_a_long_report_gets_a_word(
    quick_lines: None,
    featdiff_cli: Cli,
    tiny_model: Path,
    few_images: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from featdiff.report import html

    save_report = html.save_report

    def slowly(*arguments: Any) -> None:
        time.sleep(0.8)
        save_report(*arguments)

    monkeypatch.setattr(html, "save_report", slowly)
    command = ("score", few_images, "-m", tiny_model, "-o", tmp_path / "a.csv", "--report", tmp_path / "a.html")
    assert "writing the report" in featdiff_cli(*command).stderr.splitlines()
    assert featdiff_cli(*command, "-q").stderr == ""


# ---- on a terminal ----


def test_a_terminal_has_a_word_until_the_first_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = screen(monkeypatch)
    with starting():
        time.sleep(0.3)
        assert "loading libraries and the model" in stream.getvalue()
        with Bars() as bars:
            time.sleep(0.3)
            assert "loading the backbone" in stream.getvalue()
            before = len(stream.getvalue())
            bars("features", 1, 2)
            bars._bars.refresh()
            shown = stream.getvalue()[before:]
            assert "features" in shown and "1/2" in shown
            before = len(stream.getvalue())
            time.sleep(0.3)
            assert "loading" not in stream.getvalue()[before:]


def test_what_is_said_stands_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = screen(monkeypatch)
    with starting():
        time.sleep(0.2)
        say("hello")
        with Bars() as bars:
            bars("features", 1, 2)
            say("and on")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    assert "hello" in lines and "and on" in lines


def test_without_standard_error_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with ``2>&-``: it must not go among the data."""
    monkeypatch.setattr("sys.stderr", None)
    say("hello")
    assert capsys.readouterr().out == ""


def test_an_error_ends_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = screen(monkeypatch)
    with pytest.raises(RuntimeError), starting():
        raise RuntimeError
    before = stream.getvalue()
    time.sleep(0.3)
    assert stream.getvalue() == before
    assert progress._starting is None
