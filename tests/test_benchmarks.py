"""The benchmark that needs a GPU works: it runs here at small size."""

from __future__ import annotations

import re
import runpy
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu.py"


def test_the_gpu_script_runs_where_there_is_none(
    sample_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with zipfile.ZipFile(tmp_path / "flowers.zip", "w") as archive:
        for file in sorted(sample_folders["train"].iterdir())[:32]:
            archive.write(file, f"train/{file.name}")
    options = ["--device", "cpu", "--backbones", "test_resnet", "--batch", "4", "--images", "32", "--quick"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--data", str(tmp_path), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")

    told = capsys.readouterr().out
    assert told.startswith("a CPU, torch ")
    rows = re.findall(r"^\| test_resnet \| (.+) \| ([\d.,]+) x \| (?:at least|at most) [\d.,]+ x \|$", told, re.M)
    assert len(rows) == 8
    what = " ".join(name for name, _ in rows)
    for word in (
        "from memory, torch,",
        "from files, torch,",
        "from memory, compile ",
        "from files, compile ",
        "`train`, 32 images",
        "guard, batch 1",
        "guard, batch 4",
        "(LMD)",
    ):
        assert word in what
    assert all(float(ratio.replace(",", "")) > 0 for _, ratio in rows)
