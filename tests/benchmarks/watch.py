"""What a watch does to many files, and to very many rows; the tables of RESULTS.md.

    python tests/benchmarks/watch.py [--files 100000 --kills 20]
    python tests/benchmarks/watch.py --rows 1000000

The first line lets files arrive while ``featdiff watch`` runs on a tiny model, and is killed with SIGKILL at random
moments. The second line takes drawn p-values in place of images: what a million rows cost in memory and on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers of the tests
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FEATDIFF_LOG_SECONDS"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from watch_stand_in import HELD_OUT, rows_of

from featdiff.data.image_refs import HeldRef, ImageRef
from featdiff.serving.watch import Watch
from featdiff.serving.watch_sources import Arrival
from featdiff.serving.watch_state import Key, WatchState
from featdiff.verdicts.drift import SIDES, DriftTest
from featdiff.verdicts.results import Scores

#: Bytes of a file of rows before it gets a number.
ROTATE_MB = 5
#: Longest time without a new row before something is wrong.
HANG_SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, help="drawn p-values in place of files")
    parser.add_argument("--model", type=Path, help="an exported model; default: a tiny one is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.rows:
            drawn_rows(Path(folder), arguments.rows)
        else:
            sys.exit(killed(Path(folder), arguments.model, arguments.files, arguments.kills))


# ---- files ----


def tiny_model(folder: Path) -> Path:
    """A model that looks at 32 x 32 pixels, and starts in a second."""
    from conftest import TINY

    from featdiff import Detector
    from featdiff.data import samples
    from featdiff.export.export import export

    images = samples.write(folder / "samples")
    detector = Detector(**{**TINY, "size": 32}, local=False).fit(images["train"])
    export(detector, folder / "model", ["onnx"])
    return folder / "model"


def killed(place: Path, model: Path | None, files: int, kills: int) -> int:
    """Let files arrive and kill their watch; the exit code is 1 if a row is lost or doubled."""
    from helpers import FEATDIFF, noise_pictures

    model = model or tiny_model(place)
    incoming, output = place / "incoming", place / "rows.jsonl"
    for folder in (incoming, place / "noise"):
        folder.mkdir()
    pictures = [file.read_bytes() for file in sorted(noise_pictures(place / "noise", 50, 8).iterdir())]
    written = [0]
    threading.Thread(target=arrive, args=(incoming, pictures, files, output, written), daemon=True).start()

    command = [FEATDIFF, "watch", str(incoming), "-m", str(model), "-o", str(output), "-q", "--poll", "0.5"]
    command += ["--rotate-mb", str(ROTATE_MB)]
    chance = random.Random(0)
    memory = 0
    for kill in range(kills):
        process = subprocess.Popen(command)
        wait_for(output, files * (kill + chance.random()) / (kills + 1), process)
        memory = max(memory, peak_memory(process.pid))
        process.kill()
        process.wait()
        print(f"killed {kill + 1}: {rows_at(output):,} rows of {written[0]:,} files", file=sys.stderr, flush=True)
    while written[0] < files:
        time.sleep(1)
    done = subprocess.run([*command, "--once"])

    times: Counter[str] = Counter()
    status: Counter[str] = Counter()
    outputs = [*sorted(place.glob("rows-*.jsonl")), output]
    for file in outputs:
        with file.open() as stream:
            for line in stream:
                row = json.loads(line)
                times[row["path"]] += 1
                status[row["status"]] += 1
    expected = {f"{incoming}/{name(i)}" for i in range(files)}
    with WatchState(output, made_with(output)) as state:
        counted = state.drift["count"] if state.drift else 0
    lost = len(expected - times.keys())
    doubled = sum(count > 1 for count in times.values())
    print(
        "| files | kills | rows | lost | doubled | not whole | in the drift test | files of rows | memory, MB | code |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {files:,} | {kills} | {times.total():,} | {lost} | {doubled} | {status['unreadable']} | {counted:,} | "
        f"{len(outputs)} | {memory / 1e6:,.0f} | {done.returncode} |"
    )
    wrong = lost or doubled or times.total() != files or counted != files or status["ok"] != files
    return int(bool(wrong))


def name(number: int) -> str:
    return f"{number // 1000:03}/{number:06}.png"


def arrive(incoming: Path, pictures: list[bytes], files: int, output: Path, written: list[int]) -> None:
    """Write files in one go, in two parts, or under another name first; at most 10,000 ahead of their rows."""
    for i in range(files):
        while i % 1000 == 0 and i > rows_at(output) + 10_000:
            time.sleep(0.2)
        file = incoming / name(i)
        if i % 1000 == 0:
            file.parent.mkdir()
        picture = pictures[i % len(pictures)]
        if i % 3 == 0:
            file.write_bytes(picture)
        elif i % 3 == 1:
            with file.open("wb", buffering=0) as stream:
                stream.write(picture[: len(picture) // 2])
                stream.write(picture[len(picture) // 2 :])
        else:
            part = file.with_suffix(".png.part")
            part.write_bytes(picture)
            part.rename(file)
        written[0] = i + 1


_counted: dict[str, tuple[int, int]] = {}


def rows_at(output: Path) -> int:
    """How many rows there are; a file is read from where it ended the time before."""
    total = 0
    for file in (*output.parent.glob(f"{output.stem}-*.jsonl"), output):
        try:
            status = file.stat()
            begin, lines = _counted.get(str(status.st_ino), (0, 0))
            with file.open("rb") as stream:
                stream.seek(begin)
                data = stream.read()
        except FileNotFoundError:  # it got its number meanwhile
            continue
        lines += data.count(b"\n")
        _counted[str(status.st_ino)] = begin + len(data), lines
        total += lines
    return total


def wait_for(output: Path, rows: float, process: subprocess.Popen[bytes]) -> None:
    """Wait until there are so many rows."""
    latest, since = -1, time.monotonic()
    while (now := rows_at(output)) < rows:
        if now > latest:
            latest, since = now, time.monotonic()
        if process.poll() is not None or time.monotonic() > since + HANG_SECONDS:
            sys.exit(f"the watch ended or hangs at {now:,} rows: {process.poll()}")
        time.sleep(0.02)


def made_with(output: Path) -> dict[str, object]:
    import sqlite3

    database = sqlite3.connect(f"{output}.state")
    (facts,) = database.execute("SELECT facts FROM now").fetchone()
    database.close()
    found: dict[str, object] = json.loads(facts)["made with"]
    return found


def peak_memory(process: int) -> int:
    """The most bytes that a process has held."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# ---- rows ----


