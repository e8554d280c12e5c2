"""The map of the house: which room may import which. A new room fails here until it is on the map."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "featdiff"

#: room -> rooms it may import; ``exceptions`` is open to all
MAY_IMPORT: dict[str, set[str]] = {
    "exceptions": set(),
    "allocator": set(),
    "sources": set(),
    "images": {"sources"},
    "samples": set(),
    "backbones": {"images"},
    "taps": set(),
    "features": {"backbones", "images", "taps"},
    "store": {"images", "persist"},
    "labels": {"sources"},
    "masks": set(),
    "pixels": {"images"},
    "noise": set(),
    "denoisers": set(),
    "processes": set(),
    "training": {"noise", "processes"},
    "reconstruct": {"noise"},
    "residuals": set(),
    "distances": {"backbones", "features", "residuals"},
    "fusion": set(),
    "neighbors": set(),
    "gaussian": set(),
    "calibration": set(),
    "metrics": set(),
    "scores": set(),
    "arrays": set(),
    "report": {"scores"},
    "hub": set(),
    "persist": {"hub"},
    "detectors": {
        *("sources", "images", "backbones", "features", "store", "noise", "denoisers", "training", "reconstruct"),
        *("residuals", "neighbors", "fusion", "calibration", "persist", "scores", "masks", "pixels", "distances"),
        *("hub", "taps", "processes"),
    },
    "outliers": {
        *("calibration", "detectors", "features", "labels", "neighbors", "noise", "persist", "reconstruct", "store"),
        *("backbones", "hub", "taps"),
    },
    "guard": {"detectors", "features", "calibration", "images", "persist", "store"},
    "hardening": {
        *("backbones", "calibration", "detectors", "features", "guard", "images", "labels", "outliers", "persist"),
        *("processes", "sources", "store", "training"),
    },
    "exporting": {"calibration", "detectors", "features", "guard", "persist"},
    "verifying": {"calibration", "detectors", "exporting", "guard", "store"},
    "comparison": set(),
    "rivals": {"features", "gaussian", "neighbors", "store"},
    "evaluation": {"detectors", "features", "sources", "images", "labels", "store", "metrics", "rivals"},
    "ablation": {"backbones", "detectors", "hardening", "outliers", "settings", "sources", "store"},
    "settings": set(),
    "suites": {"evaluation", "settings", "sources"},
    "bench": {
        "ablation",
        "hardening",
        "detectors",
        "evaluation",
        "rivals",
        "sources",
        "images",
        "labels",
        "store",
        "suites",
    },
}
#: what a library room must never know of
FOREIGN = {"click", "rich", "featdiff_cli", "cli"}


def rooms() -> dict[str, list[Path]]:
    """Room name -> its files; a room is a module or a sub-package of featdiff."""
    found: dict[str, list[Path]] = {}
    for file in sorted(LIBRARY.rglob("*.py")):
        room = file.relative_to(LIBRARY).parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, []).append(file)
    return found


def imported(file: Path) -> tuple[set[str], set[str]]:
    """(featdiff rooms, foreign top-level packages) that a file imports, at any depth of nesting."""
    inside, outside = set(), set()
    depth = len(file.relative_to(LIBRARY).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
            inside |= {a.name.split(".")[1] for a in node.names if a.name.startswith("featdiff.")}
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            module = (node.module or "").split(".")[0]
            inside |= {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            outside.add(node.module.split(".")[0])
            if node.module.startswith("featdiff"):
                inside |= set(node.module.split(".")[1:2]) or {alias.name for alias in node.names}
    return inside, outside


def test_every_room_is_on_the_map() -> None:
    assert set(rooms()) == set(MAY_IMPORT)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_rooms_import_only_what_the_map_allows(room: str) -> None:
    for file in rooms()[room]:
        inside, outside = imported(file)
        assert inside <= MAY_IMPORT[room] | {"exceptions"}, file.name
        assert not outside & FOREIGN, file.name


def test_the_map_has_no_cycles() -> None:
    left = dict(MAY_IMPORT)
    while left:
        free = [room for room, needs in left.items() if not needs & set(left)]
        assert free, f"cycle among {sorted(left)}"
        for room in free:
            del left[room]


def test_the_reader_of_this_test_sees_forbidden_imports(tmp_path: Path) -> None:
    """The check itself works: each spelling of an import is recognised."""
    file = LIBRARY / "noise.py"
    assert imported(file)[0] == {"exceptions"}
    assert "torch" in imported(file)[1]
    assert imported(LIBRARY / "detectors" / "heads.py")[0] >= {"noise", "denoisers", "residuals"}


def test_the_pixel_mode_looks_at_features_only_for_the_distance_that_is_one() -> None:
    """LMD shares rooms with the feature mode, but not its eyes."""
    for name in ("pixel_diffusion", "pixel_heads", "pixel_parts", "journal", "pipelines"):
        tree = ast.parse((LIBRARY / "detectors" / f"{name}.py").read_text())
        makers = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "make_distances"]
        allowed = [node for maker in makers for node in ast.walk(maker)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "features":
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
    for file in [*LIBRARY.rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        assert len(file.read_text().splitlines()) <= 450, file.name
