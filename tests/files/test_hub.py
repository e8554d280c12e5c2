"""Models on the hub, with the real client on a hub on loopback: to it and back, what is refused, and the card."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import READER, WRITER, Hub, Repository, serving_hub
from helpers import ROOT, fails
from pages import ON_HUB, blocks_at, commands_at

from featdiff import Detector, FeatureDiffusion
from featdiff.detectors.model_card import model_card
from featdiff.detectors.pushing import push_model
from featdiff.exceptions import ModelError, UsageError
from featdiff.files.hub import check_token, is_repository, split_revision
from featdiff.files.model_folder import load, locate


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub: Hub, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """``org/tiny``, pushed by the command line."""
    home = tmp_path_factory.mktemp("home")
    done = commands(hub, home, ["push", str(tiny_model), "org/tiny"], token=WRITER)
    assert done[0]["code"] == 0, done
    assert f"on the hub: {hub.url}/org/tiny/commit/" in done[0]["err"]
    return "org/tiny"


def process(hub: Hub, home: Path, code: str) -> str:
    """What a Python program prints for which this is the hub; nothing of a token is on its streams or in its home."""
    environment = hub.environment(home)
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, cwd=home, timeout=200)
    assert done.returncode == 0, done.stderr
    for secret in (WRITER, READER):
        assert secret not in done.stdout + done.stderr
        assert not any(secret.encode() in file.read_bytes() for file in home.rglob("*") if file.is_file())
    return done.stdout


def commands(
    hub: Hub, home: Path, *lines: list[str], token: str = "", tokens: list[str] | None = None
) -> list[dict[str, Any]]:
    """Code, output and errors of each command; all have one token, or each its own."""
    (home / "tokens.json").write_text(json.dumps(tokens or [token] * len(lines)))
    code = f"""
import json, pathlib
file = pathlib.Path("tokens.json")
tokens = json.loads(file.read_text())
file.unlink()
from importlib.metadata import entry_points
from click.testing import CliRunner
(script,) = entry_points(group="console_scripts", name="featdiff")
for line, token in zip({lines!r}, tokens):
    done = CliRunner().invoke(script.load(), line, prog_name="featdiff", env={{"HF_TOKEN": token or None}})
    print(json.dumps({{"code": done.exit_code, "out": done.stdout, "err": done.stderr}}))
"""
    return [json.loads(line) for line in process(hub, home, code).splitlines()]


# ---- there and back ----


def test_what_is_pushed_is_what_is_loaded(hub: Hub, pushed: str, tiny_model: Path, tmp_path: Path) -> None:
    """Config, tensors and a card, in one commit; a second command finds them in the cache."""
    repository = hub.repositories[pushed]
    assert len(repository.commits) == 2  # the hub's own first, and this
    files = repository.commits[repository.branches["main"]]
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (tiny_model / name).read_bytes()

    told = commands(hub, tmp_path, ["info", pushed], ["info", f"{pushed}@main"])
    digest = load(tiny_model)[0]["digest"]
    assert all(command["code"] == 0 and digest in command["out"] for command in told)


def test_rows_of_a_model_from_the_hub_are_those_of_the_folder(
    hub: Hub, pushed: str, tiny_detector: Detector, few_images: Path, tmp_path: Path
) -> None:
    line = ["score", str(few_images), "-q", "--format", "jsonl", "-m"]
    (scored,) = commands(hub, tmp_path, [*line, pushed])
    rows = [json.loads(row) for row in scored["out"].splitlines()]
    expected = tiny_detector.score(few_images)
    assert [row["path"] for row in rows] == expected.path
    assert [row["ood_score"] for row in rows] == pytest.approx(expected.ood_score, abs=1e-4)


def test_all_kinds_of_detectors(hub: Hub, tmp_path: Path) -> None:
    """Vectors, pixels, and a guard on a module of one's own: pushed, and loaded from a branch of a private repository.

    ``token`` is given to each call; the environment has none.
    """
    code = f"""
import numpy as np, torch
from PIL import Image
from classifiers import RECIPE, loader, resnet, some_images
from small_pixels import PIXEL
from featdiff import FeatureDiffusion, Guard, PixelDetector, load_detector

W, R = {WRITER[:6]!r} + {WRITER[6:]!r}, {READER[:6]!r} + {READER[6:]!r}
rows = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
given = dict(private=True, revision="trial", token=W, license="mit")
read = dict(revision="trial", token=R)

vectors = FeatureDiffusion(recipe={{"epochs": 2, "min_steps": 20}}).fit(rows)
print(vectors.push_to_hub("org/vectors", **given))
again = FeatureDiffusion.from_pretrained("org/vectors", **read)
assert np.array_equal(again.score_samples(rows), vectors.score_samples(rows))

