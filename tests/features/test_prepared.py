"""A backbone's pass that is kept: the same numbers without the network, and the network for all else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featdiff.exceptions import DamagedCache, ModelError
from featdiff.features.backbones import Backbone, load_backbone
from featdiff.features.conversions import ONNXRUNTIME, OPENVINO
from featdiff.features.extractor import FeatureExtractor
from featdiff.features.networks import fingerprint
from featdiff.features.prepared import PreparedExtractor, pass_key
from featdiff.features.views import PictureTransform

LAYERS = ["layer1", "layer2", "pre_logits"]
CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "squash",
}


def build() -> FeatureExtractor:
    return FeatureExtractor(load_backbone("test_resnet", pretrained=False), LAYERS)


def build_another() -> FeatureExtractor:
    extractor = build()
    with torch.no_grad():
        extractor.model.conv1[0].weight.mul_(2)
    return FeatureExtractor(backbone_of(extractor.model), LAYERS)


class Branching(nn.Module):
    """A network that a trace cannot follow: it does something else with large images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if x.shape[-1] < 40 else 2 * x)


def backbone_of(model: nn.Module) -> Backbone:
    model = model.eval().requires_grad_(False)
    return Backbone(model, "some", "random", fingerprint(model), CONFIG, PictureTransform(CONFIG))


def branching() -> FeatureExtractor:
    torch.manual_seed(3)
    return FeatureExtractor(backbone_of(Branching()), ["conv"])


