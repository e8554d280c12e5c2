"""From class folders to a student and its guard: the loop, the main path, and what is refused."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from model_mutations import reseal
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featdiff.data.batches import load
from featdiff.data.labels import list_labelled
from featdiff.detectors.run_config import Runtime
from featdiff.exceptions import FeatdiffError, UsageError, WeightsError
from featdiff.features.backbones import load_backbone
from featdiff.features.layout import PRE_LOGITS, FeatureLayout, Kind
from featdiff.features.networks import fingerprint
from featdiff.hardening import dataset
from featdiff.hardening import harden as harden_module
from featdiff.hardening import training as learning
from featdiff.hardening.dataset import DatasetBuilder
from featdiff.hardening.frozen import split_at
from featdiff.hardening.harden import Hardened, harden, load_hardened, outlier_facts
from featdiff.hardening.layout import is_hardened
from featdiff.hardening.objective import Objective, TrainingBatch
from featdiff.hardening.reading import Reader
from featdiff.hardening.recipe import HardenRecipe
from featdiff.hardening.students import check_head, load_classifier, new_classifier
from featdiff.hardening.teachers import Teacher, load_teacher
from featdiff.hardening.training import LearningState, learn, start
from featdiff.outliers.outlier_file import Outliers
from featdiff.outliers.synthesis import self_check, synthesise
from featdiff.runtime import checkpoints, threads

SHORT = HardenRecipe(epochs=2, batch_size=32)
GUARD: dict[str, Any] = {"guard": {"recipe": {"epochs": 2, "min_steps": 20, "batch_size": 64}}}
FAST: dict[str, Any] = {"student": "test_resnet", "recipe": SHORT, **GUARD}


@pytest.fixture(scope="module")
def classes(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``china`` and ``flower``: 100 tiles of each photograph."""
    root = tmp_path_factory.mktemp("classes")
    for name in ("china", "flower"):
        (root / name).mkdir()
        for file in sorted(sample_folders["train"].glob(f"{name}*"))[:100]:
            shutil.copy(file, root / name)
    return root


@pytest.fixture(scope="module")
def plain(classes: Path, seeded_backbone: Path) -> Hardened:
    """A student without teacher and outliers; do not change it."""
    return harden(classes, weights=seeded_backbone, **FAST)