noise = [Image.fromarray(a) for a in np.random.default_rng(1).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)]
pixel = PixelDetector(**PIXEL, cache="cache").fit(noise)
pixel.push_to_hub("org/pixel", **given)
for again in (PixelDetector.from_pretrained("org/pixel", **read), load_detector("org/pixel@trial", token=R)):
    assert np.allclose(again.score(noise[:4]).ood_score, pixel.score(noise[:4]).ood_score, atol=1e-4)

network = resnet()
guard = Guard(network, recipe=RECIPE, fpr=0.1, calibration=0.2, cache="cache").fit(loader(some_images(60, seed=1)))
guard.push_to_hub("org/guard", **given)
again = Guard.from_pretrained("org/guard", network, **read)
pictures = some_images(4, seed=2)
assert torch.allclose(again(pictures)[1].ood_score, guard(pictures)[1].ood_score, atol=1e-4)
"""
    assert process(hub, tmp_path, code).startswith(f"{hub.url}/org/vectors/commit/")
    for name in ("org/vectors", "org/pixel", "org/guard"):
        repository = hub.repositories[name]
        assert repository.private
        assert set(repository.commits[repository.branches["main"]]) == {".gitattributes"}
        card = repository.commits[repository.branches["trial"]]["README.md"].decode()
        assert header_of(card)["license"] == "mit"


def test_a_card_of_ones_own_and_foreign_files_stay(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    """What lies beside the model is not sent; a card in the folder is sent as it is."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    (folder / ".gitattributes").write_text("* text\n")
    (folder / "secret.txt").write_text("not for the hub")
    assert Detector.from_pretrained(folder).n_images_ == 390  # strict loading does not mind them
    (done,) = commands(hub, tmp_path, ["push", str(folder), "org/own", "-q"], token=WRITER)
    assert (done["code"], done["err"]) == (0, "")
    repository = hub.repositories["org/own"]
    files = repository.commits[repository.branches["main"]]
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert files["README.md"].decode().endswith("# Mine\n")
    assert files[".gitattributes"].startswith(b"*.safetensors")


def test_the_pages(hub: Hub, tiny_model: Path, few_images: Path, tmp_path: Path) -> None:
    """Their commands in order, and then the block of Python, with a model and images of these names."""
    shutil.copytree(tiny_model, tmp_path / "my-model")
    shutil.copytree(few_images, tmp_path / "test")
    lines = [shlex.split(line)[1:] for line in commands_at(ON_HUB)]
    assert [line[0] for line in lines] == ["push", "push", "score"]
    for line, done in zip(lines, commands(hub, tmp_path, *lines, token=WRITER), strict=True):
        assert done["code"] == 0, (line, done)
    assert len((tmp_path / "from-the-hub.csv").read_text().splitlines()) == 7

    card = hub.repositories["org/name"]
    assert header_of(card.commits[card.branches["main"]]["README.md"].decode())["license"] == "apache-2.0"
    (block,) = blocks_at(ON_HUB, language="python")
    login = f"import os; os.environ['HF_TOKEN'] = {WRITER[:6]!r} + {WRITER[6:]!r}\n"
    assert process(hub, tmp_path, login + block.text).startswith(f"{hub.url}/org/name/commit/")


# ---- images on the hub ----


def test_images_of_a_dataset_on_the_hub(
    hub: Hub, tiny_model: Path, tiny_detector: Detector, few_images: Path, tmp_path: Path
) -> None:
    """``hf://``: a folder, a pattern, a revision, a file that is not there, and one that is private."""
    repository = Repository(private=False)
    files = {f"train/{file.name}": file.read_bytes() for file in few_images.iterdir()}
    repository.commit("v1", {"README.md": b"# photos"} | files)
    repository.commit("main", {"README.md": b"# photos", "other/a.png": files["train/a.png"]})
    hub.repositories["org/photos"] = repository
    closed = Repository(private=True)
    closed.commit("main", {"a.png": files["train/a.png"]})
    hub.repositories["org/closed"] = closed

    line = ["score", "-q", "--format", "jsonl", "-m", str(tiny_model)]
    root = "hf://datasets/org/photos"
    sources = [f"{root}@v1/train", f"{root}@v1/train/[ab].png", f"{root}/other/a.png", f"{root}/other/none.png"]
    told = commands(hub, tmp_path, *([*line, source] for source in [*sources, "hf://datasets/org/closed/a.png"]))
    rows = [[json.loads(row) for row in done["out"].splitlines()] for done in told]

    expected = tiny_detector.score(few_images)
    assert [row["path"] for row in rows[0]] == [f"{root}@v1/train/{name}.png" for name in "abcdef"]
    assert [row["ood_score"] for row in rows[0]] == pytest.approx(expected.ood_score, abs=1e-4)
    assert [row["ood_score"] for row in rows[1]] == pytest.approx(expected.ood_score[:2], abs=1e-4)
    assert [row["ood_score"] for row in rows[2]] == pytest.approx(expected.ood_score[:1], abs=1e-4)
    for done, (row,), reason in zip(told[3:], rows[3:], ["no such object", "access is refused: "], strict=True):
        assert (done["code"], row["status"]) == (3, "unreadable")
        assert row["reason"].startswith(reason)


