"""Cuts a classifier in two: frozen layers, whose output can be cached, and the layers behind them, which are trained.

In: a classifier and the name of a layer. Out: the frozen part, which turns images into features, and the trained part,
which turns these into logits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..data.decoding import Transform
from ..exceptions import UsageError, did_you_mean
from ..features.layers import stage_names
from ..features.networks import device_of, evaluating, fingerprint
from .students import Classifier

# Raised when the same weights give other numbers.
_VERSION = 1


class FrozenLayers:
    """The layers of a classifier up to one of its modules: images -> output of that module, flattened.

    An :class:`featdiff.features.extraction.Extractor`, so its output can be cached. Made by :func:`split_at`.

    Attributes
    ----------
    layer : str
        The last module.
    shape : tuple of int
        Of its output for one image, such as (C, H, W).
    width : int
        Length of a feature vector, the product of ``shape``.
    modules : nn.ModuleList
        What the trained part lacks.
    """

    def __init__(self, classifier: Classifier, layer: str, modules: nn.ModuleList, shape: tuple[int, ...]) -> None:
        self.layer = layer
        self.shape = shape
        self.width = math.prod(shape)
        self.modules = modules
        self._classifier = classifier

    @property
    def transform(self) -> Transform:
        """RGB image -> (3, H, W) tensor, as the classifier was trained with."""
        return self._classifier.transform

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return device_of(self.modules)

    def key(self, variant: str = "") -> str:
        """A short hash of everything that decides the output: frozen weights, preprocessing and ``variant``.

        The weights behind are no part of it, so cached features stay valid when those are trained.
        """
        # the printed modules differ in settings that are no weights (padding, activation)
        architecture = self._classifier.name.partition(".")[0]
        network = [architecture, fingerprint(self.modules), repr(self.modules), self.layer]
        facts = [_VERSION, *network, self._classifier.data_config, variant]
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Run the frozen layers.

        Parameters
        ----------
        pixels : Tensor of shape (B, 3, H, W)
            Preprocessed images.

        Returns
        -------
        Tensor of float16, shape (B, ``width``)
            On the classifier's device.

        Raises
        ------
        UsageError
            Images of another size than the classifier's, or numbers above 65,504.
        """
        maps = _output_of(self._classifier.model, self.layer, pixels)
        if tuple(maps.shape[1:]) != self.shape:
            raise UsageError(f"images of shape {tuple(pixels.shape[1:])} are not those this classifier was cut for")

        features = maps.flatten(1).half()
        if maps.isfinite().all() and not features.isfinite().all():
            raise UsageError(
                f"layer {self.layer!r} gives numbers that half precision cannot hold: name another one",
                argument="train_from",
            )
        return features

    def maps(self, features: Tensor) -> Tensor:
        """Features (B, ``width``) -> (B, ``*shape``) float32, the input of the trained part."""
        maps = features.float().unflatten(1, self.shape)
        # depthwise convolutions are a quarter faster, others no slower
        return maps.contiguous(memory_format=torch.channels_last) if maps.dim() == 4 else maps


def split_at(classifier: Classifier, layer: str) -> tuple[FrozenLayers, nn.Module]:
    """Cut a classifier behind one of its modules.

    The trained part shares its parameters and buffers with the classifier, so training it trains the classifier, whose
    ``forward`` stays as it was. Afterwards, parameters of the frozen layers require no gradient, those behind do.

    Parameters
    ----------
    classifier : Classifier
    layer : str
        A stage (:func:`featdiff.features.layers.stage_names`), or any other named module.

    Returns
    -------
    frozen : FrozenLayers
    trained : nn.Module
        Turns the output of :meth:`FrozenLayers.maps`, (B, C, H, W), into logits (B, classes).

    Raises
    ------
    UsageError
        No such module, or this network cannot be cut there: on a test image, the two parts give other logits than the
        whole. (A plain ViT adds positions to its patches between two modules.)
    """
    frozen, trained = _cut(classifier, layer)
    trained.requires_grad_(True)
    frozen.modules.requires_grad_(False)
    return frozen, trained


