"""The pages as blocks of code: which there are, and where the tests run each of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

#: All pages, in the order in which their commands are run.
PAGES = (
    "README.md",
    "cli/README.md",
    "featdiff/README.md",
    "configs/README.md",
    "tests/README.md",
    "tests/benchmarks/RESULTS.md",
)

# Where a block is run. In one of two folders as a user would have them:
DEFAULT = "what featdiff demo leaves, with the default backbone (test_docs)"
SMALL = "a folder with a tiny backbone and a tiny pipeline (test_docs_other)"
STORE = "with an S3 store on loopback and a tiny model (test_docs_remote)"
PLUGIN = "that folder, in a process of its own: the block registers a score (test_docs_other)"
# ... or where something is missing, and the error says what:
HUB = "without a hub (test_docs_other)"
DOWNLOAD = "without a download (test_docs_other)"
SERVER = "of and to a server (serving/test_serve_pages)"
NO_DATA = "without the data that it measures (test_docs_other)"
# ... or it is about the checkout:
SETUP = "compared with .ci/run (test_docs_other)"
INSTALL = "extras and options are looked up (test_docs_other)"
PYTEST = "the files that it names are looked up (test_docs_other)"
LINT = "on the checkout (test_code)"
SCRIPT = "with --help (test_code)"
COMPLETION = "typed with a home of its own (cli/test_completion)"
SBATCH = "as each task of the array (serving/test_schedulers)"
INDEXED_JOB = "as each index of the job (serving/test_schedulers)"
CRON = "as cron runs it (serving/test_watch_command)"
RAY = "on a cluster of two nodes (serving/test_ray)"
UPDATED = "on a small model (cli/test_update)"
FIFTYONE = "with FiftyOne and its database, where they are installed (detectors/test_fiftyone)"
API = "into a temporary folder (test_api_pages)"
# ... or its content is checked:
CONTAINER = "its user, health check and command (serving/test_serve_pages)"
CONFIG = "featdiff train --config (test_docs_other)"
PIPELINE = "in a folder with photos and images (cli/test_pipelines)"
ON_HUB = "with a hub on loopback (files/test_hub)"
SUITE = "read as a suite (test_docs_other)"
ENTRY_POINTS = "compared with the score that it names (test_docs_other)"
ANSWER = "compared with what featdiff score prints (test_docs)"
AUDITED = "compared with what featdiff audit prints (test_docs)"
EVALUATED = "compared with what featdiff eval prints (test_docs)"
DRAWING = "not run: a drawing for people"

#: Language -> (pattern, place); the first pattern that is found decides. What fits none fails a test.
RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "bash": (
        (r"^python3 -m venv", SETUP),
        (r"^(\.venv/bin/)?pip install", INSTALL),
        (r"^\.venv/bin/python -m pytest", PYTEST),
        (r"^\.venv/bin/ruff", LINT),
        (r"^\.venv/bin/python tests/(benchmarks|fuzz)/", SCRIPT),
        (r"^\.venv/bin/python tests/api_pages", API),
        (r"^\.venv/bin/featdiff .*FOLDER", NO_DATA),
        (r"^featdiff score --manifest .* --ray", RAY),
        (r"^featdiff train --backbone resnet50$", HUB),
        (r"^featdiff train photos/ --mode pixel -o", DOWNLOAD),
        (r"^featdiff .*s3://", STORE),
        (r"^featdiff update ", UPDATED),
        (r"^featdiff train .*--log-to ", PIPELINE),
        (r"^featdiff (push|score .*-m org/)", ON_HUB),
        (r"^featdiff (train|score) .*(ddpm|--features|test_resnet|featdiff-export)", SMALL),
        (r"^featdiff (backbones|doctor|export)", SMALL),
        (r"^(FEATDIFF_\w+=\S+ )?featdiff (audit|train|score|explain|eval|bench|info|outliers|harden)", DEFAULT),
        (r"^featdiff (manifest|merge|features|recalibrate|compare|watch) ", DEFAULT),
        (r"^find (images|test) ", DEFAULT),
        (r"^featdiff serve|^curl .*127\.0\.0\.1:8000", SERVER),
        (r"_FEATDIFF_COMPLETE=", COMPLETION),
    ),
    "python": (
        (r"^@register", PLUGIN),
        (r"s3://", STORE),
        (r"detectors\.updating", UPDATED),
        (r"push_to_hub", ON_HUB),
        (r"pyod_detector", SMALL),
        (r"fiftyone_fields", FIFTYONE),
        (r"127\.0\.0\.1:8000", SERVER),
        (r"JoinedDetector", SMALL),
        (r"featdiff\.audit\(|groups=rows", DEFAULT),
        (r"load_detector|hardened/student", DEFAULT),
        (r"squeezenet1_1|ddpm/|embeddings\.npy|featdiff-export", SMALL),
    ),
    "makefile": ((r"featdiff score", PIPELINE),),
    "sh": ((r"^#SBATCH ", SBATCH),),
    "crontab": ((r"featdiff watch", CRON),),
    "yaml": ((r"^stages:", PIPELINE), (r"^kind: Job$", INDEXED_JOB)),
    "dockerfile": ((r"^FROM ", CONTAINER),),
    "toml": (
        (r"^\[detector\]", CONFIG),
        (r"^\[\[tasks\]\]", SUITE),
        (r'^\[project\.entry-points\."featdiff\.scores"\]', ENTRY_POINTS),
    ),
    "text": (
        (r"^verdict +p-value +score .*\n.* featdiff-demo/mixed/", AUDITED),
        (r"^verdict +p-value +score", ANSWER),
        (r"featdiff finds .* of the OOD images", EVALUATED),
        (r"──>|->", DRAWING),
    ),
}

#: Commands that end with another code than 0, and why.
EXPECTED = {
    "featdiff score images/": 3,  # images/ holds a broken file
    "featdiff score images/ -m my-model --fpr 0.05 -o scores.csv": 3,
    "featdiff score images/ -m my-model --top 5 --copy-to flagged": 3,
    "featdiff score images/ -m my-model --report report.html -o reported.csv": 3,
    "featdiff score images/ -m my-model --fdr 0.2 -o marked.csv": 3,
    "featdiff score images/ -m my-model --alarms-per-day 100 --rate 2000": 3,
    "featdiff score images/ -m my-model -o long.csv --resume": 3,
    "featdiff score images/ -m my-model --raw-csv -o raw.csv": 3,
    "featdiff score images/ -m my-model -o logged.csv --log-format json": 3,
    "featdiff score images/ -m my-model -o logged.csv -q --log-file run.log": 3,
    "featdiff score images/ -m ddpm-model --figure inpaintings.png": 3,
    "featdiff score --manifest manifest.parquet --out scored --shard 2/2 -m my-model": 3,
    "featdiff merge scored -o scores.parquet --report scores.html": 3,
    "featdiff watch digits/ -m my-model -o strange.jsonl --once --on-alarm cat": 4,
    "find images -name '*.png' | featdiff score - --fail-on-ood": 4,  # images/ holds digits
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or one line of a block of commands."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def place(self) -> str:
        """Where it is run; empty if no rule says so."""
        rules = RULES.get(self.language, ())
        return next((place for pattern, place in rules if re.search(pattern, self.text, flags=re.M)), "")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def all_pages() -> list[str]:
    """Every Markdown file of the checkout, but for those in folders that tools make."""
    made = {"node_modules", "build", "dist", "site-packages"}
    names = [file.relative_to(ROOT) for file in ROOT.rglob("*.md")]
    return sorted(name.as_posix() for name in names if not _is_made(name, made))


def _is_made(name: Path, made: set[str]) -> bool:
    folders = name.parts[:-1]
    return name.parts[0] == "featdiff_cli" or any(part in made or part.startswith(".") for part in folders)


def blocks(page: str) -> list[Block]:
    """All blocks of a page, in order; of commands, each line is one."""
    found: list[Block] = []
    fence = None
    lines = read(page).splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if fence is None:
            fence = number
            continue
        language = lines[fence - 1].removeprefix("```").strip()
        content = lines[fence : number - 1]
        if language == "bash":
            found += [Block(page, fence + i, language, text) for i, text in enumerate(content, 1) if text.strip()]
        else:
            found.append(Block(page, fence + 1, language, "\n".join(content) + "\n"))
        fence = None
    assert fence is None, f"{page}:{fence}: a block without an end"
    return found


def blocks_at(*places: str, language: str = "bash") -> list[Block]:
    """Blocks of one language from all pages that are run at any of these places, in order."""
    everything = [block for page in PAGES for block in blocks(page)]
    return [block for block in everything if block.language == language and block.place in places]


def commands_at(*places: str) -> list[str]:
    """The same for commands, each once."""
    return list(dict.fromkeys(block.text for block in blocks_at(*places)))


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    text = re.sub(r"[`*_]|\[([^]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: str) -> set[str]:
    """All headings of a page, as anchors."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.M)}


def links(page: str) -> list[str]:
    """Targets of all links of a page to other files or headings, not to other sites."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def broken_links(page: str) -> list[str]:
    """Links whose file or heading is not there."""
    broken = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        headings = anchors(file.resolve().relative_to(ROOT).as_posix()) if anchor and file.exists() else {anchor}
        if not file.exists() or anchor not in headings:
            broken.append(target)
    return broken
