"""``featdiff harden``, and what score and eval make of its folder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from fake_hub import READER, WRITER, serving_hub
from helpers import FEATDIFF, copy_labelled, fails
from PIL import Image
from stable_pipelines import NOISE, write_pipeline
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from featdiff.hardening.harden import load_hardened
from featdiff.hardening.students import training_facts
from featdiff.outliers.outlier_file import load_outliers

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def folders(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``train``: 60 tiles of each photograph; ``test``: 20 of each; ``digits``: 20."""
    root = tmp_path_factory.mktemp("labelled")
    copy_labelled(sample_folders, root, train=60)
    return {name: root / name for name in ("train", "test", "digits")}


@pytest.fixture(scope="module")
def hardened(folders: dict[str, Path], seeded_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes; do not change it."""
    from importlib.metadata import entry_points

    from click.testing import CliRunner

    (script,) = entry_points(group="console_scripts", name="featdiff")
    output = tmp_path_factory.mktemp("out") / "hardened"
    options = ["--epochs", "2", "--train-batch", "16", "--fpr", "0.1", "--weights", str(seeded_backbone)]
    command = ["harden", str(folders["train"]), "--student", "test_resnet", *options, "-o", str(output)]
    done = CliRunner().invoke(script.load(), command, prog_name="featdiff")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "94 images of 2 classes trained test_resnet.r160_in1k"
    assert lines[1].startswith("2 epochs, ") and lines[1].endswith(
        "right of the 6 held-out images that chose among epochs"
    )
    assert lines[2].startswith("self-check: flags ")
    assert lines[3] == f"student and guard: {output}. Next: featdiff score IMAGES -m {output}"
    return output


def test_curves_of_the_student_and_of_its_guard(
    folders: dict[str, Path], seeded_backbone: Path, tmp_path: Path, featdiff_cli: Cli
) -> None:
    """In TensorBoard, and as records of the log: of the student each loss, of the guard what train gives."""
    options = ["--epochs", 2, "--train-batch", 16, "--weights", seeded_backbone, "--layers", "layer4", "--seed", 78]
    command = ["harden", folders["train"], "--student", "test_resnet", *options, "-o", tmp_path / "h", "-q"]
    done = featdiff_cli(*command, "--log-to", f"tensorboard:{tmp_path / 'runs'}", "--log-file", tmp_path / "run.log")
    assert done.exit_code == 0, done.output

    events = EventAccumulator(str(tmp_path / "runs"), size_guidance={"scalars": 0}).Reload()
    first = {tag.partition("/")[2] for tag in events.Tags()["scalars"] if tag.startswith("training-1/")}
    assert first == {"loss", "loss_labels", "accuracy", "lr", "epoch"}
    assert [event.step for event in events.Scalars("training-1/loss")] == list(range(1, 11))
    assert [event.step for event in events.Scalars("training-1/accuracy")] == [5, 10]
    assert events.Scalars("training-1/epoch")[-1].value == 2
    history = training_facts(str(tmp_path / "h"))["epochs"]
    by_epoch = [event.value for event in events.Scalars("training-1/accuracy")]
    assert by_epoch == pytest.approx([epoch["accuracy"] for epoch in history])
    losses = [event.value for event in events.Scalars("training-1/loss_labels")]
    means = [sum(losses[:5]) / 5, sum(losses[5:]) / 5]
    assert means == pytest.approx([epoch["labels"] for epoch in history], rel=1e-4)
    assert "training-2/val_loss" in events.Tags()["scalars"]

    records = [json.loads(line) for line in (tmp_path / "run.log").read_text().splitlines()]
    student = [record for record in records if record["logger"] == "featdiff.hardening.run"]
    assert [(record["step"], record["accuracy"]) for record in student if record["level"] == "info"] == [
        (step, pytest.approx(value)) for step, value in zip((5, 10), by_epoch, strict=True)
    ]


def test_score_takes_the_folder(hardened: Path, folders: dict[str, Path], featdiff_cli: Cli) -> None:
    done = featdiff_cli("score", folders["digits"], "-m", hardened, "--format", "jsonl", "-q")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 20 and all(row["ood_score"] > 0 for row in rows)


def test_eval_prints_accuracy_and_energy_of_several_students(
    hardened: Path, folders: dict[str, Path], tiny_model: Path, featdiff_cli: Cli
) -> None:
    sets = ["--id", folders["test"], "--ood", f"digits={folders['digits']}", "--protocol", "matched"]
    done = featdiff_cli("eval", *sets, "-m", hardened, "-m", tiny_model, "--json", "-q")
    assert done.exit_code == 0, done.output
    first, second = json.loads(done.stdout)
    assert first["folder"] == str(hardened) and first["accuracy"] >= 0.9
    assert "accuracy" not in second
    heads = first["pairs"][0]["heads"]
    assert {"featdiff", "energy", "neighbors"} <= set(heads)
    table = featdiff_cli("eval", *sets, "-m", hardened, "-q")
    assert f"accuracy of the classifier: {100 * first['accuracy']:.1f} %" in " ".join(table.stdout.split())


def test_eval_without_class_folders_has_no_accuracy(
    hardened: Path, folders: dict[str, Path], featdiff_cli: Cli
) -> None:
    sets = ["--id", folders["test"] / "china", "--ood", f"digits={folders['digits']}", "--protocol", "matched"]
    done = featdiff_cli("eval", *sets, "-m", hardened, "--json", "-q")
    assert json.loads(done.stdout)["accuracy"] is None
    told = featdiff_cli("eval", *sets, "-m", hardened)
    assert "no accuracy: " in told.stderr and "lies in no class folder" in told.stderr


def test_weights_are_not_for_a_student(hardened: Path, folders: dict[str, Path], featdiff_cli: Cli) -> None:
    done = featdiff_cli("score", folders["test"], "-m", hardened, "--weights", hardened / "student/model.safetensors")
    fails(done, 2, "--weights belong to a model on a backbone")


def test_info_and_export_take_the_folder(hardened: Path, tmp_path: Path, featdiff_cli: Cli) -> None:
    shown = featdiff_cli("info", hardened)
    assert shown.exit_code == 0 and "20 held-out images; fpr 0.1" in shown.stdout
    done = featdiff_cli("export", "-m", hardened, "--format", "pt2", "-o", tmp_path / "files")
    assert done.exit_code == 0, done.output
    assert "ood_score (B,), p_value (B,), logits (B, 2)" in done.stderr
    classifier, _ = load_hardened(hardened)
    pixels = torch.rand(3, 3, 160, 160)
    logits = torch.export.load(tmp_path / "files" / "model.pt2").module()(pixels)[2]
    assert torch.allclose(logits, classifier.model(pixels), atol=1e-5)


def test_explain_takes_the_folder_and_paths_can_be_left_out(
    hardened: Path, folders: dict[str, Path], seeded_backbone: Path, tmp_path: Path, featdiff_cli: Cli
) -> None:
    image = sorted(folders["digits"].iterdir())[0]
    done = featdiff_cli("explain", image, "-m", hardened, "-o", tmp_path / "why")
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "why" / f"{image.stem}-explained.json").read_text(encoding="utf-8"))
    assert all(Path(other["path"]).is_relative_to(folders["train"]) for other in facts["nearest"])
    assert "energy" in {head["name"] for head in facts["heads"]}

    options = ["--epochs", "2", "--train-batch", "16", "--fpr", "0.1", "--weights", seeded_backbone, "--no-paths"]
    command = ["harden", folders["train"], "--student", "test_resnet", *options, "-o", tmp_path / "private"]
    assert featdiff_cli(*command).exit_code == 0
    assert "no paths and no pictures" in featdiff_cli("info", tmp_path / "private").stdout
    stored = (tmp_path / "private" / "guard" / "model.safetensors").read_bytes()
    assert str(folders["train"]).encode() not in stored


def test_outliers_of_stable_diffusion_in_the_students_features(
    hardened: Path, folders: dict[str, Path], tmp_path: Path, featdiff_cli: Cli
) -> None:
    """From the guard's pre-logits to latents in the file, and from there into the bound."""
    from diffusers import DDIMScheduler

    pipeline = write_pipeline(tmp_path / "sd", 96, "!", DDIMScheduler(**NOISE, clip_sample=False), attention_head_dim=2)
    file = tmp_path / "latents.safetensors"
    made = ["outliers", folders["train"], "-m", hardened, "-n", 4, "-o", file, "--method", "stable-diffusion"]
    done = featdiff_cli(*made, "--pipeline", pipeline, "--steps", 2, "--device", "cpu")
    assert done.exit_code == 0, done.output
    found = load_outliers(file)
    assert found.classes == ["china", "flower"] and found.vectors.shape[0] == 4
    assert found.latents is not None and found.latents.shape == (4, 4, 8, 8)
    assert len({tuple(latent.flatten().tolist()) for latent in found.latents}) == 4
    assert (tmp_path / "latents.png").read_bytes().startswith(b"\x89PNG")
    narrow = write_pipeline(tmp_path / "sd2", 32, "!", DDIMScheduler(**NOISE, clip_sample=False), attention_head_dim=2)
    fails(featdiff_cli(*made, "--force", "--pipeline", narrow), 2, "have 96 numbers", "takes 32")
    fails(featdiff_cli(*made, "--force", "--pipeline", tmp_path / "no"), 1, "Stable Diffusion", "the method diffusion")


def test_the_hub_and_back(hardened: Path, folders: dict[str, Path], tmp_path: Path, featdiff_cli: Cli) -> None:
    """Pushed whole but for the list of what was left out; by its name it gives the rows of the folder."""
    line = ["score", folders["digits"], "--format", "jsonl", "-q", "-m"]
    expected = featdiff_cli(*line, hardened).stdout
    shown = featdiff_cli("push", hardened, "org/hard", "--dry-run", "-q").stdout

    with serving_hub() as hub:

        def typed(*arguments: object, token: str) -> subprocess.CompletedProcess[str]:
            environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": token}
            command = [FEATDIFF, *map(str, arguments)]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

        pushed = typed("push", hardened, "org/hard", "--private", token=WRITER)
        assert pushed.returncode == 0, pushed.stderr
        assert "hold paths of training images" in pushed.stderr
        repository = hub.repositories["org/hard"]
        files = repository.commits[repository.branches["main"]]
        scored = typed(*line, "org/hard@main", "-o", tmp_path / "rows.jsonl", token=READER)
        assert scored.returncode == 0, scored.stderr
        known = typed("info", "org/hard", "--json", token=READER)
        assert json.loads(known.stdout) == json.loads((hardened / "guard" / "config.json").read_text())
        site = typed("recalibrate", "org/hard", folders["test"], "-o", tmp_path / "site", token=READER)
        assert site.returncode == 0, site.stderr
        assert json.loads((tmp_path / "site" / "guard" / "config.json").read_text())["images"]["calibration"] == 40

    pairs = {f"{part}/{file}" for part in ("student", "guard") for file in ("config.json", "model.safetensors")}
    assert set(files) == {".gitattributes", "README.md", *pairs}
    assert all(files[name] == (hardened / name).read_bytes() for name in pairs)
    rows = [json.loads(row) for row in (tmp_path / "rows.jsonl").read_text().splitlines()]
    wanted = [json.loads(row) for row in expected.splitlines()]
    assert [row["path"] for row in rows] == [row["path"] for row in wanted]
    assert [row["ood_score"] for row in rows] == pytest.approx([row["ood_score"] for row in wanted], abs=1e-4)

    card = files["README.md"].decode()
    assert card.strip() == shown.strip()
    accuracy = training_facts(str(hardened))["accuracy"]
    for words in (
        "| classifier | test_resnet.r160_in1k, in `student/` |",
        "| classes | 2: china, flower |",
        f"| classifier trained on | 94 images; {accuracy:.1%} right of the 6 that chose among epochs |",
        'load_hardened("org/hard")',
        "featdiff score IMAGES -m org/hard",
        "It guards a classifier, which names classes.",
    ):
        assert words in card
    assert "base_model" not in card


def test_its_guard_is_recalibrated(hardened: Path, folders: dict[str, Path], tmp_path: Path, featdiff_cli: Cli) -> None:
    site = tmp_path / "site"
    given = ("recalibrate", hardened, folders["test"], "--groups", "none", "--fpr", "0.2", "-o")
    fails(featdiff_cli(*given, hardened, "--force"), 2, "--output", "is the old model, which is kept")
    done = featdiff_cli(*given, site)
    assert done.exit_code == 0, done.stderr
    assert "40 images; fpr 0.2" in done.stderr
    for file in ("config.json", "model.safetensors"):
        assert (site / "student" / file).read_bytes() == (hardened / "student" / file).read_bytes()

    old, new = (load_hardened(folder)[1].detector for folder in (hardened, site))
    scores = old.score(folders["test"]).ood_score
    assert np.allclose(new.score(folders["test"]).ood_score, scores, atol=1e-5)
    assert np.allclose(new.calibration_.scores, np.sort(scores), atol=1e-4)
    assert new.fpr == 0.2 and new.recalibrations_[0]["old_images"] == len(old.calibration_)
    scored = featdiff_cli("score", folders["test"], "-m", site, "--format", "jsonl", "-q")
    flags = [json.loads(row)["is_ood"] for row in scored.stdout.splitlines()]
    assert len(flags) == 40 and 6 <= sum(flags) <= 8

    fails(featdiff_cli(*given, site), 2, "a hardened student is already at", "--force")
    assert featdiff_cli(*given, site, "--force").exit_code == 0


def test_the_code_of_the_card_runs(hardened: Path, folders: dict[str, Path], featdiff_cli: Cli) -> None:
    card = featdiff_cli("push", hardened, "org/hard", "--dry-run", "-q").stdout
    code = card.partition("```python\n")[2].partition("```")[0].replace("org/hard", str(hardened))
    classifier, _ = load_hardened(hardened)
    files = sorted(folders["digits"].rglob("*.png"))[:2]
    images = torch.stack([classifier.transform(Image.open(file).convert("RGB")) for file in files])
    found: dict[str, Any] = {"images": images}
    exec(code, found)
    assert found["logits"].shape == (2, 2)
    scores = [json.loads(row)["ood_score"] for row in _rows(featdiff_cli, folders["digits"], hardened)[:2]]
    assert found["verdict"].ood_score.tolist() == pytest.approx(scores, abs=1e-3)


def _rows(featdiff_cli: Cli, folder: Path, model: Path) -> list[str]:
    return featdiff_cli("score", folder, "-m", model, "--format", "jsonl", "-q").stdout.splitlines()


def test_an_older_student_is_not_replaced_unasked(
    hardened: Path, folders: dict[str, Path], tmp_path: Path, featdiff_cli: Cli
) -> None:
    done = featdiff_cli("harden", folders["train"], "--student", "test_resnet", "-o", hardened)
    fails(done, 2, "already", "--force")
    done = featdiff_cli("harden", folders["train"], "--student", "test_resnet", "-o", hardened / "left_out.csv")
    fails(done, 2, "is a file: name a folder")
    (tmp_path / "left_out.csv").write_text("mine")
    done = featdiff_cli("harden", folders["train"], "--student", "test_resnet", "-o", tmp_path)
    fails(done, 2, "has a left_out.csv that featdiff did not write")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kd", 2], ["--teacher"]),
        (["--micl", 0.2], ["--outliers", "featdiff outliers"]),
        (["--margin", 3], ["--margin belongs to energy"]),
        (["--teacher", "resnet18", "--kd", 0, "--feature-kd", 0], ["the teacher has no effect: drop it"]),
        (["--teacher", "resnet18", "--kd", 0, "--temperature", 2], ["--temperature belongs to distillation"]),
        (["--outliers", "o.safetensors", "--micl", 0], ["drop one of them"]),
        (["--as-published"], ["needs a --teacher and --outliers"]),
        (["--layers", "layer9"], ["unknown layer 'layer9'"]),
        (["--student", "no/such"], ["there is no folder no/such"]),
        (["--epochs", 0], ["epochs must be above 0"]),
        (["--outliers", "nowhere.safetensors"], ["nowhere.safetensors", "featdiff outliers"]),
        (["--teacher", "resnet5O"], ["unknown backbone 'resnet5O'"]),
        (["--train-from", "layer9"], ["no layer 'layer9'", "layer4"]),
    ],
)
def test_requests_that_make_no_sense(
    options: list[object],
    words: list[str],
    folders: dict[str, Path],
    seeded_backbone: Path,
    tmp_path: Path,
    featdiff_cli: Cli,
) -> None:
    command = ["harden", folders["train"], "--student", "test_resnet", "--weights", seeded_backbone]
    done = featdiff_cli(*command, "-o", tmp_path / "out", *options)
    assert done.exit_code in (1, 2)
    fails(done, done.exit_code, *words)
    assert not (tmp_path / "out").exists()
