"""What a server costs beside scoring in one's own process, and how it holds out; the tables of RESULTS.md.

    python tests/benchmarks/server.py --data FOLDER [--images 300 --rounds 3 --minutes 5 --size 256 --processes 2]

FOLDER holds flowers.zip as configs/README.md describes it. The clients run on the same cores as the server: eight
threads of another process, each with a connection of its own. Rates are taken in turns with what ``featdiff score``
does with the same files, by the same engine, in a process that has done it once. Then requests one after the other,
requests at half the rate at even distances, and minutes of load in which one image in a hundred is broken; every answer
is compared with the row of that process. With ``--size`` the photographs are cut to squares, as one camera takes them.
Where wrk is installed, its rate and five minutes of its load are printed as well; it does not look at answers.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
from PIL import Image, ImageOps

from featdiff.runtime.allocator import keep_freed_memory
from featdiff.runtime.cpus import prepare_threads

if TYPE_CHECKING:
    from featdiff import Detector

FEATDIFF = str(Path(sys.executable).with_name("featdiff"))
ENGINE = "openvino"
CLIENTS = 8
FITTED = 200
#: Threads that send at a given rate: more than ever wait at once.
OPEN = 32
#: Scores of another batch differ by rounding; p-values and verdicts must not.
ROUNDING = 2e-5


class Answer(NamedTuple):
    """What came of one request."""

    image: int
    status: int
    row: dict[str, Any]
    seconds: float


def ask(connection: http.client.HTTPConnection, image: int, content: bytes) -> Answer:
    begun = time.perf_counter()
    connection.request("POST", "/v1/score", content)
    response = connection.getresponse()
    found = json.loads(response.read())
    seconds = time.perf_counter() - begun
    return Answer(image, response.status, found["images"][0] if response.status == 200 else {}, seconds)


def closed_loop(port: int, contents: list[bytes], clients: int, seconds: float) -> list[Answer]:
    """Clients that send again as soon as they are answered: each image once, or for so many seconds."""

    def client(number: int) -> list[Answer]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        answers = []
        until = time.monotonic() + seconds
        image = number
        while image < len(contents) or (seconds and time.monotonic() < until):
            if seconds and time.monotonic() >= until:
                break
            answers.append(ask(connection, image % len(contents), contents[image % len(contents)]))
            image += clients
        return answers

    with ThreadPoolExecutor(clients) as pool:
        return [answer for part in pool.map(client, range(clients)) for answer in part]


def at_rate(port: int, contents: list[bytes], rate: float) -> list[Answer]:
    """Each image once, at even distances; the time counts from when it was due."""
    begun = time.perf_counter() + 0.5

    def client(image: int) -> Answer:
        due = begun + image / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        answer = ask(connection, image, contents[image])
        return answer._replace(seconds=time.perf_counter() - due)

    with ThreadPoolExecutor(OPEN) as pool:
        return list(pool.map(client, range(len(contents))))


_LUA = """
local bodies, sent = {}, 0
function init(args)
   for i, name in ipairs(args) do
      local file = io.open(name, "rb"); bodies[i] = file:read("*a"); file:close()
   end
