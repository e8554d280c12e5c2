"""Arguments of the default mode, and what it says before it is fitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featdiff import Detector
from featdiff.exceptions import NotFittedError, UsageError, WeightsError
from featdiff.files.model_folder import load


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(
            ({name: value}, name)
            for name in (
                "hidden_ratio",
                "hidden_max",
                "blocks",
                "timesteps",
                "draws",
                "image_batch",
                "max_pixels",
                "max_bytes",
            )
            for value in (0, -1, "3", None, True)
        ),
        *(({name: 1.5}, name) for name in ("hidden_max", "blocks", "timesteps", "draws", "image_batch", "workers")),
        ({"hidden_ratio": float("nan")}, "hidden_ratio"),
        ({"stride": 0}, "stride"),
        ({"stride": 2.5}, "stride"),
        ({"workers": -2}, "workers"),
        ({"start_times": ()}, "start_times"),
        ({"start_times": (100,)}, "0 .. 99"),
        ({"start_times": (-1,)}, "start_times"),
        ({"start_times": (1.5,)}, "start_times"),
        ({"start_times": 20}, "start_times"),
        ({"start_times": "20"}, "start_times"),
        ({"start_times": (9,), "timesteps": 9}, "0 .. 8"),
        ({"head": "mean"}, "unknown head 'mean'.*known: fused, layerwise, mse, mfsim, lr"),
        ({"neighbors": -1}, "neighbors must be"),
        ({"neighbors": 2.5}, "neighbors must be"),
        ({"bank_size": 0}, "bank_size"),
        ({"bank_size": 4}, "a bank of 4 vectors has no 5 neighbours"),
        ({"coreset": "best"}, "unknown coreset 'best'"),
        ({"backend": "fais"}, "unknown backend 'fais'; did you mean faiss"),
        ({"calibration": 0}, "calibration"),
        ({"calibration": 0.5}, "calibration"),
        ({"calibration": "0.2"}, "calibration"),
        ({"validation": 1}, "validation"),
        ({"validation": float("nan")}, "validation"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "a"}, "seed"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"recipe": {"epochs": 0}}, "epochs must be above 0"),
        ({"recipe": {"epoch": 3}}, "unknown recipe setting 'epoch'; did you mean epochs"),
        ({"recipe": {"lr_schedule": "linear"}}, "unknown lr_schedule 'linear'"),
        ({"recipe": {"epochs": "3"}}, "epochs"),
        ({"recipe": {"batch_size": 2.5}}, "batch_size"),
        ({"recipe": 5}, "recipe"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_nonsense_is_refused_before_any_work(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Detector(**arguments)


@pytest.mark.parametrize("seed", [0, 2**31, 2**48, 2**63 - 1, 2**64])
def test_every_seed_works_or_is_refused_at_once(small: dict[str, Any], files: list[str], seed: int) -> None:
    try:
        detector = Detector(**small, seed=seed)
    except UsageError as error:
        assert "seed" in str(error) and seed > 2**31
        return
    assert len(detector.fit(files).calibration_) == 8


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"backbone": "test_resnett"},
            UsageError,
            "unknown backbone 'test_resnett'; did you mean test_resnet",
        ),
        ({"backbone": "test_vit"}, WeightsError, "does not fit test_vit"),
        ({"weights": "nowhere.safetensors"}, WeightsError, "nowhere.safetensors"),
        ({"transform": {"colour": 1}}, UsageError, "unknown transform setting 'colour'"),
        ({"model_args": {"wings": 2}}, UsageError, "wings"),
    ],
    ids=["name", "weights", "file", "transform", "model-args"],
)
def test_backbone_that_cannot_be_had_is_refused_when_fitting(
    small: dict[str, Any], files: list[str], arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        Detector(**{**small, **arguments}).fit(files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "action",
    [
        lambda detector, files: detector.score(files),
        lambda detector, files: detector.iter_scores(files),
        lambda detector, files: detector.score_features(torch.zeros(1, 8)),
        lambda detector, files: detector.all_heads(torch.zeros(1, 8)),
        lambda detector, files: detector.config(),
    ],
    ids=["score", "iter_scores", "score_features", "all_heads", "config"],
)
def test_unfitted_detector_says_so(files: list[str], action: Callable[[Detector, list[str]], object]) -> None:
    with pytest.raises(NotFittedError, match="fit"):
        action(Detector(), files)


def test_config_is_plain_and_holds_what_was_given(fitted: Detector, small: dict[str, Any], tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "model")
    config = load(tmp_path / "model")[0]
    assert config["layers"] == {"layer1": 32, "layer2": 48}
    assert config["images"] == {"different": 40, "calibration": 8, "calibration_groups": 8, "bank": 27}
    assert (config["settings"]["view"], config["settings"]["size"]) == ("squash", 32)
    assert config["settings"]["recipe"]["epochs"] == small["recipe"]["epochs"]
    assert config["settings"]["recipe"]["learning_rate"] == 1e-3


def test_fit_returns_the_detector(small: dict[str, Any], files: list[str]) -> None:
    detector = Detector(**small)
    assert detector.fit(files) is detector
