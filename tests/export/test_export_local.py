"""Exported files of a detector with a local score give the score that joins it with the global one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from defect_pictures import SIDE, plates

from featdiff import Detector
from featdiff.export.export import LIMIT, export

pytestmark = pytest.mark.usefixtures("decided_locally")
OPTIONS: dict[str, Any] = {"size": SIDE, "recipe": {"epochs": 1, "min_steps": 20}, "calibration": 0.3, "fpr": 0.1}


def test_files_give_the_joint_score_and_its_verdict(tmp_path: Path) -> None:
    detector = Detector(**OPTIONS).fit(plates(60, seed=0))
    assert detector.local_ is not None
    files = export(detector, tmp_path / "files", formats=["onnx", "pt2"])

    images = [*plates(4, seed=1), *plates(4, seed=2, defect=True)]
    pixels = torch.stack([detector.extractor_.transform(image) for image in images])
    wanted = detector.score(images)
    alone = detector.without_local().score(images)
    assert np.abs(wanted.ood_score - alone.ood_score).max() > 1  # so the local score matters here

    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    by_onnx = session.run(None, {"pixels": pixels.numpy()})
    by_pt2 = [output.numpy() for output in torch.export.load(files["pt2"]).module()(pixels)]
    for score, p_value, _, parts in (by_onnx, by_pt2):
        np.testing.assert_allclose(
            detector.local_.calibrations["local"].p_values(parts[:, 1]), wanted.p_values["local"]
        )
        np.testing.assert_allclose(score, wanted.ood_score, rtol=LIMIT, atol=LIMIT)
        np.testing.assert_allclose(p_value, wanted.p_value, atol=1e-6)