def default_cut(classifier: Classifier) -> str:
    """The deepest stage, other than the last, at which the network can be cut (``UsageError`` if there is none)."""
    for layer in reversed(stage_names(classifier.model)[:-1]):
        try:
            _cut(classifier, layer)
        except UsageError:
            continue
        return layer
    raise UsageError(
        f"no stage of {classifier.name} can be cut off: train all its layers with train_from=''",
        argument="train_from",
    )


def _cut(classifier: Classifier, layer: str) -> tuple[FrozenLayers, nn.Module]:
    """:func:`split_at` without a change to any parameter."""
    model = classifier.model
    names = [name for name, _ in model.named_modules() if name]
    if layer not in names:
        hint = did_you_mean(layer, names) or f"; its stages are {', '.join(stage_names(model)) or 'not named'}"
        raise UsageError(f"{classifier.name} has no layer {layer!r}{hint}", argument="train_from")

    size = classifier.data_config["input_size"]
    pixels = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)).to(device_of(model))
    pixels[1] *= -2  # two very different images
    finished = _finished_modules(model, layer, pixels)
    maps = _output_of(model, layer, pixels)
    frozen_modules = nn.ModuleList()
    trained = _without(model, finished, frozen_modules)
    if not _same_logits(model, trained, pixels, maps):
        raise UsageError(
            f"{classifier.name} cannot be cut at {layer!r}: what lies behind it needs more than that layer gives; "
            "name another layer, or train all layers with train_from=''",
            argument="train_from",
        )
    return FrozenLayers(classifier, layer, frozen_modules, tuple(maps.shape[1:])), trained


class _Reached(Exception):
    """Ends a forward pass at the layer; carries its output."""

    def __init__(self, output: Any) -> None:
        self.output = output


@torch.inference_mode()
def _output_of(model: nn.Module, layer: str, pixels: Tensor) -> Tensor:
    """Output of ``layer`` in eval mode; nothing behind it runs."""

    def stop(module: nn.Module, args: object, output: Any) -> None:
        raise _Reached(output)

    pixels = pixels.to(device_of(model)).contiguous(memory_format=torch.channels_last)  # convolutions are faster
    handle = model.get_submodule(layer).register_forward_hook(stop)
    try:
        with evaluating(model):
            model(pixels)
    except _Reached as reached:
        if isinstance(reached.output, Tensor):
            return reached.output
        raise UsageError(
            f"layer {layer!r} gives {type(reached.output).__name__}, not one tensor", argument="train_from"
        ) from None
    finally:
        handle.remove()
    raise UsageError(f"layer {layer!r} is not reached in a forward pass; name another layer", argument="train_from")


@torch.inference_mode()
def _finished_modules(model: nn.Module, layer: str, pixels: Tensor) -> set[nn.Module]:
    """The modules that have run when ``layer`` has, including itself."""
    finished: set[nn.Module] = set()

    def finish(module: nn.Module, args: object, output: object) -> None:
        finished.add(module)

    handles = [module.register_forward_hook(finish) for module in model.modules()]
    try:
        _output_of(model, layer, pixels)
    finally:
        for handle in handles:
            handle.remove()
    return finished


def _without(module: nn.Module, removed: set[nn.Module], collected: nn.ModuleList) -> nn.Module:
    """The module with :class:`torch.nn.Identity` in place of ``removed`` ones, which are appended to ``collected``.

    Modules that contain a removed one are shallow copies, which share parameters and buffers with the originals; all
    others are the originals.
    """
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        if child in removed:
            collected.append(child)
            children[name] = nn.Identity()
        else:
            children[name] = child and _without(child, removed, collected)
    if all(children[name] is child for name, child in module._modules.items()):
        return module

    twin = copy.copy(module)
    twin._modules = children
    return twin


@torch.inference_mode()
def _same_logits(model: nn.Module, trained: nn.Module, pixels: Tensor, maps: Tensor) -> bool:
    """Whether the trained part gives the same logits for ``maps`` as the model for ``pixels``."""
    with evaluating(model), evaluating(trained):
        expected = model(pixels)
        try:
            logits = trained(maps.contiguous())
        except Exception:  # modules fail in many ways on inputs that they are not meant for
            return False
    # compared with the difference of two images: untrained networks give nearly the same logits for any image
    difference = (expected[0] - expected[1]).abs().max().item()
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=0, atol=1e-2 * difference)
