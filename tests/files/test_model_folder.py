"""Saved detectors: the same numbers after loading, no damaged folder accepted, nothing lost while writing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_mutations import reseal
from safetensors.torch import load_file, save_file
from torch import Tensor

from featdiff import Detector
from featdiff.exceptions import FeatdiffError, ModelError, NotFittedError, UsageError, WeightsError
from featdiff.files.model_folder import CONFIG, FORMAT_VERSION, TENSORS, check_target, load, locate, save

Tensors = dict[str, Tensor]
#: In-domain vectors in which neighbours are searched.
BANK = "members.0.vectors"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Load config.json, let ``change`` work on it, write it back under a digest that fits."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    reseal(folder)


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Load model.safetensors, let ``change`` work on it, write it back under a digest that fits."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS)
    reseal(folder)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the saved tiny detector that may be changed."""
    return shutil.copytree(tiny_model, tmp_path / "place" / "model")


# ---- round trip ----


def test_loaded_detector_gives_the_same_bits(
    tiny_detector: Detector, tiny_model: Path, sample_folders: dict[str, Path]
) -> None:
    files = sorted(map(str, sample_folders["test"].iterdir()))[:20]
    loaded = Detector.from_pretrained(tiny_model)
    before, after = tiny_detector.score(files), loaded.score(files)
    assert before.path == after.path == files
    np.testing.assert_array_equal(before.ood_score, after.ood_score)
    np.testing.assert_array_equal(before.p_value, after.p_value)
    np.testing.assert_array_equal(before.is_ood, after.is_ood)
    assert list(before.layers) == list(after.layers) == ["layer1", "layer2", "layer4"]
    for name in before.layers:
        np.testing.assert_array_equal(before.layers[name], after.layers[name])
    np.testing.assert_array_equal(tiny_detector.calibration_.scores, loaded.calibration_.scores)
    features = torch.randn(4, loaded.extractor_.width, generator=torch.Generator().manual_seed(0))
    heads, again = tiny_detector.all_heads(features), loaded.all_heads(features)
    assert set(heads) - set(again) == {"lr"}  # its early network is not saved
    for name, values in again.items():
        np.testing.assert_array_equal(values, heads[name])
    both = (tiny_detector, loaded)
    facts = [(d.n_images_, d.validation_loss_, d.fpr, d.training_seconds_) for d in both]
    settings = [(d.settings.seed, d.settings.head, d.settings.recipe) for d in both]
    assert facts[0] == facts[1]
    assert settings[0] == settings[1]


def test_a_model_without_scores_of_layers_is_loaded(tiny_detector: Detector, model: Path) -> None:
    """As an older featdiff has saved it."""
    assert list(Detector.from_pretrained(model).calibration_.layers) == tiny_detector.layers
    edit_tensors(model, lambda tensors: tensors.pop("calibration_of_layers"))
    calibration = Detector.from_pretrained(model).calibration_
    np.testing.assert_array_equal(calibration.scores, tiny_detector.calibration_.scores)
    assert calibration.layers == {}


def test_saving_a_loaded_detector_writes_the_same_model(tiny_model: Path, tmp_path: Path) -> None:
    Detector.from_pretrained(tiny_model).save_pretrained(tmp_path / "again")
    (config, tensors), (again, tensors_again) = load(tiny_model), load(tmp_path / "again")
    assert again == config  # the digest among it
    assert set(tensors_again) == set(tensors)
    assert all(torch.equal(tensors_again[name], value) for name, value in tensors.items())
    assert sorted(content(tmp_path / "again")) == sorted(content(tiny_model)) == [CONFIG, TENSORS]


def test_config_names_format_and_backbone(tiny_detector: Detector, tiny_model: Path) -> None:
    config, tensors = load(tiny_model)
    assert config["format"] == "featdiff"
    assert config["format_version"] == FORMAT_VERSION
    assert config["backbone"]["fingerprint"] == tiny_detector.extractor_.backbone.fingerprint
    assert config["layers"] == {part.layer: part.width for part in tiny_detector.extractor_.layout.layers}
    assert list(config["layers"]) == list(tiny_detector.extractor_.layers)
    assert config["images"] == {"different": 390, "calibration": 78, "calibration_groups": 78, "bank": 292}
    assert len(tensors["calibration"]) == 78


