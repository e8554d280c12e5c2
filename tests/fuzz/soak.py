"""Long runs: memory stays flat, and answers stay the same.

    python tests/fuzz/soak.py --minutes 10
    python tests/fuzz/soak.py --minutes 1 --images 2000 --processes 4

Three parts: images of mixed shapes, some of them damaged, through one Detector in a loop; a Guard under 16 threads for
so many minutes; and processes of "featdiff score" at once on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers of the tests
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FEATDIFF_LOG_SECONDS"] = "0"  # an error is one line, however long it took
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from featdiff import Detector, Guard, Verdict
from fuzz.commands import make_inputs, start
from fuzz.images import seeds
from fuzz.mutators import IN_IMAGES, mutate
from fuzz.place import Place, make_place

#: Memory may grow by this factor between the first quarter and the end.
MOST_GROWTH = 1.02
#: Images of a call.
AT_ONCE = 200
THREADS = 16


def memory() -> float:
    """Megabytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(sizes: list[float]) -> float:
    """Largest memory of the last quarter by that of the first, which is when caches and pools fill."""
    quarter = max(1, len(sizes) // 4)
    return max(sizes[-quarter:]) / max(sizes[:quarter])


def told(name: str, count: int, unit: str, different: int, sizes: list[float]) -> bool:
    """Print a line of the table; whether all was well."""
    factor = growth(sizes)
    flat = f"{max(sizes[: max(1, len(sizes) // 4)]):,.0f} to {sizes[-1]:,.0f} MB ({100 * (factor - 1):+.1f} %)"
    print(f"| {name} | {count:,} {unit} | {different:,} | {flat} |", flush=True)
    return different == 0 and factor <= MOST_GROWTH


# ---- one detector ----


def mixed_images(folder: Path, place: Place) -> Path:
    """Good tiles cut to many shapes, files of all formats, and damaged ones."""
    rng = random.Random(0)
    folder.mkdir()
    tiles = sorted((place.folder / "samples" / "test").iterdir())
    for number in range(AT_ONCE // 2):
        size = (rng.randint(20, 400), rng.randint(20, 400))
        Image.open(rng.choice(tiles)).resize(size).save(folder / f"{number:03d}.{rng.choice(('png', 'jpg', 'webp'))}")
    files = seeds()
    for number in range(AT_ONCE // 2, AT_ONCE):
        name = rng.choice(list(files))
        data = files[name] if number % 2 else mutate(files[name], rng, mutators=IN_IMAGES)
        (folder / f"{number:03d}-{name}").write_bytes(data)
    return folder


def loop(detector: Detector, folder: Path, images: int) -> bool:
    """The same images over and over: the same rows each time."""
    first = [repr(row) for row in detector.score(str(folder))]
    different = 0
    sizes = []
    for _ in range(max(4, images // AT_ONCE)):
        rows = [repr(row) for row in detector.score(str(folder))]
        different += sum(row != expected for row, expected in zip(rows, first, strict=True))
        sizes.append(memory())
    return told("one Detector in a loop", AT_ONCE * len(sizes), "images", different, sizes)


# ---- a guard under threads ----


def fit_guard(place: Place) -> tuple[Guard, list[torch.Tensor]]:
    """A guard with the detector, on a classifier that has its backbone, and batches of images for it."""
    classifier = timm.create_model("test_resnet", pretrained=False).eval()
    classifier.load_state_dict(load_file(place.weights))
    guard = Guard(classifier, place.detector)
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3, 160, 160), (1, 3, 160, 160), (4, 3, 160, 160), (2, 3, 128, 192)]
    return guard, [torch.randn(size, generator=generator) for size in sizes * 4]


def _same(answer: tuple[torch.Tensor, Verdict], expected: tuple[torch.Tensor, Verdict]) -> bool:
    logits, verdict = answer
    others, other = expected
    pairs = [(logits, others), (verdict.ood_score, other.ood_score), (verdict.p_value, other.p_value)]
    return all(torch.equal(first, second) for first, second in pairs)


def guarded(guard: Guard, batches: list[torch.Tensor], minutes: float) -> bool:
    """Sixteen threads ask one guard; each answer is that of a single thread."""
    with torch.inference_mode():
        expected = [guard(batch) for batch in batches]
    end = time.monotonic() + 60 * minutes
    counts = np.zeros((THREADS, 2), dtype=int)

    def ask(thread: int) -> None:
        number = thread
        while time.monotonic() < end:
            i = number % len(batches)
            with torch.inference_mode():
                same = _same(guard(batches[i]), expected[i])
            counts[thread] += (1, not same)
            number += 1

    sizes = list(_while_running(ask, end))
    calls, different = counts.sum(0)
    return told(f"a Guard, {THREADS} threads", int(calls), "calls", int(different), sizes)


def _while_running(ask: Callable[[int], None], end: float) -> Iterator[float]:
    """The memory, each second, as long as the threads run."""
    failed: list[BaseException] = []

    def caught(thread: int) -> None:
        try:
            ask(thread)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=caught, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(1)
        yield memory()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


# ---- many processes ----


def processes(count: int) -> bool:
    """``featdiff score`` so many times at once: all end well, with the same bytes as one alone."""
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name)
        command = make_inputs(inputs)["score csv"]
        alone = start(_on_two_cores(command.line(inputs / "alone.csv", inputs / "cache")), inputs)
        alone.communicate()
        expected = (inputs / "alone.csv").read_bytes()

        begun = time.monotonic()
        lines = [command.line(inputs / f"{i}.csv", inputs / "cache") for i in range(count)]
        running = [start(_on_two_cores(line), inputs) for line in lines]
        for process in running:
            process.communicate()
        seconds = time.monotonic() - begun
        files = [inputs / f"{i}.csv" for i in range(count)]
        different = sum(not file.exists() or file.read_bytes() != expected for file in files)
        failed = [process.returncode for process in running if process.returncode != alone.returncode]
    print(
        f"| featdiff score, at once | {count} processes, {seconds:.0f} s | {different + len(failed):,} | |", flush=True
    )
    return not different and not failed


def _on_two_cores(line: list[str]) -> list[str]:
    return ["taskset", "-c", "0,1", *line] if len(os.sched_getaffinity(0)) > 2 else line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of the guard [10]")
    parser.add_argument("--images", type=int, default=20_000, help="through the detector [20,000]")
    parser.add_argument("--processes", type=int, default=20, help="at once [20]")
    arguments = parser.parse_args()

    print("| what | how many | other answers | memory, first quarter to the end |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        place = make_place(Path(name))
        fine = [loop(place.detector, mixed_images(Path(name) / "mixed", place), arguments.images)]
        fine.append(guarded(*fit_guard(place), arguments.minutes))
    fine.append(processes(arguments.processes))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    raise SystemExit(main())
