"""The README is true: the commands and the code that use the default backbone, run as printed (see test_docs_other)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from helpers import (
    DOWNLOAD,
    EXPECTED,
    HARDENED,
    HUB,
    OTHER,
    SETUP,
    blocks,
    commands,
    newcomer_folder,
    python,
    shell,
    typed,
)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README supposes it, made from what ``featdiff demo`` leaves."""
    folder = tmp_path_factory.mktemp("newcomer")
    done = shell("featdiff demo", folder)
    assert done.returncode == 0, done.stderr
    newcomer_folder(folder, folder / "featdiff-demo" / "images")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for file in sorted((folder / "images").glob("*.png"))[:5]:
            archive.write(file, file.name)
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
    ran = [
        command for command in commands() if not command.startswith((*SETUP, *OTHER)) and command not in (HUB, DOWNLOAD)
    ]
    assert len(ran) >= 8
    for command in ran:
        result = typed(command, newcomer)
        assert result.returncode == EXPECTED.get(command, 0), f"{command}: {result.stderr}"
        assert "Traceback" not in result.stderr


def test_python_blocks_of_the_readme(newcomer: Path) -> None:
    """Those on the models that the commands above leave."""
    first, *others = blocks("python")
    for block in (first, *(block for block in others if HARDENED in block)):
        done = python(block, newcomer)
        assert done.returncode == 0, done.stderr
