"""Engines: the same features as PyTorch's, whatever the batch, size and thread, or PyTorch itself."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import Conv2dSame
from tiny_backbones import SWIN, backbone, images, one_line
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from featdiff.exceptions import UsageError
from featdiff.features import conversions, engines
from featdiff.features.backbones import Backbone, load_backbone
from featdiff.features.conversions import COMPILE
from featdiff.features.engines import AUTO, ONNXRUNTIME, OPENVINO, TORCH
from featdiff.features.extractor import FeatureExtractor
from featdiff.features.networks import fingerprint

BOTH = (OPENVINO, ONNXRUNTIME)
LIMIT = 1e-4


class Own(nn.Module):
    """Somebody's network, with a habit that a tracer does not see through."""

    def __init__(self, habit: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3))
        self.habit = habit

    def forward(self, pixels: Tensor) -> Tensor:
        values = self.stem(pixels)
        if self.habit == "half the size":  # whole numbers, which a trace takes for constants
            values = F.interpolate(values, (int(values.shape[2]) // 2, int(values.shape[3]) // 2))
        if self.habit == "refuses" and torch.jit.is_tracing():
            raise RuntimeError("not for tracers\nat all")
        if self.habit == "cheats" and torch.jit.is_tracing():
            values = 2 * values
        return self.body(values)


def to_tensor(picture: Any) -> Tensor:
    raise AssertionError("no picture is read")


def own(habit: str = "") -> FeatureExtractor:
    return FeatureExtractor(Own(habit).eval(), layers=["stem", "body"], input_size=(3, 32, 32))


def noise(count: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def same(given: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=LIMIT, atol=LIMIT * float(expected.abs().max()))


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", SWIN])
def test_features_are_those_of_torch(name: str, engine: str) -> None:
    extractor = FeatureExtractor(backbone(name))
    expected = extractor(images(name))
    before = extractor.key()
    modes = [module.training for module in extractor.model.modules()]
    note = extractor.choose_engine(engine, images(name))
    assert extractor.engine.startswith(f"{engine} 2" if engine == OPENVINO else f"{engine} 1"), note
    assert note.startswith(extractor.engine) and note.endswith(" x as fast as torch")
    same(extractor(images(name)), expected)
    assert [module.training for module in extractor.model.modules()] == modes
    assert extractor.key() != before  # what it computes is kept apart from what torch computes


@pytest.mark.parametrize("engine", BOTH)
def test_features_do_not_depend_on_batch_order_and_thread(engine: str) -> None:
    extractor = FeatureExtractor(backbone("test_efficientnet"))
    extractor.choose_engine(engine, images("test_efficientnet"))
    pixels = noise(9, 160, 128)
    whole = extractor(pixels)
    torch.testing.assert_close(torch.cat([extractor(pixels[i : i + 1]) for i in range(9)]), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(extractor(pixels.flip(0)).flip(0), whole, rtol=0, atol=1e-6)
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(extractor, [pixels] * 8):
            assert torch.equal(rows, whole)


@pytest.mark.parametrize("engine", BOTH)
def test_a_size_that_the_trace_gets_wrong_runs_in_torch(engine: str) -> None:
    extractor = own("half the size")
    plain = own("half the size")
    extractor.choose_engine(engine, noise(2))
    assert extractor.engine != TORCH
    same(extractor(noise(4)), plain(noise(4)))
    assert torch.equal(extractor(noise(4, 64, 48)), plain(noise(4, 64, 48)))
    same(extractor(noise(4, seed=1)), plain(noise(4, seed=1)))


def test_an_image_that_is_not_finite_says_nothing_about_its_size() -> None:
    extractor = own()
    extractor.choose_engine(OPENVINO, noise(2))
    assert extractor._engine is not None
    pixels = noise(3, 40, 40)
    pixels[0, 0, 0, 0] = float("nan")
    assert not extractor._engine.agrees(pixels)
    assert extractor(pixels).isfinite().all(1).tolist() == [False, True, True]
    assert extractor._engine.agrees(noise(3, 40, 40))


@pytest.fixture
def conversions_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of engines for which a network was converted."""
    made: list[str] = []
    for name, (write, start) in dict(conversions._CONVERSIONS).items():

        def counted(*given: Any, name: str = name, write: Any = write) -> None:
            made.append(name)
            write(*given)

        monkeypatch.setitem(conversions._CONVERSIONS, name, conversions._Conversion(counted, start))
    return made


@pytest.mark.parametrize("engine", BOTH)
def test_a_converted_network_is_kept(engine: str, tmp_path: Path, conversions_made: list[str]) -> None:
    name = "test_efficientnet"
    other = {key: values * 1.1 for key, values in backbone(name).model.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    rows: list[Tensor] = []
    for found, layers in (
        (backbone(name), "auto"),
        (backbone(name), "auto"),
        (load_backbone(name, tmp_path / "other.safetensors"), "auto"),
        (backbone(name), [0, 1]),
    ):
        extractor = FeatureExtractor(found, layers)
        extractor.choose_engine(engine, noise(2, 160, 160), tmp_path / "kept")
        rows.append(extractor(noise(5, 160, 160)))
    assert torch.equal(rows[0], rows[1])
    assert conversions_made == [engine] * 3  # the second was kept, other weights and other layers are others
    assert (rows[2] - rows[0]).abs().max() > 0.01


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_pass_gives_what_torch_gives(precision: str) -> None:
    model = Own().eval()
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    found = Backbone(model, "own", "random", fingerprint(model), config, to_tensor)
    extractor = FeatureExtractor(found, ["stem", "body"], precision=precision)
    expected = extractor(noise(5))
    note = extractor.choose_engine(COMPILE, noise(2))
    assert re.fullmatch(rf"compile {re.escape(version('torch'))}, \S+ x as fast as torch", note), note

    given = extractor(noise(5))
    assert not torch.equal(given, expected)  # or PyTorch ran it
    if precision == "fp32":
        same(given, expected)
    assert (given - expected).abs().mean() < 0.02 * expected.abs().mean()
    torch.testing.assert_close(extractor(noise(5)[2:3]), given[2:3], rtol=0, atol=1e-6 if precision == "fp32" else 0.05)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_each_of_the_first_four_sizes_is_compiled_for_any_batch() -> None:
    """Of a network whose padding depends on the size, one graph for all sizes would keep the compiler busy for ever."""
    padded = nn.Sequential(Conv2dSame(3, 8, 3, stride=2), nn.ReLU(), Conv2dSame(8, 8, 3, stride=2), nn.ReLU()).eval()
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    extractor = FeatureExtractor(Backbone(padded, "own", "random", fingerprint(padded), config, to_tensor), ["1", "3"])
    assert extractor.choose_engine(COMPILE, noise(2)).startswith("compile")

    exact, graphs = [], []
    for side in (32, 33, 47, 64, 65, 70):
        for count in (2, 5, 3, 7):
            images = noise(count, side, side + 1)
            given, expected = extractor(images), extractor.in_torch()(images)
            same(given, expected)
            graphs.append(counters["stats"]["unique_graphs"])
        exact.append(torch.equal(given, expected))
    assert exact == [False] * 3 + [True] * 3  # the first of the four sizes is that of the choice
    assert len(set(graphs)) == 3  # none for another number of images, and none after the fourth size


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_one_is_made_anew(engine: str, damage: str, tmp_path: Path, conversions_made: list[str]) -> None:
    first = FeatureExtractor(backbone("test_resnet"))
    first.choose_engine(engine, images("test_resnet"), tmp_path)
    (file,) = [file for file in tmp_path.rglob("model.*") if file.suffix in (".bin", ".onnx")]
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        file.write_bytes(content[:-400] + bytes(400))
    else:
        file.unlink()

    second = FeatureExtractor(backbone("test_resnet"))
    second.choose_engine(engine, images("test_resnet"), tmp_path)
    assert conversions_made == [engine] * 2
    assert file.read_bytes() == content
    assert second.engine.startswith(engine)
    assert torch.equal(second(images("test_resnet")), first(images("test_resnet")))


def test_a_module_of_ones_own_is_not_kept(tmp_path: Path) -> None:
    extractor = own()
    assert extractor.choose_engine(OPENVINO, noise(2), tmp_path).startswith(OPENVINO)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("habit", "reason"),
    [
        ("refuses", r"openvino cannot run this backbone: Own .*: not for tracers"),
        ("cheats", "openvino gives other features than PyTorch for this backbone"),
    ],
)
def test_what_cannot_be_traced_runs_in_torch(habit: str, reason: str) -> None:
    extractor = own(habit)
    assert re.fullmatch(f"torch, for {reason}", extractor.choose_engine(OPENVINO, noise(2)))
    assert extractor.engine == TORCH
    assert torch.equal(extractor(noise(3)), own(habit)(noise(3)))


def test_weights_that_change_end_the_engine() -> None:
    extractor = own()
    extractor.choose_engine(OPENVINO, noise(2))
    before = extractor(noise(3))
    with torch.no_grad():
        extractor.model.stem.weight.mul_(2)
    after = extractor(noise(3))
    assert extractor.engine == TORCH
    assert (after - before).abs().max() > 0.1
    assert torch.equal(after, extractor.in_torch()(noise(3)))


def test_other_precision_and_copies_run_in_torch() -> None:
    extractor = own()
    assert extractor.choose_engine(OPENVINO, noise(2)).startswith("openvino")
    with torch.autocast("cpu", torch.bfloat16):
        given, expected = extractor(noise(3)), own()(noise(3))
    assert torch.equal(given, expected)
    for other in (copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor)), extractor.in_torch()):
        assert other.engine == TORCH
        assert torch.equal(other(noise(3)), own()(noise(3)))
    assert extractor.engine != TORCH

    half_the_bits = FeatureExtractor(backbone("test_resnet"), precision="bf16")
    note = half_the_bits.choose_engine(ONNXRUNTIME, images("test_resnet"))
    assert note == "torch, for onnxruntime has no bfloat16 on this processor"

    half = FeatureExtractor(Own().eval().bfloat16(), layers=["stem"], input_size=(3, 32, 32))
    assert half.choose_engine(OPENVINO, noise(2)).startswith("torch, for engines run float32 on the CPU")


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", SWIN])
def test_maps_come_from_the_engine_as_well(name: str, engine: str) -> None:
    pixels = images(name)
    extractor = FeatureExtractor(backbone(name))
    extractor.choose_engine(engine, pixels)
    assert list(extractor.keep_maps()) and extractor.engine.startswith(engine)
    for given, expected in zip(extractor.maps_of(pixels), extractor.in_torch().maps_of(pixels), strict=True):
        same(given, expected)


def test_one_that_is_not_installed_is_refused_and_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: dict[str, Any] = {name: ("no_such_package_at_all",) for name in BOTH}
    monkeypatch.setattr(engines, "_PACKAGES", missing)
    extractor = own()
    assert extractor.choose_engine(AUTO, noise(2)).startswith("torch, for no other engine is installed (pip install ")
    for engine, extra in ((OPENVINO, "openvino"), (ONNXRUNTIME, "onnx")):
        with pytest.raises(UsageError) as error:
            extractor.choose_engine(engine, noise(2))
        assert f"pip install 'featdiff[{extra}]'" in one_line(error) and error.value.argument == "engine"


@pytest.mark.parametrize("fastest", BOTH)
def test_auto_takes_the_fastest(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gains = {ONNXRUNTIME: 1.5, OPENVINO: 1.4, fastest: 2.0}

    def measured(before: Any, after: list[Any], pixels: Tensor) -> list[float]:
        return [gains[read.__self__.name] for read in after]

    monkeypatch.setattr(engines, "_gains", measured)
    extractor = own()
    note = extractor.choose_engine(AUTO, noise(2))
    (other,) = set(BOTH) - {fastest}
    assert re.fullmatch(rf"{fastest} \S+, 2.0 x as fast as torch \({other} {gains[other]} x\)", note)
    assert extractor.engine.startswith(fastest)

    gains.update(dict.fromkeys(BOTH, 1.05))
    assert extractor.choose_engine(AUTO, noise(2)).startswith("torch, for ") and extractor.engine == TORCH


def test_auto_takes_the_one_that_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_gains", lambda before, after, pixels: [2.0] * len(after))
    monkeypatch.setitem(engines._PACKAGES, OPENVINO, ("no_such_package_at_all",))
    extractor = own()
    assert re.fullmatch(r"onnxruntime \S+, 2.0 x as fast as torch", extractor.choose_engine(AUTO, noise(2)))
    assert extractor.engine.startswith(ONNXRUNTIME)


def test_auto_takes_what_is_faster_or_says_why_not() -> None:
    extractor = FeatureExtractor(backbone("test_efficientnet"))
    note = extractor.choose_engine(AUTO, noise(4, 160, 160))
    if extractor.engine == TORCH:
        assert note.startswith("torch, for ") and "x as fast as torch" in note
    else:
        assert extractor.engine.split()[0] in BOTH and float(note.split(", ")[1].split()[0]) >= 1.1
    assert extractor.choose_engine(TORCH, noise(2)) == "torch, as asked"
    assert extractor.engine == TORCH
