"""Images inside zip and tar archives."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_files import (
    TAR_MODES,
    below,
    encoded,
    link,
    noise,
    png,
    posix,
    reason_of,
    to_tensor,
    value,
    write_archive,
    write_tar,
    write_zip,
)

from featdiff.data.batches import load
from featdiff.data.references import (
    TarMemberRef,
    TarRef,
    ZipRef,
    list_images,
)
from featdiff.exceptions import UsageError

# ---- archives ----

MEMBERS = ["train/b.png", "train/a.png", "test/deep/c.png", "d.png"]
ARCHIVES = [".zip", *TAR_MODES]


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_archive_is_read_without_unpacking(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"data{suffix}"
    write_archive(archive, {name: png(i) for i, name in enumerate(MEMBERS)} | {"readme.txt": b"x"})
    refs = list_images(archive)
    assert {name: value(ref) for name, ref in zip(below(refs, archive), refs, strict=True)} == {
        name: i for i, name in enumerate(MEMBERS)
    }
    assert os.listdir(tmp_path) == [archive.name]


@pytest.mark.parametrize(("suffix", "kind"), [(".zip", ZipRef), (".tar", TarRef)])
def test_members_that_can_be_read_in_any_order_are_sorted(tmp_path: Path, suffix: str, kind: type) -> None:
    archive = write_archive(tmp_path / f"data{suffix}", {name: png() for name in MEMBERS})
    refs = list_images(archive)
    assert below(refs, archive) == sorted(MEMBERS)
    assert all(type(ref) is kind and not ref.sequential for ref in refs)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_members_of_a_compressed_tar_keep_its_order(tmp_path: Path, suffix: str) -> None:
    archive = write_tar(tmp_path / f"data{suffix}", {name: png() for name in MEMBERS})
    refs = list_images(archive)
    assert below(refs, archive) == MEMBERS
    assert all(type(ref) is TarMemberRef and ref.sequential for ref in refs)


def test_compressed_tar_under_a_plain_name(tmp_path: Path) -> None:
    compressed = write_tar(tmp_path / "a.tar.gz", {name: png(i) for i, name in enumerate(MEMBERS)})
    compressed.rename(tmp_path / "a.tar")
    assert [value(ref) for ref in list_images(tmp_path / "a.tar")] == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("train", ["train/a.png", "train/b.png"]),
        ("train/", ["train/a.png", "train/b.png"]),
        ("test/deep", ["test/deep/c.png"]),
        ("test/deep/c.png", ["test/deep/c.png"]),
    ],
)
def test_folder_or_file_inside_an_archive(tmp_path: Path, suffix: str, inside: str, expected: list[str]) -> None:
    """``train2`` is not inside ``train``."""
    members = {name: png() for name in [*MEMBERS, "train2/e.png"]}
    archive = write_archive(tmp_path / f"data{suffix}", members)
    assert sorted(below(list_images(f"{archive}/{inside}"), archive)) == expected


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_folder_inside_an_archive_whose_members_begin_with_a_dot(tmp_path: Path, suffix: str) -> None:
    """``tar -czf data.tar.gz .`` writes ``./train/a.png``."""
    members = {f"./{name}": png(i) for i, name in enumerate(MEMBERS)}
    archive = write_archive(tmp_path / f"data{suffix}", members)
    assert sorted(value(ref) for ref in list_images(archive)) == [0, 1, 2, 3]
    assert sorted(value(ref) for ref in list_images(f"{archive}/train")) == [0, 1]


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_missing_folder_inside_an_archive(tmp_path: Path, suffix: str) -> None:
    archive = write_archive(tmp_path / f"data{suffix}", {"train/a.png": png()})
    with pytest.raises(UsageError, match="data.*val: no images in this archive"):
        list_images(f"{archive}/val")


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_archive_leaves_out_hidden_and_other_members(tmp_path: Path, suffix: str) -> None:
    names = ["a.png", ".b.png", "__MACOSX/a.png", "__MACOSX/._a.png", "x.jpg/", "notes.txt", "sub/._a.png"]
    archive = write_archive(tmp_path / f"data{suffix}", {n: png() for n in names if not n.endswith("/")})
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("x.jpg/", b"")
    assert below(list_images(archive), archive) == ["a.png"]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_member_written_twice_is_listed_once_and_the_last_counts(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"data{suffix}"
    with pytest.warns(UserWarning, match="Duplicate") if suffix == ".zip" else tempfile.TemporaryFile():
        if suffix == ".zip":
            with zipfile.ZipFile(archive, "w") as file:
                file.writestr("a.png", png(1))
                file.writestr("a.png", png(2))
        else:
            with tarfile.open(archive, TAR_MODES[suffix]) as tar:
                for number in (1, 2):
                    info = tarfile.TarInfo("a.png")
                    info.size = len(png(number))
                    tar.addfile(info, io.BytesIO(png(number)))
    (ref,) = list_images(archive)
    assert value(ref) == 2


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_links_inside_a_tar_are_read_and_never_lost(tmp_path: Path, suffix: str) -> None:
    """Hard links are how tar stores a file met twice; a broken link or a FIFO is a row with a reason."""
    members: dict[str, bytes | tarfile.TarInfo] = {
        "d/a.png": png(5),
        "d/hard.png": link("d/hard.png", tarfile.LNKTYPE, "d/a.png"),
        "d/soft.png": link("d/soft.png", tarfile.SYMTYPE, "a.png"),
        "d/dead.png": link("d/dead.png", tarfile.SYMTYPE, "gone.png"),
        "d/pipe.png": link("d/pipe.png", tarfile.FIFOTYPE),
    }
    archive = write_tar(tmp_path / f"data{suffix}", members)
    loaded = {ref.path.rsplit("/", 1)[1]: load(ref, to_tensor) for ref in list_images(archive)}
    assert {"a.png", "hard.png", "soft.png"} <= set(loaded)
    for name in ("a.png", "hard.png", "soft.png"):
        assert (loaded[name].reason, int(loaded[name].pixels.max())) == ("", 5)  # type: ignore[union-attr]
    for name in ("dead.png", "pipe.png"):
        assert name not in loaded or loaded[name].reason


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("damage", ["empty", "text", "half", "flipped"])
def test_corrupt_archive_is_a_row_with_one_line(tmp_path: Path, suffix: str, damage: str) -> None:
    rng = np.random.default_rng(0)
    members = {f"{i}.png": rng.integers(0, 40, 30000, dtype=np.uint8).tobytes() for i in range(5)}
    archive = write_archive(tmp_path / f"data{suffix}", members)
    whole = archive.read_bytes()
    middle = len(whole) // 2
    flipped = bytes(byte ^ 0x55 for byte in whole[middle : middle + 64])
    data = {
        "empty": b"",
        "text": b"this is not an archive\n" * 40,
        "half": whole[:middle],
        "flipped": whole[:middle] + flipped + whole[middle + 64 :],
    }
    archive.write_bytes(data[damage])
    refs = list_images([archive, np.zeros((4, 4), np.uint8)])
    assert refs[-1].path == "array[1]"
    assert len(refs) >= 2
    for ref in refs[:-1]:
        assert ref.path.startswith(str(archive))
        assert reason_of(ref)  # the members are noise: none of them is an image either
        assert "\n" not in reason_of(ref)
    if damage == "half" and suffix in TAR_MODES:  # what was written before the end is kept
        assert "archive cannot be read to its end: " in reason_of(refs[-2]) or len(refs) == 2
    elif damage != "flipped":
        assert len(refs) == 2
        assert "archive cannot be read" in reason_of(refs[0])


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
@pytest.mark.parametrize("kept", [2, 1])
def test_tar_that_is_cut_short_keeps_the_members_before(tmp_path: Path, suffix: str, kept: int) -> None:
    """Of three members of noise, which does not compress, the last ones are cut away."""
    good = [encoded(noise(60, 60, seed)) for seed in range(3)]
    archive = write_tar(tmp_path / f"data{suffix}", {f"{i}.png": data for i, data in enumerate(good)})
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * (kept + 0.5) / 3)])

    refs = list_images(archive)
    assert [ref.read() for ref in refs[:kept]] == good[:kept]
    cut, rest = refs[kept:]
    assert cut.path == f"{archive}/{kept}.png"
    assert reason_of(cut)
    assert rest.path == str(archive)
    assert "archive cannot be read to its end: " in reason_of(rest)


def test_damaged_header_is_not_the_end_of_a_tar(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "data.tar", {"a.png": png(1), "b.png": png(2)})
    data = bytearray(archive.read_bytes())
    data[1024 + 150] ^= 0x55  # the checksum of the second
    archive.write_bytes(data)
    first, rest = list_images(archive)
    assert value(first) == 1
    assert reason_of(rest) == "archive cannot be read to its end: a damaged header at byte 1,024"


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_members_that_lead_out_of_the_archive_are_rows(tmp_path: Path, suffix: str) -> None:
    names = ["../a.png", "/etc/b.png", "x/../../c.png", "..\\d.png", "C:\\e.png", "fine/f.png", "..g.png"]
    archive = write_archive(tmp_path / f"data{suffix}", {name: png(i) for i, name in enumerate(names)})
    refs = {ref.path.removeprefix(f"{archive}/"): ref for ref in list_images(archive)}
    assert sorted(refs) == sorted(names[:-1])  # the last is a hidden file
    assert value(refs.pop("fine/f.png")) == 5
    assert {reason_of(ref) for ref in refs.values()} == {"its name leads out of the archive"}
    assert below(list_images(f"{archive}/fine"), archive) == ["fine/f.png"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_links_that_lead_nowhere_have_a_plain_reason(tmp_path: Path, suffix: str) -> None:
    members: dict[str, bytes | tarfile.TarInfo] = {
        "self.png": link("self.png", tarfile.SYMTYPE, "self.png"),
        "hard.png": link("hard.png", tarfile.LNKTYPE, "hard.png"),
        "one.png": link("one.png", tarfile.SYMTYPE, "two.png"),
        "two.png": link("two.png", tarfile.SYMTYPE, "./one.png"),
        "gone.png": link("gone.png", tarfile.SYMTYPE, "d/none.png"),
        "out.png": link("out.png", tarfile.SYMTYPE, "/etc/passwd"),
    }
    archive = write_tar(tmp_path / f"data{suffix}", members)
    reasons = {ref.path.rsplit("/", 1)[1]: reason_of(ref) for ref in list_images(archive)}
    round_and_round = "a link that leads to itself"
    assert reasons == {
        "self.png": round_and_round,
        "hard.png": round_and_round,
        "one.png": round_and_round,
        "two.png": round_and_round,
        "gone.png": "a link to d/none.png, which is not in the archive",
        "out.png": "a link to /etc/passwd, which is not in the archive",
    }


def test_deflate_damage_inside_a_tar_is_a_row(tmp_path: Path) -> None:
    """Every place of a small compressed tar is damaged in turn."""
    rng = np.random.default_rng(0)
    members = {f"{i}.png": rng.integers(0, 40, 3000, dtype=np.uint8).tobytes() for i in range(3)}
    whole = write_tar(tmp_path / "whole.tar.gz", dict(members)).read_bytes()
    bad = tmp_path / "bad.tar.gz"
    for place in range(20, len(whole) - 40, 97):
        bad.write_bytes(whole[:place] + b"\xff\x00\xaa\x55" * 4 + whole[place + 16 :])
        refs = list_images([bad, np.zeros((4, 4), np.uint8)])
        assert len(refs) > 1
        assert all(reason_of(ref) for ref in refs[:-1])


def _patched(archive: Path, local: int, central: int, new: bytes) -> None:
    """Overwrite a field of the first member in its local header and in the directory of a zip file."""
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        start = data.index(signature) + offset
        data[start : start + len(new)] = new
    archive.write_bytes(data)


@pytest.mark.parametrize(
    ("field", "words"),
    [((6, 8, struct.pack("<H", 1)), "encrypted"), ((8, 10, struct.pack("<H", 97)), "compression method")],
    ids=["encrypted", "unknown method"],
)
def test_zip_member_that_cannot_be_decoded_is_a_row(tmp_path: Path, field: tuple[int, int, bytes], words: str) -> None:
    archive = write_zip(tmp_path / "data.zip", {"a.png": png(1), "b.png": png(2)})
    _patched(archive, *field)
    bad, good = list_images(archive)
    assert words in reason_of(bad)
    assert value(good) == 2


def test_zip_of_a_newer_format_is_a_row(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "data.zip", {"a.png": png()})
    _patched(archive, 4, 6, struct.pack("<H", 132))
    refs = list_images([archive, np.zeros((4, 4), np.uint8)])
    assert "version" in reason_of(refs[0])


def test_zip_member_with_wrong_checksum_is_a_row(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "data.zip", {"a.png": png(1), "b.png": png(2)})
    data = bytearray(archive.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 0xFF
    archive.write_bytes(data)
    bad, good = list_images(archive)
    assert "CRC" in reason_of(bad)
    assert value(good) == 2


def test_zip_member_name_that_is_not_ascii(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "data.zip", {"grün/日本.png": png(4)})
    (ref,) = list_images(archive)
    assert (ref.path, value(ref)) == (f"{archive}/grün/日本.png", 4)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_member_name_that_is_not_utf8(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"data{suffix}"
    with tarfile.open(archive, TAR_MODES[suffix], format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("caf\udce9.png")
        info.size = len(png(6))
        tar.addfile(info, io.BytesIO(png(6)))
    (ref,) = list_images(archive)
    assert (ref.path, value(ref)) == (f"{archive}/caf\\xe9.png", 6)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("way", ["replace", "overwrite"])
def test_archive_written_anew_is_read_anew(tmp_path: Path, suffix: str, way: str) -> None:
    """In one process, as in a notebook: the second list must not be that of the old file."""
    archive = write_archive(tmp_path / f"data{suffix}", {"a.png": png(1), "b.png": png(2)})
    assert [value(ref) for ref in list_images(archive)] == [1, 2]
    fresh = write_archive(tmp_path / f"new{suffix}", {"c.png": png(11), "d.png": png(12), "e.png": png(13)})
    if way == "replace":
        fresh.rename(archive)
    else:
        archive.write_bytes(fresh.read_bytes())
    refs = list_images(archive)
    assert below(refs, archive) == ["c.png", "d.png", "e.png"]
    assert [value(ref) for ref in refs] == [11, 12, 13]


@posix
def test_archive_overwritten_by_one_of_the_same_size_is_read_anew(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "data.zip", {"a.png": png(1)})
    size = archive.stat().st_size
    assert [value(ref) for ref in list_images(archive)] == [1]
    write_zip(archive, {"b.png": png(2)})
    os.utime(archive, (0, 2_000_000_000))  # some clocks are coarse
    assert archive.stat().st_size == size
    (ref,) = list_images(archive)
    assert (below([ref], archive), value(ref)) == (["b.png"], 2)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_members_read_from_many_threads_are_not_mixed_up(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    members = {f"{i:02d}.png": rng.bytes(40_000) for i in range(16)}
    refs = list_images(write_archive(tmp_path / f"data{suffix}", members))
    wrong: list[object] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(16):
            try:
                wrong.extend([i] * (refs[i].read() != members[f"{i:02d}.png"]))
            except Exception as error:  # two threads in one stream
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_compressed_tar_can_be_read_backwards(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", {f"{i}.png": png(i) for i in range(5)})
    refs = list_images(archive)
    assert [value(ref) for ref in reversed(refs)] == [4, 3, 2, 1, 0]