# ---- what is refused ----


def test_errors_are_one_line(hub: Hub, pushed: str, tiny_model: Path, tmp_path: Path) -> None:
    """A repository or revision that is missing, wrong tokens or none; nothing is made or changed on the hub."""
    push = ["push", str(tiny_model), "-q", "org/new"]
    cases = [
        ("", ["info", "org/gone"], 1, "there is no such repository"),
        ("", ["info", f"{pushed}@v9"], 1, "no such revision"),
        ("", push, 1, "valid token: hf auth login"),
        ("hf_wrong", ["info", pushed], 1, "valid token"),
        ("hf_wrong", push, 1, "valid token"),
        (READER, push, 1, "no right to do that"),
        (WRITER, [*push[:-1], pushed, "--private"], 2, f"--private: {pushed} exists and everybody can see it"),
    ]
    before = len(hub.repositories), len(hub.repositories[pushed].commits)
    told = commands(hub, tmp_path, *(line for _, line, _, _ in cases), tokens=[token for token, *_ in cases])
    for (token, line, code, words), done in zip(cases, told, strict=True):
        assert done["code"] == code, (line, done)
        (error,) = done["err"].splitlines()
        assert error.startswith("Error: ") and words in error and "a bug" not in error
        assert not token or token not in error
    assert before == (len(hub.repositories), len(hub.repositories[pushed].commits))


def test_a_hub_that_is_not_there(tiny_model: Path, tmp_path: Path) -> None:
    with serving_hub() as gone:
        pass
    load_it, push_it = commands(
        gone, tmp_path, ["info", "org/x"], ["push", str(tiny_model), "org/x", "-q"], token=WRITER
    )
    for done in (load_it, push_it):
        assert done["code"] == 1
        assert len(done["err"].splitlines()) == 1


def test_requests_that_make_no_sense(tiny_model: Path, tmp_path: Path, featdiff_cli: Any) -> None:
    fails(featdiff_cli("push", tiny_model, "no-slash", "-q"), 2, "'no-slash' is no repository on the hub: ")
    fails(featdiff_cli("push", tmp_path / "gone", "org/name"), 1, "no featdiff model at")
    fails(featdiff_cli("push", tiny_model, "a b/c", "-q"), 2, "is no repository")
    with pytest.raises(UsageError, match="is a folder, and only a repository"):
        Detector.from_pretrained(tiny_model, revision="main")
    with pytest.raises(UsageError, match="names another revision than v2"):
        locate("org/name@v1", revision="v2")
    with pytest.raises(ModelError, match="at revision v1: there is no such folder"):
        locate(tmp_path / "gone", revision="v1")
    (tmp_path / "student").mkdir()
    (tmp_path / "guard").mkdir()
    fails(featdiff_cli("push", tmp_path, "org/name"), 1, f"no featdiff model at {tmp_path / 'guard'}")


@pytest.mark.parametrize("token", ["", "hf_secret\n", "hf secret", "hf_sécret", "hf_\x00secret"])
def test_what_cannot_be_a_token_is_not_shown(token: str, tiny_model: Path) -> None:
    """The client's own library would print the header whole."""
    for call in (
        lambda: check_token(token),
        lambda: Detector.from_pretrained("org/name", token=token),
        lambda: push_model(tiny_model, "org/name", token=token),
    ):
        with pytest.raises(UsageError, match="token is not one of the hub's") as refused:
            call()
        assert "cret" not in str(refused.value)


