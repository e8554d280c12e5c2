"""``featdiff demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import runtime_arguments, runtime_options
from .progress import Bars, say


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="featdiff-demo",
    show_default=True,
    help="Folder for the results.",
)
@runtime_options
def command(output: Path, quiet: bool, **options: Any) -> None:
    """Train, score and evaluate on a built-in sample set; under two minutes on two cores, no download.

    In-domain are tiles of two photographs, out-of-distribution are handwritten digits. Writes the images, the model,
    scores.csv and histograms.png.

    \b
    Example: featdiff demo -o try-out
    """
    from featdiff import Detector
    from featdiff.data import samples
    from featdiff.evaluation.baselines import fit_baselines
    from featdiff.evaluation.protocols import evaluate_detector
    from featdiff.report.figures import save_histograms
    from featdiff.report.writers import CsvWriter
    from featdiff.runtime.allocator import keep_freed_memory

    from .evaluate import print_table

    keep_freed_memory()
    folders = samples.write(output / "images")
    detector = Detector(**runtime_arguments(options))
    with Bars(quiet) as bars:
        detector.fit(folders["train"], bars)
        detector.save_pretrained(output / "model")
        scores = {name: detector.score(folders[name], progress=bars) for name in ("test", "digits")}
        result = evaluate_detector(
            detector,
            folders["test"],
            {"digits": folders["digits"]},
            ["matched"],
            bars,
            baselines=fit_baselines(detector),
        )
    with (output / "scores.csv").open("wb") as stream:
        writer = CsvWriter(stream)
        for part in scores.values():
            writer.write(part)
    save_histograms(
        output / "histograms.png",
        {f"{name} tiles" if name == "test" else name: part.ood_score for name, part in scores.items()},
        detector.calibration_.threshold(detector.fpr),
        detector.fpr,
        "featdiff demo: tiles of two photographs against handwritten digits",
    )
    print_table(result)
    for name, part in scores.items():
        say(f"{name}: {int(part.is_ood.sum())} of {len(part)} flagged at fpr {detector.fpr:g}", quiet)
    say(f"written: {output}/model, scores.csv, histograms.png, images/", quiet)
    say(f"Next: featdiff score {output}/images/digits -m {output}/model", quiet)
