"""What ``featdiff score`` imports for one image. Seconds are measured in tests/benchmarks/startup.py."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from featdiff import Detector

#: What scoring never needs.
NEVER = {"accelerate", "diffusers", "faiss", "lpips", "matplotlib", "pandas", "scipy", "sklearn", "transformers"}
#: What only building a network by name needs, by far the most of the start.
NETWORK = {"huggingface_hub", "sympy", "timm", "torch._dynamo", "torchvision"}

# Runs the installed command, and ends with the names of all modules.
PROGRAM = """
import json, sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="featdiff")
try:
    script.load()(sys.argv[1:], prog_name="featdiff")
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]), file=sys.stderr)
"""


def score(model: Path, cache: Path, *images: str) -> tuple[str, set[str]]:
    """The rows, and which modules were imported for them."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, "score", "-q", "-m", str(model), "--device", "cpu", *images],
        capture_output=True,
        text=True,
        env={**os.environ, "FEATDIFF_CACHE": str(cache)},
        check=True,
    )
    code, modules = json.loads(run.stderr.splitlines()[-1])
    assert code == 0, run.stderr
    return run.stdout, set(modules)


@pytest.fixture(scope="module")
def model(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose backbone is a timm network by name."""
    settings: dict[str, Any] = {"hidden_max": 32, "blocks": 1, "fpr": 0.2, "recipe": {"epochs": 1, "min_steps": 1}}
    detector = Detector("test_resnet", pretrained=False, layers="layer1,layer2", device="cpu", **settings)
    detector.fit(sorted(map(str, sample_folders["train"].iterdir()))[:40])
    folder = tmp_path_factory.mktemp("start") / "model"
    detector.save_pretrained(folder)
    return folder


def test_one_image_is_scored_without_what_only_training_needs(
    model: Path, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    image, other = sorted(map(str, sample_folders["test"].iterdir()))[:2]
    first, modules = score(model, tmp_path, image)
    assert not modules & NEVER
    assert modules >= {"torch", "timm"}

    again, modules = score(model, tmp_path, image)
    assert again == first
    assert not modules & (NEVER | NETWORK)
    assert "torch" in modules

    another, modules = score(model, tmp_path, other)  # of the same size
    assert another != first
    assert not modules & NETWORK


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_runs_a_model_whose_pass_is_kept(
    engine: str, model: Path, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    images = sorted(map(str, sample_folders["digits"].iterdir()))[:8]
    expected, _ = score(model, tmp_path / "cache", *images)  # keeps the pass
    for cache in ("cache", "empty"):
        rows, modules = score(model, tmp_path / cache, "--engine", engine, *images)
        assert engine in modules
        for given, wanted in zip(csv.DictReader(rows.splitlines()), csv.DictReader(expected.splitlines()), strict=True):
            assert (given["path"], given["is_ood"]) == (wanted["path"], wanted["is_ood"])
            assert float(given["ood_score"]) == pytest.approx(float(wanted["ood_score"]), abs=1e-4)
