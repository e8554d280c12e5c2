"""A watch: each image has its row once, whatever happens to files, folders, clocks and the process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import watch_stand_in
from PIL import Image
from watch_stand_in import STEPS, fill, run

from featdiff.data.image_refs import FileRef
from featdiff.data.references import iter_images
from featdiff.exceptions import FeatdiffError, UsageError
from featdiff.serving.alarms import Alarm
from featdiff.serving.manifest import write_manifest
from featdiff.serving.watch_sources import Source, open_source
from featdiff.serving.watch_state import Key, WatchState
from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.counts import Counts
from featdiff.verdicts.drift import SIDES
from featdiff.verdicts.layer_drift import LayerDrift

PAUSE = 0.02


def rows_in(*files: Path) -> list[dict[str, object]]:
    """Of all these files; every line must be whole."""
    text = "".join(file.read_text() for file in files)
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def times(*files: Path) -> Counter[str]:
    """How often each name has a row."""
    return Counter(Path(str(row["path"])).name for row in rows_in(*files))


def looked(source: Source, is_done: Callable[[Key], bool] = lambda key: False) -> list[str]:
    """What a further look makes ready."""
    time.sleep(PAUSE)
    source.look(is_done)
    return [Path(arrival.ref.path).name for arrival in source.take()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "incoming"
    place.mkdir()
    return place


@pytest.fixture
def source(folder: Path) -> Source:
    return open_source(str(folder), lambda text: None, PAUSE)


def even(count: int, seed: int = 0) -> np.ndarray:
    """p-values of normal images."""
    return np.random.default_rng(seed).integers(1, 502, count) / 501


def names_of(count: int) -> list[str]:
    return [f"{i:04}.png" for i in range(count)]


# ---- killed ----


@pytest.mark.parametrize("step", STEPS)
def test_a_process_that_is_killed_loses_and_doubles_nothing(folder: Path, tmp_path: Path, step: str) -> None:
    """At each step that could: the file of rows and the test of drift are as if nobody had disturbed it."""
    values = even(200)
    values[120:] = 0.002
    fill(folder, names_of(200), values)
    output = tmp_path / "rows.jsonl"
    at = {"half a line": 2, "rows": 3, "transaction": 1}.get(step, 0)
    command = [sys.executable, watch_stand_in.__file__, folder, output, "--once", "--rotate", "9000", "--kill", step]
    killed = subprocess.run([*map(str, command), "--at", str(at)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if step == "half a line":
        assert not output.read_bytes().endswith(b"\n")

    alarms: list[Alarm] = []
    watch = run(str(folder), output, rotate=9000, on_alarm=alarms.append)
    files = [*sorted(tmp_path.glob("rows-*.jsonl")), output]
    assert [row["path"] for row in rows_in(*files)] == [f"{folder}/{name}" for name in names_of(200)]
    assert len(files) >= 3
    assert all(file.stat().st_size >= 9000 for file in files[:-1])

    undisturbed = run(str(folder), tmp_path / "other.jsonl")
    assert watch.counts == undisturbed.counts
    assert watch.test and undisturbed.test and watch.test.to_json() == undisturbed.test.to_json()
    assert [alarm.side for alarm in alarms] == ["strange"]  # also where the one before had told it


def test_after_the_end_a_watch_finds_nothing_left(folder: Path, tmp_path: Path) -> None:
    fill(folder, names_of(70), even(70))
    for _ in range(2):
        watch = run(str(folder), tmp_path / "rows.jsonl")
        assert watch.test and (watch.counts.rows, watch.test.count) == (70, 70)
    assert set(times(tmp_path / "rows.jsonl").values()) == {1}


def test_a_layer_that_changes_gives_an_alarm_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Its name is told once, before and after a restart; the whole score, which has not changed, says nothing."""
    calibration = Calibration(np.arange(500.0), layers={"stage": np.arange(500.0)})
    fill(folder, names_of(150), even(150))
    for number, name in enumerate(names_of(150)):
        value = (folder / name).read_text()
        (folder / name).write_text(f"{value} {197 * number % 500 if number < 60 else 499.5}")

    alarms: list[Alarm] = []
    for _ in range(2):
        layers = LayerDrift(calibration, sides=SIDES)
        watch = run(str(folder), tmp_path / "rows.jsonl", on_alarm=alarms.append, layers=layers)
        assert watch.test and watch.test.alarms == {}
        assert [(layer, side) for layer, side, _ in watch.alarms] == [("stage", "strange")]
    (alarm,) = alarms
    assert (alarm.side, alarm.layer, alarm.chance) == ("strange", "stage", pytest.approx(0.04))
    assert 60 < alarm.after < 90
    assert alarm.in_words().startswith("layer stage has more small p-values than normal images have, found after ")
    assert watch.layers and watch.layers.tests["stage"].count == 150


