"""Kill commands, fill their disk, and run them side by side.

    python tests/fuzz/kills.py --kills 20
    python tests/fuzz/kills.py --kills 3 --only train --only 'score csv'

Each command is stopped with SIGKILL and SIGINT in turn, at a random moment, or when its output begins to appear. What
it leaves must be nothing, or whole; the same command run again must end in the same bytes (of models: the same tensors)
as a run that nobody stopped. Then each command writes to a full disk (as root, who may mount one), and four trainings
at once share a cache. What stands in brackets is not a fault.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers of the tests
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FEATDIFF_LOG_SECONDS"] = "0"  # an error is one line, however long it took
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzz.commands import Command, audit, content, execute, export, fill_disk, leftovers, make_inputs, start, train

#: A command that does not end in this time hangs.
HANG_SECONDS = 600
#: Codes of a command that came to its end: fine, or some images unreadable.
_FINE = (0, 3)


def stop(command: Command, inputs: Path, work: Path, seconds: float, sign: signal.Signals, last: bool) -> list[str]:
    """Start a command and stop it; what went wrong up to here. ``last``: when its output begins to appear."""
    process = start(command.line(work / command.output, work / "cache"), inputs)
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < (HANG_SECONDS if last else seconds):
        if last and any(path.name != "cache" for path in work.iterdir()):
            time.sleep(random.choice((0, 0.001, 0.005, 0.05)))
            break
        time.sleep(0.0005)

    running = process.poll() is None
    process.send_signal(sign)
    try:
        _, errors = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return ["hangs after Ctrl-C"]

    if not running:
        return ["(had ended)"]
    if sign == signal.SIGINT and time.monotonic() - begun > 5:  # earlier, Python itself may still start
        return _after_interrupt(process.returncode, errors, work)
    return []


def _after_interrupt(code: int, errors: str, work: Path) -> list[str]:
    problems = []
    # "python -m" ends itself by the signal, though all was handled, if Ctrl-C came while a text was executed
    by_signal = code == -signal.SIGINT and errors.startswith("interrupted")
    if code not in (130, *_FINE) and not by_signal:
        problems.append(f"exit code {code} after Ctrl-C: {errors.strip()[-200:]!r}")
    if "Traceback" in errors:
        problems.append("a traceback after Ctrl-C")
    if any(name.endswith(".tmp") for name in leftovers(work)):
        problems.append("temporary files after Ctrl-C")
    return problems


def kill_once(
    command: Command, inputs: Path, work: Path, expected: dict[str, str], moment: float, number: int
) -> list[str]:
    """Stop a command once and run it again; what went wrong."""
    sign = (signal.SIGKILL, signal.SIGINT)[number % 2]
    problems = stop(command, inputs, work, moment, sign, last=number % 4 >= 2)

    left = content(work / command.output)
    if left and left != expected:
        problems.append("half an output under its own name")
    elif left:
        return [*problems, "(whole)"]

    line = command.line(work / command.output, work / "cache")
    done = execute([*line, *command.again], inputs)
    if done.returncode not in _FINE and problems:
        shutil.rmtree(work / command.output, ignore_errors=True)  # already counted
    elif done.returncode not in _FINE:
        problems.append(f"cannot run again: {done.stderr.strip()[:200]}")
    elif content(work / command.output) != expected:
        problems.append("another output when run again")
    elif any(name.endswith(".partial") for name in leftovers(work)):
        problems.append("part of an output is left beside the whole")
    return problems


def kill(command: Command, inputs: Path, kills: int, rng: random.Random) -> Counter[str]:
    """Kill a command so many times; what was seen, and how often."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        begun = time.monotonic()
        done = execute(command.line(work / command.output, work / "cache"), inputs)
        taken = time.monotonic() - begun
        if done.returncode not in _FINE:
            return Counter([f"does not run at all: {done.stderr.strip()}"])
        expected = content(work / command.output)

    found: Counter[str] = Counter()
    for number in range(kills):
        with tempfile.TemporaryDirectory() as name:
            moment = rng.uniform(number, number + 1) / kills * taken  # spread over the whole run
            problems = kill_once(command, inputs, Path(name), expected, moment, number)
        found.update(problems or ["(as it should)"])
        print(f"{command.name}: {number + 1} of {kills}: {', '.join(problems)}", flush=True)
    return found


