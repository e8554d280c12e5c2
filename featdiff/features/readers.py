"""Two ways to read the layers of a network: one for backbones by name, one for modules of the user's own.

Either turns preprocessed images into one vector per layer and kind (:class:`featdiff.features.layout.Kind`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import UsageError, first_line
from .hooks import Hook, Hooks, channels_first, find_module, pool, spatial_std
from .layers import Layers, final_norm, is_auto, resolve_layers, stage_names
from .layout import LOGITS, PRE_LOGITS, Key, Kind
from .networks import evaluating, logits_of
from .stages import Output, find_stages, maps_with_channels_last, watch


class Reader:
    """What both have in common.

    Attributes
    ----------
    model : nn.Module
    tag : str
        What the network is called in errors.
    layers : tuple of str
        Names of the layers that are read.
    hooks : Hooks
        What a pass is read with.
    """

    layers: tuple[str, ...]
    hooks: Hooks

    def __init__(self, model: nn.Module, tag: str) -> None:
        self.model = model
        self.tag = tag
        self.stage_names = stage_names(model)
        self.module_names = [name for name, _ in model.named_modules() if name]

    @property
    def last_stage(self) -> str:
        """The deepest layer besides the pre-logits."""
        return [name for name in self.layers if name != PRE_LOGITS][-1]

    @property
    def keys(self) -> list[Key]:
        """What a row may hold, in order: the layers, then spatial standard deviations of the deep ones."""
        layers = [(name, Kind.PRE_LOGITS if name == PRE_LOGITS else Kind.MEAN) for name in self.layers]
        return [*layers, (self.last_stage, Kind.SPATIAL_STD), (PRE_LOGITS, Kind.SPATIAL_STD)]

    def read(self, pixels: Tensor) -> dict[Key, Tensor]:
        """Preprocessed images (B, C, H, W) -> vectors (B, C), and maps that are kept, by layer and kind."""
        raise NotImplementedError

    def keep_maps(self, hooks: Sequence[Hook]) -> None:
        """Read these maps as well from now on, in the same pass, in place of those that were kept before."""
        raise NotImplementedError

    @contextmanager
    def evaluated(self, pixels: Tensor) -> Iterator[None]:
        """Eval mode for a pass of these images, whose failure is told in one line (``UsageError``)."""
        try:
            with evaluating(self.model):
                yield
        except (UsageError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # networks fail in many ways on a size they were not made for
            batch = tuple(map(int, pixels.shape))
            shape = f"{batch[2]} x {batch[3]} pixels (batch {batch})"
            raise UsageError(f"{self.tag} cannot take images of {shape}: {first_line(error)}") from None


class BackboneReader(Reader):
    """Reads a timm model that was loaded by name.

    Stages come from ``forward_intermediates`` (as maps (B, C, H, W) for CNN, ViT and Swin alike) and pre-logits from
    ``forward_head``; the classifier never runs. Of tokens, the mean of the patches is kept: class tokens and registers
    stand for no place. What the head sees of them (a class token, or attention pooling) is in the pre-logits. Layers
    inside a stage are read by hooks in a pass of their own.

    Parameters
    ----------
    model : nn.Module
        A timm model without its classifier.
    tag : str
    layers : "auto", names or indices
        See :func:`featdiff.features.layers.resolve_layers`.
    """

    def __init__(self, model: nn.Module, tag: str, layers: Layers) -> None:
        super().__init__(model, tag)
        has_pre_logits = bool(self.stage_names) and hasattr(model, "forward_head")
        self.layers = resolve_layers(layers, self.stage_names, self.module_names, has_pre_logits)

        self._stages = {name: self.stage_names.index(name) for name in self.layers if name in self.stage_names}
        inner = [name for name in self.layers if name not in self._stages and name != PRE_LOGITS]
        self.hooks = Hooks(model, [Hook(name, name, spatial_std=name == self.last_stage) for name in inner])
        self._norm = final_norm(model)
        self._maps = Hooks(model, [])

    def keep_maps(self, hooks: Sequence[Hook]) -> None:
        """Read these maps as well from now on."""
        self._maps = Hooks(self.model, hooks)

    def read(self, pixels: Tensor) -> dict[Key, Tensor]:
        """Preprocessed images (B, C, H, W) -> vectors (B, C), and maps that are kept, by layer and kind."""
        features: dict[Key, Tensor] = {}
        with self._maps.recording() as maps:
            if self.hooks.hooks:
                with self.hooks.recording() as features:
                    self.model(pixels)
            if self._stages or PRE_LOGITS in self.layers:
                features |= self._intermediates(pixels.contiguous(memory_format=torch.channels_last))
        return features | maps

    def _intermediates(self, pixels: Tensor) -> dict[Key, Tensor]:
        features: dict[Key, Tensor] = {}
        indices = sorted(set(self._stages.values())) or [0]  # timm returns them in this order, and needs one
        options = {"indices": indices, "output_fmt": "NCHW", "norm": bool(self._norm)}
        run: Any = self.model.forward_intermediates

        if PRE_LOGITS in self.layers:
            final, maps = run(pixels, **options)
            features |= self._pre_logits(final)
        else:
            maps = run(pixels, intermediates_only=True, stop_early=True, **options)

        for name, index in self._stages.items():
            stage = maps[indices.index(index)]
            features[name, Kind.MEAN] = pool(stage, name)
            if name == self.last_stage and (std := spatial_std(stage)) is not None:
                features[name, Kind.SPATIAL_STD] = std
        return features

    def _pre_logits(self, final: Tensor) -> dict[Key, Tensor]:
        """Pre-logits, and the spatial standard deviation of the map or of the patches before them."""
        head: Any = self.model.forward_head
        features: dict[Key, Tensor] = {(PRE_LOGITS, Kind.PRE_LOGITS): pool(head(final, pre_logits=True), PRE_LOGITS)}
        if final.dim() == 3:
            final = final[:, getattr(self.model, "num_prefix_tokens", 0) :]
        if (std := spatial_std(channels_first(final, self.model, self.model))) is not None:
            features[PRE_LOGITS, Kind.SPATIAL_STD] = std
        return features


class ModuleReader(Reader):
    """Reads a module of the user's own in its own forward pass, all by hooks.

    Parameters
    ----------
    model : nn.Module
    tag : str
    layers : "auto", names or indices
        ``auto`` takes the stages of a timm model, and finds those of others (:mod:`featdiff.features.stages`);
        ``pre_logits`` is the input of the linear layer that gives the logits, or, in a timm model without one, its
        output.
    probe : Tensor of shape (1, C, H, W)
        An image, to see what the modules do.
    logits : bool
        Whether a row ends with the logits.
    """

    def __init__(self, model: nn.Module, tag: str, layers: Layers, probe: Tensor, logits: bool) -> None:
        super().__init__(model, tag)
        self.logits = logits
        requested = layers if isinstance(layers, str) else list(layers)
        needs_head = logits or bool(self.stage_names) or PRE_LOGITS in requested
        self._last_linear = self._find_last_linear(probe) if needs_head else ""

        classes: Any = getattr(model, "num_classes", 0)
        headless = bool(self.stage_names) and hasattr(model, "forward_head") and not classes
        stages = self.stage_names
        if is_auto(layers) and not stages:
            stages = self._find_stages(probe)
        self.layers = resolve_layers(layers, stages, self.module_names, headless or bool(self._last_linear))
        self._row_hooks = self._make_hooks(probe)
        self.hooks = Hooks(model, self._row_hooks)

    def keep_maps(self, hooks: Sequence[Hook]) -> None:
        """Read these maps as well from now on."""
        self.hooks = Hooks(self.model, [*self._row_hooks, *hooks])

    @property
    def keys(self) -> list[Key]:
        """What a row may hold, in order; logits, if they are wanted, come last."""
        return [*super().keys, *([(LOGITS, Kind.LOGITS)] if self.logits else [])]

    def read(self, pixels: Tensor) -> dict[Key, Tensor]:
        """Preprocessed images (B, C, H, W) -> vectors (B, C) by layer and kind."""
        with self.hooks.recording() as features:
            output = self.model(pixels)
        return self.with_output(features, output)

    def with_output(self, features: Mapping[Key, Tensor], output: Any) -> dict[Key, Tensor]:
        """Recorded features, completed by what the pass itself returned, where that is a layer that is wanted."""
        complete = dict(features)
        if PRE_LOGITS in self.layers and not self._last_linear:
            complete[PRE_LOGITS, Kind.PRE_LOGITS] = pool(logits_of(output), PRE_LOGITS)
        if self.logits:
            complete[LOGITS, Kind.LOGITS] = logits_of(output)
        return complete

    def last_linear(self) -> nn.Linear | nn.Conv2d:
        """The layer that gives the logits (``UsageError`` if there is none)."""
        if not self._last_linear:
            raise UsageError(f"no linear layer of {self.tag} gives its logits")
        module = self.model.get_submodule(self._last_linear)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        return module

    def _find_stages(self, probe: Tensor) -> list[str]:
        """Names of the stages of a network that does not tell them; sets its last linear layer as well."""
        if not self._last_linear:
            with self.evaluated(probe), torch.no_grad():
                output = self.model(probe)
            if _is_classifier_output(output):
                self._last_linear = self._find_last_linear(probe)
        return find_stages(self.model, self._watch(probe), tuple(probe.shape[1:]))

    def _watch(self, probe: Tensor) -> dict[str, Output]:
        with self.evaluated(probe):
            return watch(self.model, lambda: self.model(probe), probe)

    def _make_hooks(self, probe: Tensor) -> list[Hook]:
        # timm models declare their layout
        channels_last = set() if self.stage_names else maps_with_channels_last(self._watch(probe))
        prefix = getattr(self.model, "num_prefix_tokens", 0)
        of_stages = final_norm(self.model)
        hooks = []
        for name in self.layers:
            if name == PRE_LOGITS:
                continue
            if name in self.stage_names and name not in self.module_names:
                raise UsageError(f"layer {name!r} of {self.tag} is no module of its own; name other layers")
            # stages of a timm model are what forward_intermediates would give, without class tokens
            tokens, norm = (prefix, of_stages) if name in self.stage_names else (0, "")
            is_last = name == self.last_stage
            last = name in channels_last
            hooks.append(Hook(name, name, spatial_std=is_last, skip=tokens, channels_last=last, norm=norm))

        if PRE_LOGITS in self.layers and self._last_linear:
            hooks.append(Hook(self._last_linear, PRE_LOGITS, Kind.PRE_LOGITS, input=True))
        if PRE_LOGITS in self.layers and (final := self._find_final_map(probe)):
            hooks.append(Hook(final, PRE_LOGITS, pooled=None, spatial_std=True, skip=prefix))
        return hooks

    def _find_last_linear(self, probe: Tensor) -> str:
        """Name of the module whose output is the logits, if it is a linear one."""
        with self.evaluated(probe), torch.no_grad():
            logits = logits_of(self.model(probe))

            def gives_logits(module: nn.Module, output: Any) -> bool:
                return isinstance(module, nn.Linear | nn.Conv2d) and _same_values(output, logits)

            return find_module(self.model, lambda: self.model(probe), gives_logits)

    def _find_final_map(self, probe: Tensor) -> str:
        """Name of the module that gives the map which a timm model's head averages; empty for other models."""
        if not hasattr(self.model, "forward_features"):
            return ""
        run: Any = self.model.forward_features
        with self.evaluated(probe), torch.no_grad():
            final = run(probe)
            return find_module(self.model, lambda: run(probe), lambda _, output: _same_values(output, final))


