"""A classifier cut in two: a trunk that stays as it is, whose output can be kept, and the tail that is trained."""

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

# Raised when the numbers that a trunk gives for the same weights change.
_TRUNK_VERSION = 1


class Trunk:
    """Images -> what a classifier's module ``layer`` gives, as rows.

    It is the :class:`featdiff.features.extraction.Extractor` of a tail.

    Attributes
    ----------
    layer : str
        The last module that runs.
    shape : tuple of int
        Of its output for one image, such as (C, H, W).
    width : int
        Length of a row, the product of ``shape``.
    """

    def __init__(self, classifier: Classifier, layer: str, parts: nn.ModuleList, shape: tuple[int, ...]) -> None:
        self.layer, self.shape, self.width = layer, shape, math.prod(shape)
        self._classifier, self._parts = classifier, parts

    @property
    def transform(self) -> Transform:
        """RGB picture -> (3, H, W) tensor, as the classifier was trained with."""
        return self._classifier.transform

    def key(self, variant: str = "") -> str:
        """A short hash of what decides the numbers: the trunk's own weights, preprocessing, ``variant``.

        The tail's weights are no part of it, so training them leaves what was kept as good as it was.
        """
        # the printed modules tell settings that leave the weights alone (padding, activation)
        network = [self._classifier.name.partition(".")[0], fingerprint(self._parts), repr(self._parts), self.layer]
        facts = [_TRUNK_VERSION, *network, self._classifier.data_config, variant]
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed images -> (B, ``width``) float16 on the classifier's device.

        Raises
        ------
        UsageError
            Images of another size than the classifier's, or numbers above 65,504.
        """
        maps = _maps(self._classifier.model, self.layer, pixels)
        if tuple(maps.shape[1:]) != self.shape:
            raise UsageError(f"images of shape {tuple(pixels.shape[1:])} are not those this classifier was cut for")
        rows = maps.flatten(1).half()
        if maps.isfinite().all() and not rows.isfinite().all():
            raise UsageError(f"layer {self.layer!r} gives numbers that half precision cannot hold: name another one")
        return rows

    def maps(self, rows: Tensor) -> Tensor:
        """Rows (B, ``width``) -> (B, ``*shape``) float32, as the tail takes them."""
        maps = rows.float().unflatten(1, self.shape)
        # depthwise convolutions are a quarter faster, others no slower
        return maps.contiguous(memory_format=torch.channels_last) if maps.dim() == 4 else maps


def split_at(classifier: Classifier, layer: str) -> tuple[Trunk, nn.Module]:
    """Cut a classifier behind one of its modules.

    The tail takes what :meth:`Trunk.maps` gives, (B, C, H, W), and gives logits (B, classes). Its parameters and
    buffers are the classifier's own, so training it trains the classifier, whose ``forward`` stays as it was. From then
    on the trunk's parameters ask for no gradient, the tail's do.

    Parameters
    ----------
    layer : str
        A stage (:func:`featdiff.features.layers.stage_names`), or any other named module.

    Raises
    ------
    UsageError
        No such module, or this network cannot be cut there: the tail, fed by the trunk, gives other logits than the
        whole on a test image. (A plain ViT adds positions to its patches between two modules.)
    """
    trunk, tail = _cut(classifier, layer)
    tail.requires_grad_(True)
    trunk._parts.requires_grad_(False)
    return trunk, tail


def default_cut(classifier: Classifier) -> str:
    """The deepest stage but the last at which the network can be cut (``UsageError`` if there is none)."""
    for layer in reversed(stage_names(classifier.model)[:-1]):
        try:
            _cut(classifier, layer)
        except UsageError:
            continue
        return layer
    raise UsageError(f"no stage of {classifier.name} can be cut off: train all its layers with --train-from ''")


def _cut(classifier: Classifier, layer: str) -> tuple[Trunk, nn.Module]:
    """:func:`split_at` without a change to any parameter."""
    model = classifier.model
    known = [name for name, _ in model.named_modules() if name]
    if layer not in known:
        hint = did_you_mean(layer, known) or f"; its stages are {', '.join(stage_names(model)) or 'not named'}"
        raise UsageError(f"{classifier.name} has no layer {layer!r}{hint}")
    size = classifier.data_config["input_size"]
    pixels = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)).to(device_of(model))
    pixels[1] *= -2  # two images that are far apart
    done = _done(model, layer, pixels)
    maps = _maps(model, layer, pixels)
    parts = nn.ModuleList()
    tail = _without(model, done, parts)
    if not _agree(model, tail, pixels, maps):
        raise UsageError(
            f"{classifier.name} cannot be cut at {layer!r}: what lies behind it needs more than that layer gives; "
            "name another layer, or train all layers with --train-from ''"
        )
    return Trunk(classifier, layer, parts, tuple(maps.shape[1:])), tail


class _Reached(Exception):
    """Ends a pass at the layer; carries what the layer gave."""

    def __init__(self, output: Any) -> None:
        self.output = output


@torch.inference_mode()
def _maps(model: nn.Module, layer: str, pixels: Tensor) -> Tensor:
    """What ``layer`` gives, in eval mode; nothing behind it runs."""

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
        raise UsageError(f"layer {layer!r} gives {type(reached.output).__name__}, not one tensor") from None
    finally:
        handle.remove()
    raise UsageError(f"layer {layer!r} is not reached in a forward pass; name another layer")


@torch.inference_mode()
def _done(model: nn.Module, layer: str, pixels: Tensor) -> set[nn.Module]:
    """The modules that have finished when ``layer`` has, itself among them."""
    done: set[nn.Module] = set()

    def finish(module: nn.Module, args: object, output: object) -> None:
        done.add(module)

    handles = [module.register_forward_hook(finish) for module in model.modules()]
    try:
        _maps(model, layer, pixels)
    finally:
        for handle in handles:
            handle.remove()
    return done


def _without(module: nn.Module, done: set[nn.Module], parts: nn.ModuleList) -> nn.Module:
    """The module with :class:`torch.nn.Identity` in place of what is in ``done``, which goes to ``parts``.

    Modules around a gap are shallow copies, which have parameters and buffers in common with the originals; modules
    without a gap are the originals.
    """
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        if child in done:
            parts.append(child)
            children[name] = nn.Identity()
        else:
            children[name] = child and _without(child, done, parts)
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    twin = copy.copy(module)
    twin._modules = children
    return twin


@torch.inference_mode()
def _agree(model: nn.Module, tail: nn.Module, pixels: Tensor, maps: Tensor) -> bool:
    """Whether the tail makes of ``maps`` what the model makes of ``pixels``."""
    with evaluating(model), evaluating(tail):
        wanted = model(pixels)
        try:
            found = tail(maps.contiguous())
        except Exception:  # modules fail in many ways on what is not meant for them
            return False
    # small against what tells two images apart: logits of untrained networks are nearly those of any image
    apart = (wanted[0] - wanted[1]).abs().max().item()
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=1e-2 * apart)
