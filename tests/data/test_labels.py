"""Folders of classes: which image belongs to which class, in folders and archives."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featdiff.data.labels import list_labelled
from featdiff.data.references import FileRef
from featdiff.exceptions import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/{cat,dog}, two pictures of a cat, of which one lies deeper, and one of a dog."""
    for i, name in enumerate(("cat/1.png", "cat/deep/2.png", "dog/1.png")):
        file = tmp_path / "data" / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(file)
    return tmp_path / "data" / "train"


def archive_of(folder: Path, suffix: str) -> Path:
    """The same as an archive beside it, with ``train/`` inside."""
    archive = folder.parent.parent / f"data{suffix}"
    files = sorted(file for file in folder.rglob("*.png"))
    names = [file.relative_to(folder.parent).as_posix() for file in files]
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as opened:
            for file, name in zip(files, names, strict=True):
                opened.write(file, name)
        return archive
    with tarfile.open(archive, "w:gz" if suffix.endswith("gz") else "w") as tar:
        for file, name in zip(files, names, strict=True):
            tar.add(file, name)
    return archive


@pytest.mark.parametrize("ending", ["", os.sep])
def test_the_first_folder_is_the_class(folder: Path, ending: str) -> None:
    refs, labels, classes = list_labelled(f"{folder}{ending}")
    assert [Path(ref.path).relative_to(folder).as_posix() for ref in refs] == [
        "cat/1.png",
        "cat/deep/2.png",
        "dog/1.png",
    ]
    assert labels.tolist() == [0, 0, 1]
    assert labels.dtype == np.int64
    assert classes == ["cat", "dog"]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("ending", ["/train", "/train/"])
def test_a_folder_inside_an_archive(folder: Path, suffix: str, ending: str) -> None:
    refs, labels, classes = list_labelled([f"{archive_of(folder, suffix)}{ending}"])
    by_name = {ref.path.split("/train/")[1]: classes[label] for ref, label in zip(refs, labels, strict=True)}
    assert by_name == {"cat/1.png": "cat", "cat/deep/2.png": "cat", "dog/1.png": "dog"}
    assert Image.open(io.BytesIO(refs[0].read())).size == (8, 8)


def test_the_named_source_decides_what_the_first_folder_is(folder: Path) -> None:
    assert list_labelled(folder.parent)[2] == ["train"]
    assert list_labelled(archive_of(folder, ".zip"))[2] == ["train"]


def test_classes_of_several_sources_are_joined_by_name(folder: Path, tmp_path: Path) -> None:
    for name in ("ant", "dog"):
        (tmp_path / "more" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "more" / name / "9.png")
    refs, labels, classes = list_labelled([folder, tmp_path / "more"])
    assert classes == ["ant", "cat", "dog"]
    assert labels.tolist() == [1, 1, 2, 0, 2]
    assert Path(refs[-1].path) == tmp_path / "more" / "dog" / "9.png"


def test_an_image_that_is_named_twice_counts_once(folder: Path) -> None:
    refs, labels, classes = list_labelled([folder, folder.parent])
    assert len(refs) == 3
    assert [classes[label] for label in labels] == ["cat", "cat", "dog"]


def test_what_has_no_class_is_refused(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "alone.png")
    bad: list[tuple[object, str]] = [
        (folder, f"{folder / 'alone.png'} lies in no class folder"),
        (folder / "cat" / "1.png", "is no folder and no archive"),
        (f"{folder}/*", "is no folder and no archive"),
        ("-", "is no folder and no archive"),
        (Image.new("RGB", (8, 8)), "images given as Image have no class"),
        (FileRef("b.png", "b.png"), "b.png lies in no class folder"),
        ([], "no images were named"),
        (tmp_path / "gone", "is no folder and no archive"),
    ]
    for source, words in bad:
        with pytest.raises(UsageError) as raised:
            list_labelled(source)
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_source_without_images_is_refused_beside_good_ones(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty: no images in this folder"):
        list_labelled([folder, tmp_path / "empty"])


def test_references_have_the_class_of_the_folder_they_lie_in() -> None:
    given = [
        FileRef("x/dog/1.png", "x/dog/1.png"),
        FileRef("y/cat/1.png", "y/cat/1.png"),
        FileRef("dog/2.png", "dog/2"),
    ]
    refs, labels, classes = list_labelled(given)
    assert (refs, labels.tolist(), classes) == (given, [1, 0, 1], ["cat", "dog"])
