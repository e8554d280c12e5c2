"""The map of the house: which room may import which. A new room fails here until it is on the map."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from helpers import ROOT

LIBRARY = ROOT / "featdiff"

#: room -> rooms it may import, from the ground up; ``exceptions`` is open to all
ROOMS: dict[str, set[str]] = {
    "exceptions": set(),
    "verdicts": set(),
    "files": set(),
    "runtime": {"files"},
    "data": {"files", "runtime"},
    "exported": {"data", "runtime", "verdicts"},
    "report": {"files", "verdicts"},
    "features": {"data", "files", "runtime"},
    "diffusion": {"files", "runtime"},
    "scores": {"data", "diffusion", "features", "runtime"},
    "detectors": {"data", "diffusion", "features", "files", "runtime", "scores", "verdicts"},
    "guard": {"data", "detectors", "features", "files", "runtime"},
    "outliers": {"data", "detectors", "diffusion", "features", "files", "runtime", "scores"},
    "export": {"data", "detectors", "exported", "features", "files", "guard", "runtime", "scores", "verdicts"},
    "hardening": {"data", "detectors", "diffusion", "features", "files", "guard", "outliers", "runtime", "verdicts"},
    "evaluation": {
        *("data", "detectors", "features", "files", "hardening", "outliers", "runtime", "scores", "verdicts"),
    },
    "serving": {"data", "detectors", "exported", "files", "hardening", "report", "runtime", "verdicts"},
}
#: inside these rooms: file -> files beside it that it may import
FILES: dict[str, dict[str, set[str]]] = {
    "diffusion": {
        "schedules": set(),
        "lfdn": set(),
        "unet": set(),
        "masks": set(),
        "pretrained": set(),
        "loss": {"schedules"},
        "training": {"loss", "schedules"},
        "fit": {"schedules", "training"},
        "reconstruction": {"schedules"},
    },
    "scores": {
        "residuals": set(),
        "fusion": set(),
        "neighbors": set(),
        "coded": {"neighbors"},
        "coreset": {"neighbors"},
        "gaussian": set(),
        "registry": set(),
        "distances": {"residuals"},
        "logits": {"registry"},
        "nearest": {"coded", "neighbors", "registry"},
        "compiled": {"fused"},
        "near_copies": {"fusion", "neighbors", "registry"},
        "baselines": {"gaussian", "neighbors", "registry"},
        "denoising": set(),
        "diffusion": {"denoising", "fusion", "registry", "residuals"},
        "inpainting": set(),
        "fused": {"diffusion", "fusion", "registry"},
        "local": {"diffusion", "fusion"},
        "joint": {"local"},
    },
}
#: what the library must never know of
FOREIGN = {"click", "rich", "featdiff_cli", "cli"}
MOST_FOLDERS = 16


def imported(source: str, package: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Dotted names of all that a file below ``package`` imports, at any depth of nesting.

    Each is the tuple of its parts; a name taken from a module follows it: ``from ..data import labels`` in
    ``featdiff.features`` gives ``("featdiff", "data", "labels")``.
    """
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            found |= {(*module, alias.name) for alias in node.names}
    return found


def package_of(file: Path) -> tuple[str, ...]:
    return file.relative_to(ROOT).parent.parts


def rooms_of(file: Path) -> set[str]:
    """Rooms of the library that a file imports from, other than its own."""
    own = file.relative_to(LIBRARY).parts[0]
    names = {parts[1] for parts in imported(file.read_text(), package_of(file)) if parts[0] == "featdiff"}
    return names - {own}