@pytest.fixture(scope="module")
def saved(plain: Hardened, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hardened") / "plain"
    plain.save_pretrained(folder)
    return folder


def outliers(width: int = 96, latents: Tensor | None = None) -> Outliers:
    vectors = torch.randn(40, 8 + width, generator=torch.Generator().manual_seed(0))
    layout = FeatureLayout.of({("layer4", Kind.MEAN): 8, (PRE_LOGITS, Kind.PRE_LOGITS): width})
    labels = torch.arange(40) % 2
    return Outliers(vectors, labels, ["china", "flower"], layout, "boundary", "0" * 64, ["layer4"], latents)


# ---- the loop, on vectors ----


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), nn.Linear(6, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        return self.head


X = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def held_out() -> list[tuple[Tensor, Tensor]]:
    return [(X[100:115], Y[100:115]), (X[115:], Y[115:])]


def make_batch(positions: np.ndarray, rng: np.random.Generator) -> TrainingBatch:
    outliers = torch.from_numpy(rng.normal(size=(len(positions), 3))).float()
    return TrainingBatch(X[positions], Y[positions], outliers=(outliers,))


def fresh(recipe: HardenRecipe) -> LearningState:
    torch.manual_seed(1)
    return start(Objective(Answering(), 6, recipe, 0, (3,)), recipe)


def run(state: LearningState, recipe: HardenRecipe, **more: Any) -> list[learning.LearningStep]:
    return [*learn(state, make_batch, 100, held_out, recipe, 0, **more)]


def test_it_learns_and_counts() -> None:
    recipe = HardenRecipe(epochs=8, batch_size=16, learning_rate=0.1, patience=8)
    state = fresh(recipe)
    steps = run(state, recipe)
    assert [step.step for step in steps] == [*range(1, 49)] and {step.steps for step in steps} == {48}  # 6 full batches
    assert [step.step for step in steps if step.accuracy is not None] == [6, 12, 18, 24, 30, 36, 42, 48]
    assert state.done and state.best_accuracy >= 0.9
    assert state.best_accuracy == max(epoch["accuracy"] for epoch in state.history)
    assert state.history[-1]["labels"] < 0.5 * state.history[0]["labels"]


def test_the_best_epoch_is_kept() -> None:
    recipe = HardenRecipe(epochs=6, batch_size=20, learning_rate=0.1)
    state = fresh(recipe)
    run(state, recipe)
    found = learning.held_out_accuracy(state.objective, held_out())
    assert found == pytest.approx(state.best_accuracy)


def test_a_stopped_run_goes_the_same_way() -> None:
    recipe = HardenRecipe(epochs=4, batch_size=20, energy=0.0)
    whole = fresh(recipe)
    run(whole, recipe)
    first = fresh(recipe)
    for step in learn(first, make_batch, 100, held_out, recipe, 0):
        if step.step == 10:  # the end of the second epoch
            break
    kept = copy.deepcopy(first.state_dict())
    second = fresh(recipe)
    second.load_state_dict(kept)
    assert second.epoch == 2
    steps = run(second, recipe)
    assert steps[0].step == 11
    for name, value in whole.best.items():
        assert torch.equal(value, second.best[name]), name
    assert whole.history == second.history


def test_dropout_follows_from_the_seed_alone() -> None:
    recipe = HardenRecipe(epochs=2, batch_size=20)
    found = []
    for chance in (1, 2):
        state = fresh(recipe)
        state.network.body.append(nn.Dropout(0.5))  # type: ignore[operator, union-attr]
        torch.manual_seed(chance)
        run(state, recipe)
        assert torch.initial_seed() == chance  # the caller's source of chance is left alone
        found.append(state)
    assert found[0].history == found[1].history


def test_as_published_the_networks_of_the_bound_learn_by_sgd() -> None:
    recipe = HardenRecipe.as_published()
    objective = Objective(Answering(), 6, recipe, 0, (3, 5))
    state = start(objective, recipe)
    assert state.club_optimizer is None and len(state.optimizer.param_groups) == 2
    assert [type(layer).__name__ for layer in objective.clubs[1].mean].count("Linear") == 4
    widths = [layer.in_features for layer in objective.clubs[1].mean if isinstance(layer, nn.Linear)]
    assert widths == [5, 32, 16, 256]
    more = {"batch_size": 20, "epochs": 1, "patience": 1}
    short = HardenRecipe(**{**vars(recipe), **more})
    own = fresh(short)
    before = copy.deepcopy(own.objective.clubs.state_dict())
    steps = run(own, short)
    rates = [group["lr"] for group in own.optimizer.param_groups]
    assert rates[1] / rates[0] == pytest.approx(1e-4 / 0.025)
    taught = start(Objective(Answering(), 6, recipe, 7, (3, 5)), recipe).optimizer.param_groups
    found = [recipe.learning_rate * group["factor"] for group in taught]
    assert found == pytest.approx([0.005, 0.01, 1e-4])  # as published: student, projection, networks of the bound
    assert "micl_likelihood" not in steps[0].losses
    assert any(not torch.equal(before[name], value) for name, value in own.objective.clubs.state_dict().items())


def test_the_rate_changes_whatever_prepares_the_optimizer() -> None:
    """Accelerate replaces the groups of an optimizer that it places on a device."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = HardenRecipe(batch_size=20, epochs=2)
    state = fresh(recipe)
    rates = []
    accelerator = Accelerator(cpu=True, device_placement=True)
    for _ in learn(state, make_batch, 100, held_out, recipe, 0, accelerator=accelerator):
        rates.append(state.optimizer.param_groups[0]["lr"])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert rates == pytest.approx([0.02 * learning._rate(i, 10, 0.1) for i in range(10)])


def test_without_warm_up_the_first_rate_is_the_highest() -> None:
    assert learning._rate(0, 100, 0.0) == 1.0 and learning._rate(0, 100, 0.1) == pytest.approx(1 / 11)
    assert learning._rate(10, 100, 0.1) == 1.0 and learning._rate(99, 100, 0.1) < 0.001


def test_it_ends_early() -> None:
    recipe = HardenRecipe(epochs=50, batch_size=20, patience=2, learning_rate=1e-12)
    state = fresh(recipe)
    run(state, recipe)
    assert state.epoch < 10 and state.done


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    recipe = HardenRecipe(epochs=2, batch_size=20)

    def broken(positions: np.ndarray, rng: np.random.Generator) -> TrainingBatch:
        outliers = torch.zeros(len(positions), 3)
        return TrainingBatch(X[positions] * float("nan"), Y[positions], outliers=(outliers,))

    before = threading.active_count()
    with pytest.raises(FeatdiffError, match="diverged at step 1 .*lower the learning rate"):
        [*learn(fresh(recipe), broken, 100, held_out, recipe, 0)]
    assert threading.active_count() == before  # the thread that made the next batch has ended


def test_an_error_in_a_batch_reaches_the_caller() -> None:
    recipe, drawn = HardenRecipe(epochs=2, batch_size=20), []

    def broken(positions: np.ndarray, rng: np.random.Generator) -> TrainingBatch:
        drawn.append(len(positions))
        if len(drawn) == 3:
            raise FeatdiffError("an image has gone")
        return make_batch(positions, rng)

    steps: list[int] = []
    with pytest.raises(FeatdiffError, match="an image has gone"):
        steps.extend(step.step for step in learn(fresh(recipe), broken, 100, held_out, recipe, 0))
    assert steps == [1, 2] and len(drawn) == 3


def test_prefetched_batches_are_those_made_in_place() -> None:
    positions = [np.arange(4), np.arange(3), np.arange(5)]
    with ThreadPoolExecutor(1) as thread:
        prefetched, in_place = (
            [*learning._prefetched(make_batch, positions, np.random.default_rng(0), how)] for how in (thread, None)
        )
    for (batch, seed), (other, again) in zip(prefetched, in_place, strict=True):
        assert seed == again and torch.equal(batch.outliers[0], other.outliers[0])


def test_fewer_rows_than_a_batch() -> None:
    recipe = HardenRecipe(batch_size=101)
    with pytest.raises(UsageError, match="100 training images do not fill a batch of 101"):
        run(fresh(recipe), recipe)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"learning_rate": 0},
        {"micl": -1},
        {"energy": float("nan")},
        {"batch_size": 1},
        {"warm_up": 1.5},
    ],
)
def test_recipes_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        HardenRecipe(**wrong)


# ---- the main path ----


def test_student_and_guard(plain: Hardened, classes: Path) -> None:
    facts = plain.facts
    assert plain.classifier.classes == ("china", "flower")
    assert facts["train_from"] == "layer3" and facts["teacher"] is None
    assert facts["images"] == {"training": 150, "validation": 10}
    assert facts["accuracy"] >= 0.9 and len(facts["epochs"]) == 2
    assert len(plain.guard.detector.calibration_) == 40  # a fifth, for 0.05
    images = torch.rand(3, 3, 160, 160)
    logits, verdict = plain.guard(images)
    assert torch.equal(logits, plain.classifier.model(images))
    assert verdict is not None and verdict.ood_score.shape == (3,)


def test_the_guards_calibration_images_trained_nothing(
    classes: Path, seeded_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    train = harden_module.train_student

    def watched(networks: Any, batches: Any, split: Any, *rest: Any) -> LearningState:
        seen["split"] = split
        return train(networks, batches, split, *rest)

    monkeypatch.setattr(harden_module, "train_student", watched)
    found = harden(classes, weights=seeded_backbone, **FAST)
    digests = [load(ref, found.classifier.transform).digest for ref in list_labelled(classes)[0]]
    split, held_out = seen["split"], found.guard.detector.calibration_digests_
    assert len(held_out) == 40 and not set(split.calibration) & set(split.training)
    assert [digests[i] for i in split.calibration] == held_out  # the same split for student and guard
    kept = found.guard.detector.feature_store().table(held_out)
    mine = found.guard.detector.score_features(kept[np.arange(40)])
    assert np.array_equal(np.sort(mine), found.guard.detector.calibration_.scores)


def test_a_second_run_finds_everything_in_the_cache(plain: Hardened, classes: Path, seeded_backbone: Path) -> None:
    stages: list[str] = []
    again = harden(classes, weights=seeded_backbone, progress=lambda stage, *_: stages.append(stage), **FAST)
    assert "training" not in stages
    assert again.facts == plain.facts
    for name, value in plain.classifier.model.state_dict().items():
        assert torch.equal(value, again.classifier.model.state_dict()[name]), name


def test_a_stopped_run_goes_on_where_it_was(
    plain: Hardened, classes: Path, seeded_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", -1)
    own = {"weights": seeded_backbone, "cache": tmp_path, **FAST}

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("training", 6):  # in the second epoch of 4 steps
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harden(classes, **own, progress=stop)
    steps: list[int] = []
    found = harden(classes, **own, progress=lambda stage, done, total: steps.append(done) if total == 8 else None)
    assert steps == [5, 6, 7, 8]
    assert found.facts["epochs"] == plain.facts["epochs"]
    for name, value in plain.classifier.model.state_dict().items():
        assert torch.equal(value, found.classifier.model.state_dict()[name]), name


def test_a_small_student_trains_on_one_thread_whatever_the_program_uses(
    classes: Path, seeded_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "WORK_PER_SPINNING_THREAD", 10**12)  # then this one is small
    monkeypatch.setattr(threads, "threads_sleep", lambda: False)
    used: set[int] = set()

    def watch(stage: str, done: int, total: int) -> None:
        if (stage, total) == ("training", 8):  # the student's; its guard's are more
            used.add(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        harden(classes, weights=seeded_backbone, cache=tmp_path, progress=watch, **FAST)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert used == {1}


def test_bf16_training_is_near_full_precision(plain: Hardened, classes: Path, seeded_backbone: Path) -> None:
    half = harden(classes, weights=seeded_backbone, mixed_precision="bf16", **FAST)
    assert half.facts["accuracy"] >= 0.9
    one, other = (found.classifier.model.state_dict()["fc.weight"].flatten() for found in (plain, half))
    assert not torch.equal(one, other) and torch.cosine_similarity(one, other, 0) > 0.99


def test_only_the_layers_behind_the_cut_are_trained(plain: Hardened, seeded_backbone: Path) -> None:
    before = timm.create_model("test_resnet", num_classes=2)
    before.load_state_dict(_weights(seeded_backbone), strict=False)
    after = plain.classifier.model.state_dict()
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, after[name])}
    assert moved and all(name.startswith(("layer4", "fc")) for name in moved)


def _weights(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value for name, value in load_file(file).items() if not name.startswith("fc.")}


def test_saved_and_loaded(plain: Hardened, saved: Path) -> None:
    images = torch.rand(2, 3, 160, 160)
    wanted, verdict = plain.guard(images)
    assert is_hardened(saved) and not is_hardened(saved / "student")
    by_timm = timm.create_model(f"local-dir:{saved / 'student'}", pretrained=True).eval()
    assert torch.equal(by_timm(images), wanted)
    classifier, guard = load_hardened(saved)
    logits, found = guard(images)
    assert torch.equal(logits, wanted) and classifier.classes == ("china", "flower")
    assert verdict is not None and found is not None
    assert torch.allclose(found.ood_score, verdict.ood_score, atol=1e-5)
    facts = json.loads((saved / "student" / "config.json").read_text())["featdiff"]
    assert facts == json.loads(json.dumps(plain.facts))


def test_whoever_taught_has_not_seen_what_calibrates(plain: Hardened, classes: Path, seeded_backbone: Path) -> None:
    """The seed does not move an image from calibration to training."""
    other = harden(classes, weights=seeded_backbone, seed=7, **FAST)
    held_out = plain.guard.detector.calibration_digests_
    assert other.guard.detector.calibration_digests_ == held_out and plain.facts["held_out"] == 0.25


def test_a_teacher_that_saw_what_must_calibrate(classes: Path, saved: Path, seeded_backbone: Path) -> None:
    wanted = "was trained on all but 25.0% of its images, and 35.0% must be held back here"
    with pytest.raises(UsageError, match=wanted):
        harden(classes, teacher=str(saved), weights=seeded_backbone, calibration=0.3, **FAST)
    with pytest.raises(UsageError, match=wanted):
        harden(classes, str(saved), calibration=0.3, recipe=SHORT)


def test_outliers_of_a_guard_have_the_logits_of_their_pre_logits(plain: Hardened, classes: Path) -> None:
    detector = plain.guard.detector
    for method in ("diffusion", "boundary"):
        made = synthesise(detector, classes, 20, method).outliers
        last = plain.classifier.model.get_classifier()  # type: ignore[operator]
        pre_logits, logits = made.layout.pre_logits, made.layout.logits
        assert pre_logits is not None and logits is not None
        wanted = last(made.vectors[:, pre_logits.columns])
        assert torch.allclose(made.vectors[:, logits.columns], wanted, atol=1e-4)
    assert 0 <= self_check(detector) <= 1


def test_all_losses_with_a_teacher_and_outliers(classes: Path, saved: Path, seeded_backbone: Path) -> None:
    recipe = HardenRecipe(epochs=1, batch_size=32, energy=0.1)
    latents = torch.randn(40, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    given = outliers(latents=latents)
    found = harden(classes, "test_resnet", str(saved), given, weights=seeded_backbone, recipe=recipe, **GUARD)
    (epoch,) = found.facts["epochs"]
    assert {"labels", "distillation", "feature_distillation", "micl", "micl_2", "energy", "accuracy"} <= set(epoch)
    assert all(np.isfinite(value) for value in epoch.values())
    assert found.facts["outliers"]["n"] == 40 and found.facts["teacher"] == "plain (test_resnet.r160_in1k)"
    assert found.facts["teacher_weights"] == fingerprint(load_classifier(saved / "student").model)


def test_a_teacher_keeps_the_student_close(classes: Path, saved: Path, plain: Hardened, seeded_backbone: Path) -> None:
    """With nearly all weight on it, the student's logits rank images as the teacher's do, labels or not."""
    recipe = HardenRecipe(3, 32, learning_rate=2.0, distillation=100.0, feature_distillation=0.0)
    found = harden(classes, "test_resnet", str(saved), weights=seeded_backbone, recipe=recipe, **GUARD)
    epochs = found.facts["epochs"]
    assert epochs[-1]["distillation"] < 0.2 * epochs[0]["distillation"]


def test_a_backbone_as_teacher_learns_the_classes_first() -> None:
    backbone = load_backbone("test_resnet", pretrained=False)
    teacher = Teacher(backbone, backbone.tag, backbone.model.num_features)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(60, teacher.width, generator=rng)
    labels = (rows[:, 0] > 0).long().numpy()
    teacher.fit_head(rows[:40], labels[:40], rows[40:], labels[40:])
    assert teacher.accuracy(rows[:40], labels[:40]) >= 0.95 and teacher.accuracy(rows[40:], labels[40:]) >= 0.7
    assert teacher.accuracy(rows[:40], 1 - labels[:40]) <= 0.05


def test_the_head_of_a_backbone_learns_rare_classes_too(
    classes: Path, seeded_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it learns from some rows only, a class of few is among them."""
    model = new_classifier("test_resnet", ("a", "b"), seeded_backbone).model
    timm.models.save_for_hf(model, tmp_path / "network", safe_serialization=True)
    images = tmp_path / "images"
    shutil.copytree(classes, images)
    (images / "rare").mkdir()
    for file in sorted((images / "china").iterdir())[:12]:
        Image.open(file).rotate(90).save(images / "rare" / file.name)
    monkeypatch.setattr(dataset, "MAX_HEAD_IMAGES", 3)
    found = harden(images, teacher=f"local-dir:{tmp_path / 'network'}", weights=seeded_backbone, **FAST)
    assert found.facts["classes"] == ["china", "flower", "rare"] and found.facts["teacher_accuracy"] > 0.5


def test_a_teacher_whose_frozen_layers_are_kept_runs_only_what_lies_behind(
    saved: Path, classes: Path, seeded_backbone: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    teacher = load_teacher(str(saved), ("china", "flower"))
    assert teacher.frozen is not None and teacher.frozen.layer == "layer3"
    pixels = torch.stack([teacher.transform(Image.open(file)) for file in sorted(classes.glob("*/*"))[:4]])
    assert torch.allclose(teacher.from_frozen(teacher.frozen(pixels)), teacher(pixels), atol=2e-3)
    seen: list[int] = []
    whole = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, x: seen.append(len(x)) or whole(self, x))
    short = {**FAST, "recipe": HardenRecipe(epochs=1, batch_size=32), "teacher": str(saved)}
    here = harden(classes, weights=seeded_backbone, **short)  # the student's frozen layers are the teacher's
    assert not seen
    elsewhere = harden(classes, weights=seeded_backbone, views=1, train_from="layer4", cache=tmp_path, **short)
    assert sum(seen) == 200
    assert here.facts["teacher_accuracy"] == elsewhere.facts["teacher_accuracy"] >= 0.9


def test_a_teachers_classes_may_stand_in_another_order(saved: Path) -> None:
    one, other = (load_teacher(str(saved), order) for order in (("china", "flower"), ("flower", "china")))
    rows = torch.randn(5, one.width)
    assert torch.equal(one.logits(rows)[:, [1, 0]], other.logits(rows))


def test_all_layers_can_be_trained_from_pixels(classes: Path, seeded_backbone: Path, plain: Hardened) -> None:
    recipe = HardenRecipe(epochs=1, batch_size=85)
    found = harden(classes, "test_resnet", weights=seeded_backbone, recipe=recipe, train_from="", views=3, **GUARD)
    before, after = (one.classifier.model.state_dict()["conv1.0.weight"] for one in (plain, found))
    assert not torch.equal(before, after)
    assert found.facts["train_from"] == ""


def test_a_student_in_a_folder_keeps_the_order_of_its_classes(classes: Path, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(saved / "student", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": ["flower", "china"]}))
    tensors = load_file(folder / "model.safetensors")
    save_file({n: v.flip(0) if n.startswith("fc.") else v for n, v in tensors.items()}, folder / "model.safetensors")
    reseal(folder)
    recipe = HardenRecipe(epochs=1, batch_size=32, learning_rate=1e-6)
    found, usual = (harden(classes, str(one), str(saved), recipe=recipe, **GUARD) for one in (folder, saved))
    assert found.classifier.classes == ("flower", "china")
    assert found.facts["accuracy"] >= 0.9 and found.facts["teacher_accuracy"] >= 0.9
    for name, loss in found.facts["epochs"][0].items():  # labels and the teacher's answers are in the same order
        assert loss == pytest.approx(usual.facts["epochs"][0][name], rel=1e-3), name


def test_a_student_can_begin_where_another_ended(classes: Path, saved: Path) -> None:
    recipe = HardenRecipe(epochs=1, batch_size=32, learning_rate=1e-6)
    found = harden(classes, str(saved), recipe=recipe, **GUARD)
    start_of, end = load_classifier(saved / "student").model.state_dict(), found.classifier.model.state_dict()
    assert torch.allclose(start_of["fc.weight"], end["fc.weight"], atol=1e-3)


def test_unreadable_and_double_images_are_left_out(
    classes: Path, seeded_backbone: Path, tmp_path: Path, plain: Hardened
) -> None:
    folder = tmp_path / "some"
    shutil.copytree(classes, folder)
    (folder / "china" / "broken.png").write_bytes(b"no picture")
    first = sorted((folder / "flower").iterdir())[0]
    shutil.copy(first, folder / "flower" / "zz_copy.png")
    found = harden(folder, weights=seeded_backbone, **FAST)
    assert [path for path, _ in found.unreadable] == [str(folder / "china" / "broken.png")]
    assert found.facts["images"] == plain.facts["images"]
    shutil.copy(first, folder / "china" / "doubtful.png")  # now in both classes
    found = harden(folder, weights=seeded_backbone, **FAST)
    left_out = {Path(path).name: reason for path, reason in found.unreadable}
    assert left_out.keys() == {"broken.png", "doubtful.png", first.name, "zz_copy.png"}
    assert left_out["doubtful.png"] == "the same image lies in the classes china, flower"
    found.save_pretrained(tmp_path / "out")
    with (tmp_path / "out" / "left_out.csv").open(newline="") as stream:
        assert [*csv.reader(stream)] == [["path", "reason"], *map(list, found.unreadable)]
    assert found.facts["images"]["training"] == plain.facts["images"]["training"] - 1


PROGRAM = """
import os, sys
from featdiff.hardening.harden import harden
from featdiff.hardening.recipe import HardenRecipe
images, weights, cache, output = sys.argv[1:]
guard = {"recipe": {"epochs": 2, "min_steps": 20, "batch_size": 64}}
recipe = HardenRecipe(epochs=2, batch_size=32)
found = harden(images, "test_resnet", weights=weights, recipe=recipe, cache=cache, device="cpu", guard=guard)
rank = os.environ["RANK"]
found.save_pretrained(f"{output}{rank}")
"""


def test_two_processes_share_the_batches(classes: Path, seeded_backbone: Path, tmp_path: Path) -> None:
    """As ``torchrun`` starts them (``accelerate launch`` starts one on a CPU): both end with the same student."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29781"]
    arguments = map(str, (classes, seeded_backbone, tmp_path / "cache", tmp_path / "out"))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launcher, program, *arguments], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    one, other = (load_classifier(tmp_path / f"out{rank}" / "student").model.state_dict() for rank in (0, 1))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out0/guard" / name).read_bytes() == (tmp_path / "out1/guard" / name).read_bytes()


def test_latents_make_other_outliers_of_the_same_vectors() -> None:
    one, other = (outlier_facts(outliers(latents=latents)) for latents in (None, torch.zeros(40, 4, 8, 6)))
    assert one is not None and other is not None and one["sha256"] != other["sha256"]


# ---- what is refused ----


def test_one_class(classes: Path) -> None:
    with pytest.raises(UsageError, match="lies? in|in no class folder"):
        harden(classes / "china", **FAST)


def test_weights_that_a_teacher_lacks_are_not_those_of_the_student(classes: Path, seeded_backbone: Path) -> None:
    with pytest.raises(WeightsError, match=r"the teacher: no weights for resnet18.*name it local-dir:FOLDER"):
        harden(classes, teacher="resnet18", weights=seeded_backbone, **FAST)


def test_one_class_folder(classes: Path, tmp_path: Path) -> None:
    shutil.copytree(classes / "china", tmp_path / "all" / "china")
    with pytest.raises(UsageError, match="at least two classes, and all images lie in 'china'"):
        harden(tmp_path / "all", **FAST)


def test_a_teacher_of_other_classes(classes: Path, saved: Path, tmp_path: Path, seeded_backbone: Path) -> None:
    folder = tmp_path / "others"
    shutil.copytree(classes, folder)
    (folder / "china").rename(folder / "temple")
    with pytest.raises(UsageError, match="knows the classes china, flower, the images have flower, temple"):
        harden(folder, teacher=str(saved), weights=seeded_backbone, **FAST)
    with pytest.raises(UsageError, match="has the classes china, flower, the images flower, temple"):
        harden(folder, str(saved), recipe=SHORT)


def test_too_few_images_for_the_rate(classes: Path, seeded_backbone: Path) -> None:
    assert refused(classes, weights=seeded_backbone, fpr=0.01).startswith("fpr 0.01 needs at least 99 held-out images")


def test_networks_that_do_not_end_in_one_linear_layer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="resnetv2_50x1_bit.* ends in Conv2d, not in one linear layer"):
        check_head(new_classifier("resnetv2_50x1_bit", ("a", "b"), pretrained=False))
    model = timm.create_model("volo_d1_224", num_classes=2)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    with pytest.raises(UsageError, match="logits of volo_d1_224.* do not come from its last layer alone"):
        check_head(load_classifier(tmp_path))


def test_classes_too_small_for_the_energy_margin(classes: Path, tmp_path: Path, seeded_backbone: Path) -> None:
    for name in ("china", "flower"):
        shutil.copytree(classes / name, tmp_path / name)
        for file in sorted((tmp_path / name).iterdir())[4:]:
            file.unlink()
    recipe = HardenRecipe(epochs=1, batch_size=2, energy=0.1)
    with pytest.raises(UsageError, match="energy needs a class of at least 5 training images"):
        harden(tmp_path, "test_resnet", weights=seeded_backbone, recipe=recipe, fpr=0.5)


def test_large_sets_hold_back_smaller_shares() -> None:
    def share(images: int) -> float:
        return DatasetBuilder(Reader(Runtime()), 1, 0.05, None, 0.05, 2, None).held_back(images)

    shares = [share(n) for n in (100, 300, 1_000, 100_000, 1_000_000)]
    assert shares == pytest.approx([0.25, 0.05 + 40 / 300, 0.15, 0.12, 0.012])


def test_no_views(classes: Path) -> None:
    with pytest.raises(UsageError, match="views must be a whole number above 0, not 0"):
        harden(classes, views=0, **FAST)


def refused(classes: object, **arguments: Any) -> str:
    """What is said before any image is read."""

    def never(*step: object) -> None:
        raise AssertionError(step)

    with pytest.raises(UsageError) as error:
        harden(classes, **{**FAST, **arguments}, progress=never)
    return str(error.value)


def test_what_is_refused_before_the_work_begins(
    classes: Path, saved: Path, seeded_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"weights": seeded_backbone}
    assert refused(classes, **own, guard={"head": "nope"}).startswith("unknown head 'nope'")
    assert refused(classes, **own, guard={"layers": ["layer9"]}).startswith("unknown layer 'layer9'")
    assert "classes cat, dog" in refused(classes, **own, outliers=replace(outliers(), classes=["cat", "dog"]))
    assert "150 training images do not fill" in refused(classes, **own, recipe=HardenRecipe(batch_size=151))
    assert refused(classes, **own, calibration=0.5).startswith("calibration is a share")
    assert refused(classes, **own, validation=-1).startswith("validation is a share")
    assert "35.0% must be held back" in refused(classes, **own, teacher=f"local-dir:{saved}/student", calibration=0.3)
    assert "weights belong to a backbone" in refused(classes, **own, student=str(saved))
    assert refused(classes, student="runs/no-such") == "there is no folder runs/no-such"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert "a folder here: write ./resnet18" in refused(classes, student="resnet18")
    assert refused(classes, **own, teacher=str(tmp_path / "none")).startswith("there is no folder")
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        archive.add(classes, ".")
    assert "unpack it" in refused(tmp_path / "all.tar.gz", **own, train_from="")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    said = refused(classes, **own, cache=tmp_path / "cache")
    assert said.startswith("200 images in 2 views need") and "0.0 GB are free: choose another cache" in said


def test_numbers_that_half_precision_cannot_hold() -> None:
    classifier = new_classifier("test_resnet", ("a", "b"), pretrained=False)
    frozen, _ = split_at(classifier, "layer3")
    with pytest.raises(UsageError, match="layer 'layer3' gives numbers that half precision cannot hold"):
        frozen(torch.full((1, 3, 160, 160), 1e12))
