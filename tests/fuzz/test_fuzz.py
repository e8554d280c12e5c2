"""A short seeded run of each fuzz target, and whether the harness would notice what it looks for."""

from __future__ import annotations

import os
import random
import sys
import warnings
from pathlib import Path

import pytest

from fuzz.harness import Figures, Target, check, replay, run, run_one
from fuzz.images import seeds
from fuzz.mutators import IN_IMAGES, mutate
from fuzz.place import Place, Wrong, make_place
from fuzz.targets import TARGETS

#: Cases of each target: a few seconds.
CASES = {"images": 12, "archives": 25, "models": 20, "vectors": 25, "configs": 150, "file_names": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(name: str, place: Place, tmp_path: Path) -> None:
    figures = run(TARGETS[name], place, 0, CASES[name], tmp_path)
    assert figures.cases == CASES[name]
    assert figures.rows > 0
    assert figures.kinds == {}, figures.alike


def test_seeds_are_of_all_formats() -> None:
    assert len(seeds()) == 58
    assert len({Path(name).suffix for name in seeds()}) == 10
    assert len(set(seeds().values())) == 58


# ---- the harness would notice ----


def _target(check_files, shrinks: bool = False) -> Target:  # type: ignore[no-untyped-def]
    def make(rng: random.Random, folder: Path, place: Place) -> None:
        for name in "abc":
            (folder / name).write_text(str(rng.random()))

    return Target("sample", make, check_files, shrinks)


def _raises(folder: Path, place: Place) -> int:
    raise ValueError("no")


def _is_wrong(folder: Path, place: Place) -> int:
    raise Wrong("no")


def _prints(folder: Path, place: Place) -> int:
    os.write(2, b"libtiff: no\n")
    return 1


def _warns(folder: Path, place: Place) -> int:
    warnings.warn("no", stacklevel=1)
    return 1


@pytest.mark.parametrize(
    ("check_files", "kind"), [(_raises, "ValueError"), (_is_wrong, "wrong"), (_prints, "noise"), (_warns, "noise")]
)
def test_failures_are_seen_kept_and_replayed(check_files, kind: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    target = _target(check_files)
    figures = Figures()
    outcome, kept = run_one(target, None, 0, 7, tmp_path, figures)  # type: ignore[arg-type]
    assert outcome.kind == kind
    assert figures.kinds == {kind: 1}
    assert kept is not None
    assert replay(kept, {"sample": target}, None).kind == kind  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_seen(tmp_path: Path) -> None:
    def large(folder: Path, place: Place) -> int:
        return len(b"x" * (300 << 20))

    assert check(_target(large), tmp_path, None).peak > 250 << 20  # type: ignore[arg-type]


def test_the_file_that_fails_is_found(tmp_path: Path) -> None:
    def no_b(folder: Path, place: Place) -> int:
        if (folder / "b").exists():
            raise Wrong("b")
        return 1

    _, kept = run_one(_target(no_b, shrinks=True), None, 0, 0, tmp_path, Figures())  # type: ignore[arg-type]
    assert kept is not None
    assert {file.name for file in kept.iterdir()} == {"b", "target.json"}


def test_cases_are_the_same_for_the_same_seed() -> None:
    for data in seeds().values():
        first, second = (mutate(data, random.Random(3), [b"other"], IN_IMAGES) for _ in range(2))
        assert first == second