def test_names() -> None:
    assert split_revision("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    assert split_revision("org/name@") == ("org/name", None)
    assert is_repository("org/name@refs/pr/1") and is_repository("org/name")
    assert not is_repository("./name@v1") and not is_repository("name@v1") and not is_repository("/a@v1")


def test_a_folder_with_an_at_sign_is_a_folder(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "org").mkdir()
    shutil.copytree(tiny_model, tmp_path / "org" / "model@v1")
    monkeypatch.chdir(tmp_path)
    assert Detector.from_pretrained("org/model@v1").n_images_ == 390


# ---- the card ----


def header_of(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, flags=re.S)
    assert match
    header: dict[str, Any] = yaml.safe_load(match[1])
    return header


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> dict[str, Any]:
    return load(tiny_model)[0]


def as_default(config: dict[str, Any], backbone: str, tag: str, source: str) -> dict[str, Any]:
    return config | {
        "backbone": config["backbone"] | {"tag": tag, "source": source},
        "settings": config["settings"] | {"backbone": backbone},
    }


def test_the_card_names_backbone_and_licence_as_timm_has_them(config: dict[str, Any]) -> None:
    card = model_card(as_default(config, "resnet50", "resnet50.a1_in1k", "hub"), "org/name")
    header = header_of(card)
    assert header["base_model"] == "timm/resnet50.a1_in1k"
    assert header["library_name"] == "featdiff"
    assert {"featdiff", "timm", "out-of-distribution-detection"} <= set(header["tags"])
    assert "license" not in header  # of the model, which nobody has named
    assert "| licence of the backbone | apache-2.0 |" in card
    assert "arXiv:2110.00476" in card


@pytest.mark.parametrize(
    ("backbone", "source", "base"),
    [("hf-hub:org/net", "hub", "org/net"), ("test_resnet", "file x.safetensors", None), ("mine", "module", None)],
)
def test_the_card_claims_no_origin_that_is_not_known(
    config: dict[str, Any], backbone: str, source: str, base: str | None
) -> None:
    card = model_card(as_default(config, backbone, "test_resnet.r160_in1k", source), "org/name")
    assert header_of(card).get("base_model") == base
    assert "not known here" in card


def test_the_card_says_how_many_images_and_which_rates(config: dict[str, Any]) -> None:
    card = model_card(config, "org/name", held="paths")
    for words in (
        "| trained on | 390 different images",
        "ranks among 78 held-out images. So false-alarm rates from\n0.013 up",
        "the default is 0.05",
        config["digest"],
        'Detector.from_pretrained("org/name")',
        "**The files hold paths of training images.**",
        "exchangeability",
        "Nothing is known here. `featdiff eval",
    ):
        assert words in card, words
    assert "paths of training" not in model_card(config, "org/name")


def test_the_card_shows_an_evaluation(
    tiny_model: Path, sample_folders: dict[str, Path], tmp_path: Path, featdiff_cli: Any
) -> None:
    """Of ``featdiff eval --json``, in a table and in the header; a local path of the test images is not told."""
    sets = ["--id", sample_folders["test"], "--ood", f"di|gits={sample_folders['digits']}"]
    measured = featdiff_cli("eval", *sets, "-m", tiny_model, "--json", "-q")
    file = tmp_path / "evaluation.json"
    file.write_text(measured.stdout)
    done = featdiff_cli("push", tiny_model, "org/name", "--results", file, "--dry-run", "-q")
    assert (done.exit_code, done.stderr) == (0, "")

    pair = json.loads(measured.stdout)["pairs"][0]["heads"]["featdiff"]
    assert f"| di\\|gits | matched | 130 | 200 | {100 * pair['auroc']:.1f} % (" in done.stdout
    (entry,) = header_of(done.stdout)["model-index"]
    first, second = entry["results"]
    assert {metric["name"]: metric["value"] for metric in first["metrics"]} == {
        "AUROC": pytest.approx(pair["auroc"], abs=1e-4),
        "FPR@95TPR": pytest.approx(pair["fpr95"], abs=1e-4),
    }
    assert (first["dataset"]["config"], second["dataset"]["config"]) == ("matched", "as-published")
    assert str(sample_folders["test"]) not in done.stdout


def test_the_card_shows_a_self_check(config: dict[str, Any]) -> None:
    assert "Self-check: 93.0 % of synthetic outliers" in model_card(config, "org/name", results={"self_check": 0.93})


@pytest.mark.parametrize(
    "results",
    [
        {"pairs": [{"ood": "x"}]},
        {"something": 1},
        {"pairs": 3},
        {"self_check": 93},
        {"self_check": "nan"},
        {"self_check": float("nan")},
    ],
    ids=str,
)
def test_other_results_are_refused(config: dict[str, Any], results: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="featdiff eval --json"):
        model_card(config, "org/name", results=results)


def test_a_file_of_other_results_is_refused(tiny_model: Path, tmp_path: Path, featdiff_cli: Any) -> None:
    file = tmp_path / "results.json"
    for text in ("[]", "{", '{"pairs": []}'):
        file.write_text(text)
        fails(featdiff_cli("push", tiny_model, "org/name", "--dry-run", "-q", "--results", file), 2, "--results")


def test_the_card_of_vectors(tmp_path: Path) -> None:
    import numpy as np

    rows = np.random.default_rng(0).normal(size=(100, 4))
    FeatureDiffusion(recipe={"epochs": 1, "min_steps": 5}).fit(rows).save_pretrained(tmp_path / "model")
    card = model_card(load(tmp_path / "model")[0], "org/rows")
    assert "featdiff score --features ROWS.npy -m org/rows" in card
    assert "base_model" not in header_of(card)