def test_an_alarm_of_the_whole_score_comes_before_those_of_layers(folder: Path, tmp_path: Path) -> None:
    calibration = Calibration(np.arange(500.0), layers={"stage": np.arange(500.0)})
    fill(folder, names_of(90), np.full(90, 0.002))
    for name in names_of(90):
        (folder / name).write_text("0.002 499.5")
    alarms: list[Alarm] = []
    watch = run(str(folder), tmp_path / "rows.jsonl", on_alarm=alarms.append, layers=LayerDrift(calibration))
    assert [alarm.layer for alarm in alarms] == [""]
    assert [layer for layer, _, _ in watch.alarms] == ["", "stage"]


# ---- files ----


def test_a_file_that_grows_is_waited_for(folder: Path, source: Source) -> None:
    (folder / "a.png").write_text("0.")
    assert looked(source) == []
    (folder / "a.png").write_text("0.5")
    assert looked(source) == []  # it has changed since the last look
    assert looked(source) == ["a.png"]


def test_two_looks_at_once_are_as_one(folder: Path) -> None:
    """However often one looks, a file must stay as it is for the pause."""
    fill(folder, ["a.png"], even(1))
    source = open_source(str(folder), lambda text: None, 3600.0)
    assert looked(source) == looked(source) == []


def test_names_of_files_that_are_being_written_are_not_taken(folder: Path, source: Source) -> None:
    for name in (".a.png", "a.png.tmp", "a.png.part", "a.tmp", "notes.txt", "a.jpg", "sub/b.png", ".sub/c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "sub" / "up").symlink_to(folder)
    assert looked(source) == []
    assert sorted(looked(source)) == ["a.jpg", "b.png"]


def test_a_file_that_is_deleted_while_it_waits_is_forgotten(folder: Path, source: Source) -> None:
    fill(folder, ["a.png", "b.png"], even(2))
    assert looked(source) == []
    (folder / "a.png").rename(folder / "a.png.part")
    assert looked(source) == ["b.png"]
    (folder / "a.png.part").rename(folder / "a.png")
    assert looked(source, lambda key: key.name == b"b.png") == []  # as if it had never been there
    assert looked(source, lambda key: key.name == b"b.png") == ["a.png"]


def test_a_file_that_is_deleted_or_replaced_once_it_was_taken(folder: Path, source: Source) -> None:
    """What could be read has its row; what is not there any more, or is another file by now, has none yet."""
    fill(folder, ["gone.png", "new.png", "same.png"], even(3))
    looked(source)
    time.sleep(PAUSE)
    source.look(lambda key: False)
    gone, new, same = source.take()
    (folder / "gone.png").unlink()
    (folder / "new.png").write_text("0.25 and more")
    assert (source.keeps(gone, True), source.keeps(gone, False)) == (True, False)
    assert (source.keeps(new, True), source.keeps(new, False)) == (False, False)
    assert (source.keeps(same, True), source.keeps(same, False)) == (True, True)


def test_a_new_content_is_a_new_row(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    fill(folder, ["a.png", "b.png"], np.array([0.5, 0.25]))
    run(str(folder), output)
    (folder / "a.png").write_text("0.125")
    run(str(folder), output)
    assert [(Path(str(row["path"])).name, row["p_value"]) for row in rows_in(output)] == [
        ("a.png", 0.5),
        ("b.png", 0.25),
        ("a.png", 0.125),
    ]


def test_times_are_compared_and_not_ordered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes backwards, and files of 1970 and of the next century."""
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    output = tmp_path / "rows.jsonl"
    fill(folder, ["old.png", "new.png"], even(2))
    os.utime(folder / "old.png", (0, 0))
    os.utime(folder / "new.png", (5e9, 5e9))
    for _ in range(2):
        run(str(folder), output)
    assert times(output) == {"old.png": 1, "new.png": 1}
    os.utime(folder / "new.png", (4e9, 4e9))  # written again after the clock was set back
    run(str(folder), output)
    assert times(output) == {"old.png": 1, "new.png": 2}


def test_a_folder_that_vanishes_and_comes_back(folder: Path, tmp_path: Path) -> None:
    """A line when it goes and one when it is back; nothing is scored again, and what is new is."""
    output, away = tmp_path / "rows.jsonl", tmp_path / "away"
    fill(folder, names_of(3), even(3))
    lines: list[str] = []
    seen: list[int] = []

    class Enough(Exception):
        pass

    def after_each() -> None:
        seen.append(len(rows_in(output)) if output.exists() else 0)
        if seen[-1] == 3 and folder.exists() and not lines:
            folder.rename(away)
        elif len(lines) == 1 and seen[-4:] == [3] * 4 and not folder.exists():
            fill(away, ["new.png"], even(1))
            away.rename(folder)
        elif seen[-1] == 4 or len(seen) > 1000:
            raise Enough

    with pytest.raises(Enough):
        run(str(folder), output, once=False, poll=PAUSE, tell=lines.append, after_each=after_each)
    assert lines == [f"{folder}: No such file or directory; waiting for it", f"{folder} is there again"]
    assert times(output) == {**dict.fromkeys(names_of(3), 1), "new.png": 1}


def test_a_folder_that_vanishes_while_its_images_are_scored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images are not called unreadable for ever: they have their rows when it is back."""
    output = tmp_path / "rows.jsonl"
    fill(folder, names_of(100), even(100))
    score = watch_stand_in.score

    def with_break(refs: list[FileRef]) -> object:
        for number, part in enumerate(score(refs)):  # type: ignore[arg-type]
            yield part
            if number == 0:
                folder.rename(tmp_path / "away")

    monkeypatch.setattr(watch_stand_in, "score", with_break)
    run(str(folder), output)
    assert times(output).total() == 32
    (tmp_path / "away").rename(folder)
    monkeypatch.setattr(watch_stand_in, "score", score)
    run(str(folder), output)
    assert times(output) == dict.fromkeys(names_of(100), 1)
    assert {row["status"] for row in rows_in(output)} == {"ok"}


def test_rows_without_a_p_value_are_told_and_not_counted(folder: Path, tmp_path: Path) -> None:
    fill(folder, names_of(10), even(10))
    for name, text in (("a.png", "none"), ("b.png", "nan"), ("c.png", "0"), ("d.png", "1.5")):
        (folder / name).write_text(text)
    lines: list[str] = []
    watch = run(str(folder), tmp_path / "rows.jsonl", tell=lines.append)
    assert watch.test and (watch.counts.rows, watch.test.count) == (14, 10)
    (line,) = lines
    assert line.startswith("without a p-value, so not in the test of drift: ")
    assert "a.png" in line and "b'none'" in line and line.endswith(" and 3 more")


def test_images_come_by_the_order_of_their_names(folder: Path, tmp_path: Path) -> None:
    names = [f"{name}/{i}.png" for name in ("b", "a") for i in (2, 1, 3)]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("0.5")
    run(str(folder), tmp_path / "rows.jsonl")
    assert [row["path"] for row in rows_in(tmp_path / "rows.jsonl")] == [f"{folder}/{name}" for name in sorted(names)]


def test_a_name_that_is_no_text(folder: Path, tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))).write_text("0.5")
    for _ in range(2):
        run(str(folder), tmp_path / "rows.jsonl")
    assert [row["path"] for row in rows_in(tmp_path / "rows.jsonl")] == [f"{folder}/\\xff.png"]


