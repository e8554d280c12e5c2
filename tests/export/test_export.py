"""Exported files run by ONNX Runtime and torch.export give what the detector gives, or are found out."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import ROOT, typed
from onnx import numpy_helper
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from featdiff import Detector, Guard, PixelDetector
from featdiff.exceptions import FeatdiffError, ModelError, NotFittedError, UsageError
from featdiff.export.export import FACTS, FILES, LIMIT, Exportable, Rows, export, facts
from featdiff.export.verify import verify
from featdiff.exported.layout import FORMAT_VERSION
from featdiff.features.backbones import load_backbone
from featdiff.scores.diffusion import DIFFUSION
from featdiff.scores.nearest import NearestNeighbors
from featdiff.verdicts.calibration import Calibration

SIZE = 24
SMALL: dict[str, Any] = {
    "layers": ["stem", "body"],
    "joint": True,
    "hidden_max": 8,
    "blocks": 1,
    "start_times": [70],
    "draws": 1,
    "calibration": 0.4,
    "recipe": {"epochs": 1, "min_steps": 5, "batch_size": 16},
}


class Net(nn.Module):
    """Somebody's own network, with a habit that an exporter may not like."""

    def __init__(self, habit: str = "", classes: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 5, stride=2)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 12, 3, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.habit = habit
        self.last = nn.Linear(12, classes) if classes else None

    def forward(self, x: Tensor) -> Tensor:
        if self.habit == "looks" and x.mean() > 0.9:
            return self.body(self.stem(x))
        if self.habit == "counts":
            x = x[: int(len(x))].clone()
        x = self.dropout(self.body(self.act(self.stem(x))))
        return self.last(x.mean((2, 3))) if self.last else x