def test_runtime_arguments_are_not_part_of_the_model(tiny_model: Path, tmp_path: Path) -> None:
    assert not {"device", "image_batch", "workers", "max_pixels", "max_bytes", "cache"} & set(
        load(tiny_model)[0]["settings"]
    )
    loaded = Detector.from_pretrained(tiny_model, image_batch=5, workers=2, max_pixels=99, max_bytes=98, cache=tmp_path)
    settings = loaded.settings
    assert (settings.image_batch, settings.workers, settings.max_pixels, settings.max_bytes) == (5, 2, 99, 98)
    assert settings.cache == settings.cache_folder == tmp_path


@pytest.mark.parametrize("setting", [{"head": "mse"}, {"draws": 4}, {"seed": 7}, {"image_bach": 4}])
def test_only_runtime_arguments_can_be_changed_when_loading(tiny_model: Path, setting: dict[str, Any]) -> None:
    """Another head or noise would make every p-value wrong without a word."""
    with pytest.raises((TypeError, UsageError), match=next(iter(setting))):
        Detector.from_pretrained(tiny_model, **setting)


def test_wrong_runtime_argument_is_not_blamed_on_the_model(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="image_batch must be"):
        Detector.from_pretrained(tiny_model, image_batch=0)
    with pytest.raises(UsageError, match="no device 'abacus'"):
        Detector.from_pretrained(tiny_model, device="abacus")


def test_unfitted_detector_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError, match="fit"):
        Detector().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ---- strict load ----


def put(name: str, value: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


def poison(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].flatten()[:1].fill_(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("diffusion.noise"), "lacks tensor diffusion.noise"),
        (
            lambda t: t.pop("diffusion.denoiser.layers.0.project_out.weight"),
            "lacks tensor diffusion.denoiser.layers.0.project_out",
        ),
        (put("extra", torch.zeros(1)), "unknown tensor extra"),
        (poison("diffusion.noise", float("nan")), "tensor diffusion.noise holds NaN"),
        (poison("diffusion.mean", float("inf")), "tensor diffusion.mean holds NaN or infinite"),
        (
            lambda t: t.update({"diffusion.noise": t["diffusion.noise"].flatten()}),
            "another shape for tensor diffusion.noise",
        ),
        (lambda t: t.update({"diffusion.mean": t["diffusion.mean"][:1]}), "another shape for tensor diffusion.mean"),
        (lambda t: t.update({"diffusion.noise": t["diffusion.noise"].half()}), "noise"),
        (lambda t: t.pop("members.0.vectors"), "lacks tensor members.0.vectors"),
        (
            lambda t: t.update({"members.0.vectors": t["members.0.vectors"][1:]}),
            "another shape for tensor members.0.vectors",
        ),
        (lambda t: t.update({"members.0.vectors": t["members.0.vectors"].float()}), "another type for tensor members"),
        (lambda t: t.pop("bank_digests"), "digests of its bank"),
        (lambda t: t.update(bank_digests=t["bank_digests"][:, 1:]), "digests of its bank"),
        (lambda t: t.update(bank_digests=t["bank_digests"][1:]), "digests of its bank"),
        (lambda t: t.pop("calibration"), "calibration"),
        (lambda t: t.update(calibration=t["calibration"][1:]), "calibration"),
        (lambda t: t.update(calibration=t["calibration"][:, None]), "calibration"),
        (lambda t: t.update(calibration=t["calibration"][:0]), "calibration"),
        (poison("calibration", float("nan")), "tensor calibration holds NaN"),
        (lambda t: t.update(calibration_of_layers=t["calibration_of_layers"][1:]), "calibration scores of layers"),
        (lambda t: t.update(calibration_of_layers=t["calibration_of_layers"].double()), "calibration scores of layers"),
        (lambda t: t.update(calibration_of_layers=t["calibration_of_layers"].flip(1)), "calibration scores of layers"),
        (lambda t: t.clear(), "damaged"),
    ],
    ids=[
        "missing",
        "missing-weight",
        "extra",
        "nan",
        "inf",
        "reshaped",
        "cut",
        "half",
        "no-bank",
        "short-bank",
        "other-bank",
        "no-digests",
        "narrow-digests",
        "short-digests",
        "no-calibration",
        "short-calibration",
        "calibration-2d",
        "empty-calibration",
        "nan-calibration",
        "short-layers",
        "double-layers",
        "unsorted-layers",
        "nothing",
    ],
)
def test_damaged_tensors_are_refused(model: Path, change: Callable[[Tensors], object], words: str) -> None:
    edit_tensors(model, change)
    with pytest.raises(ModelError, match=words) as caught:
        Detector.from_pretrained(model)
    assert str(model) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[1, 2]", "was not written by featdiff"),
        (b'{"model_type": "bert"}', "was not written by featdiff"),
        (b'{"format": "featdiff"}', "format None"),
        (b'{"format": "featdiff", "format_version": "1"}', "format 1"),
        (b'{"format": "featdiff", "format_version": %d}' % (FORMAT_VERSION + 1), "pip install -U featdiff"),
    ],
    ids=["empty", "cut", "binary", "list", "foreign", "no-version", "text-version", "newer"],
)
def test_damaged_or_foreign_config_is_refused(model: Path, data: bytes, words: str) -> None:
    (model / CONFIG).write_bytes(data)
    with pytest.raises(ModelError, match=words):
        Detector.from_pretrained(model)


