"""How often the test of drift gives a false alarm, and how soon it finds a change; the tables of RESULTS.md.

    python tests/benchmarks/drift.py [--streams 200 --images 10000]
    python tests/benchmarks/drift.py --data FOLDER [--model FOLDER]

The first line draws p-values: each stream has a calibration set of its own, and strange images lie beyond all held-out
ones. The second line takes real scores: FOLDER holds cifar10.zip, whose training
images fit a model; streams are drawn from its test images, as they are and after five strengths of a change of the
camera (less light, blur, JPEG compression, fewer pixels).
"""

from __future__ import annotations

import argparse
import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from featdiff import Detector, Scores
from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.drift import SIDES, STRANGE, DriftTest
from featdiff.verdicts.layer_drift import LayerDrift

HELD_OUT = (100, 500, 1600)
SHARES = (0.05, 0.1, 0.3)
LATE = 100_000
#: Images of a real stream: 2,000 test images, drawn again and again.
LENGTH = 10_000
CHANGES: dict[str, tuple[tuple[float, ...], Callable[[Image.Image, float], Image.Image]]] = {
    "light": ((0.9, 0.8, 0.6, 0.4, 0.2), lambda picture, share: ImageEnhance.Brightness(picture).enhance(share)),
    "blur, radius": ((0.2, 0.4, 0.6, 1.0, 2.0), lambda picture, r: picture.filter(ImageFilter.GaussianBlur(r))),
    "JPEG quality": ((80, 60, 40, 20, 10), lambda picture, quality: compressed(picture, int(quality))),
    "pixels": (
        (28, 24, 20, 16, 12),
        lambda picture, side: picture.resize((int(side), int(side))).resize(picture.size),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path, help="fitted on cifar10.zip/train; default: fitted now")
    arguments = parser.parse_args()
    if arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            real_streams(arguments.data, arguments.model, Path(folder), arguments.streams)
    else:
        drawn_streams(arguments.streams, arguments.images)


# ---- drawn ----


def drawn_streams(streams: int, images: int) -> None:
    print(f"{streams} streams of {images:,} images; alpha = delta = 0.01")
    heads = [f"{share:.0%} strange: median delay, found" for share in SHARES]
    heads.append(f"the middle one after {LATE:,} normal images")
    print(
        f"| held out | false alarms, strange | both sides | {' | '.join(heads)} |\n|---|---|---|{'---|' * len(heads)}"
    )
    for held_out in HELD_OUT:
        alarms = [
            sum(bool(first_alarm(drawn(held_out, images, 0.0, seed), held_out, sides)) for seed in range(streams))
            for sides in ((STRANGE,), SIDES)
        ]
        cells = [f"{count / streams:.1%} ({count})" for count in alarms]
        for share in SHARES:
            found = [first_alarm(drawn(held_out, images, share, seed), held_out) for seed in range(streams)]
            cells.append(delay_of(found))
        late = [first_alarm(drawn(held_out, LATE + images, SHARES[1], seed, LATE), held_out) for seed in range(50)]
        cells.append(delay_of([count and count - LATE for count in late]))
        print(f"| {held_out:,} | {' | '.join(cells)} |", flush=True)


def drawn(held_out: int, images: int, share: float, seed: int, normal: int = 0) -> np.ndarray:
    """p-values (images,) of one stream behind one calibration set; strange images come after so many normal ones."""
    rng = np.random.default_rng([held_out, seed])
    calibration = Calibration(rng.standard_normal(held_out))
    scores = rng.standard_normal(images)
    strange = rng.random(images) < share
    strange[:normal] = False
    return calibration.p_values(np.where(strange, 10.0, scores))


def first_alarm(p_values: np.ndarray, held_out: int, sides: tuple[str, ...] = (STRANGE,)) -> int:
    """After how many images; 0: never."""
    test = DriftTest(held_out, sides=sides)
    test.update(p_values)
    return min(test.alarms.values(), default=0)


def delay_of(found: list[int]) -> str:
    late = [float(count) if count else np.inf for count in found]
    median = np.median(late)
    return (
        f"{median:,.0f}, {np.isfinite(late).mean():.0%}"
        if np.isfinite(median)
        else f"-, {np.isfinite(late).mean():.0%}"
    )


# ---- real ----


def real_streams(data: Path, model: Path | None, folder: Path, streams: int) -> None:
    """False alarms over halves of the held-out and test images, and delays after a change of the camera."""
    detector = Detector.from_pretrained(model) if model else Detector().fit(data / "cifar10.zip" / "train")
    pictures = list(read(data / "cifar10.zip", "test/"))
    scored = detector.score(pictures)
    normal = scored.ood_score
    pool = np.concatenate([detector.calibration_.scores, normal])
    print(f"{len(detector.calibration_):,} held-out and {len(normal):,} test images; streams of {LENGTH:,}")
    for held_out in HELD_OUT:
        alarms = 0
        for seed in range(streams):
            order = np.random.default_rng(seed).permutation(len(pool))
            calibration = Calibration(pool[order[:held_out]])
            rest = pool[order[held_out:]]  # drawn again and again: their shares are those of the stream
            stream = calibration.p_values(np.random.default_rng([seed, 1]).choice(rest, LENGTH))
            alarms += bool(first_alarm(stream, held_out, SIDES))
        by_layer = f", of layers {layer_alarms(scored, held_out, streams)}" if held_out < len(scored) / 2 else ""
        print(
            f"{held_out:,} held out: {alarms} of {streams} streams with a false alarm, both sides{by_layer}", flush=True
        )

    heads = "change | strength | AUROC | flagged at 0.05 | median delay, found | first layer, its median delay"
    print(f"\n| {heads} |\n{6 * '|---'}|")
    from featdiff.evaluation.metrics import auroc

    for name, (strengths, change) in CHANGES.items():
        for strength in strengths:
            changed = detector.score([change(picture, strength) for picture in pictures])
            p_values = changed.p_value
            found = []
            for seed in range(streams):
                stream = np.random.default_rng(seed).choice(p_values, LENGTH)
                found.append(first_alarm(stream, len(detector.calibration_), SIDES))
            cells = f"{100 * auroc(normal, changed.ood_score):.1f} | {(p_values <= 0.05).mean():.1%}"
            first = first_layer(detector, changed)
            print(f"| {name} | {strength:g} | {cells} | {delay_of(found)} | {first} |", flush=True)


def layer_alarms(scored: Scores, held_out: int, streams: int) -> int:
    """Streams of normal images with a false alarm of any layer; some of these images are held out, as the joint scores
    of those of the model are not kept."""
    alarms = 0
    for seed in range(streams):
        order = np.random.default_rng(seed).permutation(len(scored))
        chosen = scored[order[:held_out]]
        drift = LayerDrift(Calibration(chosen.ood_score, layers=chosen.layers), sides=SIDES)
        rows = np.random.default_rng([seed, 2]).choice(order[held_out:], LENGTH)
        alarms += bool(drift.update({name: scores[rows] for name, scores in scored.layers.items()}))
    return alarms


def first_layer(detector: Detector, changed: Scores, streams: int = 20) -> str:
    """The layer whose alarm comes first in most streams, and after how many images."""
    alarms: dict[str, list[int]] = {name: [] for name in detector.calibration_.layers}
    for seed in range(streams):
        drift = LayerDrift(detector.calibration_, sides=SIDES)
        rows = np.random.default_rng(seed).integers(len(changed), size=LENGTH)
        drift.update({name: scores[rows] for name, scores in changed.layers.items()})
        for name, test in drift.tests.items():
            alarms[name].append(min(test.alarms.values(), default=LENGTH + 1))
    first = min(alarms, key=lambda name: float(np.median(alarms[name])))
    delay = float(np.median(alarms[first]))
    return f"{first}, {delay:,.0f}" if delay <= LENGTH else "-"


def read(archive: Path, prefix: str) -> Iterator[Image.Image]:
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            if name.startswith(prefix) and name.endswith((".png", ".jpg")):
                yield Image.open(io.BytesIO(opened.read(name))).convert("RGB")


def compressed(picture: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return Image.open(out).convert("RGB")


if __name__ == "__main__":
    main()
