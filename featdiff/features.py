"""A backbone and layer names -> one pooled vector per layer and image. Knows nothing of diffusion.

timm models go through ``forward_intermediates`` (NCHW for CNN, ViT and Swin alike); any other module, or a layer
inside a stage, through forward hooks.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from einops import reduce
from PIL import Image
from torch import Tensor, nn

from .backbones import Backbone, fingerprint
from .exceptions import UsageError, did_you_mean
from .images import Transform

#: ``layers="auto"`` takes every stage of a CNN or Swin, and this many evenly spaced blocks of a plain ViT.
AUTO_LAYERS = 5
#: The layer of a timm model's pre-logits: what its classifier sees.
PRE_LOGITS = "pre_logits"
#: ``<layer>:std`` is the spatial deviation of a layer's channels.
SPREAD = ":std"
# Raised when the numbers that an extractor gives for the same weights change.
_FEATURE_VERSION = 2

Layers = str | Sequence[str | int]


class FeatureExtractor:
    """Images -> pooled features of several layers, concatenated.

    Parameters
    ----------
    backbone : Backbone or nn.Module
        From :func:`featdiff.backbones.load_backbone`, or any module that takes (B, 3, H, W).
    layers : "auto", names, or indices
        Names as in timm's ``feature_info`` or ``named_modules``; indices (negative ones too) into ``feature_info``;
        ``pre_logits`` for what a timm model's classifier sees.
    device : str or torch.device
    mixed_precision : bool
        Run the backbone under float16 autocast (GPU only).
    transform : callable, optional
        RGB picture -> (3, H, W) tensor; needed for a bare module if it is to read files.

    Attributes
    ----------
    layers, widths : names and channels of the layers
    columns : dict of slices
        Where each vector lies in a row of features: the layers in order, then the spatial deviations
        (``<layer>:std``) of the deep ones, that is the last stage and ``pre_logits``, where these are maps. (Deviations
        of early stages tell contrast and compression, not content.)
    width : int
        Length of a row.
    """

    def __init__(
        self,
        backbone: Backbone | nn.Module,
        layers: Layers = "auto",
        device: str | torch.device = "cpu",
        mixed_precision: bool = True,
        transform: Transform | None = None,
    ) -> None:
        self.backbone = backbone if isinstance(backbone, Backbone) else _wrap(backbone, transform)
        self.device = torch.device(device)
        self.mixed_precision = mixed_precision and self.device.type == "cuda"
        self.model = self.backbone.model.to(self.device)
        stages = _stage_names(self.model)
        modules = [name for name, _ in self.model.named_modules() if name]
        has_classifier = bool(stages) and hasattr(self.model, "forward_head")
        self.layers = resolve_layers(layers, stages, modules, has_classifier)
        self._stages = {name: stages.index(name) for name in self.layers if name in stages}
        self._wants_pre_logits = PRE_LOGITS in self.layers
        self._inner = [name for name in self.layers if name not in stages and name != PRE_LOGITS]
        *_, self._last = (name for name in self.layers if name != PRE_LOGITS)
        size = self.backbone.data_config.get("input_size", (3, 224, 224))
        found = self._forward(torch.zeros(1, *size, device=self.device))
        ends = np.cumsum([part.shape[1] for part in found.values()]).tolist()
        self.columns = {n: slice(e - v.shape[1], e) for (n, v), e in zip(found.items(), ends, strict=True)}
        self.widths = tuple(found[name].shape[1] for name in self.layers)
        self.width = ends[-1]

    @property
    def transform(self) -> Transform:
        """RGB picture -> (3, H, W) tensor, as the backbone was trained with."""
        return self.backbone.transform

    def key(self, note: str = "") -> str:
        """A short hash of everything that decides the numbers: weights, layers, preprocessing, precision, ``note``."""
        # the printed module tells settings that leave the weights alone (padding, activation)
        network = [self.backbone.fingerprint, repr(self.model), self.layers, self.mixed_precision]
        facts = [_FEATURE_VERSION, *network, self.backbone.data_config, note]
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed images -> (B, ``width``) float32 features on ``device``.

        Raises
        ------
        UsageError
            The backbone does not take images of this shape.
        """
        return torch.cat([*self._forward(pixels.to(self.device, non_blocking=True)).values()], dim=1)

    @torch.inference_mode()
    def _forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pooled vectors (B, C) of each layer, then of the deep layers' deviations."""
        autocast = torch.autocast(self.device.type, torch.float16) if self.mixed_precision else nullcontext()
        try:
            with autocast, _evaluating(self.model):
                found = self._run(pixels)
        except (UsageError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # networks fail in many ways on a size they were not made for
            shape = f"{pixels.shape[2]} x {pixels.shape[3]} pixels (batch {tuple(pixels.shape)})"
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise UsageError(f"{self.backbone.tag} cannot take images of {shape}: {reason}") from None
        for name in self.layers:
            if found[name].shape[0] != pixels.shape[0]:  # len() would fix the batch size of an export
                raise UsageError(f"layer {name!r} gives {len(found[name])} vectors for {len(pixels)} images")
        deep = [name + SPREAD for name in (self._last, PRE_LOGITS) if name + SPREAD in found]
        return {name: found[name].float() for name in (*self.layers, *deep)}

    def _run(self, pixels: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self._inner:  # a pass of their own: forward_intermediates never runs the head
            with recorded(self.model, self._inner, deep=self._last) as found:
                self.model(pixels)
        if not self._stages and not self._wants_pre_logits:
            return found
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        indices = sorted(set(self._stages.values())) or [0]  # timm returns them in this order, and needs one
        options = {"indices": indices, "output_fmt": "NCHW", "norm": False}
        if self._wants_pre_logits:
            final, maps = self.model.forward_intermediates(pixels, **options)  # type: ignore[operator]
            found |= self._pre_logits(final)
        else:
            options |= {"intermediates_only": True, "stop_early": True}
            maps = self.model.forward_intermediates(pixels, **options)  # type: ignore[operator]
        for name, i in self._stages.items():
            found[name] = pool(maps[indices.index(i)], name)
            if name == self._last:
                found |= _spread(maps[indices.index(i)], name)
        return found

    def _pre_logits(self, final: Tensor) -> dict[str, Tensor]:
        """Pre-logits, and the deviations of the map they are the mean of, if they are one's."""
        vectors = pool(self.model.forward_head(final, pre_logits=True), PRE_LOGITS)  # type: ignore[operator]
        spread = _spread(_channels_first(final, self.model, self.model), PRE_LOGITS)
        same = [v.shape[1] == vectors.shape[1] for v in spread.values()]
        return {PRE_LOGITS: vectors} | (spread if all(same) else {})


def resolve_layers(
    layers: Layers, stages: Sequence[str], modules: Sequence[str], has_classifier: bool = False
) -> tuple[str, ...]:
    """``auto``, names or indices -> layer names, in network order as given; ``auto`` ends with ``pre_logits``.

    Raises
    ------
    UsageError
        A layer that does not exist (near names are offered), or ``auto`` for a module without stages.
    """
    if isinstance(layers, str):
        layers = [part.strip() for part in layers.split(",") if part.strip()]
    if not isinstance(layers, Iterable):
        raise UsageError(f"layers are 'auto', names or indices, not {layers!r}")
    if list(layers) == ["auto"]:
        if not stages:
            raise UsageError("layers='auto' needs a timm model; name the layers of your module")
        count = len(stages)
        if count > AUTO_LAYERS + 1:
            stages = [stages[round((i + 1) * count / AUTO_LAYERS) - 1] for i in range(AUTO_LAYERS)]
        return tuple(dict.fromkeys([*stages, PRE_LOGITS] if has_classifier else stages))
    if has_classifier and PRE_LOGITS not in modules:
        modules = [*modules, PRE_LOGITS]
    names = tuple(_layer_name(layer, stages, modules) for layer in layers)
    if not names or len(set(names)) < len(names):
        raise UsageError("name at least one layer, and each layer once")
    if has_classifier and names == (PRE_LOGITS,):
        raise UsageError(f"name another layer beside {PRE_LOGITS!r}: it is used for neighbours, not for diffusion")
    return names


def _layer_name(layer: object, stages: Sequence[str], modules: Sequence[str]) -> str:
    if isinstance(layer, str) and (layer in stages or layer in modules):
        return str(layer)
    index = _as_index(layer)
    if index is None:
        known = list(dict.fromkeys([*stages, *modules]))
        hint = did_you_mean(str(layer), known)
        raise UsageError(f"unknown layer {layer!r}{hint or '; known: ' + ', '.join(stages or known[:20])}")
    if not -len(stages) <= index < len(stages):
        raise UsageError(f"no layer {index}: this backbone has {len(stages)} ({', '.join(stages) or 'name them'})")
    return stages[index]


def _as_index(layer: object) -> int | None:
    try:
        return int(layer) if isinstance(layer, str) else operator.index(layer)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _stage_names(model: nn.Module) -> list[str]:
    if not hasattr(model, "forward_intermediates"):
        return []
    return [info["module"] for info in model.feature_info]  # type: ignore[union-attr]


def _wrap(model: nn.Module, transform: Transform | None) -> Backbone:
    def missing(image: Any) -> Tensor:
        raise UsageError("a bare module needs transform=... to read pictures, or a DataLoader of ready tensors")

    config = _probe(transform) if transform else {}
    # equal weights may sit in different networks: the printed module is part of its identity
    identity = hashlib.sha256(f"{model} {fingerprint(model)}".encode()).hexdigest()
    return Backbone(model, type(model).__name__, "module", identity, config, transform or missing)


def _probe(transform: Transform) -> dict[str, Any]:
    """What a transform makes of a test picture: its size, and a hash that tells transforms apart by what they do."""
    rows, columns = np.mgrid[0:120, 0:160]
    picture = Image.fromarray(np.stack([rows * 2, columns, (rows * columns) % 256], axis=-1).astype(np.uint8))
    try:
        pixels = transform(picture)
    except Exception as error:
        raise UsageError(f"transform fails on an RGB picture: {type(error).__name__} {error}") from None
    if not isinstance(pixels, Tensor) or pixels.dim() != 3:
        raise UsageError("transform must turn an RGB picture into a (3, H, W) tensor")
    digest = hashlib.sha256(pixels.detach().float().contiguous().numpy().tobytes()).hexdigest()
    return {"input_size": tuple(pixels.shape), "transform": digest}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every part of a user's network gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def recorded(model: nn.Module, names: Sequence[str], deep: str = "") -> Iterator[dict[str, Tensor]]:
    """Collect the pooled outputs of the named modules in a forward pass, by hooks that are removed afterwards.

    Of the module ``deep``, the spatial deviations as well.
    """
    outputs: dict[str, Tensor] = {}
    modules: Mapping[str, nn.Module] = dict(model.named_modules())

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            # pooled at once: the next module may work in place
            features = _channels_first(first, module, model)
            outputs[name] = pool(features, name).clone()
            if name == deep:
                outputs.update(_spread(features, name))

        return keep

    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    try:
        yield outputs
        if unused := [name for name in names if name not in outputs]:
            raise UsageError(f"layer {unused[0]!r} was not reached in the forward pass")
    finally:
        for handle in handles:
            handle.remove()


def _channels_first(output: Tensor, module: nn.Module, model: nn.Module) -> Tensor:
    # linear layers and layer norms work on the last axis, so a map that leaves them has its channels there
    formats = (getattr(module, "output_fmt", None), getattr(model, "output_fmt", None))
    nhwc = type(module) in (nn.Linear, nn.LayerNorm) or "NHWC" in formats
    return output.movedim(-1, 1) if nhwc and isinstance(output, Tensor) and output.dim() == 4 else output


def pool(features: Tensor, name: str = "") -> Tensor:
    """Global average: (B, C, H, W) maps or (B, N, C) tokens -> (B, C); vectors stay as they are."""
    if not isinstance(features, Tensor) or features.dim() not in (2, 3, 4):
        what = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(f"layer {name!r} gives {what}; featdiff needs (B, C, H, W), (B, N, C) or (B, C)")
    if features.dim() == 4:
        return reduce(features, "b c h w -> b c", "mean")
    return reduce(features, "b n c -> b c", "mean") if features.dim() == 3 else features


def _spread(features: Tensor, name: str) -> dict[str, Tensor]:
    """Deviations over space: (B, C, H, W) or (B, N, C) -> {"<name>:std": (B, C)}; nothing for vectors."""
    if features.dim() == 2:
        return {}
    places = (2, 3) if features.dim() == 4 else (1,)
    # as std(correction=0), which torch computes 15 times more slowly on a CPU
    centred = features.float() - features.float().mean(places, keepdim=True)
    return {name + SPREAD: centred.square().mean(places).sqrt()}


def block_normalise(features: Tensor, widths: Sequence[int], delta: float = 1e-6) -> Tensor:
    """(B, sum of widths): each sample's stretch of each layer to mean 0, variance 1 over its channels.

    DLSR (arXiv 2411.10701), section 3: (f - mean(f)) / sqrt(Var(f) + delta).
    """
    parts = [
        (p - p.mean(1, keepdim=True)) / (p.var(1, keepdim=True, correction=0) + delta).sqrt()
        for p in features.split(list(widths), 1)
    ]
    return torch.cat(parts, dim=1)
