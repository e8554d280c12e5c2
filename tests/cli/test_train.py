"""``featdiff train``: from a folder to a model, what is said on the way, and how it fails."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers import fails, noise_pictures, stopped

from featdiff import Detector
from featdiff.files.model_folder import load

Cli = Callable[..., Result]


def write_config(file: Path, weights: Path, recipe: str = "epochs = 2, min_steps = 1", more: str = "") -> Path:
    """A config of a detector that trains in a moment: two layers of ``test_resnet`` at 32 px."""
    file.write_text(
        f"""
[detector]
backbone = "test_resnet"
weights = "{weights}"
layers = "layer1,layer2"
hidden_max = 64
blocks = 1
fpr = 0.2
calibration = 0.2
recipe = {{ batch_size = 16, {recipe} }}
size = 32
{more}
"""
    )
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 small pictures of noise."""
    return noise_pictures(tmp_path_factory.mktemp("photos"), 40, 24)


@pytest.fixture
def quick(tmp_path: Path, seeded_backbone: Path) -> Path:
    return write_config(tmp_path / "quick.toml", seeded_backbone)


# ---- the main path ----


def test_waiting_for_images_is_told(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featdiff_cli import waiting

    monkeypatch.setattr(waiting, "_LONG", 0)
    monkeypatch.setattr(waiting, "_MUCH", 0)
    lines = featdiff_cli("train", photos, "--config", quick, "-o", tmp_path / "model").stderr.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("40 images; features"))
    assert re.fullmatch(r"for \d+% of that time the backbone waited for images: smaller.*help", lines[place + 1])


def test_folder_becomes_a_model(featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path) -> None:
    result = featdiff_cli("train", photos, "--config", quick, "-o", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "40 images" in result.stderr
    assert "images/s" in result.stderr
    assert "view: whole picture, squashed to 32 x 32 pixels" in result.stderr
    assert "calibrated on 8 held-out images: --fpr from 0.12 up" in result.stderr
    assert f"featdiff score IMAGES -m {tmp_path / 'model'}" in result.stderr
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    config = load(tmp_path / "model")[0]
    assert config["layers"] == {"layer1": 32, "layer2": 48}
    assert config["images"] == {"different": 40, "calibration": 8, "calibration_groups": 8, "bank": 27}
    assert len(Detector.from_pretrained(tmp_path / "model").score(photos)) == 40


def test_options_go_before_the_config(featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path) -> None:
    options = ("--layers", "layer2", "--fpr", "0.3", "--seed", "5")
    result = featdiff_cli("train", photos, "--config", quick, *options, "-o", tmp_path / "model")
    assert result.exit_code == 0, result.output
    arguments = load(tmp_path / "model")[0]["settings"]
    assert (arguments["layers"], arguments["fpr"], arguments["seed"]) == (["layer2"], 0.3, 5)
    assert arguments["blocks"] == 1


def test_model_goes_to_the_folder_that_score_looks_in(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert featdiff_cli("train", photos, "--config", quick).exit_code == 0
    assert (tmp_path / "featdiff-model" / "config.json").is_file()
    result = featdiff_cli("score", photos / "00.png")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].startswith(f"{photos / '00.png'},ok,")


def test_missing_parents_of_the_model_folder_are_made(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path
) -> None:
    result = featdiff_cli("train", photos, "--config", quick, "-o", tmp_path / "a" / "b" / "model")
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "a" / "b" / "model")[0]["images"]["different"] == 40


def test_quiet_is_silent(featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path) -> None:
    result = featdiff_cli("train", photos, "--config", quick, "-q", "-o", tmp_path / "model")
    assert (result.exit_code, result.output) == (0, "")


def test_several_sources_and_stdin(featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path) -> None:
    files = sorted(map(str, photos.iterdir()))
    names = "\n".join(files[20:]).encode()
    result = featdiff_cli(
        "train",
        photos / "0?.png",
        photos / "1?.png",
        "-",
        "--config",
        quick,
        "-o",
        tmp_path / "model",
        input=names,
    )
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "model")[0]["images"]["different"] == 40


