"""Suite files, and where their images are found."""

from __future__ import annotations

import gzip
import inspect
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from featdiff import Detector
from featdiff.data.references import list_images
from featdiff.evaluation.students import check_students
from featdiff.evaluation.suite_images import NotThere, everything_else, find_images
from featdiff.evaluation.suites import Source, load_suite
from featdiff.exceptions import UsageError
from featdiff.features.backbones import check_name

SUITES = sorted((ROOT / "configs" / "suites").glob("*.toml"))
GOOD = """
[sources.a]
path = "a"
[[tasks]]
name = "t"
train = "a"
test = "a"
ood = "*"
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "suite.toml"
    file.write_text(text)
    return file


def picture(file: Path, shade: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file)


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_shipped_suites_are_whole(file: Path) -> None:
    suite = load_suite(file)
    assert suite.tasks
    detectors = {
        "lmd": {"lmd"},
        "oal": set(),
        "folders": {"featdiff", "dlsr_joint"},
        "dlsr": {"dlsr_efficientnet_b4", "dlsr_resnet50"},
        "openood-imagenet200": {"resnet50", "dinov2_small"},
    }
    assert set(suite.detectors) == detectors.get(file.stem, {"dlsr_joint"})
    check_students(suite.students)
    assert bool(suite.students) == (file.stem == "oal")
    assert all(0 < number.auroc <= 100 for number in suite.published)


def test_shipped_suites_are_these() -> None:
    assert [file.stem for file in SUITES] == [
        *("cifar10", "dlsr", "folders", "lmd", "oal", "openood-cifar10", "openood-imagenet200")
    ]


@pytest.mark.parametrize("name", ["dlsr", "openood-imagenet200"])
def test_detectors_of_large_suites_can_be_made(name: str) -> None:
    for arguments in load_suite(ROOT / "configs" / "suites" / f"{name}.toml").detectors.values():
        check_name(arguments["backbone"])
        assert Detector(**arguments).settings.backbone == arguments["backbone"]


def test_dlsr_suite_has_the_denoiser_of_the_preset() -> None:
    preset = tomllib.loads((ROOT / "configs" / "dlsr_paper.toml").read_text())["detector"]
    detectors = load_suite(ROOT / "configs" / "suites" / "dlsr.toml").detectors
    assert detectors["dlsr_efficientnet_b4"] == preset
    assert detectors["dlsr_resnet50"] == preset | {"backbone": "resnet50.tv_in1k"}


def test_imagenet200_reads_lists_in_openoods_layout(tmp_path: Path) -> None:
    suite = load_suite(ROOT / "configs" / "suites" / "openood-imagenet200.toml")
    for name, source in suite.sources.items():
        picture(tmp_path / source.root / name / "a.png")
        listed = tmp_path / source.imglist
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text(f"{name}/a.png 0\n")

    for name, source in suite.sources.items():
        (image,) = find_images(source, tmp_path)
        assert image.path.endswith(f"{source.root}/{name}/a.png")
        assert image.read()
    assert [task.ood for task in suite.tasks] == [("ssb_hard", "ninco"), ("inaturalist", "textures", "openimage_o")]


def test_suite_of_start_times_compares_like_with_like() -> None:
    """The default's times are in it as well, and every detector is diffusion alone."""
    suite = load_suite(ROOT / "tests" / "benchmarks" / "start_times.toml")
    assert len(suite.detectors) >= 8
    for arguments in suite.detectors.values():
        assert set(arguments) == {"start_times", "draws", "head"}
        assert Detector(**arguments).settings.head == "layerwise"
    default = list(inspect.signature(Detector).parameters["start_times"].default)
    assert default in [arguments["start_times"] for arguments in suite.detectors.values()]


def test_class_splits_of_cifar10_are_disjoint_and_whole() -> None:
    suite = load_suite(SUITES[0])
    tasks = {task.name: task for task in suite.tasks}
    assert list(tasks) == ["far", *(f"near {i}" for i in range(1, 6)), "resolution"]
    splits = set()
    for i in range(1, 6):
        task = tasks[f"near {i}"]
        assert (task.train, task.test, task.ood) == (f"in{i}_train", f"in{i}_test", (f"out{i}",))
        inside, outside = set(suite.sources[task.test].classes), set(suite.sources[task.ood[0]].classes)
        assert (len(inside), len(outside), len(inside | outside)) == (6, 4, 10)
        assert set(suite.sources[task.train].classes) == inside
        splits.add(frozenset(inside))
    assert len(splits) == 5


