"""``featdiff watch``: as a process that is killed, as one that reads a pipe, and its lines, codes and refusals."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from helpers import FEATDIFF, fails, noise_pictures, stopped
from pages import CRON, blocks_at
from PIL import Image

from featdiff import Detector
from featdiff.exceptions import FeatdiffError
from featdiff.serving.alarms import Alarm, run_command
from featdiff.serving.watch_state import WatchState
from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.drift import NORMAL, SIDES, STRANGE, DriftTest

Cli = Callable[..., Result]
IMAGES = 300
KILLS = 5


def rows_in(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def watch(featdiff_cli: Cli, exported_model: Path, tmp_path: Path) -> Cli:
    """``watch(source, ...)`` of the exported tiny model, once, into ``rows.jsonl`` of the temporary folder."""

    def run(source: object, *options: object, model: Path = exported_model) -> Result:
        return featdiff_cli(
            *("watch", source, "-m", model, "-o", tmp_path / "rows.jsonl", "--once", "--poll", 0.05), *options
        )

    return run


@pytest.fixture
def incoming(tmp_path: Path, sample_folders: dict[str, Path]) -> Path:
    """A folder of 60 tiles."""
    folder = tmp_path / "incoming"
    folder.mkdir()
    for file in sorted(sample_folders["test"].iterdir())[:60]:
        shutil.copy(file, folder)
    return folder


# ---- killed ----


def put(picture: bytes, folder: Path, number: int) -> None:
    """An image as programs write it: in one go, in two parts, or under another name first."""
    file = folder / f"{number:04}.png"
    if number % 3 == 0:
        file.write_bytes(picture)
    elif number % 3 == 1:
        with file.open("wb") as stream:
            stream.write(picture[: len(picture) // 2])
            stream.flush()
            time.sleep(0.001)
            stream.write(picture[len(picture) // 2 :])
    else:
        part = folder / f"{number:04}.png.part"
        part.write_bytes(picture)
        part.rename(file)


def test_a_process_that_is_killed_again_and_again(exported_model: Path, tmp_path: Path) -> None:
    """Images arrive while it is killed five times: each has one row, and is in the test of drift once."""
    folder, output = tmp_path / "incoming", tmp_path / "rows.jsonl"
    folder.mkdir()
    (tmp_path / "noise").mkdir()
    pictures = [file.read_bytes() for file in sorted(noise_pictures(tmp_path / "noise", 10, 16).iterdir())]
    chance = random.Random(0)
    arrive = threading.Thread(target=lambda: [put(pictures[i % 10], folder, i) for i in range(IMAGES)])
    arrive.start()
    command = [FEATDIFF, "watch", str(folder), "-m", str(exported_model), "-o", str(output), "--poll", "0.2"]
    command += ["--rotate-mb", "0.02", "-q", "--batch-size", "8"]

    def files() -> list[Path]:
        return [*sorted(tmp_path.glob("rows-*.jsonl")), output]

    for _ in range(KILLS):
        before = sum(file.stat().st_size for file in files() if file.exists())
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 120
        while process.poll() is None and sum(f.stat().st_size for f in files() if f.exists()) < before + 1000:
            assert time.monotonic() < until, "no rows came"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    arrive.join()
    done = subprocess.run([*command, "--once"], capture_output=True, text=True)

    assert done.returncode in (0, 4), done.stderr
    rows = [row for file in files() for row in rows_in(file)]
    counts = Counter(str(row["path"]) for row in rows)
    assert counts == {f"{folder}/{i:04}.png": 1 for i in range(IMAGES)}
    assert {row["status"] for row in rows} == {"ok"}  # none was read before it was whole
    made_with = json.loads(json.dumps(state_of(output)["made with"]))
    with WatchState(output, made_with) as state:
        assert state.drift and state.drift["count"] == state.counts.rows == IMAGES
        values = [float(str(row["p_value"])) for row in rows]
        again = DriftTest.from_json({**DriftTest(state.drift["held_out"], sides=SIDES).to_json()})
        again.update(np.array(values))
        assert again.to_json()["alarms"] == state.drift["alarms"]
    assert len(files()) > 3


def state_of(output: Path) -> dict[str, object]:
    """The facts that lie beside the rows."""
    import sqlite3

    database = sqlite3.connect(output.with_name(output.name + ".state"))
    try:
        (facts,) = database.execute("SELECT facts FROM now").fetchone()
    finally:
        database.close()
    found: dict[str, object] = json.loads(facts)
    return found


def test_ctrl_c_keeps_all_rows(exported_model: Path, incoming: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    arguments = ["watch", incoming, "-m", exported_model, "-o", output, "--poll", "0.1"]
    code, printed, errors = stopped(arguments, lambda: len(rows_in(output)) == 60)
    assert (code, printed) == (130, "")
    lines = errors.splitlines()
    assert lines[0] == f"watching {incoming}: 0 rows are in {output}"
    assert lines[-1] == f"interrupted; all rows so far are in {output}: the same command goes on from there"
    assert len(lines) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["incoming", "rows.jsonl", "rows.jsonl.state"]


# ---- a pipe ----


def test_rows_are_written_when_a_pipe_pauses(exported_model: Path, incoming: Path, tmp_path: Path) -> None:
    """Not only when a batch is full; at the end of the pipe it ends."""
    output = tmp_path / "rows.jsonl"
    command = [FEATDIFF, "watch", "-", "-m", str(exported_model), "-o", str(output), "-q"]
    names = [str(file) for file in sorted(incoming.iterdir())[:4]]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdin
        for count in (1, 3):
            process.stdin.write("".join(f"{name}\n" for name in names[:count]))
            process.stdin.flush()
            until = time.monotonic() + 120
            while len(rows_in(output)) < count:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.01)
        _, errors = process.communicate(names[3], timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    assert [row["path"] for row in rows_in(output)] == names


# ---- alarms ----


def test_once_as_cron_runs_it(watch: Cli, incoming: Path, tmp_path: Path, sample_folders: dict[str, Path]) -> None:
    """Rows as of score, an alarm that comes once and stands, and a restart."""
    told = tmp_path / "told.jsonl"
    command = f"{sys.executable} -c \"import sys; open('{told}', 'a').write(sys.stdin.read())\""
    (incoming / "broken.png").write_text("no picture")
    done = watch(incoming, "--on-alarm", command)
    assert done.exit_code == 3
    assert "without a p-value, so not in the test of drift: " in done.stderr and "broken.png" in done.stderr
    rows = rows_in(tmp_path / "rows.jsonl")
    assert len(rows) == 61 and list(rows[0])[:6] == ["path", "status", "reason", "ood_score", "p_value", "is_ood"]
    assert watch(incoming).exit_code == 0  # that a file was unreadable is told once
    assert not told.exists()

    noise_pictures(incoming, 60, 40)
    done = watch(incoming, "--on-alarm", command, "-q")
    assert done.exit_code == 4
    (line,) = done.stderr.splitlines()
    assert line.startswith("ALARM: more small p-values than normal images have, found after ")
    assert line.endswith("; 1 row without a p-value is not counted; it stays until --restart-drift")
    (alarm,) = rows_in(told)
    assert (alarm["side"], alarm["rows"], alarm["uncounted"]) == ("strange", alarm["counted"] + 1, 1)  # type: ignore[operator]
    assert 60 < int(str(alarm["after"])) <= int(str(alarm["counted"])) <= 120
    assert str(alarm["message"]) in line

    done = watch(incoming, "--on-alarm", command, "-q")
    assert (done.exit_code, done.stderr) == (4, "")
    assert len(rows_in(told)) == 1
    assert watch(incoming, "--restart-drift").exit_code == 0
    assert watch(incoming).exit_code == 0
    assert len(rows_in(tmp_path / "rows.jsonl")) == 121


def test_the_line_of_the_page_as_cron_runs_it(exported_model: Path, incoming: Path, tmp_path: Path) -> None:
    """By sh, with hardly any environment; what it prints would be sent as a mail."""
    (block,) = blocks_at(CRON, language="crontab")
    *times, command = block.text.strip().split(maxsplit=5)
    assert len(times) == 5
    (tmp_path / "my-model").symlink_to(exported_model)
    environment = {"PATH": f"{Path(FEATDIFF).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}  # of a checkout
    line = command.replace("/data", str(tmp_path))
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [row["path"] for row in rows_in(tmp_path / "rows.jsonl")] == [
        f"incoming/{name}" for name in sorted(os.listdir(incoming))
    ]


@pytest.fixture
def alarm() -> Alarm:
    test = DriftTest(500, sides=SIDES)
    test.update(np.full(400, 1.0))
    return Alarm.of(test, NORMAL, 0.05, rows=500, since=90, chance=0.02)


def test_an_alarm_in_words(alarm: Alarm) -> None:
    words = alarm.in_words()
    assert words.startswith("fewer small p-values than normal images have, as with a frozen camera")
    assert (
        f"found after {alarm.after} images: of the latest 400, 0.0 % have one up to 0.05 (95 % interval 0.0 to "
        in words
    )
    assert "where normal images have 5.0 %; the p-values are 1.00 from even ones" in words
    assert words.endswith("; 10 rows without a p-value are not counted")
    assert json.loads(alarm.as_json())["message"] == words
    strange = DriftTest(500, sides=SIDES)
    strange.update(np.full(100, 1 / 501))
    words = Alarm.of(strange, STRANGE, 0.05, 100, 0, 0.02).in_words()
    assert words.startswith("more small p-values than normal images have")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 7", "sh ended with code 7"),
        ("sleep 60 & sleep 60", "sh took more than 0.5 s and was killed"),
        ("exec 0<&-; sleep 60", "sh took more than 0.5 s and was killed"),
        ("exit 0", ""),
    ],
)
def test_a_command_that_fails_or_hangs(alarm: Alarm, script: str, message: str) -> None:
    begun = time.monotonic()
    if message:
        with pytest.raises(FeatdiffError) as caught:
            run_command(["sh", "-c", script], alarm, patience=0.5)
        assert str(caught.value) == message
    else:
        run_command(["sh", "-c", script], alarm, patience=60)
    assert time.monotonic() - begun < 30


def test_a_watch_goes_on_after_a_command_that_fails(watch: Cli, tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    noise_pictures(tmp_path / "noise", 99, 40)
    done = watch(tmp_path / "noise", "--on-alarm", "false", "-q")
    assert done.exit_code == 4
    alarm, failed = done.stderr.splitlines()
    assert alarm.startswith("ALARM: ")
    assert failed == "WARNING: --on-alarm: false ended with code 1; the watch goes on"
    assert len(rows_in(tmp_path / "rows.jsonl")) == 99


def test_too_few_held_out_images_for_alarms(
    watch: Cli, tiny_detector: Detector, incoming: Path, tmp_path: Path
) -> None:
    """It scores all the same, and says what would give alarms."""
    detector = copy.copy(tiny_detector)
    detector.calibration_ = Calibration(tiny_detector.calibration_.scores, groups=3)
    detector.save_pretrained(tmp_path / "few")
    done = watch(incoming, "--fpr", 0.3, model=tmp_path / "few")
    assert done.exit_code == 0
    assert done.stderr.splitlines()[0] == (
        "WARNING: no alarms: a test of drift needs at least 4 held-out images, or groups of them, and the model has 3; "
        "train it on more images"
    )
    assert len(rows_in(tmp_path / "rows.jsonl")) == 60
    assert state_of(tmp_path / "rows.jsonl")["drift"] is None


# ---- refusals ----


def test_requests_that_make_no_sense(watch: Cli, featdiff_cli: Cli, incoming: Path, tmp_path: Path) -> None:
    fails(watch(tmp_path / "nothing"), 2, "no folder or manifest", "nothing")
    fails(watch(incoming / sorted(os.listdir(incoming))[0]), 2, "is no manifest")
    fails(watch(incoming, "--on-alarm", "no-such-program x"), 2, "--on-alarm: no program 'no-such-program'")
    fails(watch(incoming, "--on-alarm", "sh 'x"), 2, "--on-alarm: ", "No closing quotation")
    fails(watch(incoming, "--on-alarm", ""), 2, "--on-alarm: no program ''")
    fails(watch(incoming, "--alpha", 1.5), 2, "--alpha must lie between 0 and 1, not 1.5")
    fails(watch(incoming, "--fpr", 1e-9), 2, "--fpr 1e-09 needs at least")
    fails(watch(incoming, "-o", tmp_path / "rows.csv"), 2, "--output: ", "choose a name like rows.jsonl")
    fails(featdiff_cli("watch", incoming, "-m", tmp_path / "none", "-o", tmp_path / "rows.jsonl"), 1, "none")
    assert [path.name for path in tmp_path.iterdir()] == ["incoming"]  # nothing is left behind


def test_another_model_or_rate_needs_a_restart(
    watch: Cli, tiny_model: Path, incoming: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of before stay, and their images are not scored again."""
    assert watch(incoming).exit_code == 0
    fails(
        watch(incoming, model=tiny_model), 2, "begun with another model (", "--restart-drift goes on with the new one"
    )
    fails(watch(incoming, "--fpr", 0.1), 2, "begun with another fpr (0.05, now 0.1)", "--restart-drift")
    fails(watch(incoming, "--alpha", 0.05), 2, "begun with another alpha (0.01, now 0.05)", "--restart-drift")
    with monkeypatch.context() as patch:
        patch.setattr("featdiff_cli.shards.version", lambda name: "99.0")
        fails(watch(incoming), 2, "begun with another featdiff (", "now 99.0", "--restart-drift")
    other = tmp_path / "other"
    other.mkdir()
    fails(watch(other, "--restart-drift"), 2, "--output: ", "begun with another source (", "choose another output")
    Image.new("RGB", (20, 20)).save(incoming / "new.png")
    done = watch(incoming, "--restart-drift", model=tiny_model)
    assert done.exit_code == 0, done.stderr
    assert len(rows_in(tmp_path / "rows.jsonl")) == 61


