"""The pages are true: all that needs no default backbone, or more than tests have (see pages, test_docs)."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from diffusers import DDPMPipeline
from helpers import ROOT, newcomer_folder, python, typed
from pages import (
    CONFIG,
    DOWNLOAD,
    ENTRY_POINTS,
    EXPECTED,
    HUB,
    INSTALL,
    NO_DATA,
    PLUGIN,
    PYTEST,
    SETUP,
    SMALL,
    SUITE,
    Block,
    blocks_at,
    commands_at,
)
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from featdiff import Detector
from featdiff.diffusion.schedules import make_pixel_scheduler
from featdiff.diffusion.training import Recipe
from featdiff.diffusion.unet import make_unet
from featdiff.evaluation.suites import load_suite

BLOCKS = blocks_at(SMALL, language="python")
#: Arguments of a detector that fits in a second, as in the command that trains ``offline-model``.
TINY = """
TINY = {
    "backbone": "test_resnet", "weights": "test_resnet.safetensors", "layers": "layer2,layer4",
    "recipe": {"epochs": 2, "min_steps": 20},
}
"""


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, sample_folders: dict[str, Path], seeded_backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    newcomer_folder(folder, sample_folders["train"].parent)
    shutil.copy(seeded_backbone, folder / "test_resnet.safetensors")
    unet = make_unet(16, 3, width=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0)
    DDPMPipeline(unet, make_pixel_scheduler()).save_pretrained(folder / "ddpm")
    return folder


# ---- what runs as printed ----


def test_commands(newcomer: Path) -> None:
    commands = commands_at(SMALL)
    # a small model comes first, to be exported in place of the one of the default backbone
    commands.sort(key=lambda command: "offline-model" not in command)
    assert len(commands) >= 8
    for command in commands:
        if command.startswith("featdiff export"):
            shutil.copytree(newcomer / "offline-model", newcomer / "featdiff-model")
        result = typed(command, newcomer)
        assert result.returncode == EXPECTED.get(command, 0), f"{command}: {result.stderr}"
        assert "Traceback" not in result.stderr
    assert (newcomer / "inpaintings.png").read_bytes().startswith(b"\x89PNG")


def test_there_are_python_blocks() -> None:
    assert len(BLOCKS) >= 8


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_python_blocks(block: Block, newcomer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which need not import torch anew for each, and with a sixth of the steps of a training."""
    plan = Recipe.plan

    def shorter(recipe: Recipe, count: int) -> tuple[int, int]:
        epochs, per_epoch = plan(recipe, count)
        return max(1, epochs // 6), per_epoch

    monkeypatch.setattr(Recipe, "plan", shorter)
    with contextlib.chdir(newcomer):
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "__main__"})


def test_configs(newcomer: Path) -> None:
    (block,) = blocks_at(CONFIG, language="toml")
    (newcomer / "mine.toml").write_text(block.text)
    done = typed("featdiff train --config mine.toml -o from-config", newcomer)
    assert done.returncode == 0, done.stderr
    assert "130 images" in done.stderr


def test_suites(tmp_path: Path) -> None:
    (block,) = blocks_at(SUITE, language="toml")
    (tmp_path / "mine.toml").write_text(block.text)
    suite = load_suite(tmp_path / "mine.toml")
    assert suite.tasks
    for arguments in suite.detectors.values():
        Detector(**arguments)


# ---- scores of one's own ----


def _names(block: str) -> list[str]:
    """Names of the scores that a block registers."""
    return re.findall(r'^@register\("(\w+)"', block, flags=re.M)


def test_scores_of_ones_own_are_measured_as_baselines(newcomer: Path) -> None:
    blocks = blocks_at(PLUGIN, language="python")
    assert len(blocks) == 2
    code = "\n".join(block.text for block in blocks)
    arguments = ["eval", "--id", "test/", "--ood", "digits=digits/", "-m", "offline-model", "--baselines", "--json"]
    done = python(f"{code}\nfrom featdiff_cli import main\nmain({arguments!r})", newcomer)
    assert done.returncode == 0, done.stderr
    for pair in json.loads(done.stdout)["pairs"]:
        assert {f"baseline_{name}" for name in _names(code)} <= set(pair["heads"])


