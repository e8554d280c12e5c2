"""Saved models that were damaged, edited or forged: refused in one line, or the same."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from model_mutations import FORGERIES, MUTATIONS, forge, reseal
from safetensors.torch import load_file, save_file

from featdiff import Detector
from featdiff.exceptions import ModelError, WeightsError
from featdiff.files.model_folder import CONFIG, TENSORS, load
from featdiff.verdicts.calibration import Calibration

#: What does not change a model's values.
HARMLESS = {"spaces"}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the saved tiny detector that may be changed."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture(scope="module")
def other(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape: its calibration scores and its noise are others."""
    detector = Detector.from_pretrained(tiny_model)
    detector.calibration_ = Calibration(detector.calibration_.scores + 1)
    detector.heads_.state_dict()["diffusion.noise"].neg_()
    folder = tmp_path_factory.mktemp("other") / "model"
    detector.save_pretrained(folder)
    return folder


def answers(folder: Path) -> np.ndarray:
    """Scores and p-values of a few rows of features."""
    detector = Detector.from_pretrained(folder, local_files_only=True)
    rows = torch.randn(4, detector.extractor_.width, generator=torch.Generator().manual_seed(0))
    scores, layers = detector.layer_scores(rows)
    return np.concatenate([scores, detector.calibration_.p_values(scores), layers.ravel()])


def refused(error: pytest.ExceptionInfo[Exception], folder: Path) -> None:
    text = str(error.value)
    assert str(folder) in text
    assert "\n" not in text


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_models_are_refused_or_the_same(name: str, model: Path, other: Path) -> None:
    """A longer run: tests/fuzz."""
    whole = {file: (model / file).read_bytes() for file in (CONFIG, TENSORS)}
    expected = answers(model)
    source = random.Random(name)
    times_refused = 0
    for _ in range(4):
        MUTATIONS[name](model, other, source)
        try:
            found = answers(model)
        except ModelError as error:
            times_refused += 1
            assert str(model) in str(error)
            assert "\n" not in str(error)
        else:  # a change of spaces, or of one zero for another; where weights lie in the file decides how sums round
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        for file, data in whole.items():
            (model / file).write_bytes(data)
    assert times_refused == 0 if name in HARMLESS else times_refused >= 3


def test_spaces_in_the_config_do_not_count(model: Path, tiny_model: Path) -> None:
    config = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_bytes(json.dumps(config).encode().replace(b", ", b",\r\n\t"))
    np.testing.assert_array_equal(answers(model), answers(tiny_model))


def test_every_region_of_both_files_is_covered(model: Path) -> None:
    for file in (model / CONFIG, model / TENSORS):
        data = file.read_bytes()
        for place in np.linspace(0, len(data) - 1, 60).astype(int):
            for bit in (0, 7):
                changed = bytearray(data)
                changed[place] ^= 1 << bit
                file.write_bytes(changed)
                with pytest.raises(ModelError) as error:
                    load(model)
                refused(error, model)
        file.write_bytes(data)
    load(model)


@pytest.mark.parametrize("seed", range(24))
def test_forged_models_fail_in_a_plain_way_or_work(seed: int, model: Path, other: Path) -> None:
    """Somebody who makes the digest fit can make a model give wrong scores, and nothing else."""
    done = forge(model, other, seed)
    try:
        found = answers(model)
    except (ModelError, WeightsError) as error:
        assert "\n" not in str(error)
    else:
        assert len(found) > 8, done


def test_forgeries_cover_config_and_tensors() -> None:
    assert {"edit_value", "drop_key", "edit_header", "edit_number"} <= set(FORGERIES)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("settings", "transform"), "centre", "transform"),
        (("settings", "transform"), [1], "transform"),
        (("settings", "model_args"), [1], "model_args"),
        (("settings", "layers"), {"layer1": 1}, "layers|damaged"),
        (("settings", "layers"), 7, "layers"),
        (("settings", "layers"), [["layer1"]], "layer"),
        (("settings", "fpr"), 0, "fpr"),
        (("settings", "fpr"), 1.5, "fpr"),
        (("settings", "hidden_ratio"), -1, "hidden_ratio"),
        (("settings", "recipe"), {"epochs": 0}, "epochs"),
        (("settings", "workers"), 10_000, "workers is no setting of a saved model"),
        (("settings", "max_pixels"), 10**12, "max_pixels is no setting of a saved model"),
        (("settings", "cache"), "/etc", "cache is no setting of a saved model"),
        (("images", "different"), 0, "images.different"),
        (("images", "calibration"), -1, "images.calibration"),
        (("images", "calibration_groups"), 0, "images.calibration_groups"),
        (("images", "calibration_groups"), 10**6, "groups"),
        (("images", "bank"), -1, "images.bank"),
        (("images", "different"), True, "images.different"),
        (("layers", "layer1"), "wide", "layer1"),
        (("layers", "layer1"), 0, "layer1"),
        (("backbone", "precision"), None, "backbone.precision"),
        (("training_seconds",), -1, "training_seconds"),
        (("mode",), None, "unknown mode"),
        (("mode",), ["feature"], "unknown mode"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_values_are_checked_beside_the_digest(place: tuple[str, ...], value: object, words: str, model: Path) -> None:
    config = json.loads((model / CONFIG).read_text())
    table = config
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    (model / CONFIG).write_text(json.dumps(config))
    reseal(model)
    with pytest.raises(ModelError, match=words) as error:
        Detector.from_pretrained(model)
    refused(error, model)


@pytest.mark.parametrize(
    ("literal", "words"),
    [
        ("NaN", "NaN or an infinite number"),
        ("-Infinity", "NaN or an infinite number"),
        ("1e999", "NaN or an infinite number"),
        ("1" + "0" * 400, "more than 64 bits"),
        ("9" * 5000, "damaged"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ('1, "seed": 2', "names 'seed' twice"),
    ],
    ids=["nan", "inf", "overflow", "large", "huge", "deep", "deeper", "twice"],
)
def test_json_that_readers_differ_about_is_refused(literal: str, words: str, model: Path) -> None:
    text = (model / CONFIG).read_text()
    assert '"seed": 0' in text
    (model / CONFIG).write_text(text.replace('"seed": 0', f'"seed": {literal}'))
    with pytest.raises(ModelError, match=words) as error:
        Detector.from_pretrained(model)
    refused(error, model)


def test_calibration_must_be_sorted(model: Path) -> None:
    tensors = load_file(model / TENSORS)
    tensors["calibration"] = tensors["calibration"].flip(0)
    save_file(tensors, model / TENSORS)
    reseal(model)
    with pytest.raises(ModelError, match="calibration scores are not sorted"):
        Detector.from_pretrained(model)


def test_huge_file_in_place_of_the_tensors_is_not_read(model: Path) -> None:
    os.truncate(model / TENSORS, 1 << 40)
    with pytest.raises(ModelError, match="model.safetensors is not what was saved"):
        load(model)


def test_equal_models_have_equal_digests(tiny_detector: Detector, tiny_model: Path, tmp_path: Path) -> None:
    tiny_detector.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again")[0]["digest"] == load(tiny_model)[0]["digest"]