def test_a_folder_that_is_gone_when_cron_comes(watch: Cli, incoming: Path, tmp_path: Path) -> None:
    """It was there before, so it is no wrong name; all is as it was when it is back."""
    assert watch(incoming).exit_code == 0
    incoming.rename(tmp_path / "away")
    done = watch(incoming, "-q")
    assert (done.exit_code, done.stderr) == (1, f"{incoming}: No such file or directory; waiting for it\n")
    (tmp_path / "away").rename(incoming)
    done = watch(incoming, "-q")
    assert (done.exit_code, done.stderr) == (0, "")
    assert len(rows_in(tmp_path / "rows.jsonl")) == 60


def test_two_at_once(watch: Cli, incoming: Path, tmp_path: Path) -> None:
    assert watch(incoming).exit_code == 0
    with WatchState(tmp_path / "rows.jsonl", state_of(tmp_path / "rows.jsonl")["made with"]):  # type: ignore[arg-type]
        fails(watch(incoming), 2, "another process is writing", "rows.jsonl")


def test_a_termination_is_as_ctrl_c(exported_model: Path, incoming: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    arguments = ["watch", incoming, "-m", exported_model, "-o", output, "-q"]
    code, _, errors = stopped(arguments, lambda: len(rows_in(output)) == 60, number=signal.SIGTERM)
    assert code == 143
    assert errors.startswith("interrupted; all rows so far are in ")


def test_what_programs_read(watch: Cli, tmp_path: Path) -> None:
    """The log as JSON: the facts of an alarm, and the counts of all rows."""
    (tmp_path / "noise").mkdir()
    noise_pictures(tmp_path / "noise", 99, 40)
    done = watch(tmp_path / "noise", "--log-format", "json")
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    (alarm,) = [entry for entry in entries if "side" in entry]
    assert alarm["level"] == "warning" and alarm["message"].startswith("more small p-values")
    assert 0 < alarm["after"] <= 99 and 0 <= alarm["share"] <= 1 and 0 < alarm["distance"] <= 1
    (counts,) = [entry for entry in entries if "rows" in entry]
    assert counts["rows"] == 99 and counts["message"].startswith("99 new; all: 99 images: ")
