"""A backbone and layer names -> one pooled vector per layer and image. Knows nothing of diffusion.

timm models go through ``forward_intermediates`` (NCHW for CNN, ViT and Swin alike); any other module, or a layer
inside a stage, through forward hooks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from .backbones import Backbone, fingerprint
from .exceptions import UsageError, did_you_mean
from .images import Transform

#: ``layers="auto"`` takes every stage of a CNN or Swin, and this many evenly spaced blocks of a plain ViT.
AUTO_LAYERS = 5
# Raised when the numbers that an extractor gives for the same weights change.
_FEATURE_VERSION = 1

Layers = str | Sequence[str | int]


class FeatureExtractor:
    """Images -> pooled features of several layers, concatenated.

    Parameters
    ----------
    backbone : Backbone or nn.Module
        From :func:`featdiff.backbones.load_backbone`, or any module that takes (B, 3, H, W).
    layers : "auto", names, or indices
        Names as in timm's ``feature_info`` or ``named_modules``; indices (negative ones too) into ``feature_info``.
    device : str or torch.device
    mixed_precision : bool
        Run the backbone under float16 autocast (GPU only).
    transform : callable, optional
        RGB picture -> (3, H, W) tensor; needed for a bare module if it is to read files.
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
        self.layers = resolve_layers(layers, stages, [name for name, _ in self.model.named_modules() if name])
        self._indices = [stages.index(name) for name in self.layers] if set(self.layers) <= set(stages) else None
        self.widths = self._measure_widths()

    @property
    def transform(self) -> Transform:
        """RGB picture -> (3, H, W) tensor, as the backbone was trained with."""
        return self.backbone.transform

    def key(self, note: str = "") -> str:
        """A short hash of everything that decides the numbers: weights, layers, preprocessing, precision, ``note``."""
        facts = [
            _FEATURE_VERSION,
            self.backbone.fingerprint,
            self.layers,
            self.backbone.data_config,
            self.mixed_precision,
            note,
        ]
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed images -> (B, sum of ``widths``) float32 features on ``device``."""
        pixels = pixels.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        autocast = torch.autocast(self.device.type, torch.float16) if self.mixed_precision else nullcontext()
        with autocast:
            maps = self._maps(pixels)
        return torch.cat([pool(maps[name], name).float() for name in self.layers], dim=1)

    def _maps(self, pixels: Tensor) -> dict[str, Tensor]:
        if self._indices is None:
            with recorded(self.model, self.layers) as maps:
                self.model(pixels)
            return maps
        found = self.model.forward_intermediates(  # type: ignore[operator]
            pixels,
            indices=self._indices,
            intermediates_only=True,
            output_fmt="NCHW",
            norm=False,
            stop_early=True,
        )
        ordered = sorted(self._indices)  # timm returns them in network order
        return {name: found[ordered.index(index)] for name, index in zip(self.layers, self._indices, strict=True)}

    def _measure_widths(self) -> tuple[int, ...]:
        size = self.backbone.data_config.get("input_size", (3, 224, 224))
        try:
            with torch.inference_mode():
                maps = self._maps(torch.zeros(1, *size, device=self.device))
        except UsageError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{self.backbone.tag} cannot take images of {size[1]} x {size[2]} pixels: {reason}"
            ) from None
        return tuple(pool(maps[name], name).shape[1] for name in self.layers)


def resolve_layers(layers: Layers, stages: Sequence[str], modules: Sequence[str]) -> tuple[str, ...]:
    """``auto``, names or indices -> layer names, in network order as given.

    Raises
    ------
    UsageError
        A layer that does not exist (near names are offered), or ``auto`` for a module without stages.
    """
    if isinstance(layers, str):
        layers = _parse(layers)
    if list(layers) == ["auto"]:
        if not stages:
            raise UsageError("layers='auto' needs a timm model; name the layers of your module")
        count = len(stages)
        if count <= AUTO_LAYERS + 1:
            return tuple(stages)
        return tuple(stages[round((i + 1) * count / AUTO_LAYERS) - 1] for i in range(AUTO_LAYERS))
    names = tuple(_layer_name(layer, stages, modules) for layer in layers)
    if not names or len(set(names)) < len(names):
        raise UsageError("name at least one layer, and each layer once")
    return names


def _parse(text: str) -> list[str | int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [int(part) if part.lstrip("-").isdigit() else part for part in parts]


def _layer_name(layer: str | int, stages: Sequence[str], modules: Sequence[str]) -> str:
    if isinstance(layer, int):
        if not -len(stages) <= layer < len(stages):
            raise UsageError(f"no layer {layer}: this backbone has {len(stages)} ({', '.join(stages) or 'name them'})")
        return stages[layer]
    if layer not in stages and layer not in modules:
        hint = did_you_mean(layer, [*stages, *modules])
        raise UsageError(f"unknown layer {layer!r}{hint or '; known: ' + ', '.join(stages or modules[:20])}")
    return layer


def _stage_names(model: nn.Module) -> list[str]:
    if not hasattr(model, "forward_intermediates"):
        return []
    return [info["module"] for info in model.feature_info]  # type: ignore[union-attr]


def _wrap(model: nn.Module, transform: Transform | None) -> Backbone:
    def missing(image: Any) -> Tensor:
        raise UsageError("a bare module needs transform=... to read pictures, or a DataLoader of ready tensors")

    model.eval().requires_grad_(False)
    name = type(model).__name__
    return Backbone(model, name, "module", fingerprint(model), {"transform": repr(transform)}, transform or missing)


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the named modules during a forward pass, by hooks that are removed afterwards."""
    outputs: dict[str, Tensor] = {}
    modules: Mapping[str, nn.Module] = dict(model.named_modules())

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = _channels_first(output[0] if isinstance(output, tuple | list) else output, module, model)

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
    nhwc = "NHWC" in (getattr(module, "output_fmt", None), getattr(model, "output_fmt", None))
    return output.movedim(-1, 1) if nhwc and isinstance(output, Tensor) and output.dim() == 4 else output


def pool(features: Tensor, name: str = "") -> Tensor:
    """Global average: (B, C, H, W) maps or (B, N, C) tokens -> (B, C); vectors stay as they are."""
    if not isinstance(features, Tensor) or features.dim() not in (2, 3, 4):
        what = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(f"layer {name!r} gives {what}; featdiff needs (B, C, H, W), (B, N, C) or (B, C)")
    if features.dim() == 4:
        return reduce(features, "b c h w -> b c", "mean")
    return reduce(features, "b n c -> b c", "mean") if features.dim() == 3 else features


def block_normalise(features: Tensor, widths: Sequence[int], delta: float = 1e-6) -> Tensor:
    """(B, sum of widths): each sample's stretch of each layer to mean 0, variance 1 over its channels.

    DLSR (arXiv 2411.10701), section 3: (f - mean(f)) / sqrt(Var(f) + delta).
    """
    parts = [
        (p - p.mean(1, keepdim=True)) / (p.var(1, keepdim=True, correction=0) + delta).sqrt()
        for p in features.split(list(widths), 1)
    ]
    return torch.cat(parts, dim=1)