def noise(count: int, size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def fitted(network: nn.Module, **arguments: Any) -> Detector:
    return Detector(network, **SMALL | arguments).fit(iter([noise(60)]))


def run_onnx(file: Path, pixels: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": pixels.numpy()})


@functools.cache
def load_pt2(file: Path) -> tuple[Any, dict[str, Any]]:
    """(module, metadata), loaded once: it takes seconds."""
    extra = {FACTS: ""}
    module = torch.export.load(file, extra_files=extra).module()
    return module, json.loads(extra[FACTS])


def run_pt2(file: Path, pixels: Tensor) -> list[np.ndarray]:
    return [output.detach().numpy() for output in load_pt2(file)[0](pixels)]


RUNS = {"onnx": run_onnx, "pt2": run_pt2}


def metadata(kind: str, file: Path) -> dict[str, Any]:
    if kind == "pt2":
        return load_pt2(file)[1]
    return {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}


def expected(detector: Detector, pixels: Tensor) -> np.ndarray:
    return detector.score_features(detector.extractor_(pixels))


def same_scores(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=LIMIT, atol=LIMIT)


@pytest.fixture(scope="module")
def names(sample_folders: dict[str, Path]) -> list[Path]:
    """Four tiles like the others and four strange ones."""
    strange = ["flower_04_04.png", "flower_12_12.png", "flower_03_08.png", "flower_04_16.png"]
    folder = sample_folders["test"]
    return [*sorted(folder.iterdir())[:4], *(folder / name for name in strange)]


@pytest.fixture(scope="module")
def command(
    tiny_model: Path, names: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """The command, run once for all tests: it takes seconds, and does what :func:`export` and :func:`verify` do."""
    images = " ".join(f"--verify {name}" for name in names)
    folder = tmp_path_factory.mktemp("exported")
    (folder / "broken.png").write_bytes(b"no picture")
    done = typed(f"featdiff export -m {tiny_model} {images} --verify broken.png", folder)
    done.args = folder / "featdiff-export"
    return done


@pytest.fixture(scope="module")
def files(command: subprocess.CompletedProcess[str]) -> dict[str, Path]:
    """Both files of the tiny detector; do not change them."""
    return {kind: command.args / name for kind, name in FILES.items()}


@pytest.fixture(scope="module")
def pixels(tiny_detector: Detector, names: list[Path]) -> Tensor:
    """The images as the backbone gets them."""
    (batch,) = tiny_detector.batches(names)[0]
    (stack,) = batch.stacks
    return stack.pixels


@pytest.fixture(scope="module")
def small() -> Detector:
    """A detector on a module, which is quickly exported; do not change it."""
    return fitted(Net())


# ---- the files ----


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_scores_p_values_and_verdicts_are_torchs(
    tiny_detector: Detector, files: dict[str, Path], pixels: Tensor, kind: str, batch: int
) -> None:
    part = pixels[-batch:]
    score, p, *_ = RUNS[kind](files[kind], part)
    wanted = expected(tiny_detector, part)
    same_scores(score, wanted)
    assert p.dtype == np.float32 and p.shape == (batch,)
    wanted_p, is_ood = tiny_detector.calibration_.flags(wanted, tiny_detector.fpr)
    np.testing.assert_allclose(p, wanted_p, rtol=1e-6)
    limit = tiny_detector.calibration_.threshold(tiny_detector.fpr)
    np.testing.assert_array_equal(score > limit, is_ood)


def test_both_verdicts_occur_among_the_images(tiny_detector: Detector, pixels: Tensor) -> None:
    """Or the test above would say little."""
    _, flags = tiny_detector.calibration_.flags(expected(tiny_detector, pixels), tiny_detector.fpr)
    assert 0 < flags.sum() < len(flags)


@pytest.mark.parametrize("kind", FILES)
def test_an_image_of_nan_is_flagged_and_harms_no_other(
    tiny_detector: Detector, files: dict[str, Path], pixels: Tensor, kind: str
) -> None:
    part = pixels[:3].clone()
    part[1] = torch.nan
    score, p, *_ = RUNS[kind](files[kind], part)
    assert np.isnan(score[1])
    assert p[1] == pytest.approx(tiny_detector.calibration_.smallest_fpr)
    same_scores(score[[0, 2]], expected(tiny_detector, part[[0, 2]]))


@pytest.mark.parametrize("kind", FILES)
def test_metadata_say_what_the_detector_is(tiny_detector: Detector, files: dict[str, Path], kind: str) -> None:
    from importlib.metadata import version

    found, backbone = metadata(kind, files[kind]), tiny_detector.extractor_.backbone
    scores = tiny_detector.calibration_.scores
    _, flags = tiny_detector.calibration_.flags(scores, 0.05)
    np.testing.assert_array_equal(scores > found["threshold"], flags)
    assert found["threshold"] in scores
    assert (found["fpr"], found["calibration_images"], found["classes"]) == (0.05, 78, [])
    assert found["input_size"] == [3, 160, 160]
    wanted = {key: backbone.data_config[key] for key in ("interpolation", "crop_pct", "crop_mode")}
    wanted |= {key: list(backbone.data_config[key]) for key in ("mean", "std")}
    rule = found["preprocessing"]["rectangle"]
    assert found["preprocessing"] == wanted | {"rectangle": rule}
    assert wanted["crop_mode"] == "rectangle"
    assert (rule["area"], rule["multiple_of"], rule["min_side"], rule["max_area"]) == (160 * 160, 32, 64, 32000)
    side = {"min": 64, "max": 480, "multiple_of": 32}
    assert found["sizes"] == {"height": side, "width": side}
    assert (found["backbone"], found["backbone_fingerprint"]) == (backbone.tag, backbone.fingerprint)
    assert (found["layers"], found["head"]) == (["layer1", "layer2", "layer4"], "fused")
    assert found["featdiff_version"] == version("featdiff")
    assert found["format_version"] == FORMAT_VERSION
    assert (found["layer_scores"], found["part_scores"]) == (tiny_detector.layers, [])
    assert found["calibration"] == {"ood_score": scores.tolist()}


def test_onnx_is_one_file_with_a_bank_of_8_bit_numbers(tiny_detector: Detector, files: dict[str, Path]) -> None:
    model = onnx.load(files["onnx"], load_external_data=False)
    onnx.checker.check_model(model)
    assert sorted(file.name for file in files["onnx"].parent.iterdir()) == ["model.onnx", "model.pt2"]
    assert not any(part.external_data for part in model.graph.initializer)
    assert [part.name for part in model.graph.input] == ["pixels"]
    assert [part.name for part in model.graph.output] == ["ood_score", "p_value", "layer_scores"]
    banks = list(tiny_detector.heads_.members)
    codes = [numpy_helper.to_array(part) for part in model.graph.initializer if part.data_type == onnx.TensorProto.INT8]
    assert len(codes) == len(banks) > 0
    for found, bank in zip(codes, banks, strict=True):
        np.testing.assert_array_equal(found, bank.vectors.numpy())


@pytest.mark.parametrize("kind", FILES)
def test_files_tell_nothing_of_the_machine_and_hold_no_ballast(
    tiny_detector: Detector, files: dict[str, Path], kind: str
) -> None:
    data = files[kind].read_bytes()
    for path in (ROOT, Path(torch.__file__).parents[1]):
        assert str(path).encode() not in data
    heads, network = tiny_detector.heads_, tiny_detector.extractor_.model
    denoiser = dict(heads.diffusion.denoiser.named_parameters())
    used = [*denoiser.values(), *network.parameters(), *heads.buffers()]
    needed = sum(part.nbytes for part in used)
    of_times = sum(weight.nbytes for name, weight in denoiser.items() if "time" in name)  # always the same: folded
    assert 0.9 * (needed - of_times) < len(data) < needed + 1_500_000


# ---- all that a detector can be ----


def test_a_guarded_classifier_gives_its_logits_too(tmp_path: Path) -> None:
    """All from one pass, layers taken by hooks. Nothing is changed."""
    network = Net(classes=4).eval()
    network.stem.train()
    hooked = network.act.register_forward_hook(lambda *_: None)
    guard = Guard(network, **SMALL | {"extra_heads": ("energy",)}).fit(iter([noise(60)]))
    x, names = noise(5, seed=1), ["cat", "dog", "hat", "log"]
    detector = guard.detector
    before = expected(detector, x)
    files = export(guard, tmp_path, classes=names)
    for kind, run in RUNS.items():
        for part in (x, x[:1]):
            score, p, logits, layers = run(files[kind], part)
            same_scores(score, before[: len(part)])
            np.testing.assert_allclose(p, detector.calibration_.p_values(before[: len(part)]), rtol=1e-6)
            with torch.inference_mode():
                np.testing.assert_allclose(logits, network(part).numpy(), rtol=1e-4, atol=1e-5)
            _, of_layers = detector.layer_scores(detector.extractor_(part))
            np.testing.assert_allclose(layers, of_layers, atol=1e-3)  # those of an untrained network hardly spread
        assert metadata(kind, files[kind])["classes"] == names
    assert metadata("pt2", files["pt2"])["outputs"] == ["ood_score", "p_value", "logits", "layer_scores"]
    assert [agreement.problem for agreement in verify(guard, [*files.values()], iter([x]))] == ["", ""]

    np.testing.assert_array_equal(expected(detector, x), before)
    assert [name for name, module in network.named_modules() if module.training] == ["stem"]
    assert list(network.act._forward_hooks) == [hooked.id] and not network.stem._forward_hooks
    banks = [score for score in detector.heads_.members if isinstance(score, NearestNeighbors)]
    assert banks and not any(hasattr(bank, "index") for bank in banks)  # as search_coded would leave them
    assert isinstance(detector.heads_.diffusion.early, type(detector.heads_.diffusion.denoiser))


@pytest.mark.parametrize(
    "arguments",
    [
        *({"head": head} for head in DIFFUSION),
        {"head": "fused"},
        *({"stride": 30}, {"joint": False}, {"backend": "faiss"}, {"neighbors": 0}, {"bank_size": 6}),
    ],
    ids=str,
)
def test_what_is_exported_scores_like_every_variant_of_the_detector(arguments: dict[str, Any]) -> None:
    detector, x = fitted(Net(), **arguments), noise(6, seed=2)
    exportable = Exportable(Rows(detector.extractor_), detector.heads_, detector.calibration_)
    score, p, layers = exportable(x)
    wanted, of_layers = detector.layer_scores(detector.extractor_(x))
    same_scores(score.numpy(), wanted)
    same_scores(layers.numpy(), of_layers)
    np.testing.assert_allclose(p, detector.calibration_.p_values(score.double().numpy()), rtol=1e-6)


def test_a_path_of_several_steps_is_traced_for_any_number_of_images(tmp_path: Path) -> None:
    detector = fitted(Net(), stride=40)
    file = export(detector, tmp_path, ["pt2"])["pt2"]
    for batch in (1, 6):
        x = noise(batch, seed=2)
        same_scores(run_pt2(file, x)[0], expected(detector, x))


# ---- verify ----


def test_the_command_says_what_it_wrote_and_what_verify_found(
    command: subprocess.CompletedProcess[str], files: dict[str, Path]
) -> None:
    assert (command.returncode, command.stdout) == (3, "")
    first, *written, shape, sides, verdict, by_onnx, by_pt2, bad = command.stderr.splitlines()
    assert first.startswith("exporting test_resnet.r160_in1k")
    assert written == [f"featdiff-export/{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in files.values()]
    assert shape == "pixels (B, 3, H, W) -> ood_score (B,), p_value (B,), layer_scores (B, 3)"
    assert sides == "H and W: multiples of 32 from 64 to 480"
    limit = metadata("onnx", files["onnx"])["threshold"]
    assert verdict == f"OOD where ood_score > {limit:.6g} (fpr 0.05, 78 calibration images)"
    for kind, line in (("onnx", by_onnx), ("pt2", by_pt2)):
        form = rf"model.{kind}: 8 images, scores within (\S+), same verdicts; \d+ images/s, torch \d+ \(\d+\.\d\d x\)"
        found = re.fullmatch(form, line)
        assert found and 0 <= float(found[1]) < LIMIT
    assert bad == "  left out: broken.png: not an image in a format that can be decoded"


def test_verify_agrees_and_counts(
    tiny_detector: Detector, files: dict[str, Path], few_images: Path, names: list[Path]
) -> None:
    (few_images / "broken.png").write_bytes(b"no picture")
    unreadable: dict[str, str] = {}
    seen: list[tuple[str, int, int]] = []
    images = [*names, few_images]
    (found,) = verify(tiny_detector, [files["onnx"]], images, lambda *step: seen.append(step), unreadable)
    assert (found.file, found.images) == (files["onnx"], 14)
    assert (found.verdicts, found.p_values, found.problem) == (0, 0, "")
    assert 0 <= found.difference < LIMIT
    assert found.speed > 0 and found.torch_speed > 0
    assert list(unreadable) == [str(few_images / "broken.png")]
    assert seen[-1] == ("verifying", 15, 15)


def test_verify_leaves_out_images_of_nan(tiny_detector: Detector, files: dict[str, Path], pixels: Tensor) -> None:
    bad = pixels.clone()
    bad[3, 0, 0, 0] = torch.inf
    unreadable: dict[str, str] = {}
    (found,) = verify(tiny_detector, [files["onnx"]], iter([bad]), unreadable=unreadable)
    assert (found.images, found.problem) == (7, "")
    assert unreadable == {"loader[3]": "NaN or infinite values"}
    with pytest.raises(UsageError, match="none of the images to compare on could be read"):
        verify(tiny_detector, [files["onnx"]], iter([bad[3:4]]))


def tampered(files: dict[str, Path], folder: Path, part: np.ndarray, change: float) -> Path:
    """A copy of the ONNX file in which the numbers of the tensor that holds ``part`` are larger by ``change``."""
    model = onnx.load(files["onnx"])
    tensors = [(tensor, numpy_helper.to_array(tensor)) for tensor in model.graph.initializer]
    ((tensor, values),) = [pair for pair in tensors if np.array_equal(pair[1], part.astype(np.float32))]
    tensor.CopyFrom(numpy_helper.from_array(values + np.float32(change), tensor.name))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_verify_finds_changed_weights(
    tiny_detector: Detector, files: dict[str, Path], pixels: Tensor, tmp_path: Path
) -> None:
    file = tampered(files, tmp_path, tiny_detector.heads_.mean.numpy(), 3.0)
    (found,) = verify(tiny_detector, [file], iter([pixels]))
    assert found.difference > 10 * LIMIT and found.verdicts == 4 and found.p_values == 0
    assert found.problem.startswith(f"{file} disagrees with torch, do not use it: of 8 images, scores differ by up to ")
    assert found.problem.endswith(
        f"{found.difference:.1e} x max(1, |score|) (allowed 0.0001), 4 verdicts and 0 p-values are wrong"
    )


def test_verify_finds_p_values_of_other_calibration_images(
    tiny_detector: Detector, files: dict[str, Path], pixels: Tensor, tmp_path: Path
) -> None:
    file = tampered(files, tmp_path, tiny_detector.calibration_.scores, 100.0)
    (found,) = verify(tiny_detector, [file], iter([pixels]))
    assert found.difference < LIMIT and (found.verdicts, found.p_values) == (0, 8)
    assert "0 verdicts and 8 p-values are wrong" in found.problem


@pytest.mark.parametrize("kind", FILES)
def test_verify_refuses_the_file_of_another_detector(
    tiny_detector: Detector, files: dict[str, Path], pixels: Tensor, kind: str
) -> None:
    other = copy.copy(tiny_detector)
    other.calibration_ = Calibration(tiny_detector.calibration_.scores + 1)
    with pytest.raises(ModelError, match=r"was not exported from this detector: its threshold is [\d.]+, not [\d.]+$"):
        verify(other, [files[kind]], iter([pixels]))


@pytest.mark.parametrize("kind", FILES)
def test_verify_refuses_damaged_and_foreign_files(
    tiny_detector: Detector, files: dict[str, Path], pixels: Tensor, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / FILES[kind]
    with pytest.raises(ModelError, match="no file at"):
        verify(tiny_detector, [file], iter([pixels]))
    file.write_bytes(files[kind].read_bytes()[:10_000])
    with pytest.raises(ModelError, match=f"{FILES[kind]} cannot be loaded: .+"):
        verify(tiny_detector, [file], iter([pixels]))
    with pytest.raises(UsageError, match="is neither an .onnx nor a .pt2 file"):
        verify(tiny_detector, [shutil.copy(file, tmp_path / "model.pth")], iter([pixels]))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("height", "width"), [(64, 480), (160, 160), (128, 192), (480, 64)])
def test_images_of_every_size_that_a_picture_may_become(
    tiny_detector: Detector, files: dict[str, Path], kind: str, height: int, width: int
) -> None:
    """The file has the same scores and p-values as torch, for one image too."""
    images = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(3))
    for part in (images, images[:1]):
        score, p, *_ = RUNS[kind](files[kind], part)
        wanted = expected(tiny_detector, part)
        same_scores(score, wanted)
        np.testing.assert_allclose(p, tiny_detector.calibration_.p_values(wanted), rtol=1e-6)


@pytest.mark.parametrize("kind", FILES)
def test_verify_takes_pictures_of_mixed_shapes(
    tiny_detector: Detector, files: dict[str, Path], names: list[Path], kind: str
) -> None:
    picture = Image.open(names[0]).convert("RGB")
    shapes = [(32, 32), (90, 30), (30, 90), (60, 40), (32, 32), (40, 60), (1500, 5)]
    pictures = [picture.resize(shape) for shape in shapes]
    (found,) = verify(tiny_detector, [files[kind]], pictures)
    assert (found.images, found.problem) == (7, "")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("height", "width"), [(100, 160), (32, 480), (160, 512)])
def test_images_of_another_size(
    tiny_detector: Detector, files: dict[str, Path], kind: str, height: int, width: int
) -> None:
    """Torch takes them, no picture becomes one of them."""
    pixels = torch.rand(2, 3, height, width)
    with pytest.raises(ModelError, match=rf"model.{kind} does not take a batch \(2, 3, {height}, {width}\)") as caught:
        verify(tiny_detector, [files[kind]], iter([pixels]))
    assert "from 64 to 480" in str(caught.value) and "\n" not in str(caught.value)


# ---- sizes ----


def exported_backbone(view: str, pictures: list[Image.Image], folder: Path, **arguments: Any) -> tuple[Detector, Path]:
    """A detector by name with TensorFlow's padding, and its .pt2 file."""
    arguments = SMALL | {"layers": "blocks.1,blocks.3", "pretrained": False, "view": view} | arguments
    detector = Detector("test_efficientnet", model_args={"pad_type": "same"}, **arguments).fit(pictures)
    return detector, export(detector, folder, ["pt2"])["pt2"]


@pytest.fixture(scope="module")
def pictures(sample_folders: dict[str, Path]) -> list[Image.Image]:
    """60 pictures of four shapes."""
    shapes = [(32, 32), (48, 32), (32, 64), (90, 30)]
    chosen = sorted(sample_folders["train"].iterdir())[::6][:60]
    return [Image.open(file).convert("RGB").resize(shapes[i % 4]) for i, file in enumerate(chosen)]


def test_padding_that_depends_on_the_size_is_exported_for_every_rectangle(
    pictures: list[Image.Image], tmp_path: Path
) -> None:
    """The network itself is left as it was."""
    detector, file = exported_backbone("whole", pictures, tmp_path)
    assert [agreement.problem for agreement in verify(detector, [file], pictures)] == [""]
    assert not any("forward" in vars(module) for module in detector.extractor_.model.modules())


@pytest.mark.parametrize("view", ["squash", "crop"])
def test_views_of_one_size_are_exported_for_it(view: str, pictures: list[Image.Image], tmp_path: Path) -> None:
    detector, file = exported_backbone(view, pictures, tmp_path, size=96)
    side = {"min": 96, "max": 96, "multiple_of": 96}
    found = metadata("pt2", file)
    assert (found["input_size"], found["sizes"]) == ([3, 96, 96], {"height": side, "width": side})
    assert "rectangle" not in found["preprocessing"]
    assert [agreement.problem for agreement in verify(detector, [file], pictures)] == [""]


def test_a_network_that_is_traced_for_some_sizes_only_is_refused(pictures: list[Image.Image], tmp_path: Path) -> None:
    """It counts the rows of the map, so that the trace holds for one height."""
    detector = Detector("test_resnet", **SMALL | {"layers": "layer1,layer2", "pretrained": False}).fit(pictures)
    stage: Any = detector.extractor_.model.get_submodule("layer1")
    stage.register_forward_hook(lambda module, args, output: output * (1 + 1 / int(output.shape[2])))
    with pytest.raises(FeatdiffError, match=r"test_resnet.* cannot be exported: .*view='squash' or view='crop'$"):
        export(detector, tmp_path, ["pt2"])
    assert not list(tmp_path.iterdir())


def test_a_guard_on_a_rectangle_detector_takes_every_size(pictures: list[Image.Image], tmp_path: Path) -> None:
    """The transform came along from the backbone."""
    detector = Detector("test_resnet", **SMALL | {"layers": "layer1,layer2", "pretrained": False}).fit(pictures)
    classifier = load_backbone("test_resnet", pretrained=False).model
    guard = Guard(classifier, detector)
    file = export(guard, tmp_path, ["pt2"])["pt2"]
    assert metadata("pt2", file)["preprocessing"] == facts(detector)["preprocessing"]
    assert [agreement.problem for agreement in verify(guard, [file], pictures)] == [""]


# ---- refusals ----


def test_only_fitted_detectors_of_the_default_mode_on_the_cpu(small: Detector, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only detectors of the default mode can be exported"):
        export(PixelDetector(), tmp_path)
    with pytest.raises(NotFittedError):
        export(Detector(), tmp_path)
    elsewhere = copy.copy(small)
    elsewhere.extractor_ = copy.copy(small.extractor_)
    elsewhere.extractor_.model = copy.deepcopy(small.extractor_.model).to("meta")
    with pytest.raises(UsageError, match="is on meta.*: load it with device='cpu'"):
        export(elsewhere, tmp_path)


@pytest.mark.parametrize(
    ("formats", "words"),
    [(["onxx"], "unknown format 'onxx'; did you mean onnx"), ([], "name at least one format: onnx, pt2")],
)
def test_formats(small: Detector, tmp_path: Path, formats: Sequence[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export(small, tmp_path, formats)


def test_size_of_a_module_is_that_of_the_images_it_was_fitted_on(small: Detector) -> None:
    assert facts(small)["input_size"] == [3, SIZE, SIZE]


def test_size_and_hash_of_a_transform_of_ones_own() -> None:
    prepare = v2.Compose([v2.Resize((20, 28)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    detector = fitted(Net(), transform=prepare)
    found = facts(detector)
    assert found["input_size"] == [3, 20, 28]
    assert found["preprocessing"] == {"transform": detector.extractor_.backbone.data_config["transform"]}


@pytest.mark.parametrize("habit", ["looks", "counts"])
def test_networks_that_cannot_be_traced(habit: str, tmp_path: Path) -> None:
    """One looks at values, one at the number of images."""
    detector = fitted(Net(habit))
    with pytest.raises(FeatdiffError, match=r"^Net cannot be exported: .+") as caught:
        export(detector, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_packages_of_the_extra(small: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"^{package} is not installed.*pip install 'featdiff\[onnx\]'"):
        export(small, tmp_path)


def test_a_file_in_the_way(small: Detector, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FeatdiffError, match="file cannot be written: File exists$"):
        export(small, tmp_path / "file", ["pt2"])


def test_a_full_disk(mounted: Any, tmp_path: Path) -> None:
    folder = mounted(tmp_path / "disk", "64k")
    with pytest.raises(FeatdiffError, match="disk cannot be written: No space left on device$"):
        export(fitted(Net(), neighbors=0), folder, ["pt2"])
    assert not list(folder.iterdir())
