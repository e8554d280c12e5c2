"""``featdiff train --features`` and ``featdiff score --features``: vectors in place of images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from helpers import fails
from safetensors.torch import save_file

from featdiff import FeatureDiffusion

Cli = Callable[..., Result]
WIDTH = 12


def rows(n: int, seed: int) -> np.ndarray:
    """Rows (n, 12) near a plane of 4 dimensions."""
    plane = np.random.default_rng(7).normal(size=(4, WIDTH))
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 4)) @ plane + 0.1 * rng.normal(size=(n, WIDTH))).astype(np.float32)


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.npy`` of 200 rows, ``new.npy`` of 30, of which 20 to 29 are strange; the same 30 as tensors."""
    folder = tmp_path_factory.mktemp("vectors")
    np.save(folder / "train.npy", rows(200, 0))
    new = np.concatenate([rows(20, 1), np.random.default_rng(2).normal(0, 2, (10, WIDTH)).astype(np.float32)])
    np.save(folder / "new.npy", new)
    save_file(
        {"a": torch.from_numpy(new[:, :4].copy()), "b": torch.from_numpy(new[:, 4:].copy())}, folder / "new.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def model(vectors: Path) -> Path:
    """A model of ``train.npy``; do not change it."""
    recipe = {"epochs": 2, "min_steps": 150, "batch_size": 64}
    FeatureDiffusion(recipe=recipe).fit(np.load(vectors / "train.npy")).save_pretrained(vectors / "model")
    return vectors / "model"


def test_train_then_score(featdiff_cli: Cli, vectors: Path, tmp_path: Path) -> None:
    done = featdiff_cli(
        "train", "--features", vectors / "train.npy", "--layers", "0:4,4:12", "--seed", "3", "-o", tmp_path
    )
    assert (done.exit_code, done.stdout) == (0, "")
    told = done.stderr.splitlines()
    assert told[0] == "200 rows of 12 numbers" and told[1].startswith("trained ")
    assert told[2] == "calibrated on 200 held-out rows: --fpr from 0.005 up"
    assert told[3].startswith(f"model: {tmp_path} (") and told[3].endswith(
        f"featdiff score --features FILE -m {tmp_path}"
    )
    same = FeatureDiffusion.from_pretrained(tmp_path)
    assert same.layers == [slice(0, 4), slice(4, 12)] and same.random_state == 3
    scored = featdiff_cli("score", "--features", vectors / "new.npy", "-m", tmp_path)
    assert scored.exit_code == 0
    found = table(scored.stdout)
    assert list(found[0]) == [
        *("path", "status", "reason", "ood_score", "p_value", "is_ood", "layer_0", "layer_1"),
    ]
    assert [row["path"] for row in found] == [f"{vectors / 'new.npy'}[{i}]" for i in range(30)]
    new = np.load(vectors / "new.npy")
    assert np.allclose([float(row["ood_score"]) for row in found], same.ood_score(new), atol=1e-5)
    assert [row["is_ood"] == "true" for row in found] == list(same.predict(new) == -1)
    assert {row["is_ood"] for row in found[20:]} == {"true"}
    flagged = sum(row["is_ood"] == "true" for row in found)
    assert scored.stderr.startswith("30 rows in ") and f"rows/s): {flagged} OOD at fpr 0.05" in scored.stderr


def test_options_of_score(featdiff_cli: Cli, vectors: Path, model: Path, tmp_path: Path) -> None:
    command = ("score", "--features", vectors / "new.npy", "-m", model)
    assert featdiff_cli(*command, "--fail-on-ood").exit_code == 4
    done = featdiff_cli(*command, "--fpr", "0.3", "-o", tmp_path / "rows.jsonl")
    assert (done.exit_code, done.stdout) == (0, "") and "at fpr 0.3" in done.stderr
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(found) == 30 and all(row["is_ood"] == (row["p_value"] <= 0.3) for row in found)
    assert featdiff_cli(*command, "-q").stderr == ""
    shown = featdiff_cli(*command, "--format", "table").stdout.splitlines()
    assert shown[0].split() == ["verdict", "p-value", "score", "path"] and shown[-1].startswith("OOD ")
    fails(featdiff_cli(*command, "--fpr", "0.001"), 2, "--fpr 0.001 needs at least 999")


def test_bad_rows_are_rows_of_the_answer(featdiff_cli: Cli, vectors: Path, model: Path, tmp_path: Path) -> None:
    new = np.load(vectors / "new.npy")
    new[4, 0], new[7, 3] = np.nan, -np.inf
    np.save(tmp_path / "x.npy", new)
    done = featdiff_cli("score", "--features", tmp_path / "x.npy", "-m", model)
    found = table(done.stdout)
    assert done.exit_code == 3 and ", 2 unreadable" in done.stderr
    assert [i for i, row in enumerate(found) if row["status"] == "unreadable"] == [4, 7]
    assert "NaN or infinite" in found[4]["reason"] and found[4]["p_value"] == found[4]["layer_0"] == ""
    whole = table(featdiff_cli("score", "--features", vectors / "new.npy", "-m", model).stdout)
    assert all(found[i]["ood_score"] == whole[i]["ood_score"] for i in range(30) if i not in (4, 7))


def test_bad_rows_and_copies_are_left_out_of_training(featdiff_cli: Cli, vectors: Path, tmp_path: Path) -> None:
    train = np.load(vectors / "train.npy")
    train[2, 0], train[9] = np.inf, train[8]
    np.save(tmp_path / "x.npy", train)
    done = featdiff_cli("train", "--features", tmp_path / "x.npy", "-o", tmp_path / "model")
    assert done.exit_code == 3
    told = done.stderr.splitlines()
    assert told[0] == "198 rows of 12 numbers, 1 duplicate left out, 1 unreadable"
    assert told[-1].startswith(f"  left out: {tmp_path / 'x.npy'}[2]: ") and "NaN" in told[-1]
    assert FeatureDiffusion.from_pretrained(tmp_path / "model").n_rows_ == 198
    np.save(tmp_path / "x.npy", train * np.nan)
    fails(featdiff_cli("train", "--features", tmp_path / "x.npy", "-o", tmp_path / "other"), 2, "x.npy[0]", "none of")
    assert not (tmp_path / "other").exists()


def test_parquet_in_and_out(featdiff_cli: Cli, vectors: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name: str, numbers: np.ndarray, order: list[int]) -> Path:
        names = [f"{i}.jpg" for i in range(len(numbers))]
        columns = {"path": names} | {f"c{i}": numbers[:, i] for i in order}
        parquet.write_table(arrow.table(columns), tmp_path / name)
        return tmp_path / name

    there = list(range(WIDTH))
    train = write("train.parquet", np.load(vectors / "train.npy"), there)
    assert featdiff_cli("train", "--features", train, "-o", tmp_path / "model", "-q").exit_code == 0
    new = write("new.parquet", np.load(vectors / "new.npy"), there)
    answer = tmp_path / "rows.parquet"
    assert featdiff_cli("score", "--features", new, "-m", tmp_path / "model", "-o", answer).exit_code == 0
    found = parquet.read_table(answer)
    assert found["path"].to_pylist() == [f"{i}.jpg" for i in range(30)] and all(found["is_ood"].to_pylist()[20:])
    turned = write("turned.parquet", np.load(vectors / "new.npy"), there[::-1])
    fails(featdiff_cli("score", "--features", turned, "-m", tmp_path / "model"), 2, "'c11'", "'c0'")


def test_named_layers_must_be_the_same(featdiff_cli: Cli, vectors: Path, model: Path, tmp_path: Path) -> None:
    found = table(featdiff_cli("score", "--features", vectors / "new.safetensors", "-m", model).stdout)
    plain = table(featdiff_cli("score", "--features", vectors / "new.npy", "-m", model).stdout)
    assert [row["ood_score"] for row in found] == [row["ood_score"] for row in plain]
    train = torch.from_numpy(np.load(vectors / "train.npy"))
    save_file({"a": train[:, :5].clone(), "c": train[:, 5:].clone()}, tmp_path / "x.safetensors")
    command = ("train", "--features", tmp_path / "x.safetensors", "-o", tmp_path / "model")
    assert featdiff_cli(*command).exit_code == 0
    fails(
        featdiff_cli("score", "--features", vectors / "new.safetensors", "-m", tmp_path / "model"),
        *(2, "a (4), b (8)", "a (5), c (7)"),
    )
    scored = featdiff_cli("score", "--features", tmp_path / "x.safetensors", "-m", tmp_path / "model")
    assert scored.stdout.splitlines()[0].endswith("layer_a,layer_c")
    fails(featdiff_cli(*command), 2, "a model is already at", "--force")


def test_info(featdiff_cli: Cli, model: Path) -> None:
    told = {line.split()[0]: line for line in featdiff_cli("info", model).stdout.splitlines()}
    assert "rows of 12 numbers" in told["vectors"] and "0 (12)" in told["layers"] and "none" in told["neighbours"]
    assert "200 different rows" in told["trained"] and "200 held-out rows; fpr 0.05" in told["calibrated"]
    assert json.loads(featdiff_cli("info", model, "--json").stdout)["mode"] == "vectors"


def test_models_of_images_and_of_vectors_are_not_mixed_up(
    featdiff_cli: Cli, vectors: Path, model: Path, tiny_model: Path, few_images: Path
) -> None:
    fails(featdiff_cli("score", few_images, "-m", model), 1, "trained on vectors", "--features: ")
    fails(featdiff_cli("eval", "--id", few_images, "--ood", f"x={few_images}", "-m", model), 1, "trained on vectors")
    fails(featdiff_cli("score", "--features", vectors / "new.npy", "-m", tiny_model), 1, "trained on images")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["photos/"], ["IMAGES"]),
        (["--backbone", "resnet50", "--weights", "x"], ["--backbone, --weights"]),
        (["--view", "crop", "--size", "96"], ["--view, --size"]),
        (["--mode", "pixel"], ["--mode"]),
        (["--config", "lmd_small"], ["--config"]),
        (["--no-pretrained"], ["--no-pretrained"]),
        (["--device", "cpu", "--cache", "x"], ["--cache, --device"]),
        (["--layers", "layer1,layer2"], ["like 0:192,192:320"]),
        (["--layers", "0:4,3:5"], ["share columns"]),
        (["--layers", "0:40"], ["columns 0:12"]),
        (["--fpr", "0.001"], ["fpr 0.001 needs about 4,995"]),
        (["--fpr", "2"], ["false-alarm rate"]),
        (["--seed", "-1"], ["seed"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_options_that_make_no_sense(
    featdiff_cli: Cli, vectors: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    result = featdiff_cli("train", "--features", vectors / "train.npy", "-o", tmp_path / "model", *options)
    fails(result, 2, *words)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("options", [["a.png"], ["--figure", "x.png"], ["--weights", "x"], ["--workers", "2"]], ids=str)
def test_score_refuses_what_is_for_images(
    featdiff_cli: Cli, vectors: Path, model: Path, tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "rows.csv").write_text("yesterday's rows")
    command = ("score", "--features", vectors / "new.npy", "-m", model, "-o", tmp_path / "rows.csv")
    fails(featdiff_cli(*command, *options), 2, "--features", "IMAGES" if options == ["a.png"] else options[0])
    assert (tmp_path / "rows.csv").read_text() == "yesterday's rows"


def test_files_that_do_not_fit(featdiff_cli: Cli, vectors: Path, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((3, 13)))
    fails(featdiff_cli("score", "--features", tmp_path / "wide.npy", "-m", model), 2, "13 columns", "12", "train again")
    fails(featdiff_cli("score", "--features", tmp_path / "gone.npy", "-m", model), 2, "gone.npy: no such file")
    fails(featdiff_cli("score", "--features", vectors / "new.npy", "-m", tmp_path / "gone"), 1, "no featdiff model")
    fails(featdiff_cli("train", "--features", tmp_path, "-o", tmp_path / "model"), 2, "end in .npy")