def test_there_is_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder or manifest"):
        open_source(str(tmp_path / "nothing"), lambda text: None, PAUSE)


# ---- manifests and paths ----


def test_a_manifest_is_scored_as_its_files_come_and_as_it_grows(folder: Path, tmp_path: Path) -> None:
    manifest, output, lines = tmp_path / "m.parquet", tmp_path / "rows.jsonl", list[str]()
    fill(folder, names_of(3), even(3))
    write_manifest(iter_images(str(folder)), str(manifest))
    (folder / "0001.png").rename(tmp_path / "later.png")
    run(str(manifest), output, tell=lines.append)
    assert times(output) == {"0000.png": 1, "0002.png": 1}
    (tmp_path / "later.png").rename(folder / "0001.png")
    run(str(manifest), output, tell=lines.append)
    fill(folder, names_of(4), even(4))
    write_manifest([FileRef(str(folder / "0003.png"), str(folder / "0003.png"))], str(manifest))
    run(str(manifest), output, tell=lines.append)
    assert times(output) == dict.fromkeys(names_of(4), 1)
    assert lines == []


def test_a_manifest_that_is_replaced_while_it_is_watched(folder: Path, tmp_path: Path) -> None:
    """Of a damaged one there is a line, and the watch goes on when it is whole."""
    manifest, lines = tmp_path / "m.parquet", list[str]()
    fill(folder, names_of(2), even(2))
    refs = list(iter_images(str(folder)))
    write_manifest(refs[:1], str(manifest))
    source = open_source(str(manifest), lines.append, PAUSE)
    done: set[bytes] = set()
    looked(source)
    assert looked(source) == ["0000.png"]
    done.add(os.fsencode(refs[0].path))
    manifest.write_bytes(b"no manifest")
    assert looked(source, lambda key: key.name in done) == []
    write_manifest(refs, str(manifest))
    looked(source, lambda key: key.name in done)
    assert looked(source, lambda key: key.name in done) == ["0001.png"]
    assert len(lines) == 2 and "is no manifest" in lines[0] and lines[1] == f"{manifest} is there again"


