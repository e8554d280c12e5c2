"""The page of a run without a browser: what it says, how large it is, and that names of files stay text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_pages import CALIBRATION, FPR, HOSTILE, made_up, pictures, write_page

from featdiff.exceptions import FeatdiffError
from featdiff.report.cards import Names
from featdiff.report.html import save_report
from featdiff.report.rows import ReportRows
from featdiff.verdicts.explanation import Explanation, Neighbor


class Page(HTMLParser):
    """Elements and text of a page, as a parser of another make sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.contents: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.contents:
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            self.inside.remove(tag)

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.contents[self.inside[-1]].append(data)
        else:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.contents["script"][0])
        return found


def read(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def test_the_page_counts_as_the_rows_do(tmp_path: Path) -> None:
    scores = made_up(400)
    page = read(write_page(tmp_path / "a.html", scores))
    text = " ".join(" ".join(page.words).split())
    assert f"{scores.flagged} of 400 images are unlike the normal ones" in text
    assert "200 held-out normal images" in text
    assert "my-model" in text
    assert text.count("empty file (0 bytes)") == 8
    positions = [int(path[-9:-4]) for path in scores.sorted().path[:100]]
    gone = sum(at % 10 == 9 for at in positions)  # these cannot be read any more
    assert 0 < gone < 50
    assert len(page.all("article")) == 100 - gone


def test_rows_for_the_script_are_those_of_the_run(tmp_path: Path) -> None:
    scores = made_up(400)
    data = read(write_page(tmp_path / "a.html", scores)).data
    rows, levels = data["rows"], data["levels"]
    expected = [row for row in scores.sorted() if row.status == "ok"]
    folders = [rows["folders"][i] for i in rows["folder"]]
    assert [f"/data/photos/{a}/{b}" for a, b in zip(folders, rows["name"], strict=True)] == [r.path for r in expected]
    assert [levels["p"][i] for i in rows["p"]] == [row.p_value for row in expected]
    assert rows["score"] == pytest.approx([row.ood_score for row in expected], rel=1e-3)
    assert [column["label"] for column in rows["more"]] == ["stage1", "stage4"]
    assert rows["more"][0]["values"] == pytest.approx([row.layers["stage1"] for row in expected], rel=1e-3)
    assert data["calibration"]["scores"] == pytest.approx(CALIBRATION.scores[::-1].tolist(), rel=1e-4)


def test_every_further_column_is_there(tmp_path: Path) -> None:
    scores = made_up(30)
    scores.extra = {"group": ["7"] * 30, "nearest": [f"/data/photos/other_{i}.jpg" for i in range(30)]}
    data = read(write_page(tmp_path / "a.html", scores)).data
    group, nearest, *layers = data["rows"]["more"]
    assert (group["label"], group["text"], group["values"]) == ("group", True, ["7"] * 30)
    assert sorted(nearest["values"]) == sorted(f"other_{i}.jpg" for i in range(30))
    assert len(layers) == 2


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    scores = made_up(60, HOSTILE)
    file = write_page(tmp_path / "a.html", scores, facts={name: name for name in HOSTILE})
    page = read(file)
    assert len(page.all("script")) == 2
    assert all((picture["src"] or "").startswith("data:image/") for picture in page.all("img"))
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    text = "".join(page.words)
    for name in HOSTILE:
        assert (name if name != "\u202egnp.exe" else "\\u202egnp.exe") in text
    assert set(page.data["rows"]["name"]) >= {"{{ 7 * 7 }}.png", "\\u202egnp.exe", "${alert(1)}.png"}


def test_nothing_is_loaded_and_the_policy_names_what_may_run(tmp_path: Path) -> None:
    page = read(write_page(tmp_path / "a.html", made_up(60)))
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for rule, content in (("script-src", page.contents["script"][1]), ("style-src", page.contents["style"][0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    addresses = [
        value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert all(value and value.startswith(("data:", "#")) for value in addresses)
    assert not re.search(r"https?://|url\(|@import", file_without_data(tmp_path / "a.html"))


def file_without_data(file: Path) -> str:
    return re.sub(r"data:image[^\"]*", "", file.read_text(encoding="utf-8"))


def test_ten_thousand_rows_stay_below_three_megabytes(tmp_path: Path) -> None:
    """With noise for pictures, which no format makes smaller, and a path in a further column."""
    scores = made_up(10_000)
    scores.extra = {"nearest": scores.path[::-1]}
    rng = np.random.default_rng(0)

    def noise(positions: list[int]) -> list[Image.Image]:
        return [Image.fromarray(rng.integers(0, 256, (200, 224, 3), dtype=np.uint8)) for _ in positions]

    rows = ReportRows()
    rows.add(scores)
    save_report(tmp_path / "a.html", rows, FPR, CALIBRATION, pictures=noise)
    size = (tmp_path / "a.html").stat().st_size
    assert 2e6 < size < 3e6
    assert len(read(tmp_path / "a.html").all("article")) >= 10


def test_long_names_and_many_layers_leave_the_page_small(tmp_path: Path) -> None:
    scores = made_up(10_000)
    scores.path = [path.replace(".jpg", "-" + "x" * 60 + ".jpg") for path in scores.path]
    scores.layers = {f"blocks.{i}": np.random.default_rng(i).normal(size=10_000) for i in range(12)}
    page = read(write_page(tmp_path / "a.html", scores))
    assert (tmp_path / "a.html").stat().st_size < 3e6
    assert len(page.data["rows"]["name"]) == 9_800  # all of them, with JavaScript
    rows = len(page.all("tr")) - 1 - 201  # without the heads, and without unreadable ones
    assert 4_000 < rows < 9_800
    assert f"These are the {rows:,} strangest. With JavaScript, all 9,800 are listed." in "".join(page.words)


def test_as_many_pictures_as_asked_for(tmp_path: Path) -> None:
    for images, expected in ((0, 0), (7, 7), (150, 150)):
        rows = ReportRows()
        rows.add(made_up(200))
        save_report(
            tmp_path / "a.html",
            rows,
            FPR,
            CALIBRATION,
            images=images,
            pictures=lambda positions: [Image.new("RGB", (9, 9))] * len(positions),
        )
        assert len(read(tmp_path / "a.html").all("article")) == expected


def test_explanations_are_shown_where_there_are_some(tmp_path: Path) -> None:
    asked: list[list[int]] = []
    scores = made_up(300)
    scores.p_values = {"local": scores.p_value}
    scores.layers["stage1"][:] = -0.001

    def explain(positions: list[int]) -> list[Explanation]:
        asked.append(positions)
        return [explanation_of(scores, at, readable=at % 2 == 0) for at in positions]

    rows = ReportRows()
    rows.add(scores)
    save_report(tmp_path / "a.html", rows, FPR, CALIBRATION, images=30, pictures=pictures, explain=explain)
    strangest, positions = rows.strangest()
    (first,) = asked
    assert first == sorted(positions[:24].tolist())  # 24 is less than a tenth of them

    page = read(tmp_path / "a.html")
    text = " ".join(page.words)
    explained = sum(at % 2 == 0 for at in first)
    assert text.count("Fine texture is unusual.") == explained
    assert "".join(page.words).count("normal_<i>.png") == explained
    assert "/train/" in page.words  # named once, not with each of these
    gone = sum(at % 10 == 9 for at in positions[:30])
    assert len(page.all("article")) == 30 - gone
    assert text.count("p local") == 30 - gone  # known of every image, explained or not
    assert not re.search(r"-0\.0+\b", text)

    # each heat map stands above its scale, whose middle is the threshold
    assert " ".join(text.split()).count("normal threshold strange") == explained
    assert [bar.get("fill") for bar in page.all("rect")].count("url(#heat-scale)") == explained
    assert [colours["id"] for colours in page.all("lineargradient")] == ["heat-scale"]
    colours = {stop["offset"]: stop["stop-color"] for stop in page.all("stop")}
    assert list(colours) == ["0%", "49.9%", "50%", "70%", "85%", "100%"]
    assert (colours["49.9%"], colours["50%"]) == ("#8fadcc", "#ffdb66")


def explanation_of(scores: Any, at: int, readable: bool) -> Explanation:
    picture = Image.new("RGB", (20, 10)) if readable else None
    return Explanation(
        path=scores.path[at],
        status="ok" if readable else "unreadable",
        reason="",
        ood_score=1.0,
        p_value=0.01,
        is_ood=True,
        fpr=FPR,
        threshold=1.0,
        reasons=("Fine texture is unusual.",),
        size=(20, 10),
        picture=picture,
        heat=np.ones((10, 20)) if readable else None,
        heat_threshold=0.5,
        heat_top=1.0,
        nearest=(Neighbor("/train/normal_<i>.png", 0.1, Image.new("RGB", (8, 8))),),
    )


@pytest.mark.parametrize("count", [1, 2])
def test_few_images(tmp_path: Path, count: int) -> None:
    text = " ".join(" ".join(read(write_page(tmp_path / "a.html", made_up(count))).words).split())
    assert f"of {count} image" in text
    assert ("image is unlike the normal ones" in text) == (count == 1)
    assert ("If all 2 were normal, about one or none would be flagged" in text) == (count == 2)


def test_only_unreadable_images(tmp_path: Path) -> None:
    scores = made_up(60)[:1]
    page = read(write_page(tmp_path / "a.html", scores))
    assert "0 of 1 image" in " ".join(" ".join(page.words).split())
    assert page.data["rows"]["name"] == []
    assert "empty file (0 bytes)" in "".join(page.words)


def test_audits_compare_with_themselves(tmp_path: Path) -> None:
    scores = made_up(100)[2:]
    rows = ReportRows()
    rows.add(scores)
    save_report(tmp_path / "a.html", rows, FPR)
    page = read(tmp_path / "a.html")
    assert page.data["calibration"] is None
    assert page.data["smallest"] == 1 / 98
    assert "are marked as odd" in " ".join(" ".join(page.words).split())


def test_an_audit_shows_what_is_nearest(tmp_path: Path) -> None:
    scores = made_up(100)[2:]
    scores.extra = {"nearest": [scores.path[0]] * len(scores)}  # picture 2 is the nearest to all
    rows = ReportRows()
    rows.add(scores)
    save_report(tmp_path / "a.html", rows, FPR, images=20, pictures=pictures)
    page = read(tmp_path / "a.html")
    assert " ".join(page.words).count("Nearest other image") == 9  # a tenth of 98
    shown = [picture["src"] for picture in page.all("img")]
    assert max(map(shown.count, shown)) >= 9
    assert "Normal images" not in page.words


def test_a_full_disk_leaves_the_older_page(tmp_path: Path, mounted: Any) -> None:
    disk = mounted(tmp_path / "disk", "64k")
    (disk / "a.html").write_text("older")
    with pytest.raises(FeatdiffError, match="cannot be written: No space left"):
        write_page(disk / "a.html", made_up(2000))
    assert [file.name for file in disk.iterdir()] == ["a.html"]
    assert (disk / "a.html").read_text() == "older"


def test_a_shared_folder_is_named_once() -> None:
    assert Names.of(["/a/b/c.png", "/a/bc/d.png"]).root == "/a/"
    assert Names.of(["a/b.png", "a/c.png"]).short("a/c.png") == "c.png"
    assert Names.of(["a/b.png", "c.png"]).root == ""
    assert Names.of(["/b.png", "/c.png"]).root == "/"
    assert Names.of([]).root == ""