def test_duplicates_are_said(featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "again")
    result = featdiff_cli("train", photos, tmp_path / "again", "--config", quick, "-o", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "40 images, 40 duplicates left out" in result.stderr


def test_same_command_twice_finds_its_training_in_the_cache(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path
) -> None:
    command = ("train", photos, "--config", quick, "--cache", tmp_path / "cache", "-o")
    first, second = (featdiff_cli(*command, tmp_path / name) for name in ("one", "two"))
    assert "training found complete in the cache" not in first.stderr
    assert "training found complete in the cache" in second.stderr
    one, two = (load(tmp_path / name)[1] for name in ("one", "two"))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- without images ----


def test_sample_set_is_used_loudly_without_images(featdiff_cli: Cli, quick: Path, tmp_path: Path) -> None:
    """Said even with -q: the model knows nothing of the user's data."""
    result = featdiff_cli("train", "--config", quick, "-q", "-o", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "NO IMAGES GIVEN" in result.stderr
    assert "sample set, 390 tiles" in result.stderr
    assert load(tmp_path / "model")[0]["images"]["different"] == 390


@pytest.mark.parametrize("images", ['["pictures"]', '"pictures"', '["pictures/*.png"]'], ids=["list", "text", "glob"])
def test_images_named_in_the_config_count_from_its_folder(
    featdiff_cli: Cli, photos: Path, tmp_path: Path, seeded_backbone: Path, images: str
) -> None:
    shutil.copytree(photos, tmp_path / "pictures")
    config = write_config(tmp_path / "run.toml", seeded_backbone, more=f"[data]\nimages = {images}\n")
    result = featdiff_cli("train", "--config", config, "-o", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "NO IMAGES" not in result.stderr
    assert load(tmp_path / "model")[0]["images"]["different"] == 40


def test_images_of_the_command_line_go_before_those_of_the_config(
    featdiff_cli: Cli, photos: Path, tmp_path: Path, seeded_backbone: Path
) -> None:
    config = write_config(tmp_path / "run.toml", seeded_backbone, more='[data]\nimages = ["missing"]\n')
    assert featdiff_cli("train", photos, "--config", config, "-o", tmp_path / "model").exit_code == 0
    result = featdiff_cli("train", "--config", config, "-o", tmp_path / "other")
    fails(result, 2, str(tmp_path / "missing"), "no such file")


# ---- a random backbone ----


def test_random_backbone_is_called_meaningless_and_can_be_scored(
    featdiff_cli: Cli, photos: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    config = tmp_path / "run.toml"
    config.write_text('[detector]\nlayers = "layer1"\nfpr = 0.2\nblocks = 1\nrecipe = { epochs = 1, min_steps = 1 }\n')
    options = ("--no-pretrained", "--backbone", "test_resnet", "--config", config)
    result = featdiff_cli("train", photos, *options, "-q", "-o", model)
    assert result.exit_code == 0, result.output
    assert "WARNING" in result.stderr and "mean nothing" in result.stderr
    result = featdiff_cli("score", photos, "-m", model, "-q")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 41


# ---- configs ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[detector]\nbackbon = 'x'", ["unknown key 'backbon'", "did you mean backbone"]),
        ("[detektor]\n", ["unknown table 'detektor'", "did you mean detector"]),
        ("backbone = 'x'", ["unknown table 'backbone'"]),
        ("[data]\nimage = 'x'", ["unknown key 'image'", "did you mean images"]),
        ("[detector\n", ["is not TOML"]),
        ("x = " + 100_000 * "[", ["is not TOML", "brackets"]),
        ("[detector]\nhead = 'x'", ["unknown head 'x'"]),
        ("[detector.recipe]\nepoch = 1", ["unknown recipe setting 'epoch'", "did you mean epochs"]),
        ("detector = 5", ["detector"]),
        ("data = 5", ["data"]),
        ("[data]\nimages = 5", ["images"]),
        ("[data]\nimages = [1, 2]", ["images"]),
        ("[detector]\nrecipe = 5", ["recipe"]),
        ("[detector]\ncalibration = '0.2'", ["calibration"]),
        ("[detector]\nstart_times = 20", ["start_times"]),
        ("[detector]\nbackbone = 50", ["backbone"]),
        ("[detector]\nweights = 5", ["weights"]),
        ("[detector]\ncache = 5", ["cache"]),
    ],
    ids=lambda value: value.replace("\n", " ")[:40] if isinstance(value, str) else "",
)
def test_wrong_config_is_refused_at_once(
    featdiff_cli: Cli, photos: Path, tmp_path: Path, text: str, words: list[str]
) -> None:
    (tmp_path / "run.toml").write_text(text)
    result = featdiff_cli("train", photos, "--config", tmp_path / "run.toml", "-o", tmp_path / "model")
    fails(result, 2, *words)
    assert not (tmp_path / "model").exists()


def test_binary_config_is_refused(featdiff_cli: Cli, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    fails(featdiff_cli("train", photos, "--config", tmp_path / "run.toml"), 2, "run.toml is not TOML")


def test_unknown_preset_gets_a_hint(featdiff_cli: Cli, photos: Path) -> None:
    fails(featdiff_cli("train", photos, "--config", "dlsr_papr"), 2, "'dlsr_papr'", "did you mean dlsr_paper")
    fails(featdiff_cli("train", photos, "--config", "no/such.toml"), 2, "no/such.toml", "presets: dlsr_paper")


def test_folder_as_config_is_refused(featdiff_cli: Cli, photos: Path, tmp_path: Path) -> None:
    fails(featdiff_cli("train", photos, "--config", tmp_path), 2, str(tmp_path))


def test_preset_names_its_backbone(featdiff_cli: Cli, photos: Path, tmp_path: Path) -> None:
    """Offline, its weights cannot be had: the resolved tag and the three ways out are named."""
    result = featdiff_cli("train", photos, "--config", "dlsr_paper", "-o", tmp_path / "model")
    fails(result, 1, "tf_efficientnet_b4.aa_in1k", "--weights", "--backbone tf_efficientnet_lite0", "hub")


# ---- what cannot be trained on ----


def test_empty_and_missing_folders(featdiff_cli: Cli, quick: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = featdiff_cli("train", tmp_path / "empty", "--config", quick, "-o", tmp_path / "model")
    fails(result, 2, str(tmp_path / "empty"), "no images in this folder")
    result = featdiff_cli("train", tmp_path / "gone", "--config", quick, "-o", tmp_path / "model")
    fails(result, 2, str(tmp_path / "gone"), "no such file or folder")
    result = featdiff_cli("train", "-", "--config", quick, "-o", tmp_path / "model", input=b"")
    fails(result, 2)
    assert not (tmp_path / "model").exists()


def test_unreadable_files_are_named_and_give_code_3(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.png").write_bytes(b"")
    (bad / "text.jpg").write_text("hello")
    result = featdiff_cli("train", photos, bad, "--config", quick, "-o", tmp_path / "model")
    assert result.exit_code == 3, result.output
    assert "40 images, 2 unreadable" in result.stderr
    assert f"{bad / 'empty.png'}: empty file" in result.stderr
    assert f"{bad / 'text.jpg'}: not an image" in result.stderr
    assert len(Detector.from_pretrained(tmp_path / "model").calibration_) == 8


def test_many_unreadable_files_are_counted(featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(13):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"")
    result = featdiff_cli("train", photos, tmp_path / "bad", "--config", quick, "-o", tmp_path / "model")
    assert result.exit_code == 3
    assert result.stderr.count("empty file") == 10
    assert "... and 3 more" in result.stderr


@pytest.mark.parametrize("fpr", ["0", "1", "-1", "nan"])
def test_impossible_rate(featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path, fpr: str) -> None:
    result = featdiff_cli("train", photos, "--config", quick, "--fpr", fpr, "-o", tmp_path / "model")
    fails(result, 2, "--fpr", "between 0 and 1")
    assert not (tmp_path / "model").exists()


def test_rate_that_needs_more_images(featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path) -> None:
    result = featdiff_cli("train", photos, "--config", quick, "--fpr", "0.01", "-o", tmp_path / "model")
    fails(result, 2, "--fpr 0.01 needs about 495 images", "there are 40", "fpr 0.12 or more")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--backbone", "resnet5O"], 2, ["unknown backbone 'resnet5O'", "did you mean resnet50"]),
        (
            ["--backbone", "resnet50", "--layers", "auto"],
            1,
            ["test_resnet.safetensors", "does not fit resnet50"],
        ),
        (["--layers", "layerX"], 2, ["unknown layer 'layerX'", "did you mean layer"]),
        (["--weights", "gone.safetensors"], 1, ["gone.safetensors"]),
        (["--device", "abacus"], 2, ["no device 'abacus'"]),
        (["--seed", "-1"], 2, ["seed"]),
        (["--seed", "x"], 2, ["--seed"]),
        (["--workers", "0"], 2, ["--workers"]),
        (["--batch-size", "0"], 2, ["--batch-size"]),
        (["--colour", "red"], 2, ["--colour"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_wrong_options(
    featdiff_cli: Cli,
    photos: Path,
    quick: Path,
    tmp_path: Path,
    options: list[str],
    code: int,
    words: list[str],
) -> None:
    result = featdiff_cli("train", photos, "--config", quick, "-o", tmp_path / "model", *options)
    fails(result, code, *words)
    assert not (tmp_path / "model").exists()


# ---- where the model goes ----


def test_existing_model_is_replaced_only_with_force(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path
) -> None:
    command = ("train", photos, "--config", quick, "-o", tmp_path / "model")
    assert featdiff_cli(*command).exit_code == 0
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    fails(featdiff_cli(*command, "--seed", "3"), 2, f"a model is already at {tmp_path / 'model'}", "--force")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert featdiff_cli(*command, "--seed", "3", "--force").exit_code == 0
    assert load(tmp_path / "model")[0]["settings"]["seed"] == 3


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_folder_of_something_else_is_never_replaced(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path, force: list[str]
) -> None:
    """Not even with --force, and not even if its files are named as ours are."""
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    (other / "model.safetensors").write_bytes(b"weights")
    for target in (photos, quick, other):
        fails(
            featdiff_cli("train", photos, "--config", quick, "-o", target, *force),
            2,
            str(target),
            "not a featdiff",
        )
    assert len(list(photos.iterdir())) == 40
    assert (other / "model.safetensors").read_bytes() == b"weights"


def test_current_folder_as_target_works_or_is_refused_at_once(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = featdiff_cli("train", photos, "--config", quick, "-q", "-o", ".")
    if result.exit_code:
        fails(result, 2)
    else:
        assert load(tmp_path / "here")[0]["images"]["different"] == 40


def test_full_disk_loses_nothing(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path, mounted: Callable[[Path, str], Path]
) -> None:
    """The same command with a good -o ends at once: features and training are in the cache."""
    disk = mounted(tmp_path / "disk", "64k")
    command = ("train", photos, "--config", quick, "--cache", tmp_path / "cache", "-o")
    fails(featdiff_cli(*command, disk / "model"), 1, str(disk / "model"), "No space left on device")
    assert list(disk.iterdir()) == []
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    result = featdiff_cli(*command, tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "training found complete in the cache" in result.stderr
    assert kept and {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")} == kept


def test_full_cache_disk_is_one_line(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path, mounted: Callable[[Path, str], Path]
) -> None:
    disk = mounted(tmp_path / "disk", "8k")
    result = featdiff_cli("train", photos, "--config", quick, "--cache", disk / "cache", "-o", tmp_path / "model")
    fails(result, 1, "feature cache", str(disk / "cache"), "No space left", "--cache")
    assert not list(disk.rglob("*.tmp"))


def test_full_cache_disk_after_training_does_not_matter(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path, mounted: Callable[[Path, str], Path]
) -> None:
    """All that is needed is there already, so nothing has to be written into the cache."""
    disk = mounted(tmp_path / "disk", "4m")
    command = ("train", photos, "--config", quick, "--cache", disk, "-q", "-o")
    assert featdiff_cli(*command, tmp_path / "one").exit_code == 0
    with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(4096))
    result = featdiff_cli(*command, tmp_path / "two")
    assert result.exit_code == 0, result.output


# ---- Ctrl-C ----


def test_ctrl_c_while_training(featdiff_cli: Cli, photos: Path, seeded_backbone: Path, tmp_path: Path) -> None:
    """A real process: one line, code 130, no model, the features are kept for the next run."""
    endless = write_config(
        tmp_path / "endless.toml",
        seeded_backbone,
        "epochs = 1000000, patience = 1000000, max_steps = 10000000",
    )
    arguments = [str(photos), "--cache", str(tmp_path / "cache"), "-q", "-o", str(tmp_path / "model")]
    code, output, errors = stopped(
        ["train", "--config", endless, *arguments], lambda: list(tmp_path.glob("cache/features/*/*.npy")), pause=0.7
    )
    assert code == 130, errors
    assert output == ""
    assert not (tmp_path / "model").exists()
    assert not [path.name for path in tmp_path.rglob("*.tmp")]
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}
    result = featdiff_cli("train", "--config", write_config(tmp_path / "quick.toml", seeded_backbone), *arguments)
    assert result.exit_code == 0, result.output
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")} == kept
    assert "the same command goes on" in errors
    assert len(errors.splitlines()) == 1, errors


# ---- view and size ----


@pytest.mark.parametrize(
    ("options", "words", "saved"),
    [
        ((), "squashed to 32 x 32 pixels", ("squash", 32)),
        (("--size", 96), "whole picture, about 96 x 96 pixels", ("rectangle", 96)),
        (("--view", "crop", "--size", 64), "cropped to 64 x 64 pixels", ("crop", 64)),
    ],
)
def test_view_and_size(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path, options: Any, words: str, saved: tuple[str, int]
) -> None:
    """The command line wins over the file."""
    result = featdiff_cli("train", photos, "--config", quick, "-o", tmp_path / "model", *options)
    assert result.exit_code == 0, result.output
    assert words in result.stderr
    settings = json.loads((tmp_path / "model" / "config.json").read_text())["settings"]
    assert (settings["view"], settings["size"]) == saved
    assert words in featdiff_cli("info", tmp_path / "model").stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--view", "hole"), ["--view", "did you mean whole"]),
        (("--size", 0), ["--size"]),
        (("--backbone", "levit_128s", "--no-pretrained", "--size", 100), ["--size", "224 x 224 pixels"]),
    ],
)
def test_wrong_views_and_sizes(featdiff_cli: Cli, photos: Path, tmp_path: Path, options: Any, words: list[str]) -> None:
    result = featdiff_cli("train", photos, "-o", tmp_path / "model", *options)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words)
    assert not (tmp_path / "model").exists()


# ---- a damaged cache ----


def flip_last_bit(folder: Path, pattern: str) -> Path:
    (file,) = folder.rglob(pattern)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file


def test_damaged_cache_is_said_in_one_line_and_changes_nothing(
    featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path
) -> None:
    cache = ("--cache", tmp_path / "cache")
    train = ("train", photos, "--config", quick, *cache, "-o", tmp_path / "model", "--force")
    assert featdiff_cli(*train).exit_code == 0
    model = (tmp_path / "model" / "model.safetensors").read_bytes()

    for pattern, then in (
        ("*.vectors.npy", "what it held is computed again"),
        ("*.digests", "what it held is computed again"),
        ("training-*.pt", "this training starts anew"),
    ):
        file = flip_last_bit(tmp_path / "cache", pattern)
        result = featdiff_cli(*train)
        assert result.exit_code == 0, result.output
        assert f"WARNING: {file} was damaged and is removed: {then}" in result.stderr.splitlines()
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == model
        assert "WARNING" not in featdiff_cli(*train).stderr

    evaluate = ("eval", "-m", tmp_path / "model", "--id", photos, "--ood", f"d={photos}", "--no-baselines", *cache)
    expected = featdiff_cli(*evaluate, "--protocol", "as-published").stdout
    file = flip_last_bit(tmp_path / "cache", "*.vectors.npy")
    result = featdiff_cli(*evaluate, "--protocol", "as-published")
    assert result.exit_code == 0, result.output
    assert result.stdout == expected
    assert f"WARNING: {file} was damaged" in result.stderr


def test_damaged_cache_and_quiet(featdiff_cli: Cli, photos: Path, quick: Path, tmp_path: Path) -> None:
    train = ("train", photos, "--config", quick, "--cache", tmp_path, "-o", tmp_path / "model", "--force", "--quiet")
    assert featdiff_cli(*train).exit_code == 0
    flip_last_bit(tmp_path, "*.vectors.npy")
    assert featdiff_cli(*train).stderr == ""