def test_a_head_of_ones_own_joins_the_score_and_is_saved(newcomer: Path) -> None:
    (block,) = [block for block in blocks_at(PLUGIN, language="python") if "head=True" in block.text]
    (name,) = _names(block.text)
    use = f"""
from featdiff import Detector
plain = Detector(**TINY).fit("photos/").score("test/").ood_score
detector = Detector(**TINY, extra_heads=[{name!r}]).fit("photos/")
scores = detector.score("test/").ood_score
detector.save_pretrained("with-{name}")
again = Detector.from_pretrained("with-{name}").score("test/").ood_score
assert abs(scores - plain).max() > 1e-3, "it changes nothing"
assert abs(scores - again).max() < 1e-5, "it is not saved"
"""
    done = python(block.text + TINY + use, newcomer)
    assert done.returncode == 0, done.stderr


def test_entry_points_name_a_score_of_the_same_page() -> None:
    (block,) = blocks_at(ENTRY_POINTS, language="toml")
    scores = [score for score in blocks_at(PLUGIN, language="python") if score.page == block.page]
    entries = tomllib.loads(block.text)["project"]["entry-points"]["featdiff.scores"]
    assert list(entries) == [name for score in scores for name in _names(score.text)]
    for target in entries.values():
        assert any(f"\nclass {target.partition(':')[2]}(" in score.text for score in scores)


# ---- what needs more than tests have ----


def test_hub_command_without_a_hub(tmp_path: Path) -> None:
    """Typed with no folder and no hub: the sample set is named loudly, and the error names the tag and the ways out."""
    (command,) = commands_at(HUB)
    done = typed(command, tmp_path)
    assert done.returncode == 1
    assert "built-in sample set" in done.stderr
    for words in ("resnet50.a1_in1k", "connect to the hub", "--weights FILE", "--backbone tf_efficientnet_lite0"):
        assert words in done.stderr


def test_pixel_command_without_a_download(newcomer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchvision's weights cannot be had, the line says what to do, before ten minutes of training."""
    (command,) = commands_at(DOWNLOAD)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    done = typed(command, newcomer)
    assert done.returncode == 1
    for words in ("squeezenet1_1", "--weights", "--distances mse,ssim"):
        assert words in done.stderr


@pytest.mark.parametrize("command", commands_at(NO_DATA))
def test_measuring_commands_without_their_data(command: str, tiny_model: Path, tmp_path: Path) -> None:
    """Every option is known, and what is missing is the data."""
    data = tmp_path / "empty"
    data.mkdir()
    trunk = tmp_path / "squeezenet1_1.safetensors"
    save_file(squeezenet1_1().state_dict(), trunk)
    line = command.removeprefix(".venv/bin/")
    for name, file in {
        "FOLDER": data,
        "FILE": trunk,
        "featdiff-model": tiny_model,
        trunk.name: trunk,
        "tests/benchmarks": ROOT / "tests" / "benchmarks",
    }.items():
        line = line.replace(f" {name}", f" {file}")
    done = typed(line, tmp_path)
    assert done.returncode == 2, done.stderr
    (error,) = [text for text in done.stderr.splitlines() if text.startswith("Error: ")]
    assert str(data) in error


# ---- the checkout ----


def test_ci_runs_the_test_command_of_the_front_page() -> None:
    blocks = blocks_at(SETUP)
    assert {block.page for block in blocks} == {"README.md"}
    first, second = (block.text for block in blocks)
    assert first == "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/featdiff demo"
    assert second in (ROOT / ".ci" / "run").read_text().splitlines()


def test_installing() -> None:
    """The line for the CPU stands there as PyTorch documents it; extras exist."""
    commands = commands_at(INSTALL)
    assert "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu" in commands
    assert commands.index("pip install .") > 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command in commands:
        for extras in re.findall(r"\.\[([\w,-]+)\]", command):
            assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_files_that_pytest_is_given_exist() -> None:
    for command in commands_at(PYTEST):
        assert all((ROOT / name).is_file() for name in re.findall(r"tests/\S+", command))
