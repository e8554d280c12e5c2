"""The picture of an explanation: one scale for all images, nothing red below the threshold, and two whole files."""

from __future__ import annotations

import io
import itertools
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from featdiff.exceptions import FeatdiffError
from featdiff.report.explanation_page import Page, draw
from featdiff.report.explanations import save_explanation
from featdiff.report.heatmaps import overlay, scale_ends
from featdiff.verdicts.explanation import Contribution, Explanation, Neighbor

WIDTH, HEIGHT = 60, 40


def explanation(**changes: Any) -> Explanation:
    """Of a grey picture with a ramp of heat: 0 at the left, 4 at the right; the threshold is 2, the top 3."""
    heat = np.linspace(0, 4, WIDTH, dtype=np.float32)[None].repeat(HEIGHT, 0)
    whole = {
        "path": "photos/a.png",
        "status": "ok",
        "reason": "",
        "ood_score": 3.0,
        "p_value": 0.01,
        "is_ood": True,
        "fpr": 0.05,
        "threshold": 1.5,
        "layers": {"stage1": 2.0},
        "heads": (Contribution("layer_stage1", "fine texture and colour", 2.0, 3.5), Contribution("x", "y", -1, -0.5)),
        "reasons": ("Flagged.", "Fine texture and colour are very unusual, and so is everything else about it."),
        "size": (600, 400),
        "picture": Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128)),
        "heat": heat,
        "heat_threshold": 2.0,
        "heat_top": 3.0,
        "nearest": (Neighbor("b.png", 0.5, Image.new("RGB", (96, 20))), Neighbor("image 17", 0.7)),
    }
    return Explanation(**{**whole, **changes})


def rgb(picture: Image.Image | None) -> np.ndarray:
    assert picture is not None
    return np.asarray(picture).astype(int)


def test_nothing_below_the_threshold_is_warm_and_everything_above_is() -> None:
    found = explanation()
    assert found.heat is not None
    colours = rgb(overlay(found))
    warm = colours[..., 0] > colours[..., 2] + 10
    np.testing.assert_array_equal(warm, found.heat > 2.0)


def test_exactly_the_threshold_is_normal() -> None:
    for value, is_warm in ((2.0, False), (np.nextafter(np.float32(2.0), np.float32(9)) + 1e-4, True)):
        colours = rgb(overlay(explanation(heat=np.full((HEIGHT, WIDTH), value, dtype=np.float32))))
        assert (colours[..., 0] > colours[..., 2] + 10).all() == is_warm


