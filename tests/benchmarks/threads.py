"""What the number of threads and their waiting cost, on an idle machine and beside four busy loops.

    python tests/benchmarks/threads.py

Three programs take turns: ``before`` trains on all cores, with threads that spin while they wait, as featdiff did until
it chose their number; ``library`` as a program does that imports featdiff; ``command`` as ``featdiff train`` does.

Takes three minutes on two idle cores; ``--what layers joint paper backbone`` measures more. On a machine
that is never idle, root may add ``--real-time``: measurements without busy loops then go before all other processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

PROGRAMS = ("before", "library", "command")
#: Channels of the default backbone's layers, and rows of features in the cache.
WIDTHS = [24, 40, 112, 320]
ROWS = 8_000

Work = Callable[[float], float]


class Enough(Exception):
    """The time of a measurement is over."""


def training(name: str, program: str) -> Work:
    """Seconds -> steps per second of a training on rows of features."""
    import torch

    from featdiff.diffusion import fit
    from featdiff.diffusion.lfdn import LFDN, LayerwiseLFDN
    from featdiff.diffusion.schedules import make_scheduler
    from featdiff.diffusion.training import Recipe

    if program == "before":
        fit.training_threads = lambda *_: nullcontext()  # type: ignore[assignment, misc]
    features = torch.randn(ROWS, sum(WIDTHS), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(batch_size=128 if name == "paper" else 256, epochs=10**6, max_steps=10**9)

    def network() -> torch.nn.Module:
        if name == "layers":
            return LayerwiseLFDN(WIDTHS, hidden_ratio=2.0, hidden_max=320, blocks=3)
        size = {"hidden": 1440, "blocks": 16} if name == "paper" else {"hidden": 320, "blocks": 3}
        return LFDN(sum(WIDTHS), **size, time_width=size["hidden"] // 2)

    def measure(seconds: float) -> float:
        times: list[float] = []  # the first step warms up

        def watch(*_: object) -> None:
            times.append(time.perf_counter())
            if len(times) > 1 and times[-1] - times[0] > seconds:
                raise Enough

        with suppress(Enough):
            fit.fit_denoiser(
                network(),
                make_scheduler(),
                lambda indices: features[indices],
                ROWS,
                features[:500],
                recipe,
                seed=0,
                watch=watch,
            )
        return (len(times) - 1) / (times[-1] - times[0])

    return measure


def backbone() -> Work:
    """Seconds -> images per second of the default backbone, without decoding."""
    import torch

    from featdiff.features.backbones import load_backbone
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    model = load_backbone().model.eval()
    images = torch.randn(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def measure(seconds: float) -> float:
        model(images)
        count = 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            model(images)
            count += len(images)
        return count / (time.perf_counter() - start)

    return measure


def serve(what: str, program: str) -> None:
    """Measure once for each line of standard input, which says for how many seconds."""
    if program == "command":
        from featdiff.runtime.cpus import prepare_threads

        prepare_threads()
    measure = backbone() if what == "backbone" else training(what, program)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, _, first = line.strip().partition(" ")
        set_real_time(bool(first))
        rate = measure(float(seconds))
        set_real_time(False)
        print(rate, flush=True)


def set_real_time(first: bool) -> None:
    """Whether all threads of this process run before those of other processes (Linux; root only)."""
    if hasattr(os, "sched_setscheduler"):
        policy, priority = (os.SCHED_FIFO, 1) if first else (os.SCHED_OTHER, 0)
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it has just ended
                os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


def started(what: str, program: str) -> subprocess.Popen[str]:
    """A program that measures on demand, free of thread settings."""
    from featdiff.runtime.cpus import THREAD_COUNTS, WAITING

    environment = {name: value for name, value in os.environ.items() if name not in (*THREAD_COUNTS, *WAITING)}
    command = [sys.executable, __file__, "--serve", what, program]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    if child.stdout.readline() != "ready\n":
        sys.exit(f"{what}, {program}: did not start")
    return child


def asked(child: subprocess.Popen[str], seconds: float, first: bool) -> float:
    assert child.stdin is not None and child.stdout is not None
    print(seconds, "first" if first else "", file=child.stdin, flush=True)
    return float(child.stdout.readline())


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """So many processes that never wait."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def compare(what: str, loops: int, pairs: int, seconds: float, real_time: bool) -> None:
    """Print the table rows of one kind of work: nothing beside it, and busy loops."""
    children = {program: started(what, program) for program in PROGRAMS}
    rates: dict[tuple[int, str], list[float]] = {}
    for pair in range(pairs):
        turns = PROGRAMS if pair % 2 == 0 else PROGRAMS[::-1]
        for number in (0, loops):
            with busy_loops(number):
                for program in turns:
                    rate = asked(children[program], seconds, first=real_time and not number)
                    rates.setdefault((number, program), []).append(rate)
    for child in children.values():
        child.communicate()

    for number in (0, loops):
        before, library, command = (statistics.median(rates[number, program]) for program in PROGRAMS)
        print(
            f"| {what} | {number} | {before:.2f} | {library:.2f} ({library / before:.2f} x) "
            f"| {command:.2f} ({command / before:.2f} x) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=["layers", "backbone"], help="layers, joint, paper, backbone")
    parser.add_argument("--loops", type=int, default=4, help="busy loops [4]")
    parser.add_argument("--pairs", type=int, default=3, help="how often the programs take turns [3]")
    parser.add_argument("--seconds", type=float, default=3, help="of one measurement, at least [3]")
    parser.add_argument("--real-time", action="store_true", help="go before other processes where no loops run")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return

    print(f"load before the start: {os.getloadavg()[0]:.1f}\n")
    print("| steps/s (backbone: images/s) | busy loops | before | library | command line |\n|---|---|---|---|---|")
    for what in arguments.what:
        compare(what, arguments.loops, arguments.pairs, arguments.seconds, arguments.real_time)


if __name__ == "__main__":
    main()
