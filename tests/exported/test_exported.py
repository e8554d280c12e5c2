"""Exported detectors without torch: the same rows as the detector, by the library and by the command line."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from defect_pictures import SIDE, plates
from helpers import fails
from image_files import encoded, exif, rotated
from PIL import Image
from small_detectors import MODULE, stack, tiny_net, to_tensor

from featdiff import Detector, ExportedDetector, Scores
from featdiff.data.listing import Listing
from featdiff.data.references import iter_images
from featdiff.exceptions import ModelError, UsageError
from featdiff.export.export import LIMIT, export
from featdiff.exported.layout import FORMAT_VERSION, is_exported

Cli = Callable[..., Result]
ENGINES = ("onnxruntime", "openvino")
#: What may not be imported where there is no torch: it, what needs it, and what scoring does not need.
FORBIDDEN = (
    *("torch", "torchvision", "timm", "diffusers", "safetensors", "einops", "huggingface_hub", "tqdm"),
    *("sklearn", "scipy", "matplotlib", "jinja2", "platformdirs", "onnx"),
)
WITHOUT_TORCH = f"""
import sys

class Forbidding:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN}:
            raise ImportError(f"{{name}} is forbidden here")

sys.meta_path.insert(0, Forbidding())
"""


def written(detector: Detector, folder: Path) -> Path:
    export(detector, folder, ["onnx"])
    return folder


@pytest.fixture(scope="module")
def exported(tiny_detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the exported tiny detector; do not change it."""
    return written(tiny_detector, tmp_path_factory.mktemp("exported"))