end
function request()
   sent = sent + 1
   return wrk.format("POST", nil, nil, bodies[sent % #bodies + 1])
end
"""


def by_wrk(port: int, files: list[str], seconds: float) -> tuple[float, str]:
    """Requests a second of as many connections in wrk, and what it says of failures; it checks no answer."""
    script = Path(files[0]).with_name(".wrk.lua")
    script.write_text(_LUA)
    url = f"http://127.0.0.1:{port}/v1/score"
    command = ["wrk", "-t1", f"-c{CLIENTS}", f"-d{seconds:.0f}s", "-s", str(script), "--timeout", "60s", url, "--"]
    told = subprocess.run([*command, *files], capture_output=True, text=True, check=True).stdout
    failures = "; ".join(line.strip() for line in told.splitlines() if "Non-2xx" in line or "errors" in line)
    return float(re.findall(r"Requests/sec:\s+([\d.]+)", told)[0]), failures or "no failures"


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[int, int]]:
    """(port, process) of ``featdiff serve``."""
    command = [FEATDIFF, "serve", "-m", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        ports = (re.search(r":(\d+)/v1/score", line) for line in process.stderr)
        yield next(int(found[1]) for found in ports if found), process.pid
    finally:
        process.terminate()
        process.wait()


def family(process: int) -> list[psutil.Process]:
    """A process and what it has started."""
    return [psutil.Process(process), *psutil.Process(process).children()]


def memory(process: int) -> float:
    """MB that a process holds, and those that it has started."""
    return sum(member.memory_info().rss for member in family(process)) / 1e6


def seconds_of(process: int) -> float:
    """CPU time that a process has taken, and those that it has started."""
    return sum(sum(member.cpu_times()[:2]) for member in family(process))


def unpacked(data: Path, folder: Path, count: int, size: int) -> list[Path]:
    """Photographs; with a size, the middle square of each at that size."""
    with zipfile.ZipFile(data / "flowers.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        chosen = np.random.default_rng(0).permutation(len(names))[: count + FITTED]
        files = [Path(archive.extract(names[i], folder)) for i in chosen]
    for file in files if size else ():
        ImageOps.fit(Image.open(file), (size, size)).save(file, quality=90)
    return files


def wrong(answers: list[Answer], rows: list[dict[str, Any]]) -> int:
    """Answers that are not the row of this process."""
    count = 0
    for answer in answers:
        row = rows[answer.image]
        same = answer.status == 200
        for name, value in row.items() if same else ():
            if name.startswith("layer_") or name == "ood_score":
                same = same and (value is None or abs(answer.row[name] - value) <= ROUNDING * max(1, abs(value)))
            elif name != "path":
                same = same and answer.row[name] == value
        count += not same
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with flowers.zip")
    parser.add_argument("--images", type=int, default=300, help="images of a round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--minutes", type=float, default=5.0, help="of load with broken images")
    parser.add_argument("--processes", type=int, default=1, help="of the server")
    parser.add_argument("--size", type=int, default=0, help="pixels of a side, all alike; 0: as they are")
    arguments = parser.parse_args()

    prepare_threads()  # as the command does, for all processes that are started here
    from featdiff import Detector

    with tempfile.TemporaryDirectory() as folder:
        files = unpacked(arguments.data, Path(folder) / "flowers", arguments.images, arguments.size)
        model = Path(folder) / "model"
        Detector().fit([str(file) for file in files[:FITTED]]).save_pretrained(model)
        for file in files[:FITTED]:
            file.unlink()
        options = ["--engine", ENGINE, "--processes", str(arguments.processes)]
        measure(model, Path(folder) / "flowers", arguments.rounds, arguments.minutes, options)


@functools.cache
def loaded(model: Path) -> Detector:
    """In the process that scores."""
    from featdiff import Detector

    keep_freed_memory()
    return Detector.from_pretrained(model, engine=ENGINE)


def scored(model: Path, folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Images a second without a server, and the rows."""
    detector = loaded(model)
    begun = time.perf_counter()
    rows = list(detector.score(folder).rows())
    return len(rows) / (time.perf_counter() - begun), rows


def measure(model: Path, folder: Path, rounds: int, minutes: float, options: list[str]) -> None:
    spawned = multiprocessing.get_context("spawn")
    with spawned.Pool(1) as clients, spawned.Pool(1) as scorer, serving(model, *options) as (port, process):
        _, rows = scorer.apply(scored, (model, folder))
        contents = [Path(row["path"]).read_bytes() for row in rows]
        clients.apply(closed_loop, (port, contents, CLIENTS, 0.0))
        rates: dict[str, list[float]] = {"without a server": [], "by the server": []}
        wrk = shutil.which("wrk") is not None
        took = dict.fromkeys(["clients", "scorer", "server"], 0.0)
        numbers = {"clients": clients.apply(os.getpid), "scorer": scorer.apply(os.getpid), "server": process}
        for _ in range(rounds):
            before = {name: seconds_of(number) for name, number in numbers.items()}
            rates["without a server"].append(scorer.apply(scored, (model, folder))[0])
            begun = time.perf_counter()
            answers = clients.apply(closed_loop, (port, contents, CLIENTS, 0.0))
            rates["by the server"].append(len(contents) / (time.perf_counter() - begun))
            assert wrong(answers, rows) == 0
            took = {name: took[name] + seconds_of(number) - before[name] for name, number in numbers.items()}
            if wrk:
                rates.setdefault("by the server, wrk", []).append(by_wrk(port, [row["path"] for row in rows], 15)[0])
        each = {name: 1e3 * total / rounds / len(contents) for name, total in took.items()}
        print("CPU time: " + ", ".join(f"{name} {value:.1f}" for name, value in each.items()) + " ms an image")
        for name, values in rates.items():
            print(f"{name}: {np.median(values):.1f} images/s ({', '.join(f'{value:.1f}' for value in values)})")
        for name in list(rates)[1:]:
            ratios = np.array(rates[name]) / np.array(rates["without a server"])
            print(f"{name}: {np.median(ratios):.2f} x ({', '.join(f'{value:.2f}' for value in ratios)})", flush=True)
        latencies(contents, clients, port, float(np.median(rates["by the server"])), rounds)
        if wrk and minutes:
            rate, failures = by_wrk(port, [row["path"] for row in rows], 60 * minutes)
            print(f"wrk, {minutes:g} minutes: {rate * 60 * minutes:,.0f} requests, {failures}", flush=True)
        if minutes:
            soak(rows, contents, clients, port, process, minutes)


def latencies(contents: list[bytes], clients: Any, port: int, rate: float, rounds: int) -> None:
    """Requests one after the other, each of which is a pass of its own, and requests at half the rate, in turns."""
    ratios = []
    for _ in range(rounds):
        seconds = {
            "one after the other": [a.seconds for a in clients.apply(closed_loop, (port, contents[:100], 1, 0.0))],
            "at half the rate": [a.seconds for a in clients.apply(at_rate, (port, contents, rate / 2))],
        }
        for name, values in seconds.items():
            points = " / ".join(f"{1e3 * np.percentile(values, point):.1f}" for point in (50, 95, 99))
            print(f"{name}: {points} ms (median / 95 % / 99 %)")
        alone, half = seconds.values()
        ratios.append(np.percentile(half, 99) / np.median(alone))
    print(f"99 % at half the rate / median alone: {', '.join(f'{ratio:.1f}' for ratio in ratios)}", flush=True)


def soak(
    rows: list[dict[str, Any]], contents: list[bytes], clients: Any, port: int, process: int, minutes: float
) -> None:
    """Minutes of load, with one image in a hundred cut short."""
    broken = range(0, len(contents), 100)
    for i in broken:
        contents[i] = contents[i][:200]
        found = clients.apply(closed_loop, (port, [contents[i]], 1, 0.0))[0]
        assert found.row["status"] == "unreadable", found
        rows[i] = found.row
    held = [memory(process)]
    statuses: Counter[int] = Counter()
    different = 0
    parts = max(1, round(minutes * 2))
    for _ in range(parts):
        answers = clients.apply(closed_loop, (port, contents, CLIENTS, 60 * minutes / parts))
        statuses.update(answer.status for answer in answers)
        different += wrong(answers, rows)
        held.append(memory(process))
    print(f"{minutes:g} minutes: {sum(statuses.values()):,} requests, {dict(statuses)}, {different} other answers")
    print(f"memory: {', '.join(f'{value:.0f}' for value in held)} MB")


if __name__ == "__main__":
    main()