def files_of(room: str) -> list[Path]:
    folder = LIBRARY / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def circle(needs: Mapping[str, Iterable[str]]) -> list[str]:
    """What is left when everything that needs nothing left is taken away, again and again; empty without a circle."""
    left = {name: set(others) for name, others in needs.items()}
    while free := [name for name, others in left.items() if not others & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_room_is_on_the_map() -> None:
    names = {path.name.removesuffix(".py") for path in LIBRARY.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names - {"__init__", "__pycache__"} == set(ROOMS)


def test_the_top_of_the_library_is_short() -> None:
    assert {path.name for path in LIBRARY.glob("*.py")} == {"__init__.py", "exceptions.py"}
    assert len(set(ROOMS) - {"exceptions"}) <= MOST_FOLDERS


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_map_allows(room: str) -> None:
    used: set[str] = set()
    for file in files_of(room):
        names = rooms_of(file)
        assert names <= ROOMS[room] | {"exceptions"}, file.name
        used |= names
    assert used - {"exceptions"} == ROOMS[room]  # the map shows the house, not what it might be


@pytest.mark.parametrize("room", ROOMS)
def test_the_library_knows_nothing_of_the_command_line(room: str) -> None:
    for file in files_of(room):
        outside = {parts[0] for parts in imported(file.read_text(), package_of(file))}
        assert not outside & FOREIGN, file.name


def test_rooms_stand_on_rooms_below() -> None:
    below: set[str] = set()
    for room, needs in ROOMS.items():
        assert needs <= below, room
        below.add(room)


@pytest.mark.parametrize("room", FILES)
def test_files_import_only_what_the_map_allows(room: str) -> None:
    files = {file.stem: file for file in files_of(room) if file.stem != "__init__"}
    assert set(files) == set(FILES[room])
    for name, file in files.items():
        inside = {p[2] for p in imported(file.read_text(), package_of(file)) if p[:2] == ("featdiff", room)}
        assert inside & set(files) == FILES[room][name], name


def file_of(parts: tuple[str, ...], files: Mapping[str, Path]) -> str:
    """The file that an imported name comes from; empty if it is not ours."""
    for end in range(len(parts), 0, -1):
        for name in (".".join(parts[:end]), ".".join((*parts[:end], "__init__"))):
            if name in files:
                return name
    return ""


def test_no_file_is_part_of_a_circle() -> None:
    files = {".".join((*package_of(file), file.stem)): file for file in LIBRARY.rglob("*.py")}
    del files["featdiff.__init__"]  # the public face names everything, for type checkers alone
    needs = {
        name: {file_of(parts, files) for parts in imported(file.read_text(), package_of(file))} - {name}
        for name, file in files.items()
    }
    assert circle(needs) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import torch.nn", ("torch", "nn")),
        ("import featdiff.data.labels as names", ("featdiff", "data", "labels")),
        ("from featdiff import data", ("featdiff", "data")),
        ("from featdiff.data import labels", ("featdiff", "data", "labels")),
        ("from . import hooks", ("featdiff", "features", "hooks")),
        ("from .hooks import pool", ("featdiff", "features", "hooks", "pool")),
        ("from .. import data", ("featdiff", "data")),
        ("from ..data import labels as names", ("featdiff", "data", "labels")),
        ("def f():\n    if True:\n        from ..data.labels import list_labelled", ("featdiff", "data", "labels")),
    ],
)
def test_the_reader_of_this_test_sees_each_spelling(line: str, found: tuple[str, ...]) -> None:
    (parts,) = imported(line, ("featdiff", "features"))
    assert parts[: len(found)] == found


def test_the_reader_of_this_test_sees_circles() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": []}) == []
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"], "d": []}) == ["a", "b", "c"]


def test_the_pixel_mode_looks_at_features_only_for_the_distance_that_is_one() -> None:
    """LMD shares rooms with the feature mode, but not its eyes."""
    for name in ("detectors/pixel", "scores/inpainting", "detectors/pixel_parts", "detectors/training_log"):
        tree = ast.parse((LIBRARY / f"{name}.py").read_text())
        makers = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "make_distances"]
        allowed = [node for maker in makers for node in ast.walk(maker)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("extractor"):
                assert node in allowed, name


def test_the_feature_mode_does_not_wait_for_what_the_others_need() -> None:
    heavy = ("diffusers.models.unets.unet_2d", "lpips", "torchmetrics", "sklearn")
    code = f"import sys, featdiff.detectors; print([name for name in {heavy} if name in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert seen == "[]\n"


def test_command_modules_use_relative_imports_only() -> None:
    for file in (ROOT / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] not in ("cli", "featdiff_cli"), file.name


def test_files_stay_small() -> None:
    """By statements, not lines: air between steps costs nothing."""
    for file in [*LIBRARY.rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        tree = ast.parse(file.read_text())
        assert sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) <= 220, file.name