def test_members_of_archives_are_not_waited_for(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(pictures / f"{name}.png")
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", pictures)
    write_manifest(iter_images(archive), str(tmp_path / "m.parquet"))
    source = open_source(str(tmp_path / "m.parquet"), lambda text: None, 3600.0)
    assert looked(source) == ["a.png", "b.png"]


def test_a_file_that_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_text("x")
    with pytest.raises(UsageError, match="is no manifest"):
        open_source(str(tmp_path / "m.parquet"), lambda text: None, PAUSE)


def test_paths_on_a_stream(folder: Path, tmp_path: Path) -> None:
    """Each once, also if it is named twice; what is not there has a row, as it was named."""
    output = tmp_path / "rows.jsonl"
    fill(folder, names_of(2), even(2))
    lines = f"{folder}/0000.png\n\n{folder}/none.png\n{folder}/0000.png\n{folder}/0001.png\n-\n".encode()
    for _ in range(2):
        run("-", output, once=False, stdin=io.BytesIO(lines))
    assert times(output) == {"0000.png": 1, "none.png": 1, "0001.png": 1, "-": 1}
    rows = {Path(str(row["path"])).name: row for row in rows_in(output)}
    assert rows["none.png"]["status"] == "unreadable"


# ---- the state ----


def add(state: WatchState, number: int) -> None:
    state.add([Key(b"%d" % number, 1, 1)], b'{"n": %d}\n' % number, Counts(rows=number), None)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_ctrl_c_between_the_state_and_the_rows(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was committed is written before the process ends, and not forgotten."""
    transaction = WatchState._transaction

    @contextlib.contextmanager
    def interrupted(self: WatchState) -> Iterator[None]:
        with transaction(self):
            yield
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), WatchState(output, {}) as state:
        add(state, 1)
        monkeypatch.setattr(WatchState, "_transaction", interrupted)
        add(state, 2)
    monkeypatch.undo()
    assert [row["n"] for row in rows_in(output)] == [1, 2]
    with WatchState(output, {}) as state:
        assert state.counts.rows == 2 and state.is_done(Key(b"2", 1, 1))
        add(state, 3)
    assert [row["n"] for row in rows_in(output)] == [1, 2, 3]


def test_rows_of_another_model_are_refused_until_a_restart(output: Path) -> None:
    with WatchState(output, {"model": "a", "source": "x", "columns": ("p",)}) as state:
        add(state, 1)
        state.tell("strange")
    for made_with, name in (({"model": "b", "source": "x"}, "model"), ({"model": "a", "source": "y"}, "source")):
        with pytest.raises(UsageError, match=f"begun with another {name} "):
            WatchState(output, {**made_with, "columns": ("p",)})
    with pytest.raises(UsageError, match="another source"):
        WatchState(output, {"model": "a", "source": "y"}, restart=True)
    with WatchState(output, {"model": "b", "source": "x"}, restart=True) as state:
        assert (state.told, state.drift, state.since, state.counts.rows) == ([], None, 1, 1)
        assert state.is_done(Key(b"1", 1, 1))
    with WatchState(output, {"model": "b", "source": "x"}) as state:
        assert state.since == 1


def test_states_of_others_are_refused(output: Path, tmp_path: Path) -> None:
    import sqlite3

    state = tmp_path / "rows.jsonl.state"
    state.write_bytes(b"no database, and long enough to be seen as none" * 50)
    with pytest.raises(UsageError, match="is damaged or no state of a watch"):
        WatchState(output, {})
    state.unlink()
    with sqlite3.connect(state) as database:
        database.execute("CREATE TABLE ours (a)")
    database.close()
    with pytest.raises(UsageError, match="is no state of a watch"):
        WatchState(output, {})
    state.unlink()
    WatchState(output, {}).__exit__()
    with sqlite3.connect(state) as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(UsageError, match="another version of featdiff .layout 7, now 1."):
        WatchState(output, {})


def test_a_damaged_test_of_drift_is_refused(folder: Path, output: Path) -> None:
    fill(folder, names_of(2), even(2))
    watch = run(str(folder), output)
    assert watch.test
    for drift, message in (
        ({**watch.test.to_json(), "version": 9}, "has version 9"),
        ({"version": 1}, "is no state of a drift test"),
    ):
        with WatchState(output, {"model": "stand-in", "source": str(folder)}) as state:
            state.add([], b"", state.counts, drift)
        with pytest.raises(UsageError, match=message):
            run(str(folder), output)


def test_one_process_at_a_time(output: Path) -> None:
    with WatchState(output, {}), pytest.raises(UsageError, match="another process is writing"):
        WatchState(output, {})
    WatchState(output, {}).__exit__()


def test_rows_without_a_state_are_not_added_to(output: Path) -> None:
    output.write_text("{}\n")
    with pytest.raises(UsageError, match="has rows, and there is no rows.jsonl.state"):
        WatchState(output, {})
    assert output.read_text() == "{}\n"


def test_places_that_cannot_hold_rows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        WatchState(tmp_path / "none" / "rows.jsonl", {})
    with pytest.raises(UsageError, match="is not a regular file"):
        WatchState(Path(os.devnull), {})


def test_an_output_that_was_changed_is_not_written_over(output: Path) -> None:
    for change in (b'{"n": 1}\n{"mine": 2}\n', b'{"n"'):
        with WatchState(output, {}) as state:
            add(state, 1)
            kept = output.read_bytes()
            output.write_bytes(change)
            with pytest.raises(FeatdiffError, match="somebody else has changed it; move it away"):
                add(state, 2)
        assert output.read_bytes() == change
        output.write_bytes(kept)


def test_an_output_that_was_moved_away_is_begun_anew(output: Path) -> None:
    """As by logrotate, while the watch runs or between two runs; no row comes twice."""
    for number in (1, 2, 3):
        with WatchState(output, {}) as state:
            add(state, 2 * number)
            output.rename(output.with_name(f"moved-{number}.jsonl"))
            add(state, 2 * number + 1)
        output.rename(output.with_name(f"closed-{number}.jsonl"))
    files = sorted(output.parent.glob("*-*.jsonl"))
    assert sorted(row["n"] for row in rows_in(*files)) == [2, 3, 4, 5, 6, 7]  # type: ignore[type-var]
    with WatchState(output, {}) as state:
        add(state, 8)
        add(state, 9)
        output.rename(output.with_name("moved.jsonl"))
    assert not output.exists()
    with WatchState(output, {}):
        pass
    assert not output.exists()


def test_numbers_that_are_in_use_are_passed_over(output: Path) -> None:
    taken = output.with_name("rows-000002.jsonl")
    taken.write_text("mine\n")
    with WatchState(output, {}, rotate_bytes=5) as state:
        for number in range(1, 5):
            add(state, number)
    names = ["rows-000001.jsonl", "rows-000003.jsonl", "rows-000004.jsonl", "rows.jsonl"]
    assert [row["n"] for row in rows_in(*(output.with_name(name) for name in names))] == [1, 2, 3, 4]
    assert taken.read_text() == "mine\n"


def test_a_full_disk_is_one_line_and_loses_nothing(
    folder: Path, tmp_path: Path, mounted: Callable[[Path, str], Path]
) -> None:
    disk = mounted(tmp_path / "disk", "8m")
    output = disk / "rows.jsonl"
    fill(folder, names_of(600), even(600))
    (disk / "ballast").write_bytes(bytes(7_800_000))
    with pytest.raises(FeatdiffError, match=r"rows\.jsonl(\.state)? cannot be written: .*(No space|full)") as caught:
        run(str(folder), output)
    assert "\n" not in str(caught.value)
    assert output.stat().st_size > 0
    (disk / "ballast").unlink()
    watch = run(str(folder), output)
    assert times(output) == dict.fromkeys(names_of(600), 1)
    assert watch.test and watch.test.count == 600
