"""What decoding large JPEGs at reduced size gains and changes; the tables of RESULTS.md.

    python tests/benchmarks/decoding.py --data FOLDER --images 1000

FOLDER holds flowers.zip as configs/README.md describes it. Photographs of 12 megapixels are made of its pictures:
enlarged, with texture of 4 and 16 pixels, which is stronger in the light, and with grain of one pixel. A detector that
is fitted on the other pictures scores each photograph twice, decoded whole and as featdiff decodes it. Times are
processor time on one thread, in turns, medians. Then 100 of them are scored as files, with all threads.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featdiff import Detector
from featdiff.data.batches import load
from featdiff.data.decoding import Transform, decode
from featdiff.data.references import HeldRef, ImageRef, list_images
from featdiff.runtime.allocator import keep_freed_memory
from featdiff.runtime.waiting import WAITED

AREA = 12_000_000
# Pixels that a patch of texture is wide, and its standard deviation as a share of the brightness.
TEXTURE = {4: 0.08, 16: 0.08}
# Noise is drawn once, of the size of the longest photograph, and each takes a part of it.
NOISE = 6000
QUALITY = 92
# A line after so many photographs.
REPORTED = 50
# Photographs that are scored as files, and how often.
FILES = 100
ROUNDS = 2


class Camera:
    """Makes photographs of 12 megapixels, and of at most 6,000 pixels a side.

    Parameters
    ----------
    grain : float
        Standard deviation of the noise of single pixels, in grey levels of 255.
    """

    def __init__(self, grain: float) -> None:
        self._draws = np.random.default_rng(0)
        self._grain = self._draws.normal(0, grain, (NOISE, NOISE)).round().astype(np.int16)
        texture = np.zeros((NOISE, NOISE), np.float32)
        for size, share in TEXTURE.items():
            patches = self._draws.normal(0, share, (NOISE // size, NOISE // size)).astype(np.float32)
            texture += patches.repeat(size, 0).repeat(size, 1)
        self._texture = (texture * 256).round().clip(-127, 127).astype(np.int16)  # in whole numbers, which are fast

    def __call__(self, picture: Image.Image) -> bytes:
        """A picture of any size -> a JPEG file."""
        scale = min((AREA / (picture.width * picture.height)) ** 0.5, NOISE / max(picture.size))
        width = round(picture.width * scale)
        height = round(picture.height * scale)
        large = picture.resize((width, height), Image.Resampling.BICUBIC)

        top = self._draws.integers(NOISE - height + 1)
        left = self._draws.integers(NOISE - width + 1)
        part = np.s_[top : top + height, left : left + width]
        bands = []
        for band in large.split():
            values = np.asarray(band).astype(np.int16)
            values = values + (values * self._texture[part] >> 8) + self._grain[part]
            bands.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))

        stream = io.BytesIO()
        Image.merge("RGB", bands).save(stream, "JPEG", quality=QUALITY)
        return stream.getvalue()


def photographs(refs: Sequence[ImageRef], grain: float) -> Iterator[bytes]:
    """One of each picture."""
    camera = Camera(grain)
    for ref in refs:
        yield camera(decode(ref.read()))


def whole(transform: Transform) -> Transform:
    """The same transform for pictures that are decoded whole."""
    return lambda picture: transform(picture)


def timed(work: Callable[..., Tensor], *given: object) -> tuple[Tensor, float]:
    """What comes of it, and the seconds of processor time that it took."""
    start = time.process_time()
    result = work(*given)
    return result, time.process_time() - start


def decoded(photograph: bytes, transform: Transform) -> Tensor:
    """Read, decode and resize, as for scoring; (1, 3, H, W)."""
    pixels = load(HeldRef("photograph", photograph), transform).pixels
    assert pixels is not None
    return pixels[None]


def report(
    megabytes: float, detector: Detector, rows: dict[str, list[Tensor]], seconds: dict[str, list[float]]
) -> None:
    """What was found so far."""
    before, after = (detector.score_features(torch.cat(rows[name])) for name in ("whole", "reduced"))
    spread = before.std()
    change = np.abs(after - before) / spread
    ms = {name: 1000 * float(np.median(times)) for name, times in seconds.items()}
    decoding = ms["reduced"] / ms["whole"]
    in_all = (ms["reduced"] + ms["pass"]) / (ms["whole"] + ms["pass"])

    print(f"| photographs, MB each | {len(before):,}, {megabytes:.1f} |")
    print("| ms whole, reduced, backbone | " + " | ".join(f"{ms[name]:.0f}" for name in ("whole", "reduced", "pass")))
    print(f"| ratio, decoding; with the backbone | {decoding:.2f} x; {in_all:.2f} x |")
    print(f"| their scores, mean and standard deviation | {before.mean():.2f}, {spread:.2f} |")
    print(f"| change in these deviations, mean | {(after - before).mean() / spread:+.4f} |")
    quantiles = (f"{x:.4f}" for x in np.quantile(change, (0.5, 0.95, 0.99, 1)))
    print("| its size: median, 95 %, 99 %, largest | " + ", ".join(quantiles) + " |")
    print(f"| by 0.05 or more | {(change >= 0.05).sum()} |")
    thresholds = {
        f"that flags {detector.fpr:.0%} of them": float(np.quantile(before, 1 - detector.fpr)),
        "of the detector": detector.calibration_.threshold(detector.fpr),
    }
    for name, threshold in thresholds.items():
        changed = int(((before > threshold) != (after > threshold)).sum())
        print(f"| at the threshold {name}: flagged, verdicts changed | {(before > threshold).mean():.1%}, {changed} |")
    print(flush=True)


def score_files(detector: Detector, folder: Path) -> None:
    """Score a folder both ways, in turns; medians of wall and processor time."""
    backbone = detector.extractor_.backbone
    whole_backbone = replace(backbone, transform=whole(backbone.transform))
    ways = {"whole": whole_backbone, "reduced": backbone}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    waited = {name: 0.0 for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            detector.extractor_.backbone = way
            start = (time.perf_counter(), time.process_time())
            before = WAITED.seconds
            detector.score(folder)
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            waited[name] += WAITED.seconds - before

    print("\n| score | wall, s | processor, s | share of the wall time that the backbone waited |")
    medians = {name: np.median(values, axis=0) for name, values in times.items()}
    for name, (wall, processor) in medians.items():
        print(f"| {name} | {wall:.1f} | {processor:.1f} | {waited[name] / sum(wall for wall, _ in times[name]):.0%} |")
    wall, processor = medians["reduced"] / medians["whole"]
    print(f"| ratio | {wall:.2f} x | {processor:.2f} x |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000, help="how many photographs [1000]; the others are to train")
    parser.add_argument("--grain", type=float, default=3, help="noise of single pixels, in grey levels [3]")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    pictures = arguments.data / "flowers.zip"
    refs = [*list_images(pictures / "train"), *list_images(pictures / "test")]
    np.random.default_rng(0).shuffle(refs)
    detector = Detector(engine="torch").fit(refs[arguments.images :])
    extractor = detector.extractor_
    transforms = {"whole": whole(extractor.transform), "reduced": extractor.transform}
    rows: dict[str, list[Tensor]] = {name: [] for name in transforms}
    seconds: dict[str, list[float]] = {name: [] for name in (*transforms, "pass")}

    size = 0
    for number, photograph in enumerate(photographs(refs[: arguments.images], arguments.grain), 1):
        size += len(photograph)
        for name, transform in transforms.items():
            pixels, taken = timed(decoded, photograph, transform)
            seconds[name].append(taken)
            features, taken = timed(extractor, pixels)
            seconds["pass"].append(taken)
            rows[name].append(features)
        if number % REPORTED == 0 or number == arguments.images:
            report(size / number / 1e6, detector, rows, seconds)

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        for number, photograph in enumerate(photographs(refs[: min(FILES, arguments.images)], arguments.grain)):
            (Path(folder) / f"{number}.jpg").write_bytes(photograph)
        score_files(detector, Path(folder))


if __name__ == "__main__":
    main()
