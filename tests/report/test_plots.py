"""Figures of an evaluation: what is in them, and that they are written whole or not at all."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from featdiff.exceptions import FeatdiffError, UsageError
from featdiff.report import plots
from featdiff.report.evaluations import Evaluated
from featdiff.report.plot_contributions import _signed, draw_contributions
from featdiff.report.plots import check_folder, draw_evaluation, save_evaluations
from featdiff.verdicts.calibration import Calibration

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ["roc", "histograms", "contributions"]
LABELS = {"layer_a": "fine texture and colour", "knn_b": "distance from normal images"}


def parts_of(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Three parts that add up to these scores, of which the second is below 0."""
    return {"layer_a": 0.25 * scores, "layer_b": -0.25 - 0 * scores, "knn_b": 0.75 * scores + 0.25}


def evaluation(
    *names: str,
    heads: tuple[str, ...] = ("layer_a", "layer_b"),
    baseline: bool = True,
    is_sum: bool = True,
    local: bool = False,
) -> Evaluated:
    """Sets whose scores lie 2 above those of 50 in-domain images; threshold 1.5."""
    rng = np.random.default_rng(0)
    scores = ["featdiff", *(["global", "local"] if local else []), *heads, *(["baseline_knn"] if baseline else [])]
    whole = "global" if local else "featdiff"
    inside = {name: rng.normal(size=50) for name in scores}
    pairs, documents = [], []
    for name in names:
        outside = {head: rng.normal(2, 1, size=30) for head in scores}
        flags = {"id_flags": inside["featdiff"] > 1.5, "ood_flags": outside["featdiff"] > 1.5}
        made_of: dict[str, Any] = {"id_contributions": {}, "ood_contributions": {}, "labels": LABELS}
        if is_sum:
            made_of["id_contributions"] = parts_of(inside[whole])
            made_of["ood_contributions"] = parts_of(outside[whole])
        sets = {"ood": name, "protocol": "matched", "id_scores": inside, "ood_scores": outside}
        pairs.append(SimpleNamespace(**sets, **flags, **made_of))
        metrics = {"auroc": 0.912, "auroc_ci": [0.8, 1.0], "fpr95": 0.1, "aupr_in": 0.9, "aupr_out": 0.9}
        documents.append({"ood": name, "protocol": "matched", "heads": dict.fromkeys(scores, metrics)})
    calibration = Calibration(np.append(np.zeros(94), np.full(5, 1.5)))
    assert calibration.threshold(0.05) == 1.5
    return Evaluated({"pairs": documents}, pairs, calibration, 0.05)


def texts(svg: bytes) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_each_protocol_has_three_figures_in_two_formats() -> None:
    pictures = draw_evaluation(evaluation("digits", "signs"))
    assert sorted(pictures) == sorted(f"{name}-matched.{format}" for name in NAMES for format in ("svg", "png"))
    for name, data in pictures.items():
        if name.endswith(".png"):
            assert Image.open(io.BytesIO(data)).width == 1470  # 4.9 inches of 300 dots


def test_text_is_text_and_says_what_is_drawn() -> None:
    pictures = draw_evaluation(evaluation("digits"))
    words = {name: texts(pictures[f"{name}-matched.svg"]) for name in NAMES}
    assert {"digits (30)", "featdiff, AUROC 91.2", "kNN, 91.2"} <= set(words["roc"])
    assert "OOD images flagged (%), higher = better" in words["roc"]
    assert "in-domain images flagged (%); the dot: at the threshold for 5 %" in " ".join(words["roc"])
    assert {"in-domain", "OOD", "threshold for 5 %", "share of the set (%)"} <= set(words["histograms"])
    assert "in-domain standard deviations; higher = more OOD)" in " ".join(words["histograms"])
    assert {"fine texture and colour", "a", "b", "distance from normal", "images", "knn_b"} <= set(
        words["contributions"]
    )


# ---- what a score is made of ----


def bars_of(figure: Figure) -> list[list[list[float]]]:
    """Of each panel and each set, the lengths of its bars."""
    return [[[bar.get_width() for bar in bars] for bars in axes.containers] for axes in figure.axes]


@pytest.mark.parametrize("local", [False, True])
def test_bars_of_a_set_add_up_to_its_mean_score(local: bool) -> None:
    drawn = evaluation("digits", "signs", local=local)
    whole = "global" if local else "featdiff"
    figure = draw_contributions(drawn.pairs)
    for axes, pair, (inside, outside) in zip(figure.axes, drawn.pairs, bars_of(figure), strict=True):
        means = pair.id_scores[whole].mean(), pair.ood_scores[whole].mean()
        assert (sum(inside), sum(outside)) == pytest.approx(means)
        assert inside[1] == outside[1] == -0.25
        shown = [text.get_text().replace("\u2212", "-") for text in axes.texts]
        assert {f"{mean:+.2f}" for mean in (*means, *inside, *outside)} <= set(shown)

    words = re.sub(r"\s+", " ", " ".join(texts(draw_evaluation(drawn)["contributions-matched.svg"])))
    which = "global score" if local else "score"
    assert f"mean contribution to the {which} (in-domain standard deviations)" in words
    assert f"the bars of a set add up to its mean {which}" in words
    assert ("the verdict joins the global and the local score" in words) == local


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert [_signed(value) for value in (-0.004, 0.004, -0.006, 1.5)] == ["0.00", "0.00", "\u22120.01", "+1.50"]