def images(count: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def forbidden() -> FeatureExtractor:
    raise AssertionError("the network was built")


@pytest.fixture(scope="module")
def weights() -> str:
    return build().backbone.fingerprint


@pytest.fixture
def folder(tmp_path: Path, weights: str) -> Path:
    """With a pass that is known to be right for images of 64 x 96 pixels."""
    folder = tmp_path / "passes" / "some"
    PreparedExtractor(folder, weights, build)(images())
    return folder


def test_a_kept_pass_gives_the_same_rows_to_the_last_bit(folder: Path, weights: str) -> None:
    known = PreparedExtractor(folder, weights, forbidden)
    expected = build()
    assert torch.equal(known(images(5)), expected(images(5)))
    assert not known.is_built
    assert (known.layout, known.layers, known.width) == (expected.layout, expected.layers, expected.width)
    assert (known.device, known.dtype, known.precision) == (expected.device, expected.dtype, expected.precision)
    for name in ("tag", "source", "fingerprint", "data_config"):
        assert getattr(known.backbone, name) == getattr(expected.backbone, name)


def test_maps_are_read_in_the_same_pass(tmp_path: Path, weights: str) -> None:
    first = PreparedExtractor(tmp_path, weights, build)
    names = list(first.keep_maps())
    first(images())

    known = PreparedExtractor(tmp_path, weights, forbidden)
    assert known.keep_maps(names) == first.maps
    for given, expected in zip(known.maps_of(images()), first.maps_of(images()), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("engine", [OPENVINO, ONNXRUNTIME])
def test_an_engine_may_take_over(known: bool, engine: str, folder: Path, weights: str, tmp_path: Path) -> None:
    extractor = PreparedExtractor(folder if known else tmp_path / "empty", weights, build)
    assert extractor.choose_engine(engine, images()).startswith(engine)
    expected = build()(images(5))
    assert (extractor(images(5)) - expected).abs().max() < 1e-4 * expected.abs().max()

    maps = list(extractor.keep_maps())
    assert extractor.engine.startswith(engine)
    plain = build()
    assert list(plain.keep_maps()) == maps
    for given, wanted in zip(extractor.maps_of(images()), plain.maps_of(images()), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_other_maps_need_the_network(tmp_path: Path, weights: str) -> None:
    first = PreparedExtractor(tmp_path, weights, build)
    first.keep_maps()
    first(images())

    other = PreparedExtractor(tmp_path, weights, build)
    assert list(other.keep_maps(["layer3"])) == ["layer3"]
    assert other.is_built


def test_a_size_that_is_not_known_builds_the_network(folder: Path, weights: str) -> None:
    extractor = PreparedExtractor(folder, weights, build)
    pixels = images(height=96, width=64)
    assert torch.equal(extractor(pixels), build()(pixels))
    assert extractor.is_built
    # and is known the next time
    again = PreparedExtractor(folder, weights, forbidden)
    assert torch.equal(again(pixels), build()(pixels))
    assert torch.equal(again(images()), build()(images()))


def test_one_process_adds_only_a_few_sizes(folder: Path, weights: str) -> None:
    extractor = PreparedExtractor(folder, weights, build)
    for side in (32, 64, 96, 128, 160, 192):
        extractor(images(1, side, side))
    assert len(list(folder.glob("3x*"))) == 1 + 4


def test_a_size_for_which_the_pass_is_wrong_is_never_known(tmp_path: Path) -> None:
    weights = branching().backbone.fingerprint
    PreparedExtractor(tmp_path, weights, branching)(images(height=32, width=32))
    large = images(height=48, width=48)
    PreparedExtractor(tmp_path, weights, branching)(large)

    extractor = PreparedExtractor(tmp_path, weights, branching)
    assert torch.equal(extractor(large), branching()(large))
    assert extractor.is_built
    assert not PreparedExtractor(tmp_path, weights, forbidden).is_built  # the pass for small ones is there
    assert sorted(file.name for file in tmp_path.iterdir()) == ["3x32x32", f"{tmp_path.name}.pt"]


def test_a_pass_of_other_weights_is_not_used(folder: Path) -> None:
    other = build_another()
    extractor = PreparedExtractor(folder, other.backbone.fingerprint, lambda: other)
    assert torch.equal(extractor(images()), other(images()))
    assert not torch.equal(extractor(images()), build()(images()))


def test_a_network_of_other_weights_is_refused_when_it_is_built(folder: Path, weights: str) -> None:
    extractor = PreparedExtractor(folder, weights, build_another)
    extractor(images())
    with pytest.raises(ModelError, match="has other weights than this detector was fitted with"):
        extractor(images(height=32))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_pass_is_named_and_made_again(folder: Path, weights: str, damage: Callable[[Path], None]) -> None:
    damage(folder / "some.pt")
    with pytest.warns(DamagedCache, match=r"some\.pt was damaged and is removed: the backbone is built instead"):
        extractor = PreparedExtractor(folder, weights, build)
    assert torch.equal(extractor(images()), build()(images()))
    assert torch.equal(PreparedExtractor(folder, weights, forbidden)(images()), build()(images()))


def test_sizes_of_a_pass_that_is_gone_do_not_count(folder: Path, weights: str) -> None:
    (folder / "some.pt").unlink()
    PreparedExtractor(folder, weights, build)(images(height=32, width=32))
    assert sorted(file.name for file in folder.iterdir()) == ["3x32x32", "some.pt"]


def test_a_pass_under_another_key_is_not_used(folder: Path, weights: str) -> None:
    other = folder.with_name("other")
    folder.rename(other)
    (other / "some.pt").rename(other / "other.pt")
    with pytest.warns(DamagedCache):
        assert PreparedExtractor(other, weights, build).is_built


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, weights: str) -> None:
    (tmp_path / "file").touch()
    extractor = PreparedExtractor(tmp_path / "file" / "passes", weights, build)
    assert torch.equal(extractor(images()), build()(images()))


def test_the_network_is_built_for_who_asks(folder: Path, weights: str) -> None:
    extractor = PreparedExtractor(folder, weights, build)
    assert fingerprint(extractor.backbone.model) == weights
    assert extractor.is_built
    assert extractor.key() == build().key()


def test_autocast_does_not_use_a_pass_in_float32(folder: Path, weights: str) -> None:
    extractor = PreparedExtractor(folder, weights, build)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(images()), build()(images()))
    assert extractor.is_built


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_work(folder: Path, weights: str, duplicate: Callable[[FeatureExtractor], FeatureExtractor]) -> None:
    other = duplicate(PreparedExtractor(folder, weights, build))
    assert torch.equal(other(images()), build()(images()))


def test_a_missing_attribute_is_an_error_as_ever(folder: Path, weights: str) -> None:
    extractor = PreparedExtractor(folder, weights, forbidden)
    assert not hasattr(extractor, "other")
    assert not hasattr(extractor.backbone, "other")


def test_the_key_follows_the_facts() -> None:
    facts = {"backbone": {"tag": "a"}, "settings": {"layers": ["x"]}}
    assert pass_key(facts) == pass_key(dict(reversed(facts.items())))
    assert len({pass_key(facts), pass_key(facts | {"settings": {"layers": ["y"]}}), pass_key({})}) == 3


def test_copies_keep_nothing(tmp_path: Path) -> None:
    """An exporter traces one, for all sizes: it must not look at any."""
    pixels = torch.rand(2, 3, 32, 32)
    extractor = PreparedExtractor(tmp_path / "pass", build().backbone.fingerprint, build)
    expected = build()(pixels)
    for other in (extractor.in_torch(), copy.deepcopy(extractor), extractor.detached()):
        assert torch.equal(other(pixels), expected)
    assert not (tmp_path / "pass").exists()
    extractor(pixels)
    assert (tmp_path / "pass" / "3x32x32").exists()
