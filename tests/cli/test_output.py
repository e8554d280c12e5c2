"""Where rows go, what endings mean, and what reaches a terminal: nothing that could steer it."""

from __future__ import annotations

import csv
import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from helpers import fails
from rich.console import Console

from featdiff.files.text import from_spreadsheet
from featdiff.verdicts.calibration import Calibration

Cli = Callable[..., Result]
#: A file name that clears the screen, turns text round, rings, and begins a line of its own.
EVIL = "=a\x1b[2J\u202e\x9b31m\x07\r\nok.png"
SHOWN = r"=a\x1b[2J\u202e\x9b31m\x07\x0d\x0aok.png"
ENDINGS = ".csv, .jsonl, .ndjson, .parquet, .txt"


@pytest.fixture
def evil(few_images: Path) -> Path:
    """A folder with an image and a broken file of such names."""
    shutil.copy(few_images / "a.png", few_images / EVIL)
    (few_images / f"-{EVIL}").write_bytes(b"")
    return few_images


def harmless(text: str) -> bool:
    return not set(text) & set("\x1b\x9b\x07\r\u202e")


# ---- endings ----


@pytest.mark.parametrize("name", ["rows.json", "rows.xlsx", "rows.csv.gz", "rows.2", "rows.tsv"])
def test_an_unknown_ending_is_refused_with_the_known_ones(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path, name: str
) -> None:
    for command in (("score", few_images, "-m", tiny_model), ("audit", few_images)):
        result = featdiff_cli(*command, "-o", tmp_path / name)
        fails(result, 2, f"--output: {tmp_path / name}: the ending {Path(name).suffix} says no format", ENDINGS)
        assert not (tmp_path / name).exists()


def test_what_a_format_is_called_goes_before_the_ending(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path
) -> None:
    command = ("score", few_images, "-m", tiny_model, "-q", "-o")
    assert featdiff_cli(*command, tmp_path / "rows.json", "--format", "jsonl").exit_code == 0
    assert len([json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]) == 6
    for name in ("rows", "ROWS.CSV"):  # without an ending it is CSV
        assert featdiff_cli(*command, tmp_path / name).exit_code == 0
        assert len(list(csv.DictReader((tmp_path / name).open()))) == 6


@pytest.mark.parametrize("name", ["out.txt", "out.xlsx", "out.jsonl"])
def test_endings_of_a_benchmark(featdiff_cli: Cli, tmp_path: Path, name: str) -> None:
    result = featdiff_cli("bench", "folders", "--data", tmp_path, "-o", tmp_path / name)
    fails(result, 2, "says no format: use .md, .markdown, .json, .csv, or name one with --format")


# ---- standard output ----


def test_a_dash_is_standard_output(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        ("score", few_images, "-m", tiny_model, "-q"),
        ("score", few_images, "-m", tiny_model, "-q", "--format", "jsonl"),
    ):
        result = featdiff_cli(*command, "-o", "-")
        assert (result.exit_code, result.stdout) == (0, featdiff_cli(*command).stdout)
        assert result.stdout
    assert not Path("-").exists()


