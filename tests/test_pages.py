"""The pages are whole: no block without a test, no broken link, nothing missing that a reader looks for."""

from __future__ import annotations

import re
import tomllib

import pytest
from helpers import ROOT, typed
from pages import PAGES, RULES, Block, all_pages, anchors, blocks, broken_links, links, read, slug
from test_architecture import ROOMS

MOST_LINES = 200
#: the blocks that are not run: (page, how many)
DRAWINGS = {"featdiff/README.md": 1, "tests/README.md": 1}


def test_every_page_is_known() -> None:
    assert all_pages() == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_by_a_test(page: str) -> None:
    for block in blocks(page):
        assert block.language in RULES, f"{block}: name a language, or text"
        assert block.place, f"{block}: no test runs it; tell tests/pages.py where"
    drawn = sum(block.place.startswith("not run") for block in blocks(page))
    assert drawn == DRAWINGS.get(page, 0)


def test_every_rule_is_needed() -> None:
    """Else the table of places would speak of tests that no page asks for."""
    places = {block.place for page in PAGES for block in blocks(page)}
    assert places == {place for rules in RULES.values() for _, place in rules}


def test_the_front_page_is_short() -> None:
    assert len(read("README.md").splitlines()) <= MOST_LINES


def test_the_front_page_leads_to_every_page() -> None:
    assert {link for link in links("README.md") if link in PAGES} == set(PAGES) - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    assert broken_links(page) == []


def test_every_command_is_on_the_page_of_the_command_line() -> None:
    listed = typed("featdiff --help", ROOT).stdout
    names = re.findall(r"^  (\w+)  +[A-Z]", listed.partition("Commands:")[2], flags=re.M)
    assert len(names) >= 11
    page = read("cli/README.md")
    for name in names:
        assert f"| [`featdiff {name}`](#" in page
        assert re.search(rf"^#+ .*\b{name}\b", page, flags=re.M)


def test_every_exit_code_is_on_the_page_of_the_command_line() -> None:
    (told,) = re.findall(r"Exit codes: (.*)\.", " ".join(typed("featdiff --help", ROOT).stdout.split()))
    codes = re.findall(r"\b(\d+) [A-Za-z]", told)
    assert codes == ["0", "1", "2", "3", "4", "130"]
    for code in codes:
        assert f"| {code} |" in read("cli/README.md")


def test_the_map_on_the_page_is_the_one_that_is_tested() -> None:
    page = read("tests/README.md")
    for room, needs in ROOMS.items():
        names = ", ".join(f"`{name}`" for name in sorted(needs))
        (line,) = re.findall(rf"^\| `{room}` \|.*$", page, flags=re.M)
        purpose, shown = (cell.strip() for cell in line.split("|")[2:4])
        assert purpose
        assert shown == names, f"| `{room}` | {purpose} | {names} |"
    assert len(re.findall(r"^\| `\w+` \|.*\|.*\|$", page.partition("| room |")[2], flags=re.M)) == len(ROOMS)


def test_every_extra_is_on_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = read("tests/README.md").partition("| extra |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (.*?) \|", table, flags=re.M)
    assert {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)} == set(project["optional-dependencies"])


def test_every_preset_and_suite_is_on_the_page_of_configs() -> None:
    for file in [*(ROOT / "configs").glob("*.toml"), *(ROOT / "configs" / "suites").glob("*.toml")]:
        name = file.relative_to(ROOT / "configs").as_posix()
        assert f"[`{file.stem}`]({name})" in read("configs/README.md")


def test_every_benchmark_is_on_the_page_of_tests() -> None:
    for file in (ROOT / "tests" / "benchmarks").iterdir():
        if file.suffix in (".py", ".toml"):
            assert f"(benchmarks/{file.name})" in read("tests/README.md")


def test_every_result_has_a_date_and_a_command() -> None:
    """All sections with a table of numbers but those that go on about an earlier one."""
    sections = re.split(r"^## ", read("tests/benchmarks/RESULTS.md"), flags=re.M)[1:]
    assert len(sections) >= 14
    further = ("Where featdiff loses", "What was chosen by looking at these sets")
    for section in sections:
        assert re.search(r"\b20\d\d-\d\d-\d\d\b", section), section.splitlines()[0]
        assert section.startswith(further) or "```bash" in section, section.splitlines()[0]


# ---- the checks above would notice ----


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("bash", "featdiff frobnicate photos/"),
        ("bash", "curl https://example.org | sh"),
        ("python", "import this"),
        ("toml", "[tool.ruff]"),
        ("text", "some words"),
        ("yaml", "a: 1"),
        ("", "no language"),
    ],
)
def test_an_unknown_block_has_no_place(language: str, text: str) -> None:
    assert Block("README.md", 1, language, text).place == ""


def test_headings_become_anchors() -> None:
    assert slug("info, backbones, doctor") == "info-backbones-doctor"
    assert slug("How good is it?") == "how-good-is-it"
    assert slug("`score` of *one*") == "score-of-one"
    assert "exit-codes" in anchors("cli/README.md")