def _is_classifier_output(output: Any) -> bool:
    """Whether a network's output is, or holds, logits (B, classes)."""
    try:
        return logits_of(output).dim() == 2
    except UsageError:
        return False


def make_reader(
    model: nn.Module, tag: str, own: bool, layers: Layers, probe: Tensor, logits: bool
) -> BackboneReader | ModuleReader:
    """The reader of a backbone by name, or of a module of the user's own (``own``)."""
    if own:
        return ModuleReader(model, tag, layers, probe, logits)
    if logits:
        raise UsageError("a backbone by name has no classifier, so no logits: give the classifier itself")
    return BackboneReader(model, tag, layers)


def _same_values(a: Any, b: Any) -> bool:
    """Whether two outputs are the same numbers, be it in another shape."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.numel() != b.numel():
        return False
    return torch.equal(a.flatten(), b.flatten())


def checked(features: Mapping[Key, Tensor], keys: Sequence[Key], count: int) -> dict[Key, Tensor]:
    """The features of ``count`` images that make up a row, in order, as float32.

    Raises
    ------
    UsageError
        A layer does not give one vector for each image.
    """
    row: dict[Key, Tensor] = {}
    for layer, kind in keys:
        vectors = features.get((layer, kind))
        if kind is Kind.SPATIAL_STD:
            pooled = features.get((layer, Kind.PRE_LOGITS if layer == PRE_LOGITS else Kind.MEAN))
            # a pre-logits vector of another width is not the mean of that map
            if vectors is None or pooled is None or vectors.shape != pooled.shape:
                continue
        assert vectors is not None
        if vectors.shape[0] != count:
            raise UsageError(f"layer {layer!r} gives {len(vectors)} vectors for {count} images")
        row[layer, kind] = vectors.float()
    return row