def test_the_scale_does_not_depend_on_the_image() -> None:
    """The same heat has the same colour beside hotter and colder places."""
    found = explanation()
    assert found.heat is not None
    colder = found.heat.copy()
    colder[:, WIDTH // 2 :] = 0.0
    np.testing.assert_array_equal(
        rgb(overlay(found))[:, : WIDTH // 2], rgb(overlay(replace(found, heat=colder)))[:, : WIDTH // 2]
    )
    assert scale_ends(found) == scale_ends(replace(found, heat=colder)) == (1.0, 3.0)


def test_what_was_not_seen_is_grey_and_neither_normal_nor_strange() -> None:
    found = explanation()
    assert found.heat is not None
    heat = found.heat.copy()
    heat[:, :10] = np.nan
    heat[:, -10:] = np.nan
    colours = rgb(overlay(replace(found, heat=heat)))
    assert len({tuple(colour) for colour in colours[:, :10].reshape(-1, 3)}) == 1
    np.testing.assert_array_equal(colours[:, :10], colours[:, -10:])
    red, green, blue = colours[0, 0]
    assert red == green == blue
    assert tuple(colours[0, 12]) != (red, green, blue)


def test_there_is_no_overlay_without_a_heat_map() -> None:
    assert overlay(explanation(heat=None)) is None


THIN = {"picture": Image.new("RGB", (1, 300)), "size": (1, 300)}
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "no heat map": {"heat": None},
    "no nearest images": {"nearest": ()},
    "no contributions": {"heads": ()},
    "nothing but a verdict": {"heat": None, "heads": (), "layers": {}, "nearest": (), "reasons": ()},
    "no picture": {"heat": None, "picture": None, "size": (0, 0)},
    "a thin picture": {**THIN, "heat": np.zeros((300, 1), dtype=np.float32)},
    "a thin picture without heat": {**THIN, "heat": None},
    "unseen everywhere": {"heat": np.full((HEIGHT, WIDTH), np.nan, dtype=np.float32)},
    "a formula": {"path": "$x^{2 costs $5.png", "reasons": ("$\\frac{",)},
    "other scripts": {"path": "Zürich/日本/😀\x1b[31m\udcff.png", "nearest": (Neighbor("日本.png", 1.0),)},
    "long names": {"path": "a" * 4000, "nearest": (Neighbor("b" * 4000, 1.0),), "reasons": ("word " * 300,)},
    "many parts": {"heads": tuple(Contribution(f"layer_{i}", "shapes", i, i) for i in range(40))},
    "no threshold to speak of": {"heat_top": 2.0, "threshold": -3.0},
}


@pytest.mark.parametrize("case", CASES)
def test_it_can_be_drawn(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Image.open(io.BytesIO(draw(explanation(**CASES[case]))))
    assert page.width == 1300
    assert 250 < page.height < 4000
    assert (np.asarray(page.convert("L")) < 100).any()


def test_the_page_shows_verdict_map_and_original() -> None:
    """Red stands in the title of a flagged image and in its map, and nowhere on the page of a normal one."""

    def reds(**changes: Any) -> int:
        page = np.asarray(Image.open(io.BytesIO(draw(explanation(**changes)))).convert("RGB")).astype(int)
        return int(((page[..., 0] > 150) & (page[..., 1] < 70) & (page[..., 2] < 70)).sum())

    flagged = reds(heat=None)
    assert flagged > 500
    assert reds() > flagged + 1000
    assert reds(heat=None, is_ood=False) == 0


LABELS = ("distance from normal images in content", "fine texture and colour", "shapes and parts")
BELOW = tuple(
    Contribution(f"layer_{i}", label, -0.1, amount) for i, label in enumerate(LABELS) for amount in (0, -0.03)
)
FLAT = Image.new("RGB", (300, 40))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"heads": BELOW},
        {"heads": BELOW, "heat": None},
        {"heads": BELOW[:1], "p_values": {"global": 0.0123, "local": 0.000123}, "p_value": 0.000123},
        {"heads": (Contribution("a", LABELS[0], -40, -40), Contribution("b", LABELS[1], 90, 90))},
        {"picture": FLAT, "heat": np.full((40, 300), np.nan, dtype=np.float32), "size": (3000, 400)},
        CASES["many parts"],
        CASES["long names"],
    ],
)
def test_nothing_is_written_over_something_else(changes: dict[str, Any]) -> None:
    figure = Page(explanation(**changes)).draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) > 15
    for (text, box), (other, beside) in itertools.combinations(boxes, 2):
        across = min(box.x1, beside.x1) - max(box.x0, beside.x0)
        down = min(box.y1, beside.y1) - max(box.y0, beside.y0)
        assert across <= 0 or down <= 2, f"{text!r} and {other!r}"
    for text, box in boxes:
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, text
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height, text


def test_both_files_are_written(tmp_path: Path) -> None:
    files = save_explanation(tmp_path / "new" / "folder", "a", explanation())
    assert (
        sorted(file.name for file in files)
        == ["a.json", "a.png"]
        == sorted(file.name for file in (tmp_path / "new" / "folder").iterdir())
    )
    facts = json.loads((tmp_path / "new" / "folder" / "a.json").read_text(encoding="utf-8"))
    assert facts == explanation().to_json()
    assert facts["nearest"] == [{"path": "b.png", "distance": 0.5}, {"path": "image 17", "distance": 0.7}]


def test_json_holds_awkward_names(tmp_path: Path) -> None:
    name = "\x00\x1b[31m\u2028\udcff\n日本.png"
    save_explanation(tmp_path, "a", explanation(path=name))
    text = (tmp_path / "a.json").read_bytes()
    assert b"\x1b" not in text
    assert json.loads(text)["path"] == name


def test_an_unreadable_image_has_no_picture(tmp_path: Path) -> None:
    unreadable = explanation(status="unreadable", reason="torn", picture=None, heat=None, p_value=np.nan)
    assert [file.name for file in save_explanation(tmp_path, "a", unreadable)] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text())["p_value"] is None


def test_a_full_disk_leaves_nothing(mounted: Callable[[Path, str], Path], tmp_path: Path) -> None:
    folder = mounted(tmp_path / "disk", "16k")
    with pytest.raises(FeatdiffError, match="a cannot be written: No space left on device"):
        save_explanation(folder, "a", explanation())
    assert list(folder.iterdir()) == []
