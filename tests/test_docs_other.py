"""The README is true: what is left of its commands and code, all that needs no default backbone (see test_docs)."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import pytest
from diffusers import DDPMPipeline
from helpers import DOWNLOAD, EXPECTED, HARDENED, HUB, OTHER, README, ROOT, blocks, commands, newcomer_folder, typed

from featdiff.diffusion.schedules import make_pixel_scheduler
from featdiff.diffusion.unet import make_unet


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, sample_folders: dict[str, Path], seeded_backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    newcomer_folder(folder, sample_folders["train"].parent)
    shutil.copy(seeded_backbone, folder / "test_resnet.safetensors")
    unet = make_unet(16, 3, width=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0)
    DDPMPipeline(unet, make_pixel_scheduler()).save_pretrained(folder / "ddpm")
    return folder


def test_commands_of_the_readme(newcomer: Path) -> None:
    ran = [command for command in commands() if command.startswith(OTHER)]
    ran.sort(key=lambda command: "offline-model" not in command)  # a small model, exported in place of the first one
    assert len(ran) == len(OTHER)
    for command in ran:
        if command.startswith("featdiff export"):
            shutil.copytree(newcomer / "offline-model", newcomer / "featdiff-model")
        result = typed(command, newcomer)
        assert result.returncode == EXPECTED.get(command, 0), f"{command}: {result.stderr}"
        assert "Traceback" not in result.stderr
    assert (newcomer / "inpaintings.png").read_bytes().startswith(b"\x89PNG")


def test_hub_command_of_the_readme_without_a_hub(tmp_path: Path) -> None:
    """Typed with no folder and no hub: the sample set is named loudly, and the error names the tag and the ways out."""
    assert HUB in commands()
    done = typed(HUB, tmp_path)
    assert done.returncode == 1
    assert "built-in sample set" in done.stderr
    for words in ("resnet50.a1_in1k", "connect to the hub", "--weights FILE", "--backbone tf_efficientnet_lite0"):
        assert words in done.stderr


def test_pixel_command_of_the_readme_without_a_download(
    newcomer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torchvision's weights cannot be had, the line says what to do, before ten minutes of training."""
    assert DOWNLOAD in commands()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    done = typed(DOWNLOAD, newcomer)
    assert done.returncode == 1
    for words in ("squeezenet1_1", "--weights", "--distances mse,ssim"):
        assert words in done.stderr


def test_python_blocks_of_the_readme(newcomer: Path) -> None:
    others = [block for block in blocks("python")[1:] if HARDENED not in block]
    assert others
    for block in others:  # in this process, which need not import torch anew for each
        with contextlib.chdir(newcomer):
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_config_block_of_the_readme(newcomer: Path) -> None:
    (block,) = blocks("toml")
    (newcomer / "mine.toml").write_text(block)
    done = typed("featdiff train --config mine.toml -o from-config", newcomer)
    assert done.returncode == 0, done.stderr
    assert "390 images" in done.stderr


def test_ci_runs_the_test_command_of_the_readme() -> None:
    first, second = (command for command in commands() if command.startswith("python3 -m venv"))
    assert first.endswith("featdiff demo")
    assert second in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_command_and_exit_code_is_in_the_readme() -> None:
    listed = typed("featdiff --help", ROOT).stdout
    names = re.findall(r"^  (\w+)  +[A-Z]", listed.partition("Commands:")[2], flags=re.M)
    assert len(names) == 11
    for name in names:
        assert f"featdiff {name}" in README
    for code in ("0", "1", "2", "3", "4", "130"):
        assert f"| {code} |" in README
