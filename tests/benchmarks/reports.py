"""What reports and explanations cost; the tables of RESULTS.md.

    python tests/benchmarks/reports.py --data FOLDER

FOLDER holds flowers.zip as configs/README.md describes it. Times are of one process, each the best of three, with and
without the page in turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from featdiff import Detector, Scores
from featdiff.data.references import list_images
from featdiff.data.thumbnails import iter_thumbnails
from featdiff.report.cards import PICTURE_SIDE
from featdiff.report.explanations import save_explanation
from featdiff.report.html import save_report
from featdiff.report.rows import ReportRows
from featdiff.verdicts.calibration import Calibration

ROWS = 10_000
REPEATS = 3


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def many_rows(count: int) -> tuple[ReportRows, Calibration]:
    """Rows as a detector with six layers gives them, and the calibration that they are compared with."""
    rng = np.random.default_rng(0)
    calibration = Calibration(rng.normal(size=2000))
    score = rng.normal(size=count)
    p_value, is_ood = calibration.flags(score, 0.05)
    names = [f"photos/folder_{i % 20:02}/picture_{i:06}.jpg" for i in range(count)]
    layers = {f"stage{i}": rng.normal(size=count) for i in range(6)}

    rows = ReportRows()
    rows.add(Scores(names, ["ok"] * count, [""] * count, score, p_value, is_ood, layers, 0.05))
    return rows, calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    train = list_images(arguments.data / "flowers.zip" / "train")
    test = list_images(arguments.data / "flowers.zip" / "test")
    detector = Detector().fit(train)

    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "report.html"

        def report(scores: Scores) -> None:
            """As ``featdiff score --report`` writes it: pictures of the strangest 100, the strangest 24 explained."""
            rows = ReportRows()
            rows.add(scores)
            save_report(
                page,
                rows,
                0.05,
                detector.calibration_,
                {},
                None,
                lambda wanted: iter_thumbnails([test[i] for i in wanted], PICTURE_SIDE),
                lambda wanted: detector.iter_explanations([test[i] for i in wanted]),
            )

        scored = []
        written = []
        scores = detector.score(test)
        for _ in range(REPEATS):
            scored.append(seconds(lambda: detector.score(test)))
            written.append(seconds(lambda: report(scores)))
        print(f"scoring {len(test)} images {min(scored):.1f} s, their report {min(written):.1f} s more")
        share = min(written) / min(scored)
        print(f"that is {100 * share:.0f} % of the scoring time; {page.stat().st_size / 1e6:.2f} MB")

        rows, calibration = many_rows(ROWS)
        took = seconds(lambda: save_report(page, rows, 0.05, calibration, {}))
        print(f"{ROWS:,} rows: {page.stat().st_size / 1e6:.2f} MB, written in {took:.1f} s")

        some = test[:50]
        explaining = min(seconds(lambda: list(detector.iter_explanations(some))) for _ in range(REPEATS))
        explanation = detector.explain(test[0])
        drawing = min(seconds(lambda: save_explanation(place, "a", explanation)) for _ in range(REPEATS))
        print(f"explaining an image {1000 * explaining / len(some):.0f} ms, drawing its PNG {drawing:.2f} s")


if __name__ == "__main__":
    main()
