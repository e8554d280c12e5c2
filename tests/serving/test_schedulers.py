"""The array job and the indexed job of the page: each task is run as its scheduler would run it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from helpers import FEATDIFF
from pages import INDEXED_JOB, SBATCH, blocks_at

from featdiff.data.references import iter_images
from featdiff.serving.manifest import write_manifest

#: Few tasks in place of the 64 of the page: each is a process.
TASKS = 2


@pytest.fixture
def folder(few_images: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """``manifest.parquet`` of seven images, one of them broken, and ``my-model``."""
    place = tmp_path / "work"
    shutil.copytree(tiny_model, place / "my-model")
    (few_images / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much")
    write_manifest(iter_images(str(few_images)), str(place / "manifest.parquet"))
    return place


def run(words: list[str], folder: Path, **variables: str) -> None:
    path = f"{Path(FEATDIFF).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "FEATDIFF_SCORE_BLOCK": "4", **variables}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # also that of the broken image


def test_the_array_job(featdiff_cli: Callable[..., Result], folder: Path) -> None:
    (block,) = blocks_at(SBATCH, language="sh")
    script = folder / "job.sh"
    script.write_text(block.text)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert "#SBATCH --array=0-63\n" in block.text
    for task in range(TASKS):
        run(["bash", str(script)], folder, SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT=str(TASKS))
    done = featdiff_cli("merge", folder / "scored", "--manifest", folder / "manifest.parquet")
    assert "7 images: " in done.stderr and "each is there once, in 2 blocks" in done.stderr


def test_the_indexed_job(featdiff_cli: Callable[..., Result], folder: Path) -> None:
    (block,) = blocks_at(INDEXED_JOB, language="yaml")
    job = yaml.safe_load(block.text)["spec"]
    (container,) = job["template"]["spec"]["containers"]
    (line,) = container["args"]
    assert f"/{job['completions']} " in line
    for index in range(TASKS):
        few = line.replace(f"/{job['completions']} ", f"/{TASKS} ")
        run([*container["command"], few], folder, JOB_COMPLETION_INDEX=str(index))
    done = featdiff_cli("merge", folder / "scored", "--manifest", folder / "manifest.parquet")
    assert "7 images: " in done.stderr and "each is there once, in 2 blocks" in done.stderr