def test_a_single_string_stands_for_a_list(tmp_path: Path) -> None:
    suite = load_suite(written(tmp_path, GOOD))
    assert suite.title == "suite"
    assert suite.sources["a"].path == ("a",)
    assert suite.tasks[0].ood == ("*",)
    assert suite.tasks[0].protocols == ("matched",)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[[tasks]]", "[[task]]", "unknown key 'task'; did you mean tasks"),
        ('path = "a"', 'paht = "a"', "sources.a: unknown key 'paht'; did you mean path"),
        ('test = "a"', "", "tasks: lacks test"),
        ('train = "a"', 'train = "b"', "task 't' names an unknown source 'b'"),
        ('ood = "*"', 'ood = "*"\nprotocols = "matchd"', "unknown protocol 'matchd'"),
        ('train = "a"', 'train = "*"', r"unknown source '\*'"),
        ('path = "a"', 'imglist = "a"\nclasses = ["x"]', "classes cannot be chosen from an imglist"),
        (
            'ood = "*"',
            'ood = "*"\n[[published]]\nmethod = "m"\ntask = "t"\nood = "b"\nauroc = 1.0\nsource = "s"',
            "published 'm': the suite has no task 't', ood 'b', protocol 'as-published'",
        ),
        (GOOD, "[sources.a]\npath = 'a'", "at least one task"),
        (GOOD, "sources = 3", r"sources must be tables, \[sources.NAME\]"),
        (GOOD, "tasks = 3", r"tasks must be a list of tables, \[\[tasks\]\]"),
        (GOOD, "=", "is not TOML"),
        ('path = "a"', "path = 3", "path must be text or a list of texts, not 3"),
        ('name = "t"', "name = 3", "name must be text, not 3"),
        ('path = "a"', 'path = "a"\nlimit = -1', "limit must be a whole number, not -1"),
        ('path = "a"', 'path = "a"\nskip = true', "skip must be a whole number, not True"),
        ('path = "a"', 'path = "a"\nskip = 1.5', "skip must be a whole number, not 1.5"),
    ],
)
def test_wrong_suites_are_refused_in_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_suite(written(tmp_path, GOOD.replace(old, new)))
    assert "\n" not in str(caught.value)


def test_missing_suite_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml cannot be read"):
        load_suite(tmp_path / "none.toml")


def test_first_path_that_exists_is_taken(tmp_path: Path) -> None:
    picture(tmp_path / "second" / "x.png")
    images = find_images(Source(path=("first.zip/x", "first", "second")), tmp_path)
    assert [ref.path for ref in images] == [str(tmp_path / "second" / "x.png")]


def test_one_set_serves_for_training_and_testing(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / "set" / f"{i:02d}.png", shade=i)
    first, rest, all_ = (
        [ref.path for ref in find_images(Source(path=("set",), skip=skip, limit=limit), tmp_path)]
        for skip, limit in ((0, 12), (12, 0), (0, 0))
    )
    assert (len(first), len(rest)) == (12, 8)
    assert sorted(first + rest) == all_
    assert first != all_[:12] and first == sorted(first)
    with pytest.raises(NotThere, match="there are 20 images, and 20 are left out"):
        find_images(Source(path=("set",), skip=20), tmp_path)


def test_digits_of_scikit_learn(tmp_path: Path) -> None:
    images = find_images(Source(sklearn="digits"), tmp_path)
    assert len(images) == 1797
    first = np.asarray(images[0].read().convert("L"))
    assert (first.shape, first.max(), first[0, 0]) == ((8, 8), 239, 0)
    with pytest.raises(UsageError, match="known: digits"):
        find_images(Source(sklearn="faces"), tmp_path)