@pytest.mark.parametrize(
    "key",
    [
        "backbone",
        "backbone.source",
        "backbone.fingerprint",
        "layers",
        "images",
        "images.different",
        "images.calibration",
        "images.bank",
        "validation_loss",
        "settings",
    ],
)
def test_config_that_lacks_a_key_is_damaged(model: Path, key: str) -> None:
    *above, last = key.split(".")

    def drop(config: dict[str, Any]) -> None:
        (config[above[0]] if above else config).pop(last)

    edit_config(model, drop)
    with pytest.raises(ModelError, match=f"damaged.*{last}"):
        Detector.from_pretrained(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["settings"].update(surprise=1), "surprise"),
        (lambda c: c["settings"].update(draws="many"), "draws"),
        (lambda c: c["settings"].update(draws=1.5), "draws"),
        (lambda c: c["settings"].update(start_times=7), "start_times"),
        (lambda c: c["settings"].update(draws=3), "shape for tensor diffusion.noise"),
        (lambda c: c["settings"].update(layers=["layer1", "layer2"]), "layers of the backbone"),
        (lambda c: c["settings"].update(layers=["layer1", "layer2", "layer9"]), "layer9"),
        (lambda c: c["layers"].update(layer2=49), "layers of the backbone"),
        (lambda c: c.update(layers=list(c["layers"])), "damaged"),
        (lambda c: c["images"].update(calibration=77), "calibration"),
        (lambda c: c["images"].update(bank=10**15), "digests of its bank"),
        (lambda c: c.update(validation_loss="low"), "damaged"),
    ],
    ids=[
        "unknown-argument",
        "text",
        "half-draw",
        "bare-time",
        "other-draws",
        "fewer-layers",
        "unknown-layer",
        "width",
        "list",
        "count",
        "bank-count",
        "loss",
    ],
)
def test_config_at_odds_with_the_model_is_refused(
    model: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit_config(model, change)
    with pytest.raises(ModelError, match=words):
        Detector.from_pretrained(model)


@pytest.mark.parametrize("cut", [0, 4, 100, -1], ids=lambda cut: f"cut{cut}")
def test_truncated_tensors_are_refused(model: Path, cut: int) -> None:
    data = (model / TENSORS).read_bytes()
    (model / TENSORS).write_bytes(data[:cut])
    with pytest.raises(ModelError, match="damaged"):
        Detector.from_pretrained(model)


def test_text_in_place_of_tensors_is_refused(model: Path) -> None:
    (model / TENSORS).write_text("version https://git-lfs.github.com/spec/v1\n" * 10)
    with pytest.raises(ModelError, match="damaged"):
        Detector.from_pretrained(model)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(ModelError, match=f"it has no .*{name}"):
        Detector.from_pretrained(model)


def test_missing_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder.*featdiff train"):
        Detector.from_pretrained(tmp_path / "nothing")


def test_file_in_place_of_a_folder_is_refused(model: Path) -> None:
    with pytest.raises(ModelError, match="no featdiff model"):
        Detector.from_pretrained(model / CONFIG)


# ---- the backbone behind the model ----


def test_other_weights_of_the_same_network_are_refused(tiny_model: Path, seeded_backbone: Path, tmp_path: Path) -> None:
    state = load_file(seeded_backbone)
    name = next(name for name in state if name.endswith("weight"))
    state[name].flatten()[0] += 1e-3  # one number of one tensor is enough
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="test_resnet.* has other weights.*expected") as caught:
        Detector.from_pretrained(tiny_model, weights=tmp_path / "other.safetensors")
    assert load(tiny_model)[0]["backbone"]["fingerprint"][:12] in str(caught.value)


