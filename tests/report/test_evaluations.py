"""The verdict in words, and the table of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featdiff.report.evaluations import best_baseline, chance_of_alarms, in_words, sections, verdicts
from featdiff.verdicts.calibration import Calibration
from featdiff_cli.tables import table_lines

CALIBRATION = Calibration(np.arange(99.0))


def metrics(auroc: float, low: float, high: float) -> dict[str, Any]:
    return {"auroc": auroc, "auroc_ci": [low, high], "fpr95": 0.25, "aupr_in": 0.8, "aupr_out": 0.7}


def result(*protocols: str, **heads: dict[str, Any]) -> dict[str, Any]:
    pair = {"ood": "digits", "n_id": 200, "n_ood": 40, "heads": heads}
    return {"id": "photos", "model": "net", "pairs": [pair | {"protocol": protocol} for protocol in protocols]}


def test_the_verdict_counts() -> None:
    document = result("matched", featdiff=metrics(0.956, 0.93, 0.97))
    ((found, comparison),) = verdicts(document, [(9, 37)], CALIBRATION, 0.05)
    assert found == (
        "digits, matched: featdiff finds 92.5 % of the OOD images (37 of 40); 4.5 % of the in-domain images are "
        "flagged (9 of 200), where 5 % were asked for."
    )
    assert comparison == "AUROC 95.6."


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (metrics(0.90, 0.88, 0.92), "AUROC 95.6, ahead of the only baseline by 5.6 points (kNN: 90.0)."),
        (
            metrics(0.99, 0.96, 1.0),
            "AUROC 95.6, behind the only baseline by 3.4 points (kNN: 99.0; the intervals overlap).",
        ),
        (metrics(0.99, 0.975, 1.0), "AUROC 95.6, behind the only baseline by 3.4 points (kNN: 99.0)."),
        (metrics(0.9563, 0.93, 0.97), "AUROC 95.6, level with the only baseline (kNN: 95.6)."),
    ],
)
def test_the_verdict_says_where_featdiff_loses(theirs: dict[str, Any], words: str) -> None:
    document = result("matched", featdiff=metrics(0.956, 0.93, 0.97), baseline_knn=theirs)
    ((_, comparison),) = verdicts(document, [(9, 37)], CALIBRATION, 0.05)
    assert comparison == words


def test_the_best_baseline_may_be_of_a_single_layer() -> None:
    heads = {
        "featdiff": metrics(0.9, 0.8, 1.0),
        "knn_last": metrics(1.0, 1.0, 1.0),  # part of featdiff, and no baseline
        "baseline_knn": metrics(0.7, 0.6, 0.8),
        "baseline_mahalanobis_blocks.4": metrics(0.95, 0.9, 1.0),
        "baseline_pca": metrics(0.95, 0.9, 1.0),
    }
    assert best_baseline(heads) == "baseline_mahalanobis_blocks.4"  # the first of two with the same AUROC
    ((_, comparison),) = verdicts(result("matched", **heads), [(9, 37)], CALIBRATION, 0.05)
    assert "behind the best of 3 baselines by 5.0 points (Mahalanobis on blocks.4: 95.0" in comparison
    assert best_baseline({"featdiff": metrics(0.9, 0.8, 1.0)}) is None


def test_names_in_words() -> None:
    names = ("baseline_knn", "baseline_pca", "baseline_mahalanobis_all", "baseline_brightest_channel")
    assert [in_words(name) for name in names] == [
        *("kNN", "PCA residual", "Mahalanobis on all stages", "brightest_channel")
    ]


def test_too_many_false_alarms_are_named() -> None:
    document = result("matched", featdiff=metrics(0.9, 0.8, 1.0))
    for flagged, named in ((10, False), (20, False), (40, True), (200, True)):
        ((found, _),) = verdicts(document, [(flagged, 0)], CALIBRATION, 0.05)
        assert ("more than chance explains" in found) is named, flagged


def test_chance_of_alarms_is_that_of_split_conformal_prediction() -> None:
    """Against a simulation with the calibration itself."""
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(4000):
        _, flags = Calibration(rng.normal(size=99)).flags(rng.normal(size=50), 0.05)
        counts.append(flags.sum())
    for flagged in (1, 3, 6):
        measured = float(np.mean(np.array(counts) >= flagged))
        assert chance_of_alarms(flagged, 50, CALIBRATION, 0.05) == pytest.approx(measured, abs=0.02)
    assert chance_of_alarms(0, 50, CALIBRATION, 0.05) == 1.0


def test_groups_are_the_evidence_that_counts() -> None:
    grouped = Calibration(np.arange(99.0), groups=19)
    assert chance_of_alarms(8, 50, grouped, 0.05) > 2 * chance_of_alarms(8, 50, CALIBRATION, 0.05)


def test_protocols_with_one_result_are_one() -> None:
    document = result("matched", "as-published", featdiff=metrics(0.9, 0.8, 1.0))
    assert [section.title for section in sections(document)] == ["digits (40 images), matched and as-published"]
    ((found, _),) = verdicts(document, [(9, 37), (9, 37)], CALIBRATION, 0.05)
    assert found.startswith("digits, matched and as-published: ")

    document["pairs"][1] |= {"heads": {"featdiff": metrics(0.8, 0.7, 0.9)}}
    assert [section.title for section in sections(document)] == [
        *("digits (40 images), matched", "digits (40 images), as-published")
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_names_and_numbers_are_whole_at_every_width(width: int) -> None:
    names = ["baseline_mahalanobis_all", "baseline_mahalanobis_layers.3.blocks.17.norm2", "baseline_日本"]
    heads = {name: metrics(1.0, 1.0, 1.0) for name in ("featdiff", *names)}
    lines = list(table_lines(sections(result("matched", **heads), all_heads=True), width))
    assert max(map(len, lines)) <= width
    numbers = ["100.0", "100.0", "-", "100.0", "25.0", "80.0", "70.0"]
    shown = [line.split() for line in lines]
    for name in ("featdiff", *names):
        (i,) = [i for i, words in enumerate(shown) if words[0] == name]
        assert shown[i] + (shown[i + 1] if len(shown[i]) == 1 else []) == [name, *numbers]