def test_audit_and_its_dash(
    featdiff_cli: Cli,
    sample_folders: dict[str, Path],
    seeded_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted(sample_folders["train"].iterdir())[:20]
    command = ("audit", *files, "--backbone", "test_resnet", "--weights", seeded_backbone, "--size", 32, "-q")
    result = featdiff_cli(*command, "-o", "-")
    assert result.exit_code == 0, result.output
    assert len(list(csv.DictReader(io.StringIO(result.stdout)))) == 20
    assert list(tmp_path.iterdir()) == []
    fails(featdiff_cli(*command, "-o", "gone/odd.csv"), 1, "gone/odd.csv cannot be written: No such file or directory")


# ---- terminals ----


def test_names_cannot_steer_the_terminal(featdiff_cli: Cli, tiny_model: Path, evil: Path) -> None:
    result = featdiff_cli("score", evil, "-m", tiny_model, "--format", "table")
    assert result.exit_code == 3
    assert harmless(result.stdout) and harmless(result.stderr)
    assert len(result.stdout.splitlines()) == 9
    assert result.stdout.count(SHOWN) == 2
    for format in ("csv", "jsonl"):
        assert harmless(featdiff_cli("score", evil, "-m", tiny_model, "--format", format).stdout)


@pytest.mark.parametrize(
    "command",
    [
        ("score", "photos", "-m", "{evil}"),
        ("train", "--features", "{evil}"),
        ("score", "photos", "-o", "gone/{evil}"),
        ("audit", "{evil}"),
        ("train", "{evil}", "--backbone", "{evil}"),
        ("train", "--config", "{evil}"),
        ("eval", "--id", "{evil}", "--ood", "{evil}"),
        ("bench", "{evil}", "--data", "."),
        ("bench", "folders", "--data", "{evil}"),
        ("info", "{evil}"),
        ("backbones", "{evil}"),
        ("{evil}",),
        ("score", "photos", "--format", "{evil}"),
        ("export", "-m", "{evil}"),
        ("outliers", "{evil}", "-m", "{evil}"),
        ("harden", "{evil}", "--student", "{evil}", "-o", "out"),
        ("--debug", "score", "photos", "-m", "{evil}"),
    ],
    ids=" ".join,
)
def test_errors_cannot_steer_the_terminal(
    featdiff_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATDIFF_DEBUG", "")
    result = featdiff_cli(*(word.format(evil=EVIL.replace("\r\n", "")) for word in command))
    assert result.exit_code in (1, 2), result.output
    assert harmless(result.output)
    assert "\\x1b" in result.stderr
    assert "a bug" not in result.stderr


def test_lists_of_unreadable_files_cannot_steer_the_terminal(
    featdiff_cli: Cli, sample_folders: dict[str, Path], seeded_backbone: Path, tmp_path: Path
) -> None:
    for i, file in enumerate(sorted(sample_folders["train"].iterdir())[:22]):
        shutil.copy(file, tmp_path / f"{i}.png")
    shutil.copy(tmp_path / "0.png", tmp_path / f"copy {EVIL}")
    (tmp_path / EVIL).write_bytes(b"")
    command = ("audit", tmp_path, "--backbone", "test_resnet", "--weights", seeded_backbone, "--size", 32)
    result = featdiff_cli(*command)
    assert result.exit_code == 3
    assert harmless(result.output)
    assert f"  left out: {tmp_path}/{SHOWN}: empty file (0 bytes)" in result.stderr.splitlines()
    assert any(SHOWN in line and "has the content of" in line for line in result.stderr.splitlines())

    paths = [row["path"] for row in csv.DictReader(io.StringIO(result.stdout))]
    assert f"{tmp_path}/{EVIL}" not in paths
    assert f"{tmp_path}/{EVIL}" in map(from_spreadsheet, paths)
    raw = featdiff_cli(*command, "--raw-csv", "-q").stdout_bytes.decode()
    assert f"{tmp_path}/{EVIL}" in [row["path"] for row in csv.DictReader(io.StringIO(raw, newline=""))]

    odd = tmp_path / "odd.csv"  # a table that featdiff wrote names the groups of these very files
    featdiff_cli(*command, "-q", "-o", odd)
    again = featdiff_cli(*command, "--groups", odd)
    assert again.exit_code == 3, again.output


def test_warnings_cannot_steer_the_terminal(featdiff_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(pattern: str) -> list[tuple[str, str]]:
        warnings.warn(f"strange name {EVIL}", UserWarning, stacklevel=1)
        return [(EVIL, "hub")]

    monkeypatch.setattr("featdiff.features.backbones.list_backbones", warn)
    result = featdiff_cli("backbones")
    assert harmless(result.output)
    assert "UserWarning: strange name =a\\x1b[2J" in result.stderr
    assert SHOWN in result.stdout


def test_bars_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from featdiff_cli import progress

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with progress.Bars() as bars:
        bars(EVIL, 1, 2)
        bars._bars.refresh()
    assert SHOWN in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


def test_tables_of_results_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from featdiff_cli.bench import _text, print_grids
    from featdiff_cli.tables import print_evaluation

    metrics = {"auroc": 0.9, "auroc_ci": [0.8, 1.0], "fpr95": 0.1, "aupr_in": 0.9, "aupr_out": 0.9}
    for name in ("auroc", "fpr95"):
        metrics |= {f"{name}_std": None, f"{name}_difference": 0.1, f"{name}_difference_ci": [0.0, 0.2]}
    pair = {"ood": EVIL, "protocol": "matched", "n_id": 9, "n_ood": 9, "heads": {EVIL: metrics}}
    heads = {"featdiff": metrics, EVIL: metrics, f"baseline_{EVIL}": metrics}
    evaluated = {"folder": EVIL, "id": EVIL, "model": EVIL, "pairs": [pair | {"heads": heads}]}
    print_evaluation(evaluated, [(0, 9)], Calibration([1.0, 2.0]), 0.5, all_heads=True)
    shown = capsys.readouterr().out
    assert harmless(shown)
    words = " ".join(shown.split())
    assert words.startswith(f"{SHOWN}: {SHOWN}, matched: featdiff finds")
    assert f"backbone {SHOWN}; in-domain: {SHOWN}" in words
    assert f"\n  {SHOWN} " in shown

    costs = {"images_per_second": 1.0, "training_seconds": 1.0, "megabytes": 1.0}
    means = [{"protocol": "matched", "ood": [EVIL], "heads": {EVIL: metrics}}]
    task = {"name": EVIL, "pairs": [pair], "methods": {EVIL: costs}, "n_train": 9, "n_bank": 9, "means": means}
    result = {"suite": EVIL, "backbone": EVIL, "seeds": [0], "tasks": [task], "published": [], "left_out": {EVIL: EVIL}}
    print_grids(result)
    shown = capsys.readouterr().out
    assert harmless(shown) and "\\x1b" in shown

    assert harmless(_text(result, "markdown", False))
    assert harmless(_text(result, "json", False))
    neutral = _text(result, "csv", False)
    assert harmless(neutral)
    (row,) = csv.DictReader(io.StringIO(neutral))
    assert (row["task"], from_spreadsheet(row["task"]), row["auroc"]) == ("'" + SHOWN, EVIL, "0.9")
    (raw,) = csv.DictReader(io.StringIO(_text(result, "csv", True), newline=""))
    assert raw["ood"] == EVIL


# ---- --debug ----


def test_debug_works_after_the_command_too(
    featdiff_cli: Cli, few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [
        ("score", few_images, "-m", tmp_path / "gone", "--debug"),
        ("score", "--debug", few_images, "-m", tmp_path / "gone"),
        ("info", tmp_path / "gone", "--debug"),
        ("--debug", "info", tmp_path / "gone"),
    ]
    for command in commands:
        monkeypatch.setenv("FEATDIFF_DEBUG", "")
        result = featdiff_cli(*command)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("Error: no featdiff model")
    monkeypatch.setenv("FEATDIFF_DEBUG", "")
    assert "Traceback" not in featdiff_cli("info", tmp_path / "gone").stderr


def test_every_command_has_debug(featdiff_cli: Cli) -> None:
    for name in ("train", "eval", "backbones", "doctor", "demo"):
        assert "--debug" in featdiff_cli(name, "--help").stdout