def test_tampered_fingerprint_is_refused(model: Path) -> None:
    edit_config(model, lambda config: config["backbone"].update(fingerprint="0" * 64))
    with pytest.raises(ModelError, match="other weights.*expected 000000000000"):
        Detector.from_pretrained(model)


def test_weights_that_moved_can_be_named(model: Path, seeded_backbone: Path, tmp_path: Path) -> None:
    edit_config(model, lambda config: config["settings"].update(weights="/gone/weights.safetensors"))
    with pytest.raises(WeightsError, match="/gone/weights.safetensors"):
        Detector.from_pretrained(model)
    moved = shutil.copy(seeded_backbone, tmp_path / "moved.safetensors")
    assert Detector.from_pretrained(model, weights=moved).n_images_ == 390


# ---- writing ----

SMALL: Tensors = {"a": torch.arange(6.0).reshape(2, 3)}


def facts(**more: object) -> dict[str, Any]:
    """The least that a config says, and ``more``."""
    return {
        "featdiff_version": "0.1.0",
        "backbone": {"tag": "net", "source": "hub", "fingerprint": "0" * 64},
        "layers": {"a": 3},
        "images": {"different": 9, "calibration": 2},
        "validation_loss": 0.5,
        "settings": {},
        **more,
    }


def test_save_and_load_keep_values_and_types(tmp_path: Path) -> None:
    tensors = {**SMALL, "b": torch.tensor([1.0, -2.0], dtype=torch.float64), "c": torch.tensor([1, 2])}
    save(tmp_path / "deep" / "er" / "model", facts(answer=42), tensors)
    config, loaded = load(tmp_path / "deep" / "er" / "model")
    expected = {"format": "featdiff", "format_version": FORMAT_VERSION, **facts(answer=42)}
    assert {name: config[name] for name in expected} == expected
    assert set(loaded) == {"a", "b", "c"}
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_views_and_transposed_tensors_are_saved_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save(tmp_path / "model", facts(), {"transposed": base.T, "row": base[1]})
    loaded = load(tmp_path / "model")[1]
    assert torch.equal(loaded["transposed"], base.T)
    assert torch.equal(loaded["row"], torch.tensor([4.0, 5.0, 6.0, 7.0]))