@pytest.fixture
def changed(exported: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of its file with other metadata; None takes an entry away."""

    def change(**entries: object) -> Path:
        model = onnx.load(exported / "model.onnx")
        facts = {entry.key: entry.value for entry in model.metadata_props}
        for key, value in entries.items():
            facts[key] = json.dumps(value)
            if value is None:
                del facts[key]
        del model.metadata_props[:]
        for key, text in facts.items():
            model.metadata_props.add(key=key, value=text)
        file = tmp_path / "changed.onnx"
        onnx.save(model, file)
        return file

    return change


@pytest.fixture(scope="module")
def pictures(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of all kinds, among them strange ones and ones that cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    tile = Image.open(sorted(sample_folders["test"].iterdir())[0]).convert("RGB")
    for file in (*sorted(sample_folders["test"].iterdir())[1:9], *sorted(sample_folders["digits"].iterdir())[:3]):
        shutil.copy(file, folder)
    for width, height in ((90, 30), (30, 90), (200, 120), (1000, 8), (1, 1)):
        tile.resize((width, height)).save(folder / f"{width}x{height}.png")

    tile.convert("L").save(folder / "grey.png")
    alpha = tile.convert("RGBA")
    alpha.putalpha(tile.convert("L"))
    alpha.save(folder / "alpha.png")
    tile.quantize(16).save(folder / "palette.png")
    deep = np.asarray(tile.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    tile.resize((60, 40)).save(folder / "rotated.jpg", exif=exif(rotated(6)))
    tile.resize((3001, 2000)).save(folder / "large.jpg")
    tile.convert("CMYK").save(folder / "print.jpg")
    tile.save(folder / "pages.tif", save_all=True, append_images=[tile])

    (folder / "broken.jpg").write_bytes(encoded(tile, "JPEG")[:200])
    (folder / "empty.png").write_bytes(b"")
    return folder


def same(given: Scores, expected: Scores) -> None:
    """Equal columns, texts, p-values and verdicts; scores up to rounding."""
    assert given.columns == expected.columns
    assert (given.path, given.status, given.reason) == (expected.path, expected.status, expected.reason)
    assert given.fpr == expected.fpr
    np.testing.assert_array_equal(given.p_value, expected.p_value)
    np.testing.assert_array_equal(given.is_ood, expected.is_ood)
    np.testing.assert_allclose(given.ood_score, expected.ood_score, rtol=LIMIT, atol=LIMIT)
    for name, values in expected.layers.items():
        np.testing.assert_allclose(given.layers[name], values, rtol=LIMIT, atol=LIMIT)
    for name, values in expected.p_values.items():
        np.testing.assert_array_equal(given.p_values[name], values)


# ---- the library ----


@pytest.mark.parametrize("engine", ENGINES)
def test_pictures_of_all_kinds_have_the_rows_of_the_detector(
    tiny_detector: Detector, exported: Path, pictures: Path, engine: str
) -> None:
    detector = ExportedDetector(exported, engine=engine)
    assert detector.engine.startswith(engine)
    expected = tiny_detector.score(pictures)
    assert 0 < expected.flagged < len(expected) - 5
    assert expected.status.count("unreadable") == 2 and any("page" in reason for reason in expected.reason)
    same(detector.score(pictures), expected)


def test_a_model_that_was_loaded_is_exported_for_all_sizes(
    tiny_detector: Detector, pictures: Path, tmp_path: Path
) -> None:
    """Its extractor keeps passes for sizes that it meets; the exporter's have none."""
    tiny_detector.save_pretrained(tmp_path / "model")
    detector = Detector.from_pretrained(tmp_path / "model", cache=tmp_path / "cache")
    same(ExportedDetector(written(detector, tmp_path / "exported")).score(pictures), tiny_detector.score(pictures))


@pytest.mark.parametrize("fpr", [0.15, 0.4])
def test_any_rate_that_the_calibration_supports(
    tiny_detector: Detector, exported: Path, pictures: Path, fpr: float
) -> None:
    given = ExportedDetector(exported).score(pictures, fpr=fpr)
    same(given, tiny_detector.score(pictures, fpr=fpr))
    assert given.flagged != tiny_detector.score(pictures).flagged


def test_a_rate_that_it_does_not_support(exported: Path, pictures: Path) -> None:
    with pytest.raises(UsageError, match=r"^fpr 0.001 needs at least 999 held-out images .* ask for fpr 0.013 or more"):
        ExportedDetector(exported).iter_scores(pictures, fpr=0.001)


@pytest.mark.parametrize("options", [{"image_batch": 1}, {"image_batch": 3, "workers": 3}, {"workers": 1}], ids=str)
def test_rows_do_not_depend_on_batches_order_and_workers(
    exported: Path, pictures: Path, options: dict[str, Any]
) -> None:
    files = sorted(pictures.iterdir())
    first = ExportedDetector(exported).score(files)
    second = ExportedDetector(exported, **options).score(files[::-1])
    order = np.arange(len(files))[::-1]
    same(second[order], first)
    np.testing.assert_allclose(second.ood_score[order], first.ood_score, rtol=1e-5, atol=1e-5)


def test_parts_come_in_order_and_tell_how_far_they_are(exported: Path, pictures: Path) -> None:
    told: list[tuple[str, int, int]] = []
    detector = ExportedDetector(exported, image_batch=2)
    parts = list(detector.iter_scores(pictures, progress=lambda *report: told.append(report)))
    count = len(list(pictures.iterdir()))
    assert len(parts) > 2
    assert told[-1] == ("scoring", count, count) and len(told) == len(parts)
    same(Scores.concatenate(parts), ExportedDetector(exported).score(pictures))


def test_a_listing_is_scored_like_its_list(exported: Path, pictures: Path) -> None:
    detector = ExportedDetector(exported)
    expected = detector.score(pictures)
    for source in (iter_images(pictures), Listing(iter_images(pictures))):
        found = Scores.concatenate(detector.iter_scores(source))
        assert found.path == expected.path
        np.testing.assert_allclose(found.ood_score, expected.ood_score, rtol=1e-5)


def test_arrays_and_pictures_in_memory(tiny_detector: Detector, exported: Path, pictures: Path) -> None:
    images = [np.asarray(Image.open(pictures / "alpha.png")), Image.open(pictures / "grey.png"), b"no picture"]
    same(ExportedDetector(exported).score(images), tiny_detector.score(images))


def test_a_detector_with_a_local_score(decided_locally: None, tmp_path: Path) -> None:
    view: dict[str, Any] = {"view": "squash", "size": SIDE, "pretrained": False, "layers": "layer1,layer2"}
    settings: dict[str, Any] = {"local": True, "recipe": {"epochs": 1, "min_steps": 20}, "calibration": 0.3, "fpr": 0.1}
    detector = Detector("test_resnet", **view, **settings).fit(plates(60, seed=0))
    assert detector.parts == ("global", "local")
    images = [*plates(4, seed=1), *plates(4, seed=2, defect=True)]
    given = ExportedDetector(written(detector, tmp_path)).score(images)
    same(given, detector.score(images))
    assert "p_value_local" in given.columns and len(set(given.p_values["local"])) > 2


def test_what_it_is(tiny_detector: Detector, exported: Path) -> None:
    detector = ExportedDetector(exported)
    assert (detector.fpr, detector.layers, detector.parts) == (0.05, ["layer1", "layer2", "layer4"], ())
    np.testing.assert_array_equal(detector.calibration_.scores, tiny_detector.calibration_.scores)
    assert repr(detector).startswith(
        "ExportedDetector(test_resnet.r160_in1k, 78 images for calibration, fpr=0.05, onnx"
    )


# ---- preprocessing of one's own, loaders ----


def prepare(picture: Image.Image) -> torch.Tensor:
    return to_tensor(picture.resize((32, 32)))


@pytest.fixture(scope="module")
def own(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Path]:
    """A detector on somebody's own network, and its exported folder."""
    arguments = MODULE | {"transform": prepare}
    detector = Detector(tiny_net(), **arguments).fit(stack(sorted(map(str, sample_folders["train"].iterdir()))[:100]))
    return detector, written(detector, tmp_path_factory.mktemp("own"))


def test_preprocessing_of_ones_own_must_be_given(own: tuple[Detector, Path], pictures: Path) -> None:
    detector, folder = own
    images = stack(sorted(map(str, pictures.glob("china*"))))
    with pytest.raises(UsageError, match="preprocessing of its own.* give ready batches, or a function") as error:
        ExportedDetector(folder).score(images)
    assert error.value.argument == "transform"
    for transform in (prepare, lambda picture: prepare(picture).numpy()):
        same(ExportedDetector(folder, transform=transform).score(images), detector.score(images))


def test_ready_batches(own: tuple[Detector, Path]) -> None:
    detector, folder = own
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    batches = [pixels[:3], pixels[3:]]
    same(ExportedDetector(folder).score(iter(batches)), detector.score(iter(batches)))

    broken = pixels.clone()
    broken[1, 0, 0, 0] = torch.nan
    scores = ExportedDetector(folder).score(iter([broken]))
    assert scores.status == ["ok", "unreadable", "ok", "ok", "ok"]
    assert scores.reason[1] == "it holds NaN or infinite values" and not scores.is_ood[1]


def test_ready_batches_of_another_size(own: tuple[Detector, Path]) -> None:
    with pytest.raises(ModelError, match=r"does not take a batch \(2, 3, 20, 32\): its height must be"):
        ExportedDetector(own[1]).score(iter([torch.rand(2, 3, 20, 32)]))


# ---- without torch ----


def run_without_torch(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    end = f"\nprint(sorted(set(sys.modules) & set({FORBIDDEN})))"
    command = [sys.executable, "-c", WITHOUT_TORCH + code + end]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_torch_is_really_forbidden(tmp_path: Path) -> None:
    done = run_without_torch("import featdiff; featdiff.Detector", tmp_path)
    assert done.returncode == 1 and "torch is forbidden here" in done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_the_library_needs_no_torch(
    tiny_detector: Detector, exported: Path, pictures: Path, tmp_path: Path, engine: str
) -> None:
    code = f"""
import json
from featdiff import ExportedDetector
scores = ExportedDetector({str(exported)!r}, engine={engine!r}).score({str(pictures)!r})
json.dump(list(scores.rows()), open("rows.json", "w"))
"""
    done = run_without_torch(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    rows_match(json.loads((tmp_path / "rows.json").read_text()), list(tiny_detector.score(pictures).rows()))


@pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet"])
def test_the_command_line_needs_no_torch(
    featdiff_cli: Cli, tiny_model: Path, exported: Path, pictures: Path, tmp_path: Path, format_: str
) -> None:
    """Same columns, rows, counts and exit code as the saved model gives."""
    arguments = ["score", str(pictures), "--fpr", "0.1", "-o"]
    code = f"""
from featdiff_cli import main
try:
    main([*{arguments!r}, "given.{format_}", "-m", {str(exported)!r}])
except SystemExit as end:
    assert end.code == 3, end.code
"""
    done = run_without_torch(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    wanted = featdiff_cli(*arguments, tmp_path / f"wanted.{format_}", "-m", tiny_model)
    assert wanted.exit_code == 3
    read = {"csv": rows_of_csv, "jsonl": rows_of_jsonl, "parquet": rows_of_parquet}[format_]
    rows_match(read(tmp_path / f"given.{format_}"), read(tmp_path / f"wanted.{format_}"))

    summary = [line.partition(" in ")[0] + line.partition("/s)")[2] for line in done.stderr.splitlines()]
    assert summary[0] in [line.partition(" in ")[0] + line.partition("/s)")[2] for line in wanted.stderr.splitlines()]


def rows_of_csv(file: Path) -> list[dict[str, Any]]:
    numeric = ("ood_score", "p_value")
    with file.open() as lines:
        rows: list[dict[str, Any]] = list(csv.DictReader(lines))
    for row in rows:
        for name, text in row.items():
            if name in numeric or name.startswith("layer_"):
                row[name] = float(text) if text else None
    return rows


def rows_of_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows_of_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return list(pyarrow.parquet.read_table(file).to_pylist())


def rows_match(given: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Rows as they are written: all equal but scores, which may differ by rounding."""
    assert len(given) == len(expected) > 0
    for row, wanted in zip(given, expected, strict=True):
        assert list(row) == list(wanted)
        for name, value in wanted.items():
            if name == "ood_score" or name.startswith("layer_"):
                value = value if value is None else pytest.approx(value, rel=LIMIT, abs=LIMIT)
            assert row[name] == value, (row["path"], name)


# ---- the command line ----


def test_the_file_itself_may_be_named(featdiff_cli: Cli, exported: Path, pictures: Path) -> None:
    files = [pictures / "grey.png", pictures / "90x30.png"]
    by_folder = featdiff_cli("score", *files, "-m", exported)
    by_file = featdiff_cli("score", *files, "-m", exported / "model.onnx")
    assert by_file.exit_code == by_folder.exit_code == 0, by_file.stderr
    assert by_file.stdout == by_folder.stdout and by_file.stdout.count("\n") == 3


def test_a_saved_model_comes_first(tiny_model: Path, exported: Path, tmp_path: Path) -> None:
    """Whoever exports into the model's own folder still has the model."""
    both = shutil.copytree(tiny_model, tmp_path / "both")
    assert not is_exported(both)
    shutil.copy(exported / "model.onnx", both)
    assert not is_exported(both) and is_exported(both / "model.onnx") and is_exported(exported)


def test_flagged_images_end_with_exit_code_4(featdiff_cli: Cli, exported: Path, pictures: Path) -> None:
    scores = ExportedDetector(exported).score(pictures)
    strange = scores.sorted()[0]
    assert strange.is_ood
    assert featdiff_cli("score", strange.path, "-m", exported, "--fail-on-ood", "-q").exit_code == 4


def test_an_interrupted_run_goes_on_with_the_same_file_only(
    featdiff_cli: Cli,
    exported: Path,
    changed: Callable[..., Path],
    few_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, rows = tmp_path / "whole.csv", tmp_path / "rows.csv"
    options = ("score", few_images, "--batch-size", 1, "-q", "-o")
    assert featdiff_cli(*options, whole, "-m", exported).exit_code == 0

    judge = ExportedDetector._judge
    with monkeypatch.context() as patch:
        patch.setattr(
            ExportedDetector,
            "_judge",
            lambda self, batch, fpr: judge(self, batch, fpr) if "d.png" not in batch.loaded[0].ref.path else stop(),
        )
        assert "; 3 rows are kept in " in featdiff_cli(*options, rows, "-m", exported).stderr

    resumed = (*options, rows, "--resume", "-m")
    fails(featdiff_cli(*resumed, changed(backbone="another")), 2, "another model (")
    assert featdiff_cli(*resumed, exported / "model.onnx").exit_code == 0
    assert rows.read_bytes() == whole.read_bytes()


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--exclude-known"], ["--exclude-known: ", "is an exported model", "give the saved one with -m"]),
        (["--figure", "x.png"], ["--figure: "]),
        (["--report", "x.html"], ["--report: "]),
        (["--report", "x.html", "--cache", "x"], ["--cache, --report: "]),
        (["--weights", "x.safetensors"], ["--weights: "]),
        (["--device", "cuda"], ["--device: ", "runs on the CPU"]),
        (["--engine", "torch"], ["--engine: ", "onnxruntime or openvino, not in 'torch'"]),
        (["--fpr", "0.001"], ["--fpr 0.001 needs at least 999"]),
    ],
)
def test_options_that_need_the_saved_model(
    featdiff_cli: Cli, exported: Path, pictures: Path, options: list[str], words: list[str]
) -> None:
    fails(featdiff_cli("score", pictures, "-m", exported, "-q", *options), 2, *words)


def test_info(featdiff_cli: Cli, exported: Path) -> None:
    result = featdiff_cli("info", exported)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = {line[:11].strip(): line[12:] for line in result.stdout.splitlines()}
    size = (exported / "model.onnx").stat().st_size / 1e6
    assert lines["exported"].startswith(f"{exported / 'model.onnx'} ({size:.1f} MB, format {FORMAT_VERSION}, ")
    assert lines["runs in"].startswith("onnxruntime ")
    assert lines["backbone"].startswith("test_resnet.r160_in1k, SHA-256 ")
    assert lines["pictures"] == "rectangle, about 160 x 160 pixels"
    assert lines["layers"] == "layer1, layer2, layer4" and lines["local score"] == "none"
    assert lines["calibrated"] == "78 held-out images; fpr 0.05, possible from 0.013 up"

    facts = json.loads(featdiff_cli("info", exported, "--json").stdout)
    assert facts == ExportedDetector(exported).facts


# ---- refusals ----


def test_no_engine(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match="the engine onnxruntime is not installed: pip install onnxruntime"):
        ExportedDetector(exported, engine="onnxruntime")
    assert ExportedDetector(exported).engine.startswith("openvino ")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match="needs ONNX Runtime or OpenVINO: pip install onnxruntime$"):
        ExportedDetector(exported)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            {"format_version": None},
            f"has the old format 1, this featdiff reads {FORMAT_VERSION}: export the model again",
        ),
        ({"format_version": FORMAT_VERSION + 1}, f"reads up to {FORMAT_VERSION}: pip install -U featdiff"),
        ({"featdiff_version": None}, "was not written by featdiff export"),
        ({"calibration": None}, "is damaged: its metadata: KeyError 'calibration'"),
        ({"calibration": {"ood_score": []}}, "is damaged: its metadata: UsageError"),
        ({"layer_scores": 7}, "is damaged: its metadata: TypeError"),
    ],
    ids=str,
)
def test_files_of_others(changed: Callable[..., Path], entries: dict[str, Any], words: str, engine: str) -> None:
    file = changed(**entries)
    with pytest.raises(ModelError, match=words) as error:
        ExportedDetector(file, engine=engine)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_no_onnx_file(exported: Path, tmp_path: Path, engine: str) -> None:
    file = tmp_path / "cut.onnx"
    for content in (b"no model", b"", (exported / "model.onnx").read_bytes()[:10_000]):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=r"cut\.onnx cannot be loaded: .+") as error:
            ExportedDetector(file, engine=engine)
        assert "\n" not in str(error.value)


def test_folders_without_an_onnx_file(featdiff_cli: Cli, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="^no model.onnx in .*: it is not a folder that featdiff export has written$"):
        ExportedDetector(tmp_path)
    with pytest.raises(ModelError, match=r"^no \.onnx file at .*none\.onnx$"):
        ExportedDetector(tmp_path / "none.onnx")

    (tmp_path / "model.pt2").touch()
    for name in (tmp_path, tmp_path / "model.pt2"):
        result = featdiff_cli("score", pictures, "-m", name, "-q")
        fails(result, 1, f"{name} is for PyTorch alone (.pt2): export the model in the format onnx, too")
