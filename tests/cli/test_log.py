"""The log: JSON lines on standard error or in a file, and standard error as it always was without them."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers import FEATDIFF, fails

Cli = Callable[..., Result]


@pytest.fixture
def broken(few_images: Path) -> Path:
    """A folder of 7 files, of which one is no image and has a name that could steer a terminal."""
    (few_images / "x\x1b[31m.png").write_bytes(b"nothing")
    return few_images


def entries(text: str) -> list[dict[str, Any]]:
    """Every line is one object with the four entries that all have."""
    found = [json.loads(line) for line in text.splitlines()]
    for entry in found:
        assert {"time", "level", "logger", "message"} <= set(entry)
        assert entry["logger"].startswith("featdiff")
        assert entry["level"] in ("info", "warning", "error")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
        age = datetime.now(UTC) - datetime.fromisoformat(entry["time"])
        assert -1 < age.total_seconds() < 600
    return found


def told(text: str) -> list[str]:
    """Lines for people, without times and speeds."""
    return [re.sub(r"\d+\.\d s|[\d,]+ images/s|waited.*", "", line) for line in text.splitlines()]


def test_standard_error_as_json(featdiff_cli: Cli, tiny_model: Path, broken: Path) -> None:
    """It says what it says to people, and beside that when it began, how it ended, and counts."""
    plain = featdiff_cli("score", broken, "-m", tiny_model)
    done = featdiff_cli("score", broken, "-m", tiny_model, "--log-format", "json")
    assert done.exit_code == plain.exit_code == 3
    assert done.stdout == plain.stdout
    found = entries(done.stderr)
    assert found[0] | {"event": "began", "command": "score"} == found[0]
    assert found[-1] | {"event": "ended", "exit_code": 3} == found[-1]
    assert found[-1]["seconds"] > 0
    assert "\x1b" not in done.stderr

    (summary,) = [entry for entry in found if "flagged" in entry]
    rows = plain.stdout.splitlines()[1:]
    assert (summary["rows"], summary["unreadable"], summary["fpr"]) == (7, 1, 0.05)
    assert summary["flagged"] == sum(",true," in row for row in rows)
    assert told("\n".join(entry["message"] for entry in found[1:-1])) == told(plain.stderr)


def test_without_the_options_nothing_is_different(featdiff_cli: Cli, tiny_model: Path, few_images: Path) -> None:
    """Before and after a command with them."""
    line = ["score", few_images, "-m", tiny_model]
    before = featdiff_cli(*line)
    featdiff_cli(*line, "--log-format", "json")
    after = featdiff_cli(*line, "--log-format", "text")
    assert told(before.stderr) == told(after.stderr)
    assert before.stdout == after.stdout
    assert logging.getLogger("featdiff").level == logging.NOTSET
    assert not [handler for handler in logging.getLogger().handlers if handler.__module__.startswith("featdiff")]


def test_a_log_file_stands_beside_standard_error(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path
) -> None:
    """It has all, under ``-q``, too; a second run appends."""
    line = ["score", few_images, "-m", tiny_model, "--log-file", tmp_path / "run.log"]
    plain = featdiff_cli("score", few_images, "-m", tiny_model)
    assert told(featdiff_cli(*line).stderr) == told(plain.stderr)
    first = (tmp_path / "run.log").read_text()
    assert told("\n".join(entry["message"] for entry in entries(first)[1:-1])) == told(plain.stderr)

    done = featdiff_cli(*line, "-q")
    assert done.stderr == ""
    both = (tmp_path / "run.log").read_text()
    assert both.startswith(first)
    assert len(entries(both)) == 2 * len(entries(first))


def test_a_log_file_for_people(featdiff_cli: Cli, tiny_model: Path, broken: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    featdiff_cli("score", broken, "-m", tiny_model, "-q", "--log-file", file, "--log-format", "text")
    lines = file.read_text().splitlines()
    assert all(re.match(r"\S+Z (INFO|WARNING|ERROR) +featdiff\.\S+: ", line) for line in lines)
    assert "\x1b" not in file.read_text()
    assert any("flagged=" in line for line in lines)


def test_quiet_leaves_warnings_and_errors(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path
) -> None:
    options = ["-q", "--log-format", "json"]
    assert featdiff_cli("score", few_images, "-m", tiny_model, *options).stderr == ""
    (entry,) = entries(featdiff_cli("score", tmp_path / "gone", "-m", tiny_model, *options).stderr)
    assert entry["level"] == "error"
    assert "gone" in entry["message"] and not entry["message"].startswith("Error")


def test_an_error_has_its_traceback_with_debug(
    featdiff_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATDIFF_DEBUG", "")
    done = featdiff_cli("score", tmp_path, "-m", tmp_path / "gone", "--log-format", "json", "--debug")
    traced = [entry for entry in entries(done.stderr) if "traceback" in entry]
    assert len(traced) == 1 and "ModelError" in traced[0]["traceback"]


def test_options_come_from_the_environment(featdiff_cli: Cli, tmp_path: Path) -> None:
    variables = {"FEATDIFF_LOG_FORMAT": "json", "FEATDIFF_LOG_FILE": str(tmp_path / "run.log")}
    done = featdiff_cli("backbones", "test_resnet*", env=variables)
    assert (done.exit_code, done.stderr) == (0, "")
    assert [entry.get("event") for entry in entries((tmp_path / "run.log").read_text())] == ["began", "ended"]


def test_bad_requests(featdiff_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    fails(featdiff_cli("info", tiny_model, "--log-file", tmp_path), 2, "--log-file", "cannot be written")
    fails(featdiff_cli("info", tiny_model, "--log-file", tmp_path / "no" / "x.log"), 2, "cannot be written")
    fails(featdiff_cli("info", tiny_model, "--log-format", "xml"), 2, "--log-format", "'text', 'json'")


def test_a_disk_that_is_full_ends_the_log_and_not_the_run(tiny_model: Path) -> None:
    run = [FEATDIFF, "info", str(tiny_model), "--log-file", "/dev/full"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0
    assert "backbone" in done.stdout
    assert done.stderr.splitlines() == ["WARNING: the log file cannot be written: [Errno 28] No space left on device"]


def test_trainings_and_warnings_of_libraries_are_logged(
    featdiff_cli: Cli, tmp_path: Path, sample_folders: dict[str, Path], seeded_backbone: Path
) -> None:
    """Every record of a training is one of the end of an epoch; steps between are left to ``--log-to``."""
    backbone = ["--backbone", "test_resnet", "--weights", seeded_backbone, "--layers", "layer4"]
    line = ["train", sample_folders["test"], *backbone, "-o", tmp_path / "model", "--no-local", "--seed", 77]
    log = tmp_path / "run.log"
    done = featdiff_cli(*line, "-q", "--log-file", log)
    assert done.exit_code == 0, done.stderr
    steps = [entry for entry in entries(log.read_text()) if entry["logger"] == "featdiff.diffusion.fit"]
    assert steps
    for entry in steps:
        assert {"step", "steps", "epoch", "loss", "val_loss", "lr"} <= set(entry)
        assert 0 < entry["step"] <= entry["steps"]


def test_a_warning_of_another_library_is_an_entry(featdiff_cli: Cli, tmp_path: Path, monkeypatch: Any) -> None:
    from featdiff.files import model_folder

    def warn(*_: Any) -> None:
        warnings.warn("something is old", FutureWarning, stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(model_folder, "load", warn)
    done = featdiff_cli("info", tmp_path, "--log-format", "json")
    assert done.exit_code == 130
    _, warned, stopped, ended = entries(done.stderr)
    assert (warned["level"], warned["category"], warned["message"]) == ("warning", "FutureWarning", "something is old")
    assert stopped["message"] == "interrupted"
    assert ended["exit_code"] == 130
