"""What several test files share: checks of the command line, and a folder as the pages suppose it."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageEnhance
from torchvision.models import squeezenet1_1

ROOT = Path(__file__).parents[1]
FEATDIFF = shutil.which("featdiff", path=str(Path(sys.executable).parent)) or "featdiff"


def fails(result: Result, code: int, *words: str) -> None:
    """One line on standard error, no traceback, not called a bug, nothing on standard output."""
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for word in words:
        assert word in lines[0]
    assert "a bug" not in lines[0]
    assert result.stdout == ""


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as a user would, with this environment's featdiff first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], check=False, **options)  # type: ignore[call-overload, no-any-return]


def typed(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a page: a plain ``featdiff`` line, variables before it or not, through its entry point in this
    process, which need not import torch anew; anything else in a shell."""
    words = [] if "|" in command else shlex.split(command)
    variables = list(itertools.takewhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    arguments = words[len(variables) :]
    if arguments[:1] != ["featdiff"]:
        return shell(command, folder)
    (script,) = entry_points(group="console_scripts", name="featdiff")
    environment = dict(variable.split("=", 1) for variable in variables)
    with contextlib.chdir(folder):
        done = CliRunner().invoke(script.load(), arguments[1:], prog_name="featdiff", env=environment)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block of code as a user would."""
    return shell(f"{sys.executable} - <<'END'\n{code}\nEND", folder)


def newcomer_folder(folder: Path, samples: Path) -> None:
    """Fill ``folder`` as the pages suppose it, from the sample set: photos/, test/, site-b/, images/, groups.csv ..."""
    for name, source in (("test", "test"), ("digits", "digits")):
        shutil.copytree(samples / source, folder / name)
    (folder / "site-b").mkdir()
    for file in sorted((samples / "test").iterdir()):  # by a camera that sees less light
        ImageEnhance.Brightness(Image.open(file).convert("RGB")).enhance(0.8).save(folder / "site-b" / file.name)
    (folder / "photos").mkdir()
    for file in sorted((samples / "train").iterdir())[::3]:  # few, as many people have
        shutil.copy(file, folder / "photos")
    labels = [f"photos/{file.name},{file.name.rpartition('_')[0]}\n" for file in (folder / "photos").iterdir()]
    (folder / "groups.csv").write_text("path,group\n" + "".join(labels))
    (folder / "images").mkdir()
    for file in (*sorted((samples / "test").iterdir())[:20], *sorted((samples / "digits").iterdir())[:10]):
        shutil.copy(file, folder / "images")
    for place, names in (("train", ("china", "flower")), ("test", ("china", "flower"))):
        for name in names:
            (folder / "classes" / place / name).mkdir(parents=True)
            for file in sorted((samples / place).glob(f"{name}*"))[:60]:
                shutil.copy(file, folder / "classes" / place / name)
    torch.save(squeezenet1_1(num_classes=2).state_dict(), folder / "classifier.pt")
    rng = np.random.default_rng(0)
    np.save(folder / "embeddings.npy", rng.normal(size=(500, 8)) @ rng.normal(size=(8, 64)))
    (folder / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a picture")


def model_of_vectors(folder: Path) -> Path:
    """Fill ``folder`` with a model of ``train.npy``, and ``new.npy`` of 70 rows: 5 are strange and 2 hold NaN."""
    from featdiff import FeatureDiffusion

    rng = np.random.default_rng(0)
    np.save(folder / "train.npy", rng.normal(size=(200, 6)).astype(np.float32))
    new = rng.normal(size=(70, 6)).astype(np.float32)
    new[3:8] *= 20
    new[[1, 40]] = np.nan
    np.save(folder / "new.npy", new)
    recipe = {"epochs": 2, "min_steps": 100, "batch_size": 64}
    FeatureDiffusion(recipe=recipe).fit(np.load(folder / "train.npy")).save_pretrained(folder / "model")
    return folder


def noise_pictures(folder: Path, count: int, side: int) -> Path:
    """Fill ``folder`` with ``count`` seeded pictures of noise, 00.png and on."""
    rng = np.random.default_rng(1)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def same_rows(rows: dict[str, list[object]], others: dict[str, list[object]]) -> bool:
    """Whether columns of rows hold the same; in other batches, the last digit of a number may be another."""
    assert list(rows) == list(others)
    for name, column in rows.items():
        numbers = any(isinstance(value, float) for value in column)
        if numbers:
            found, expected = (np.array(values, dtype=float) for values in (column, others[name]))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6, err_msg=name)
        else:
            assert column == others[name], name
    return True


def heed_ctrl_c() -> None:
    """For a new process, before its program: what runs the tests may ignore Ctrl-C, and processes inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stopped(
    arguments: Sequence[object], ready: Callable[[], object], pause: float = 0.0, number: int = signal.SIGINT
) -> tuple[int, str, str]:
    """Run ``featdiff`` as a process and press Ctrl-C (or send another signal) ``pause`` seconds after ``ready()``:
    (code, output, errors)."""
    process = subprocess.Popen(
        [FEATDIFF, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        until = time.monotonic() + 100
        while not ready() and process.poll() is None:
            assert time.monotonic() < until, "it never got so far"
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    return process.returncode, output, errors


def copy_labelled(sample_folders: dict[str, Path], root: Path, train: int) -> None:
    """``train`` and ``test``, each with a folder of tiles of either photograph (20 to test), and 20 ``digits``."""
    for part, count in (("train", train), ("test", 20)):
        for name in ("china", "flower"):
            (root / part / name).mkdir(parents=True)
            for file in sorted(sample_folders[part].glob(f"{name}*"))[:count]:
                shutil.copy(file, root / part / name)
    (root / "digits").mkdir()
    for file in sorted(sample_folders["digits"].iterdir())[:20]:
        shutil.copy(file, root / "digits")


@contextlib.contextmanager
def printed() -> Iterator[list[str]]:
    """What anybody writes to file descriptor 2 inside the block."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
