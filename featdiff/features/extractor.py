"""A backbone and layer names -> one pooled vector per layer and image. Knows nothing of diffusion.

timm models go through ``forward_intermediates`` (NCHW for CNN, ViT and Swin alike); any other module, or a layer
inside a stage, through forward hooks (:mod:`featdiff.features.hooks`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.decoding import Transform
from ..exceptions import UsageError, first_line
from .backbones import Backbone
from .hooks import SPREAD, Tap, Taps, channels_first, find_module, pool, spread
from .layers import Layers, resolve_layers, stage_names
from .layout import LOGITS, PRE_LOGITS, FeatureLayout
from .networks import evaluating, identity, logits_of

#: How the name of a mixed precision ends.
AUTOCAST = " autocast"
# Raised when the numbers that an extractor gives for the same weights change.
_FEATURE_VERSION = 2


class FeatureExtractor:
    """Images -> pooled features of several layers, concatenated.

    Parameters
    ----------
    backbone : Backbone or nn.Module
        From :func:`featdiff.features.backbones.load_backbone`, or any module that takes (B, C, H, W).
    layers : "auto", names, or indices
        Names as in timm's ``feature_info`` or ``named_modules``; indices (negative ones too) into ``feature_info``;
        ``pre_logits`` for what the classifier of a timm model, or of a module that ends in a linear layer, sees.
    device : str or torch.device
    mixed_precision : bool
        Run a backbone by name under float16 autocast (GPU only). A module of your own runs as it is.
    transform : callable, optional
        RGB picture -> (3, H, W) tensor; needed for a bare module if it is to read files.
    input_size : (C, H, W), optional
        Of the images for a bare module without ``transform``; default (3, 224, 224).
    logits : bool
        A row ends with the module's logits.

    Attributes
    ----------
    layers, widths : names and channels of the layers
    columns : dict of slices
        Where each vector lies in a row of features: the layers in order, then the spatial deviations
        (``<layer>:std``) of the deep ones, that is the last stage and ``pre_logits``, where these are maps, then
        ``logits`` if asked for. (Deviations of early stages tell contrast and compression, not content.)
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
        input_size: Sequence[int] | None = None,
        logits: bool = False,
    ) -> None:
        self.backbone = backbone if isinstance(backbone, Backbone) else _wrap(backbone, transform, input_size)
        own = self.backbone.source == "module"
        self._given_device = torch.device(device)
        self.mixed_precision = mixed_precision and self._given_device.type == "cuda" and not own
        self.model = self.backbone.model.to(self._given_device)
        self._logits = logits
        stages = stage_names(self.model)
        modules = [name for name, _ in self.model.named_modules() if name]
        pixels = self.probe()
        asks = logits or bool(stages) or PRE_LOGITS in (layers if isinstance(layers, str) else list(layers))
        self._last_linear = self._find_last_linear(pixels) if own and asks else ""
        headless = bool(stages) and hasattr(self.model, "forward_head") and not (own and self.model.num_classes)
        has_pre_logits = headless or bool(self._last_linear)
        self.layers = resolve_layers(layers, stages, modules, has_pre_logits)
        self._stages = {name: stages.index(name) for name in self.layers if name in stages and not own}
        self._wants_pre_logits = PRE_LOGITS in self.layers
        *_, self._last = (name for name in self.layers if name != PRE_LOGITS)
        self._taps = Taps(self.model, self._own_taps(stages, pixels) if own else self._inner_taps(stages))
        found = self._forward(pixels)
        ends = np.cumsum([part.shape[1] for part in found.values()]).tolist()
        self.columns = {n: slice(e - v.shape[1], e) for (n, v), e in zip(found.items(), ends, strict=True)}
        self.widths = tuple(found[name].shape[1] for name in self.layers)
        self.width = ends[-1]
        self.layout = FeatureLayout.from_json({name: [part.start, part.stop] for name, part in self.columns.items()})

    @property
    def transform(self) -> Transform:
        """RGB picture -> (3, H, W) tensor, as the backbone was trained with."""
        return self.backbone.transform

    @property
    def device(self) -> torch.device:
        """Where the network is now."""
        return next((p.device for p in self.model.parameters()), self._given_device)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's weights, and so of its images."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def precision(self) -> str:
        """What numbers the network works in at the moment, like ``float32`` or ``bfloat16 autocast``."""
        device = self.device.type
        mixed = torch.float16 if self.mixed_precision else None
        if torch.is_autocast_enabled(device):
            mixed = torch.get_autocast_dtype(device)
        return str(mixed or self.dtype).removeprefix("torch.") + (AUTOCAST if mixed else "")

    def key(self, note: str = "") -> str:
        """A short hash of everything that decides the numbers: weights, layers, preprocessing, precision, ``note``."""
        # the printed module tells settings that leave the weights alone (padding, activation)
        network = [self.backbone.fingerprint, repr(self.model), self.layers, self.mixed_precision]
        further = ["logits"] * self._logits + [self.precision] * self.precision.endswith(AUTOCAST)
        facts = [_FEATURE_VERSION, *network, self.backbone.data_config, note, *further]
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) preprocessed images -> (B, ``width``) float32 features on ``device``.

        Raises
        ------
        UsageError
            The backbone does not take images of this shape.
        """
        pixels = pixels.to(self.device, self.dtype, non_blocking=True)
        return torch.cat([*self._forward(pixels).values()], dim=1)

    def recording(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Collect layers from the passes of a module of your own that are made meanwhile; see :meth:`in_passing`.

        Nothing is changed about a pass: mode, precision and gradients are the caller's.
        """
        return self._taps.recording()

    @torch.no_grad()
    def in_passing(self, found: dict[str, Tensor], output: Any, count: int) -> Tensor:
        """What :meth:`recording` found in a pass of ``count`` images, and what the pass gave -> rows (B, ``width``).

        Raises
        ------
        UsageError
            Not one vector of each layer for each image.
        """
        return torch.cat([*self._rows(self._with_output(found, output), count).values()], dim=1)

    def last_linear(self) -> nn.Linear | nn.Conv2d:
        """The layer of a module of your own that gives the logits (``UsageError`` if there is none)."""
        if not self._last_linear:
            raise UsageError(f"no linear layer of {self.backbone.tag} gives its logits")
        found = self.model.get_submodule(self._last_linear)
        assert isinstance(found, nn.Linear | nn.Conv2d)
        return found

    def probe(self) -> Tensor:
        """Some image, to see what layers give; not an even one, of which many layers would give the same."""
        size = self.backbone.data_config.get("input_size", (3, 224, 224))
        pixels = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
        return pixels.to(self.device, self.dtype)

    @torch.inference_mode()
    def _forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pooled vectors (B, C) of each layer, of the deep layers' deviations, and logits."""
        autocast = torch.autocast(self.device.type, torch.float16) if self.mixed_precision else nullcontext()
        with autocast, self._evaluated(pixels):
            found = self._run(pixels)
        return self._rows(found, pixels.shape[0])  # len() would fix the batch size of an export

    @contextmanager
    def _evaluated(self, pixels: Tensor) -> Iterator[None]:
        """Eval mode for a pass of these images, whose failure is told in one line."""
        try:
            with evaluating(self.model):
                yield
        except (UsageError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # networks fail in many ways on a size they were not made for
            shape = f"{pixels.shape[2]} x {pixels.shape[3]} pixels (batch {tuple(pixels.shape)})"
            raise UsageError(f"{self.backbone.tag} cannot take images of {shape}: {first_line(error)}") from None

    def _rows(self, found: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        for name in self.layers:
            if found[name].shape[0] != count:
                raise UsageError(f"layer {name!r} gives {len(found[name])} vectors for {count} images")
        # a pre-logits vector of another width is not the mean of that map
        deep = [
            n + SPREAD
            for n in (self._last, PRE_LOGITS)
            if n + SPREAD in found and found[n + SPREAD].shape == found[n].shape
        ]
        names = [*self.layers, *deep, *([LOGITS] if self._logits else [])]
        return {name: found[name].float() for name in names}

    def _run(self, pixels: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self._taps.taps or self._logits:  # for a timm model a pass of their own: the other never runs the head
            with self._taps.recording() as found:
                output = self.model(pixels)
            found = self._with_output(found, output)
        if self.backbone.source == "module" or not (self._stages or self._wants_pre_logits):
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
                found |= spread(maps[indices.index(i)], name)
        return found

    def _with_output(self, found: dict[str, Tensor], output: Any) -> dict[str, Tensor]:
        """What the pass gave in the end, where that is a layer that is wanted."""
        if self._wants_pre_logits and not self._last_linear and self.backbone.source == "module":
            found[PRE_LOGITS] = pool(logits_of(output), PRE_LOGITS)
        return found | ({LOGITS: logits_of(output)} if self._logits else {})

    def _pre_logits(self, final: Tensor) -> dict[str, Tensor]:
        """Pre-logits, and the deviations of the map before them."""
        vectors = pool(self.model.forward_head(final, pre_logits=True), PRE_LOGITS)  # type: ignore[operator]
        return {PRE_LOGITS: vectors} | spread(channels_first(final, self.model, self.model), PRE_LOGITS)

    # ---- where layers are read ----

    def _inner_taps(self, stages: Sequence[str]) -> list[Tap]:
        """Layers of a timm model that ``forward_intermediates`` does not give."""
        names = [name for name in self.layers if name not in stages and name != PRE_LOGITS]
        return [Tap(name, mean=name, spread=name + SPREAD if name == self._last else "") for name in names]

    def _own_taps(self, stages: Sequence[str], pixels: Tensor) -> list[Tap]:
        """All layers of a module of your own; stages of a timm model are what ``forward_intermediates`` would give."""
        taps = []
        for name in self.layers:
            skip = getattr(self.model, "num_prefix_tokens", 0) if name in stages else 0
            if name in stages and name not in dict(self.model.named_modules()):
                raise UsageError(f"layer {name!r} of {self.backbone.tag} is no module of its own; name other layers")
            if name != PRE_LOGITS:
                taps.append(Tap(name, name, name + SPREAD if name == self._last else "", skip=skip))
        if self._wants_pre_logits and self._last_linear:
            taps.append(Tap(self._last_linear, PRE_LOGITS, incoming=True))
        if self._wants_pre_logits and (final := self._find_final(pixels)):
            taps.append(Tap(final, spread=PRE_LOGITS + SPREAD))
        return taps

    def _find_last_linear(self, pixels: Tensor) -> str:
        """Name of the module whose output is the logits, if it is a linear one."""
        with self._evaluated(pixels), torch.no_grad():
            logits = logits_of(self.model(pixels))

            def fits(module: nn.Module, gives: Any) -> bool:
                return isinstance(module, nn.Linear | nn.Conv2d) and _equal(gives, logits)

            return find_module(self.model, lambda: self.model(pixels), fits)

    def _find_final(self, pixels: Tensor) -> str:
        """Name of the module that gives the map which a timm model's head averages."""
        if not hasattr(self.model, "forward_features"):
            return ""
        run: Any = self.model.forward_features
        with self._evaluated(pixels), torch.no_grad():
            final = run(pixels)
            return find_module(self.model, lambda: run(pixels), lambda _, gives: _equal(gives, final))


def _equal(found: Any, wanted: Any) -> bool:
    """Whether a module gives this very tensor, be it in another shape."""
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor) or found.numel() != wanted.numel():
        return False
    return torch.equal(found.flatten(), wanted.flatten())


def _wrap(model: nn.Module, transform: Transform | None, input_size: Sequence[int] | None) -> Backbone:
    config = _probe(transform) if transform else {"input_size": tuple(input_size or (3, 224, 224))}
    return Backbone(model, type(model).__name__, "module", identity(model), config, transform or _no_transform)


def _no_transform(image: Any) -> Tensor:
    raise UsageError("a bare module needs transform=... to read pictures, or a DataLoader of ready tensors")


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