def test_failed_write_leaves_the_old_model_and_no_rubbish(tmp_path: Path) -> None:
    save(tmp_path / "model", facts(number=1), SMALL)
    old = content(tmp_path)
    with largest_file(10_000), pytest.raises(ModelError, match="could not be written to .*model: "):
        save(tmp_path / "model", facts(number=2), {"big": torch.ones(10_000)})
    assert content(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_files_of_two_models_are_refused(tmp_path: Path, name: str) -> None:
    """What a crash between the replacing of the two files would leave behind."""
    for number in (1, 2):
        save(tmp_path / f"{number}", facts(), {"a": torch.full((3,), float(number))})
    shutil.copy(tmp_path / "2" / name, tmp_path / "1" / name)
    with pytest.raises(ModelError, match="damaged"):
        load(tmp_path / "1")


def test_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    with largest_file(10_000), pytest.raises(ModelError):
        save(tmp_path / "model", facts(), {"big": torch.ones(10_000)})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, mounted: Callable[[Path, str], None], tiny_detector: Detector
) -> None:
    mounted(tmp_path / "small", "256k")
    with pytest.raises(ModelError, match="No space left on device"):
        tiny_detector.save_pretrained(tmp_path / "small" / "model")
    assert list((tmp_path / "small").iterdir()) == []


def test_mount_point_as_model_folder_works_or_is_refused_before_the_work(
    tmp_path: Path, mounted: Callable[[Path, str], None]
) -> None:
    """A container's volume cannot be renamed; finding that out after hours of training would be too late."""
    mounted(tmp_path / "volume", "1m")
    try:
        check_target(tmp_path / "volume")
    except UsageError:
        return
    save(tmp_path / "volume", facts(), SMALL)
    assert torch.equal(load(tmp_path / "volume")[1]["a"], SMALL["a"])


def test_replacing_a_model_leaves_only_the_new_one(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path / "model", facts(number=number), {"a": torch.full((3,), float(number))})
    config, tensors = load(tmp_path / "model")
    assert config["number"] == 2
    assert torch.equal(tensors["a"], torch.full((3,), 2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save(tmp_path / "model", facts(), SMALL)
    assert sorted(content(tmp_path / "model")) == [CONFIG, TENSORS]


@pytest.mark.parametrize(
    "files",
    [
        {"holiday.jpg": b"a photograph"},
        {".hidden": b""},
        {CONFIG: b"{}"},
        {CONFIG: b'{"model_type": "bert"}', TENSORS: b"weights of a language model"},
        {CONFIG: b"not JSON", TENSORS: b"?"},
    ],
    ids=["photos", "hidden", "half", "transformers", "unknown"],
)
def test_folder_of_something_else_is_never_replaced(tmp_path: Path, files: dict[str, bytes]) -> None:
    """Transformers and diffusers name their files as featdiff does: the names alone prove nothing."""
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match="not a featdiff model"):
        save(tmp_path, facts(), SMALL)
    assert content(tmp_path) == files


def test_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("keep me")
    with pytest.raises(UsageError, match="not a featdiff model"):
        save(tmp_path / "model", facts(), SMALL)
    assert (tmp_path / "model").read_text() == "keep me"


def test_own_files_in_a_model_folder_survive_a_new_model(tmp_path: Path) -> None:
    """A model card or a .git folder beside the model is either kept, or the folder is refused."""
    save(tmp_path / "model", facts(number=1), SMALL)
    (tmp_path / "model" / "README.md").write_text("months of notes")
    try:
        save(tmp_path / "model", facts(number=2), SMALL)
    except UsageError:
        assert load(tmp_path / "model")[0]["number"] == 1
    else:
        assert load(tmp_path / "model")[0]["number"] == 2
    assert (tmp_path / "model" / "README.md").read_text() == "months of notes"


def test_link_to_a_model_stays_a_link(tmp_path: Path) -> None:
    save(tmp_path / "v1", facts(number=1), SMALL)
    (tmp_path / "current").symlink_to("v1")
    save(tmp_path / "current", facts(number=2), SMALL)
    assert (tmp_path / "current").is_symlink()
    assert load(tmp_path / "v1")[0]["number"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]


@pytest.mark.parametrize("name", [".", "./"])
def test_folder_without_a_name_works_or_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    try:
        check_target(name)
    except UsageError:
        return
    save(name, facts(), SMALL)
    assert torch.equal(load(tmp_path / "here")[1]["a"], SMALL["a"])


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, folder: int, file: int) -> None:
    before = os.umask(umask)
    try:
        save(tmp_path / "model", facts(), SMALL)
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == folder
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "model" / name).stat().st_mode & 0o777 == file


