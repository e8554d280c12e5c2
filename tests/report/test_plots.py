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
from PIL import Image

from featdiff.exceptions import FeatdiffError, UsageError
from featdiff.report import plots
from featdiff.report.evaluations import Evaluated
from featdiff.report.plots import check_folder, draw_evaluation, save_evaluations
from featdiff.verdicts.calibration import Calibration

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ["roc", "histograms", "layers"]


def evaluation(*names: str, heads: tuple[str, ...] = ("layer_a", "layer_b"), baseline: bool = True) -> Evaluated:
    """Sets whose scores lie 2 above those of 50 in-domain images; threshold 1.5."""
    rng = np.random.default_rng(0)
    scores = ["featdiff", *heads, *(["baseline_knn"] if baseline else [])]
    inside = {name: rng.normal(size=50) for name in scores}
    pairs, documents = [], []
    for name in names:
        outside = {head: rng.normal(2, 1, size=30) for head in scores}
        flags = {"id_flags": inside["featdiff"] > 1.5, "ood_flags": outside["featdiff"] > 1.5}
        pairs.append(SimpleNamespace(ood=name, protocol="matched", id_scores=inside, ood_scores=outside, **flags))
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
    assert {"a", "b", "AUROC (%)", "91.2"} <= set(words["layers"])


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
    pictures = draw_evaluation(evaluation("digits", heads=(), baseline=False))
    assert sorted({re.sub(r"-.*", "", name) for name in pictures}) == ["histograms", "roc"]
    assert not any("kNN" in text for text in texts(pictures["roc-matched.svg"]))


def test_scores_without_any_spread_are_drawn() -> None:
    drawn = evaluation("digits")
    for pair in drawn.pairs:
        for scores in (*pair.id_scores.values(), *pair.ood_scores.values()):
            scores[:] = 1.5
    assert len(draw_evaluation(drawn)) == 6


# ---- files ----


def test_several_models_have_files_of_their_own(tmp_path: Path) -> None:
    files = save_evaluations(tmp_path / "new", {"1-plain-": evaluation("digits"), "2-hard-": evaluation("digits")})
    assert len(files) == 12 == len(list((tmp_path / "new").iterdir()))
    assert {file.name for file in files} >= {"1-plain-roc-matched.svg", "2-hard-layers-matched.png"}


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

    monkeypatch.setattr(plots, "_layers", fail)
    with pytest.raises(RuntimeError):
        save_evaluations(tmp_path / "new", {"": evaluation("digits")})
    assert not (tmp_path / "new").exists()
