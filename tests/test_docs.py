"""The README is true: every command and every block of code in it is run here, as printed."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import README, ROOT, blocks, commands, shell

#: commands that end with another code than 0, and why
EXPECTED = {
    "featdiff score images/": 3,  # images/ holds a broken file
    "featdiff score images/ -m my-model --fpr 0.05 -o scores.csv": 3,
    "find images -name '*.png' | featdiff score - --fail-on-ood": 4,  # images/ holds digits
}
#: needs weights from the hub, which tests do not have
HUB = "featdiff train --backbone resnet50"
#: commands that install or check the checkout itself; the first two are compared with .ci/run
SETUP = ("python3 -m venv", ".venv/bin/")


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, seeded_backbone: Path) -> Path:
    """A folder as the README supposes it, made from what ``featdiff demo`` leaves."""
    folder = tmp_path_factory.mktemp("newcomer")
    done = shell("featdiff demo", folder)
    assert done.returncode == 0, done.stderr
    images = folder / "featdiff-demo" / "images"
    shutil.copytree(images / "train", folder / "photos")
    shutil.copytree(images / "test", folder / "test")
    shutil.copytree(images / "digits", folder / "digits")
    (folder / "images").mkdir()
    for file in (*sorted((images / "test").iterdir())[:20], *sorted((images / "digits").iterdir())[:10]):
        shutil.copy(file, folder / "images")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for file in sorted((folder / "images").iterdir())[:5]:
            archive.write(file, file.name)
    (folder / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a picture")
    shutil.copy(seeded_backbone, folder / "test_resnet.safetensors")
    return folder


def test_demo_separates_digits_and_keeps_tiles(newcomer: Path) -> None:
    """The main job of the first command: results, not only files."""
    rows = (newcomer / "featdiff-demo" / "scores.csv").read_text().splitlines()
    assert rows[0].startswith("path,status,reason,ood_score,p_value,is_ood,layer_")
    flagged = {kind: [",true," in row for row in rows[1:] if f"/{kind}/" in row] for kind in ("test", "digits")}
    assert len(flagged["test"]) == 130
    assert len(flagged["digits"]) == 200
    assert sum(flagged["digits"]) >= 190
    assert sum(flagged["test"]) <= 16  # 5 % of 130 is 6.5; both kinds of scatter allowed for
    assert (newcomer / "featdiff-demo" / "histograms.png").read_bytes().startswith(b"\x89PNG")


def test_commands_of_the_readme(newcomer: Path) -> None:
    """All of them, in the order of the page, in one folder."""
    ran = [command for command in commands() if not command.startswith(SETUP) and command != HUB]
    assert len(ran) >= 11
    for command in ran:
        result = shell(command, newcomer)
        assert result.returncode == EXPECTED.get(command, 0), f"{command}: {result.stderr}"
        assert "Traceback" not in result.stderr


def test_hub_command_of_the_readme_without_a_hub(tmp_path: Path) -> None:
    """Typed with no folder and no hub: the sample set is named loudly, and the error names the tag and the ways out."""
    assert HUB in commands()
    done = shell(HUB, tmp_path)
    assert done.returncode == 1
    assert "built-in sample set" in done.stderr
    for words in ("resnet50.a1_in1k", "connect to the hub", "--weights FILE", "--backbone tf_efficientnet_lite0"):
        assert words in done.stderr


def test_python_blocks_of_the_readme(newcomer: Path) -> None:
    for block in blocks("python"):
        done = shell(f"{sys.executable} - <<'END'\n{block}\nEND", newcomer)
        assert done.returncode == 0, done.stderr


def test_config_block_of_the_readme(newcomer: Path) -> None:
    (block,) = blocks("toml")
    (newcomer / "mine.toml").write_text(block)
    done = shell("featdiff train --config mine.toml -o from-config", newcomer)
    assert done.returncode == 0, done.stderr
    assert "390 images" in done.stderr


def test_ci_runs_the_test_command_of_the_readme() -> None:
    first, second = (command for command in commands() if command.startswith("python3 -m venv"))
    assert first.endswith("featdiff demo")
    assert second in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_command_and_exit_code_is_in_the_readme() -> None:
    listed = shell("featdiff --help", ROOT).stdout
    names = re.findall(r"^  (\w+)  +[A-Z]", listed.partition("Commands:")[2], flags=re.M)
    assert len(names) == 7
    for name in names:
        assert f"featdiff {name}" in README
    for code in ("0", "1", "2", "3", "4", "130"):
        assert f"| {code} |" in README