class Drawn:
    """So many p-values, a thousand at once, in place of images."""

    pause = 0.0
    troubled = False

    def __init__(self, rows: int) -> None:
        self._starts = iter(range(0, rows, 1000))
        self._rows = rows
        self._ready: list[int] = []
        self.over = False

    def look(self, is_done: object) -> int:
        self._ready = [next(self._starts)]
        self.over = self._ready[0] + 1000 >= self._rows
        return 0

    def take(self) -> list[Arrival]:
        if not self._ready:
            return []
        start = self._ready.pop()
        values = np.random.default_rng(start).integers(1, HELD_OUT + 2, min(1000, self._rows - start)) / (HELD_OUT + 1)
        names = [f"incoming/2026-11/{start + i:09}.png" for i in range(len(values))]
        refs = [HeldRef(name, f"{value:.6f}".encode()) for name, value in zip(names, values, strict=True)]
        return [Arrival(Key(ref.path.encode(), 8, start), ref) for ref in refs]

    def keeps(self, arrival: Arrival, readable: bool) -> bool:
        return True


def drawn_rows(place: Path, rows: int) -> None:
    """Memory and disk as rows come."""
    output = place / "rows.jsonl"
    steps = [rows * i // 10 for i in (1, 2, 5, 10)]

    def score(refs: list[ImageRef]) -> list[Scores]:
        return [rows_of(refs[i : i + 32]) for i in range(0, len(refs), 32)]

    print("| rows | memory, MB | peak, MB | state, MB | rows, MB |")
    print("|---|---|---|---|---|")
    with WatchState(output, {"model": "drawn"}, ROTATE_MB * 10**6) as state:
        test = DriftTest(HELD_OUT, sides=SIDES)
        watch = Watch(Drawn(rows), score, state, test, 0.05, print, print)

        def after_each() -> None:
            if not steps or watch.counts.rows < steps[0]:
                return
            steps.pop(0)
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            states = sum(file.stat().st_size for file in place.glob("rows.jsonl.state*"))
            size = sum(file.stat().st_size for file in place.glob("rows*.jsonl"))
            cells = (resident, peak_memory(os.getpid()), states, size)
            print(f"| {watch.counts.rows:,} | " + " | ".join(f"{cell / 1e6:,.0f}" for cell in cells) + " |", flush=True)

        watch.run(after_each=after_each)


if __name__ == "__main__":
    main()
