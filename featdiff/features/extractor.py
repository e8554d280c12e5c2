"""Images -> rows of features: one pooled vector per layer, side by side. Knows nothing of diffusion."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.decoding import Transform
from ..exceptions import UsageError
from .backbones import Backbone
from .conversions import COMPILE
from .engines import TORCH, Choice, Engine, Pass, again, choose
from .layers import Layers
from .layout import LOCAL, FeatureLayout, Key, Kind
from .networks import identity, mixed_precision, versions
from .patches import choose_maps, map_hooks
from .readers import ModuleReader, checked, make_reader
from .stages import maps_with_channels_last, watch
from .transfer import moved

#: How the name of a mixed precision ends.
AUTOCAST = " autocast"
#: Maps (B, C, h, w), the finest first -> a score of each image (B,), and of each of its places (B, h, w).
OfMaps = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]
#: Raised when the numbers that an extractor gives for the same weights change.
FEATURE_VERSION = 4


class FeatureExtractor:
    """Turns images into rows of pooled features of several layers.

    Parameters
    ----------
    backbone : Backbone or nn.Module
        From :func:`featdiff.features.backbones.load_backbone`, or any module that takes (B, C, H, W).
    layers : "auto", names, or indices, default "auto"
        Names as in timm's ``feature_info`` or ``named_modules``; indices (negative ones too) into ``feature_info``;
        ``pre_logits`` for what the classifier of a timm model, or of a module that ends in a linear layer, sees.
        ``auto`` takes the stages of a timm model, and finds those of other modules by a pass
        (:mod:`featdiff.features.stages`).
    device : str or torch.device, default "cpu"
    precision : {"auto", "fp32", "bf16"}, default "auto"
        What a backbone by name computes in: float32, or bfloat16 autocast. ``auto`` is float32, on a GPU float16
        autocast. A module of your own runs as it is.
    transform : callable, optional
        RGB picture -> (3, H, W) tensor; needed for a bare module if it is to read files.
    input_size : (C, H, W), optional
        Of the images for a bare module without ``transform``; default (3, 224, 224).
    logits : bool, default False
        Whether a row ends with the module's logits.

    Attributes
    ----------
    layout : FeatureLayout
        What a row holds: the layers in order, then the spatial standard deviations of the deep ones (the last stage and
        the pre-logits, where these are maps), then the logits if asked for. (Deviations of early stages tell contrast
        and compression, not content.)
    layers : tuple of str
        Names of the layers.
    width : int
        Length of a row.
    maps : dict of str to int
        Modules whose maps are read as well, the finest first, and their channels; none before :meth:`keep_maps`.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
    >>> extractor = FeatureExtractor(network, layers=["1", "2"], input_size=(3, 32, 32))
    >>> extractor(torch.rand(5, 3, 32, 32)).shape  # 8 + 16 means, 16 standard deviations
    torch.Size([5, 40])
    """

    def __init__(
        self,
        backbone: Backbone | nn.Module,
        layers: Layers = "auto",
        device: str | torch.device = "cpu",
        precision: str = "auto",
        transform: Transform | None = None,
        input_size: Sequence[int] | None = None,
        logits: bool = False,
    ) -> None:
        self.backbone = backbone if isinstance(backbone, Backbone) else _wrap(backbone, transform, input_size)
        own = self.backbone.source == "module"
        self._given_device = torch.device(device)
        self._autocast = None if own else mixed_precision(precision, self._given_device)
        self.model = self.backbone.model.to(self._given_device)
        if self._given_device.type == "cuda" and not own:  # a GPU's convolutions want it in half precision
            self.model.to(memory_format=torch.channels_last)

        probe = self.probe()
        self._reader = make_reader(self.model, self.backbone.tag, own, layers, probe, logits)
        self._logits = logits
        self.layers = self._reader.layers
        self.maps: dict[str, int] = {}
        self._local: OfMaps | None = None
        self._local_key = ""
        self._engine: Engine | None = None
        self._kept_in: Path | None = None
        self._engine_weights: list[tuple[int, int]] = []  # of which an engine holds copies

        self._keys = self._reader.keys
        features = checked(self._read(probe), self._keys, 1)
        self.layout = FeatureLayout.of({key: vectors.shape[1] for key, vectors in features.items()})

    @property
    def width(self) -> int:
        """Length of a row."""
        return self.layout.width

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
        mixed = self._autocast
        if torch.is_autocast_enabled(device):
            mixed = torch.get_autocast_dtype(device)
        return str(mixed or self.dtype).removeprefix("torch.") + (AUTOCAST if mixed else "")

    def key(self, note: str = "", engine: str = "") -> str:
        """A short hash of everything that decides the numbers: weights, layers, preprocessing, precision, ``note``.

        ``engine`` stands in for what runs the forward pass now.
        """
        # the printed module tells settings that leave the weights alone (padding, activation)
        network = [self.backbone.fingerprint, repr(self.model), self.layers, self._autocast == torch.float16]
        further = ["logits"] * self._logits + [self.precision] * self.precision.endswith(AUTOCAST)
        further += [self._local_key] * bool(self._local_key)
        engine = engine or self.engine
        further += [engine] * (engine != TORCH)
        facts = [FEATURE_VERSION, *network, self.backbone.data_config, note, *further]
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) preprocessed images -> (B, ``width``) float32 features on ``device``.

        Raises
        ------
        UsageError
            The backbone does not take images of this shape.
        """
        return self.with_heat(pixels)[0]

    @torch.inference_mode()
    def with_heat(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same rows, and where images are strange, from one pass.

        Parameters
        ----------
        pixels : Tensor of shape (B, C, H, W)
            Preprocessed.

        Returns
        -------
        rows : Tensor of shape (B, ``width``)
        heat : Tensor of shape (B, h, w), optional
            In standard deviations of normal images at the same place, higher = more OOD. None without a local score.
        """
        return self._rows(self._read(pixels), pixels.shape[0])  # len() would fix the batch size of an export

    # ---- engine ----

    @property
    def engine(self) -> str:
        """What runs the forward pass: ``torch``, or another engine and its version."""
        return self._engine.label if self._engine else TORCH

    def choose_engine(self, wanted: str, pixels: Tensor, folder: Path | None = None) -> str:
        """Run the forward pass in another engine from now on, if that agrees with PyTorch and is faster.

        Parameters
        ----------
        wanted : str
            One of :data:`featdiff.features.engines.ENGINES`.
        pixels : Tensor of shape (B, C, H, W)
            Some real images, preprocessed.
        folder : Path, optional
            Where converted networks are kept, so that the next start is a fast one. One of your own is never kept:
            nothing tells when its code changes.

        Returns
        -------
        str
            What was chosen, and why.

        Raises
        ------
        UsageError
            The wanted engine is not installed.
        """
        self._engine = None
        self._kept_in = folder
        if wanted != TORCH and not self._fits(wanted):
            return f"torch, for engines run float32 on the CPU, and this is {self.precision} on {self.device}"
        return self._take(choose(wanted, self._for_engines(), pixels.to(self.device)))

    def _take(self, choice: Choice) -> str:
        self._engine = choice.engine
        self._engine_weights = versions(self.model)
        return choice.note

    def _for_engines(self) -> Pass:
        """The forward pass as engines are to run it."""
        folder = None
        if self._kept_in is not None and self.backbone.source != "module":
            code = [version("torch"), version("timm"), self.backbone.fingerprint, repr(self.model)]
            facts = json.dumps([*code, self.layers, self._logits, list(self.maps)])
            folder = self._kept_in / hashlib.sha256(facts.encode()).hexdigest()[:16]
        return Pass(self.model, self._in_torch, self._plain, self._autocast is not None, folder)

    def _fits(self, engine: str) -> bool:
        """Whether an engine may run what this extractor is at the moment."""
        as_chosen = self.dtype == torch.float32 and not torch.is_autocast_enabled(self.device.type)
        return as_chosen and (engine == COMPILE or (self.device.type == "cpu" and self._autocast != torch.float16))

    def in_torch(self, mixed: bool = True) -> FeatureExtractor:
        """The same extractor, whose passes are PyTorch's, as those of all copies are; on wish without autocast."""
        other = copy.copy(self)
        other._autocast = self._autocast if mixed else None
        return other

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_engine": None}  # engines can be neither copied nor pickled

    # ---- maps ----

    def keep_maps(self, names: Sequence[str] = ()) -> dict[str, int]:
        """From now on, read the maps that show places in the same pass.

        Parameters
        ----------
        names : sequence of str, optional
            Modules that give them, the finest first; default:
            :func:`featdiff.features.patches.choose_maps`.

        Returns
        -------
        dict of str to int
            Which these are, and their channels; :attr:`maps`.

        Raises
        ------
        UsageError
            The network gives no maps.
        """
        probe = self.probe()
        reader = self._reader
        with reader.evaluated(probe):
            outputs = watch(self.model, lambda: reader.read(probe), probe)
        names = names or choose_maps(self.layers, outputs)
        if not names or not all(name in outputs for name in names):
            raise UsageError(f"{self.backbone.tag} gives no maps, so it cannot tell where something is strange")

        last = set() if reader.stage_names else maps_with_channels_last(outputs)
        reader.keep_maps(map_hooks(names, self.model, outputs, last))
        self.maps = dict.fromkeys(names, 0)
        if self._engine is not None:  # it was built for a pass without maps
            self._take(again(self._engine.name, self._for_engines(), probe))
        self.maps = {name: values.shape[1] for name, values in zip(names, self.maps_of(probe), strict=True)}
        return self.maps

    def maps_of(self, pixels: Tensor) -> list[Tensor]:
        """(B, C, H, W) preprocessed images -> maps (B, C, h, w) of :attr:`maps`, in float32."""
        return self._maps_in(self._read(pixels))

    def attach(self, local: OfMaps, digest: str) -> None:
        """End each row with the score that ``local`` makes of the image's maps.

        Parameters
        ----------
        local : callable
            Maps (B, C, h, w) of :attr:`maps` -> a score of each image (B,), and of each of its places (B, h, w).
        digest : str
            Identifies it: it is part of :meth:`key`.
        """
        self._local = local
        self._local_key = digest
        widths = {(part.layer, part.kind): part.width for part in self.layout.parts}
        self.layout = FeatureLayout.of(widths | {(LOCAL, Kind.LOCAL): 1})

    def detached(self) -> FeatureExtractor:
        """The same extractor, whose rows do not end with a local score."""
        other = copy.copy(self)
        other._local = None
        other._local_key = ""
        other._engine = self._engine  # which copies leave out
        other.layout = self.layout.without(Kind.LOCAL)
        return other

    def _maps_in(self, features: Mapping[Key, Tensor]) -> list[Tensor]:
        return [features[name, Kind.MAP].float() for name in self.maps]

    # ---- passes of others ----

    def recording(self) -> AbstractContextManager[dict[Key, Tensor]]:
        """Collect layers from the passes of a module of your own that are made meanwhile; see :meth:`in_passing`.

        Nothing is changed about a pass: mode, precision and gradients are the caller's.
        """
        return self._reader.hooks.recording()

    @torch.no_grad()
    def in_passing(self, features: Mapping[Key, Tensor], output: Any, count: int) -> Tensor:
        """Rows from a pass that somebody else made.

        Parameters
        ----------
        features : dict
            What :meth:`recording` collected.
        output : object
            What the pass returned.
        count : int
            Images in the batch.

        Returns
        -------
        Tensor of shape (count, ``width``)

        Raises
        ------
        UsageError
            A layer does not give one vector for each image.
        """
        assert isinstance(self._reader, ModuleReader)
        rows, _ = self._rows(self._reader.with_output(features, output), count)
        return rows

    def last_linear(self) -> nn.Linear | nn.Conv2d:
        """The layer of a module of your own that gives the logits (``UsageError`` if there is none)."""
        if not isinstance(self._reader, ModuleReader):
            raise UsageError(f"{self.backbone.tag} has no classifier, so no layer gives logits")
        return self._reader.last_linear()

    def probe(self) -> Tensor:
        """Some image, to see what layers give; not an even one, of which many layers would give the same."""
        size = self.backbone.data_config.get("input_size", (3, 224, 224))
        pixels = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
        return pixels.to(self.device, self.dtype)

    @torch.inference_mode()
    def _read(self, pixels: Tensor) -> dict[Key, Tensor]:
        """Vectors (B, C) and maps by layer and kind."""
        if self._engine is not None and versions(self.model) != self._engine_weights:
            self._engine = None
        if self._engine is None or not self._fits(self._engine.name):
            return self._in_torch(pixels)
        return self._engine.read(moved(pixels, self.device, self.dtype))

    @torch.inference_mode()
    def _in_torch(self, pixels: Tensor) -> dict[Key, Tensor]:
        if self._autocast is None:
            return self._plain(pixels)
        with torch.autocast(self.device.type, self._autocast):
            return self._plain(pixels)

    @torch.inference_mode()
    def _plain(self, pixels: Tensor) -> dict[Key, Tensor]:
        """The pass in the precision of the weights, or in what the caller chose."""
        pixels = moved(pixels, self.device, self.dtype)
        with self._reader.evaluated(pixels):
            return self._reader.read(pixels)

    def _rows(self, features: Mapping[Key, Tensor], count: int) -> tuple[Tensor, Tensor | None]:
        """Rows (``count``, ``width``) and heat (``count``, h, w) from the vectors and maps of a pass."""
        parts = [*checked(features, self._keys, count).values()]
        heat = None
        if self._local is not None:
            score, heat = self._local(self._maps_in(features))
            parts.append(score[:, None])
        return torch.cat(parts, dim=1), heat


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
