"""Detectors on a module of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_detectors import COLUMNS, MODULE, TinyNet, pictures, tiny_net, to_tensor
from torch import nn

from featdiff import Detector
from featdiff.exceptions import FeatdiffError, ModelError, UsageError
from featdiff.files.model_folder import load


def test_own_module_is_fitted_saved_and_loaded(files: list[str], fresh: list[str], tmp_path: Path) -> None:
    detector = Detector(tiny_net(), **MODULE).fit(files)
    scores = detector.score(fresh)
    assert scores.columns == [*COLUMNS, "layer_stem", "layer_body"]
    assert [part.width for part in detector.extractor_.layout.layers] == [12, 24]
    detector.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model", backbone=tiny_net(), transform=to_tensor)
    np.testing.assert_array_equal(loaded.score(fresh).ood_score, scores.ood_score)


def test_own_module_must_be_given_again(files: list[str], tmp_path: Path) -> None:
    Detector(tiny_net(), **MODULE).fit(files).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"your own module.*backbone=.*TinyNet"):
        Detector.from_pretrained(tmp_path / "model")


def changed(net: TinyNet) -> TinyNet:
    with torch.no_grad():
        net.body.bias[0] += 1
    return net


@pytest.mark.parametrize(
    "other",
    [lambda: changed(tiny_net()), lambda: tiny_net(nn.GELU()), lambda: nn.Sequential(nn.Conv2d(3, 12, 5))],
    ids=["other-weights", "other-activation", "other-network"],
)
def test_another_module_is_refused(files: list[str], tmp_path: Path, other: Callable[[], nn.Module]) -> None:
    """Equal weights are not enough: ReLU and GELU have none, and give other features."""
    Detector(tiny_net(), **MODULE).fit(files).save_pretrained(tmp_path / "model")
    with pytest.raises(FeatdiffError):
        Detector.from_pretrained(tmp_path / "model", backbone=other(), transform=to_tensor)


def test_own_module_without_a_transform_takes_ready_tensors_only(files: list[str]) -> None:
    arguments = {**MODULE, "transform": None}
    batches = torch.stack([to_tensor(picture) for picture in pictures(files)]).split(16)
    detector = Detector(tiny_net(), **arguments).fit(iter(batches))
    np.testing.assert_allclose(
        detector.calibration_.scores,
        Detector(tiny_net(), **MODULE).fit(files).calibration_.scores,
        rtol=1e-3,
        atol=1e-4,
    )
    with pytest.raises(UsageError, match="transform="):
        Detector(tiny_net(), **arguments).fit(files)


def test_fit_changes_no_setting(files: list[str], tmp_path: Path) -> None:
    """The size of a loader's images belongs to the fit: another loader may have another size."""
    detector = Detector(tiny_net(), **{**MODULE, "transform": None})
    before, values = detector.settings, vars(detector.settings).copy()
    for side in (32, 48, 32):
        batches = torch.stack([to_tensor(picture.resize((side, side))) for picture in pictures(files)]).split(16)
        detector.fit(iter(batches))
        assert detector.settings is before and vars(before) == values
        assert tuple(detector.extractor_.backbone.data_config["input_size"]) == (3, side, side)
        assert detector.score(iter(batches[:1])).status == ["ok"] * 16
        detector.save_pretrained(tmp_path / "model")
        assert load(tmp_path / "model")[0]["settings"]["input_size"] == [3, side, side]


def test_own_module_can_be_trained_on_afterwards(files: list[str], fresh: list[str]) -> None:
    """Scores do not follow its mode, its batch statistics do not move, and its weights do not come back frozen."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    detector = Detector(net, **{**MODULE, "layers": ["1"]}).fit(files)
    scores = detector.score(fresh).ood_score
    net.train()
    np.testing.assert_array_equal(detector.score(fresh).ood_score, scores)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_unknown_layer_gets_a_hint(files: list[str], small: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="unknown layer 'bodi'; did you mean body"):
        Detector(tiny_net(), **{**MODULE, "layers": ["bodi"]}).fit(files)
    with pytest.raises(UsageError, match="unknown layer 'layer7'; did you mean layer"):
        Detector(**{**small, "layers": "layer7"}).fit(files)