def test_class_folders_inside_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("cat", "dog", "frog"):
            picture(tmp_path / f"{name}.png")
            archive.write(tmp_path / f"{name}.png", f"train/{name}/1.png")
    images = find_images(Source(path=("set.zip/train",), classes=("cat", "frog")), tmp_path)
    assert [ref.path.partition("train/")[2] for ref in images] == ["cat/1.png", "frog/1.png"]


def test_class_without_images_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "cat" / "1.png")
    with pytest.raises(UsageError, match=r"set/catt: no such file or folder") as caught:
        find_images(Source(path=("set",), classes=("cat", "catt")), tmp_path)
    assert not isinstance(caught.value, NotThere)


def test_folder_inside_a_tar(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(tmp_path / "1.png", "s/1.png")
    assert len(find_images(Source(path=("s.tar/s",)), tmp_path)) == 1


@pytest.mark.parametrize("source", [Source(path=("empty",)), Source(imglist="list.txt", root="images_classic")])
def test_a_set_without_files_is_not_there(tmp_path: Path, source: Source) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("svhn/1.png 0\nsvhn/2.png 0\n")
    with pytest.raises(NotThere):
        find_images(source, tmp_path)


def test_what_is_not_there_is_named_with_every_place(tmp_path: Path) -> None:
    with pytest.raises(NotThere, match=r"not below .*: a\.zip or a or lists/a\.txt"):
        find_images(Source(path=("a.zip", "a"), imglist="lists/a.txt"), tmp_path)


def test_openood_lists(tmp_path: Path) -> None:
    """Paths count from the root; a name may hold spaces; a file that is missing becomes a row later."""
    picture(tmp_path / "images_classic" / "cifar10" / "a b.png")
    (tmp_path / "list.txt").write_text("cifar10/a b.png 3\n\ncifar10/gone.png -1\n")
    images = find_images(Source(imglist="list.txt", root="images_classic"), tmp_path)
    assert [ref.path.rpartition("/")[2] for ref in images] == ["a b.png", "gone.png"]
    assert images[0].read()
    with pytest.raises(OSError, match="gone"):
        images[1].read()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Ten test pictures in the files torchvision's FashionMNIST reads; picture i is grey i, of class i."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.repeat(np.arange(10, dtype=np.uint8), 28 * 28)
    for part in ("train", "t10k"):
        header = np.array([0x803, 10, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.array([0x801, 10], dtype=">i4").tobytes() + np.arange(10, dtype=np.uint8).tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
        for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
            (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
    return tmp_path


def test_torchvision_pictures_are_read_when_needed(fashion: Path) -> None:
    images = find_images(Source(torchvision={"name": "FashionMNIST", "train": False}), fashion)
    assert [ref.path for ref in images] == [f"FashionMNIST[{i}]" for i in range(10)]
    assert [np.asarray(ref.read()).max() for ref in images] == list(range(10))
    assert len(list_images(images)) == 10


def test_torchvision_classes(fashion: Path) -> None:
    source = Source(torchvision={"name": "FashionMNIST", "train": False}, classes=("Trouser", "Ankle boot"))
    assert [np.asarray(ref.read()).max() for ref in find_images(source, fashion)] == [1, 9]
    with pytest.raises(UsageError, match="no class 'Trousers'; did you mean Trouser"):
        find_images(Source(torchvision=source.torchvision, classes=("Trousers",)), fashion)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "FashionMNIST", "train": False}, "let it be downloaded with download=True"),
        ({"name": "FashonMNIST"}, "no data set 'FashonMNIST'; did you mean FashionMNIST"),
        ({"train": True}, "no data set ''"),
        ({"name": "FashionMNIST", "wrong": 1}, "wrong"),
    ],
)
def test_torchvision_sets_that_cannot_be_had(tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        find_images(Source(torchvision=options), tmp_path)
    assert "\n" not in str(caught.value)


def test_everything_else(tmp_path: Path) -> None:
    for name in ("train", "test", "signs", ".hidden"):
        (tmp_path / name).mkdir()
    for name in ("train.zip", "digits.ZIP", "signs.zip", ".zip", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert {name: source.path for name, source in everything_else(tmp_path).items()} == {
        "signs": ("signs",),
        "signs.zip": ("signs.zip",),
        "digits": ("digits.ZIP",),
    }