def fill(command: Command, inputs: Path) -> list[str]:
    """Run a command whose output, on a full disk, is to replace an older one; what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        old = Path(name) / command.output
        if "." not in command.output:  # a folder
            made = execute(command.line(old, Path(name) / "cache"), inputs)
            if made.returncode not in _FINE:
                return [f"does not run at all: {made.stderr.strip()}"]

        disk = Path(name) / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode:
            return ["(left out: mounting a file system is not permitted)"]
        try:
            output = disk / command.output
            if old.is_dir():
                shutil.copytree(old, output)
            else:
                output.write_text("an older file, smaller than the new one\n")
            before = content(output)
            fill_disk(disk)
            line = command.line(output, Path(name) / "cache")
            force = ["--force"] if command.arguments[0] in ("train", "harden", "outliers") else []
            done = execute([*line, *force], inputs)
            return _after_full_disk(done, output, output, before, leftovers(disk))
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _after_full_disk(
    done: subprocess.CompletedProcess[str], named: Path, output: Path, before: dict[str, str], left: list[str]
) -> list[str]:
    """What is wrong with how a command ended; its error must name one path."""
    problems = []
    if done.returncode != 1:
        problems.append(f"exit code {done.returncode}")
    if len(done.stderr.splitlines()) != 1 or "a bug" in done.stderr:
        problems.append(f"says {done.stderr.strip()[-200:]!r}")
    elif named.name not in done.stderr:
        problems.append(f"does not name the file: {done.stderr.strip()!r}")
    if content(output) != before:
        problems.append("the older output is gone or changed")
    if any(name.endswith(".tmp") for name in left):
        problems.append(f"leaves {left}")
    return problems


def full_cache(command: Command, inputs: Path) -> list[str]:
    """Run a command whose cache lies on a full disk."""
    with tempfile.TemporaryDirectory() as name:
        disk = Path(name) / "cache"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode:
            return ["(left out: mounting a file system is not permitted)"]
        try:
            done = execute(command.line(Path(name) / command.output, disk), inputs)
            return _after_full_disk(done, disk, Path(name) / command.output, {}, leftovers(disk))
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def parallel(command: Command, inputs: Path, count: int) -> list[str]:
    """Run a command so many times at once, into one cache; what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        running = [start(command.line(work / f"{i}-{command.output}", work / "cache"), inputs) for i in range(count)]
        for process in running:
            process.communicate()
        outputs = [content(work / f"{i}-{command.output}") for i in range(count)]
        expected = content(inputs / "model")
        problems = [f"exit code {process.returncode}" for process in running if process.returncode not in _FINE]
        problems += ["another model" for output in outputs if output != expected]
        problems += [f"leaves {file}" for file in leftovers(work)]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each command [20]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="COMMAND", help="this one; may be given again")
    parser.add_argument("--skip", action="append", choices=["kills", "disks", "parallel"], default=[])
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)

    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name)
        commands = make_inputs(inputs)
        writers = commands | {extra.name: extra for extra in (audit("csv"), audit("parquet"), export())}
        if arguments.only:
            commands = {key: command for key, command in commands.items() if key in arguments.only}
            writers = {key: command for key, command in writers.items() if key in arguments.only}
        lines = []

        def tell(what: str, found: Counter[str]) -> None:
            lines.append(f"| {what} | {_told(found)} |")
            print(lines[-1], flush=True)

        if "kills" not in arguments.skip:
            for key, command in commands.items():
                tell(f"{key}, killed", kill(command, inputs, arguments.kills, rng))
        if "disks" not in arguments.skip:
            for key, command in writers.items():
                tell(f"{key}, full disk", Counter(fill(command, inputs)))
            tell("train, full cache", Counter(full_cache(train(), inputs)))
        if "parallel" not in arguments.skip:
            tell("4 trainings, one cache", Counter(parallel(train(), inputs, 4)))

    print("| what | what was seen |\n|---|---|", *lines, sep="\n")
    return 1 if any(_is_problem(line) for line in lines) else 0


def _told(found: Counter[str]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in found.items()) or "as it should"


def _is_problem(line: str) -> bool:
    """Whether anything stands in a line that is not in brackets."""
    seen = line.split(" | ")[1].removesuffix(" |")
    return seen != "as it should" and any("(" not in part for part in seen.split(", "))


if __name__ == "__main__":
    raise SystemExit(main())
