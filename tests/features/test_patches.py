"""Maps of places: which are chosen, how they are read in the pass that gives a row, and what is made of them."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import SWIN, backbone, images, one_line
from torch import nn

from featdiff.exceptions import UsageError
from featdiff.features.backbones import load_backbone
from featdiff.features.extractor import FeatureExtractor
from featdiff.features.layout import LOCAL, Kind

#: backbone -> its maps and what they are of an image: channels, height, width.
CHOSEN = {
    "test_resnet": {"layer3": (192, 10, 10), "layer4.0": (96, 5, 5), "layer4": (96, 5, 5)},
    "test_vit": {"blocks.3": (64, 10, 10), "blocks.4": (64, 10, 10), "blocks.5": (64, 10, 10)},
    SWIN: {"layers.2": (64, 14, 14), "layers.3.downsample": (128, 7, 7), "layers.3": (128, 7, 7)},
}


def test_the_default_backbone_has_an_inner_block() -> None:
    extractor = FeatureExtractor(load_backbone())
    assert extractor.maps == {}
    assert extractor.keep_maps() == {"blocks.4": 112, "blocks.5": 192, "blocks.6": 320}
    maps = extractor.maps_of(torch.rand(2, 3, 192, 256))
    assert [tuple(values.shape) for values in maps] == [(2, 112, 12, 16), (2, 192, 6, 8), (2, 320, 6, 8)]


@pytest.mark.parametrize("name", CHOSEN)
def test_maps_of_networks_of_all_kinds(name: str) -> None:
    extractor = FeatureExtractor(backbone(name))
    before = extractor(images(name))
    extractor.keep_maps()
    found = {
        layer: tuple(values.shape[1:])
        for layer, values in zip(extractor.maps, extractor.maps_of(images(name)), strict=True)
    }
    assert found == CHOSEN[name]
    assert torch.equal(extractor(images(name)), before)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_mean_of_the_last_map_is_in_the_row(name: str) -> None:
    extractor = FeatureExtractor(backbone(name))
    extractor.keep_maps()
    last = extractor.maps_of(images(name))[-1]
    row = extractor(images(name))[:, extractor.layout.last_stage.columns]
    if name == "test_resnet":
        assert torch.allclose(last.mean((2, 3)), row, atol=1e-5)
    else:
        assert last.mean((2, 3)).shape == row.shape


def test_a_module_of_ones_own_is_read_in_its_own_pass() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 2, 2), nn.ReLU(inplace=True))
    extractor = FeatureExtractor(network, layers=["0", "2"], input_size=(3, 16, 16))
    extractor.keep_maps()
    assert extractor.maps == {"0": 8, "2": 16}

    pixels = torch.rand(2, 3, 16, 16)
    with extractor.recording() as recorded:
        output = network(pixels)
    first = network[0](pixels)
    assert torch.equal(recorded["0", Kind.MAP], first)  # as it was before the next module changed it in place
    assert torch.equal(extractor.in_passing(recorded, output, 2), extractor(pixels))


def test_rows_end_with_what_is_made_of_maps() -> None:
    extractor = FeatureExtractor(backbone("test_resnet"))
    plain = extractor(images("test_resnet"))
    width, key = extractor.width, extractor.key()
    extractor.keep_maps()
    assert extractor.key() == key

    extractor.attach(lambda maps: (maps[0].amax((1, 2, 3)), maps[0].amax(1)), "abc")
    rows, heat = extractor.with_heat(images("test_resnet"))
    assert torch.equal(extractor(images("test_resnet")), rows)
    assert extractor.width == width + 1 == rows.shape[1]
    assert torch.equal(rows[:, :-1], plain)
    finest = extractor.maps_of(images("test_resnet"))[0]
    assert torch.equal(rows[:, -1], finest.amax((1, 2, 3)))
    assert heat is not None and torch.equal(heat, finest.amax(1))
    assert extractor.layout.local is not None and extractor.layout.local.layer == LOCAL
    assert extractor.key() != key

    without = extractor.detached()
    assert (without.width, without.key()) == (width, key)
    assert torch.equal(without(images("test_resnet")), plain)
    assert without.with_heat(images("test_resnet"))[1] is None
    assert extractor.width == width + 1


def test_layers_without_maps_are_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4))
    extractor = FeatureExtractor(network, layers=["1", "3"], input_size=(3, 4, 4))
    with pytest.raises(UsageError) as error:
        extractor.keep_maps()
    assert "gives no maps" in one_line(error)
    with pytest.raises(UsageError):
        FeatureExtractor(backbone("test_resnet")).keep_maps(["layer9"])