def test_a_score_that_is_no_sum_has_scores_of_layers_instead() -> None:
    pictures = draw_evaluation(evaluation("digits", is_sum=False))
    assert {name.partition("-")[0] for name in pictures} == {"roc", "histograms", "layers"}
    words = texts(pictures["layers-matched.svg"])
    assert {"a", "b", "AUROC (%)", "91.2"} <= set(words)
    assert "score of the layer" in " ".join(words)


# ---- any input ----


def test_the_dot_is_where_the_detector_works() -> None:
    drawn = evaluation("digits")
    figure = plots._roc_curves(drawn.pairs, [drawn.result["pairs"][0]["heads"]], 0.05)
    lines = figure.axes[0].get_lines()
    ((x,), (y,)) = lines[-1].get_data()
    pair = drawn.pairs[0]
    assert (x, y) == (100 * pair.id_flags.mean(), 100 * pair.ood_flags.mean())
    (own,) = [line for line in lines if str(line.get_label()).startswith("featdiff")]
    false_alarms, found = (np.asarray(values) for values in own.get_data())
    step = found[np.isclose(false_alarms, x)]
    assert step.min() - 1e-9 <= y <= step.max() + 1e-9
    area = np.trapezoid(found, false_alarms) / 1e4
    inside, outside = pair.id_scores["featdiff"], pair.ood_scores["featdiff"]
    assert area == pytest.approx((outside[:, None] > inside).mean(), abs=1e-9)


def test_the_same_result_gives_the_same_bytes() -> None:
    assert draw_evaluation(evaluation("digits")) == draw_evaluation(evaluation("digits"))


def test_any_number_of_sets_and_any_names() -> None:
    names = ["$x^2$", "<script>alert(1)</script>", "a\nb\x1b[2J", "_hidden", "a name that is far too long for a panel"]
    pictures = draw_evaluation(evaluation(*names))
    shown = texts(pictures["histograms-matched.svg"])
    assert "$x^2$ (30)" in shown and "<script>alert(1)</script> (30)" in shown
    assert "a\\x0ab\\x1b[2J (30)" in shown and "_hidden (30)" in shown
    assert "a name that is far too lo\u2026 (30)" in shown
    assert b"<script" not in pictures["histograms-matched.svg"]


def test_without_layers_or_baselines_the_rest_is_drawn() -> None:
    pictures = draw_evaluation(evaluation("digits", heads=(), baseline=False, is_sum=False))
    assert sorted({re.sub(r"-.*", "", name) for name in pictures}) == ["histograms", "roc"]
    assert not any("kNN" in text for text in texts(pictures["roc-matched.svg"]))


def test_scores_without_any_spread_are_drawn() -> None:
    drawn = evaluation("digits")
    for pair in drawn.pairs:
        for scores in (*pair.id_scores.values(), *pair.ood_scores.values()):
            scores[:] = 1.5
        for parts in (*pair.id_contributions.values(), *pair.ood_contributions.values()):
            parts[:] = 0
    assert len(draw_evaluation(drawn)) == 6


# ---- files ----


def test_several_models_have_files_of_their_own(tmp_path: Path) -> None:
    files = save_evaluations(tmp_path / "new", {"1-plain-": evaluation("digits"), "2-hard-": evaluation("digits")})
    assert len(files) == 12 == len(list((tmp_path / "new").iterdir()))
    assert {file.name for file in files} >= {"1-plain-roc-matched.svg", "2-hard-contributions-matched.png"}


def test_a_wrong_place_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, words in (("file", "is a file"), ("gone/new", "no folder .*gone for new")):
        with pytest.raises(UsageError, match=words) as error:
            check_folder(tmp_path / place)
        assert error.value.argument == "plots"
    check_folder(tmp_path / "new")


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """``after`` files fit."""
    left = [after]
    fsync = os.fsync

    def limited(descriptor: int) -> None:
        if not left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", limited)
        yield


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {"": evaluation("digits")}
    old = tmp_path / "old"
    old.mkdir()
    (old / "roc-matched.svg").write_text("old")
    for folder in (old, tmp_path / "new"):
        with full_disk(monkeypatch, 3), pytest.raises(FeatdiffError, match="cannot be written: No space left"):
            save_evaluations(folder, drawn)
    assert [(file.name, file.read_text()) for file in old.iterdir()] == [("roc-matched.svg", "old")]
    assert not (tmp_path / "new").exists()


def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(plots, "draw_contributions", fail)
    with pytest.raises(RuntimeError):
        save_evaluations(tmp_path / "new", {"": evaluation("digits")})
    assert not (tmp_path / "new").exists()