def test_config_keeps_text_that_is_not_ascii(tmp_path: Path) -> None:
    save(tmp_path / "modèle ☃", facts(note="Übung ☃"), SMALL)
    assert load(tmp_path / "modèle ☃")[0]["note"] == "Übung ☃"


# ---- the hub's local cache ----


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the hub library, which stays offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def fill(hub_cache: Path, repository: str, model: Path, files: tuple[str, ...] = (CONFIG, TENSORS)) -> Path:
    """Lay out a repository as the hub library caches it: refs, snapshots and links to blobs."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = hub_cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for name in files:
        shutil.copy(model / name, root / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    return snapshot


@pytest.mark.parametrize("local_files_only", [True, False])
def test_hub_name_is_loaded_from_the_local_cache(
    hub_cache: Path, tiny_model: Path, tiny_detector: Detector, local_files_only: bool
) -> None:
    snapshot = fill(hub_cache, "someone/strange-things", tiny_model)
    assert locate("someone/strange-things", local_files_only) == snapshot
    loaded = Detector.from_pretrained("someone/strange-things", local_files_only=local_files_only)
    np.testing.assert_array_equal(loaded.calibration_.scores, tiny_detector.calibration_.scores)


@pytest.mark.parametrize("local_files_only", [True, False])
def test_hub_name_that_is_not_cached_is_one_line(hub_cache: Path, local_files_only: bool) -> None:
    with pytest.raises(ModelError, match="no model someone/unknown.* hub") as caught:
        Detector.from_pretrained("someone/unknown", local_files_only=local_files_only)
    assert "\n" not in str(caught.value)


def test_half_a_hub_repository_is_refused(hub_cache: Path, tiny_model: Path) -> None:
    fill(hub_cache, "someone/half", tiny_model, (CONFIG,))
    with pytest.raises(FeatdiffError, match=TENSORS):
        Detector.from_pretrained("someone/half", local_files_only=True)


def test_folder_goes_before_a_hub_name(hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save("someone/model", facts(number=3), SMALL)
    assert locate("someone/model") == Path("someone/model")
    assert load(locate("someone/model"))[0]["number"] == 3


@pytest.mark.parametrize("name", ["missing", "./missing/model", "/missing/model", "a/b/c", "~/model"])
def test_paths_are_never_asked_of_the_hub(hub_cache: Path, name: str) -> None:
    assert locate(name) == Path(name)
    assert list(hub_cache.iterdir()) == []


def leave_a_killed_save(folder: Path, *, tensors_written: bool) -> None:
    """What SIGKILL leaves of a first save: temporary files, or the tensors and a temporary config."""
    script = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from featdiff.files.model_folder import save\n"
        "replace, left = Path.replace, [int(sys.argv[2])]\n"
        "def dying(self, target):\n"
        "    left[0] -= 1\n"
        "    return replace(self, target) if left[0] >= 0 else os.kill(os.getpid(), 9)\n"
        "Path.replace = dying\n"
        "save(sys.argv[1], {}, {'weight': torch.ones(3)})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder), str(int(tensors_written))], check=False)
    assert done.returncode == -9
    assert (folder / TENSORS).exists() == tensors_written
    assert not (folder / CONFIG).exists()


@pytest.mark.parametrize("tensors_written", [False, True])
def test_a_save_that_was_killed_can_be_repeated(tmp_path: Path, tensors_written: bool) -> None:
    leave_a_killed_save(tmp_path / "model", tensors_written=tensors_written)
    check_target(tmp_path / "model")
    with pytest.raises(ModelError, match="no featdiff model"):
        load(tmp_path / "model")

    save(tmp_path / "model", {}, {"weight": torch.ones(3)})
    assert load(tmp_path / "model")[1]["weight"].tolist() == [1, 1, 1]


def test_tensors_of_another_tool_are_not_taken_for_a_killed_save(tmp_path: Path) -> None:
    (tmp_path / TENSORS).write_bytes(b"somebody's weights")
    with pytest.raises(UsageError, match="exists and is not a featdiff model"):
        check_target(tmp_path)
