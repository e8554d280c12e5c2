"""A classifier that also says when an image is something it was never made for, in the same forward pass."""

from __future__ import annotations

import os
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..data.batches import is_batch
from ..data.splits import Split
from ..detectors import Detector
from ..exceptions import NotFittedError, UsageError
from ..features.layers import Layers, resolve_layers, stage_names
from ..features.layout import Key
from ..features.networks import device_of, logits_of
from ..files.model_folder import load, locate
from ..runtime.progress import Progress
from .recording import _precisions, _Recording, _run, _unwrapped

#: The class that an abstaining guard predicts for flagged images.
ABSTAINED = -1
# How far up the stack a warning points: past this module and torch's, to who called the guard.
_CALLER = 8


@dataclass(frozen=True)
class Verdict:
    """What a guard says of B images; all tensors lie where the logits do.

    ood_score : (B,) float, higher = more OOD, about 0 +- 1 for in-domain images. p_value : (B,) conformal, in (0, 1].
    is_ood : (B,) bool, p_value <= fpr. layers : for each layer (B,), in in-domain standard deviations.
    predicted : (B,) the class of the largest logit; -1 for flagged images if the guard abstains.
    """

    ood_score: Tensor
    p_value: Tensor
    is_ood: Tensor
    layers: dict[str, Tensor]
    predicted: Tensor


class Guard(nn.Module):
    """Wraps a classifier: ``logits, verdict = guard(images)``, from one pass through it.

    The classifier runs as it would without the guard: same mode, precision, gradients and logits to the last bit. Its
    layers are read by hooks that are there only meanwhile. Any number of threads may use a guard. It can be compiled by
    ``torch.compile``, and takes a classifier that is, or is in ``DataParallel`` or ``DistributedDataParallel``.

    Parameters
    ----------
    classifier : nn.Module
        Takes (B, C, H, W), gives logits (B, classes) or something with ``logits``. Registered as a submodule.
    detector : Detector, optional
        One fitted on this classifier, or on its backbone; else call :meth:`fit`.
    layers : "auto", or names
        For :meth:`fit`; see :func:`featdiff.features.layers.resolve_layers`. ``auto`` is for timm models.
    fpr : float, optional
        False-alarm rate: this share of in-domain images is flagged. Default: the detector's, or 0.05. Can be set anew.
    abstain : bool
        Predict class -1 for flagged images.
    arguments : further arguments of :class:`featdiff.Detector`, for :meth:`fit`
        For example ``extra_heads=("energy",)``.

    Raises
    ------
    UsageError
        An unknown layer, or an argument outside its range.
    ModelError
        The detector was fitted on another network.
    """

    def __init__(
        self,
        classifier: nn.Module,
        detector: Detector | None = None,
        *,
        layers: Layers | None = None,
        fpr: float | None = None,
        abstain: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if not isinstance(classifier, nn.Module):
            raise UsageError(f"a guard wraps a classifier (nn.Module), not {type(classifier).__name__}")
        if detector is not None and (layers is not None or arguments):
            given = [*arguments, *(["layers"] if layers is not None else [])]
            raise UsageError(f"{given[0]} is decided by the detector: drop it, or drop the detector and fit")
        self.classifier, self.abstain = classifier, abstain
        network = _unwrapped(classifier)
        if detector is None:
            self._arguments = {"layers": "auto" if layers is None else layers, **arguments}
            if fpr is not None:
                self._arguments["fpr"] = fpr
            names = [name for name, _ in network.named_modules() if name]
            resolve_layers(self._arguments["layers"], stage_names(network), names, has_classifier=True)
            self.detector = self._new_detector()
        else:
            self.detector = detector.on(network)
            if fpr is not None:
                self.fpr = fpr
        self._prepare()

    @property
    def fpr(self) -> float:
        """False-alarm rate; can be set anew (``UsageError`` if the calibration images cannot support it)."""
        return self.detector.fpr

    @fpr.setter
    def fpr(self, rate: float) -> None:
        self.detector.fpr = rate

    def __repr__(self) -> str:
        name = type(_unwrapped(self.classifier)).__name__
        state = "not fitted"
        if self.detector.is_fitted:
            images = self.detector.n_images_
            state = f"fitted on {images:,} images, {len(self.detector.calibration_):,} for calibration"
        return f"Guard({name}, {state}, fpr={self.fpr:g}{', abstain=True' if self.abstain else ''})"

    def _prepare(self) -> None:
        # a code object of its own: torch.compile keeps what it made of a function with its code, and would take what it
        # made of the bare classifier, which reads no layers, for this
        run: Any = types.FunctionType(_run.__code__.replace(), globals())
        given: Any = self.classifier
        self._run = given.dynamo_ctx(run) if isinstance(given, torch._dynamo.OptimizedModule) else run
        self._here = threading.local()
        self._moving = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_run", "_here", "_moving")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def _new_detector(self) -> Detector:
        options = {"device": str(device_of(self.classifier)), **self._arguments}
        return Detector(_unwrapped(self.classifier), **options)

    # ---- fit ----

    def check_layers(self) -> None:
        """Pass one image through the classifier to see, before anything long, whether all layers can be read.

        Raises
        ------
        UsageError
            A layer that is not reached, or gives what is no feature.
        """
        self._new_detector().check_layers()

    def fit(self, loader: object, progress: Progress | None = None, rows: Split | None = None) -> Self:
        """Learn from ordinary images what is in-domain, in the classifier's own features; no labels are needed.

        Parameters
        ----------
        loader : iterable of batches, or one tensor of images
            Preprocessed images (B, C, H, W), alone, first in a tuple, or as ``pixel_values``; or whatever
            :meth:`featdiff.Detector.fit` takes, with ``transform=`` among the arguments.
            Fit in the precision that will be used: in half precision, or under the same ``autocast``, if so.
        progress : callable (stage, done, total), optional
        rows : featdiff.data.splits.Split, optional
            Which of the different images train, validate and calibrate; see :meth:`featdiff.Detector.fit`.

        Raises
        ------
        UsageError
            No images, too few for the false-alarm rate, or a classifier that they do not suit.
        """
        if not hasattr(self, "_arguments"):
            raise UsageError("this guard was given a fitted detector: make a Guard without one to fit it anew")
        detector = self._new_detector()
        detector.fpr = self.fpr
        if isinstance(loader, Tensor) and is_batch(loader):
            loader = loader.split(64)
        if isinstance(loader, list | tuple) and loader and is_batch(loader[0]):
            loader = iter(loader)
        with torch.random.fork_rng(devices=[]):  # loaders draw from the global source
            self.detector = detector.fit(loader, progress, rows)
        return self

    # ---- the forward pass ----

    # torch.compile sees the classifier alone, in _run; hooks come and go, and rows are judged, outside of that
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Verdict | None]:
        """All that the classifier takes, images (B, C, H, W) first or as ``pixel_values`` -> (logits, verdict).

        While the guard is :meth:`off`, the verdict is None.

        Raises
        ------
        NotFittedError
        UsageError
            An empty batch, images or layers with NaN (the rows are named), images of another precision than the
            classifier, or no row of logits for each image.
        """
        if self._is_off():
            return logits_of(self.classifier(*args, **kwargs)), None
        images = self._images_in(args, kwargs)
        network = self.classifier
        if isinstance(network, torch._dynamo.OptimizedModule):
            network = network._orig_mod
        if isinstance(network, nn.DataParallel):
            logits, rows = self._on_replicas(network, args, kwargs)
            return logits, self._verdict(logits, rows, images)
        with self._recording(images) as found:
            output = self._run(network, *args, **kwargs)
        logits, rows = self._rows(found, output, len(images))
        return logits, self._verdict(logits, rows, images)

    @contextmanager
    def off(self) -> Iterator[None]:
        """For a while, in this thread, the bare classifier: ``guard(images)`` gives (logits, None)."""
        before = self._is_off()
        self._here.off = True
        try:
            yield
        finally:
            self._here.off = before

    @torch.compiler.disable
    def _is_off(self) -> bool:
        return getattr(self._here, "off", False)

    @torch.compiler.disable
    def _images_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The images among the arguments, after a look at them and at the classifier."""
        images = args[0] if args else kwargs.get("pixel_values")
        if not self.detector.is_fitted:
            raise NotFittedError(
                "this guard is not fitted: call fit(loader), or Guard.from_pretrained(folder, classifier)"
            )
        if not isinstance(images, Tensor) or images.dim() == 0 or len(images) == 0:
            what = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise UsageError(f"a guard takes a batch of at least one image, not {what}")
        if any(module.training for module in _unwrapped(self.classifier).modules()):
            _warn("the classifier is in train mode, so scores depend on the batch and on chance: call eval() first")
        now, then = self.detector.extractor_.precision, self.detector.precision_
        if now != then:
            _warn(f"the classifier runs in {now}, and the guard was fitted in {then}: scores shift, so fit as you run")
        return images

    @torch.compiler.disable
    def _recording(self, images: Tensor) -> _Recording:
        return _Recording(self.detector.extractor_, images, self.classifier)

    @torch.compiler.disable
    def _rows(self, features: dict[Key, Tensor], output: Any, count: int) -> tuple[Tensor, Tensor]:
        """Logits, and a row of features for each image."""
        logits = logits_of(output)
        if logits.dim() != 2 or len(logits) != count:
            raise UsageError(f"the classifier gives logits of shape {tuple(logits.shape)} for {count} images")
        return logits, self.detector.extractor_.in_passing(features, output, count)

    @torch.compiler.disable
    def _on_replicas(
        self, network: nn.DataParallel[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The same on all GPUs of a DataParallel: each replica reads its own layers."""
        output_device = getattr(network, "output_device", None)  # without a GPU, there is none
        tapped = nn.DataParallel(_Tapped(self, network.module), network.device_ids or None, output_device)
        logits, rows = tapped(*args, **kwargs)
        return logits, rows

    @torch.compiler.disable
    def _verdict(self, logits: Tensor, rows: Tensor, images: Tensor) -> Verdict:
        detector = self.detector
        self._check_finite(rows, images)
        with self._moving:
            if detector.heads_.mean.device != rows.device:
                detector.heads_.to(rows.device)
        score, layers = detector.heads_(rows)
        p_value, is_ood = detector.calibration_.flags(score, self.fpr)
        predicted = logits.detach().argmax(1)
        if self.abstain:
            predicted = predicted.masked_fill(is_ood, ABSTAINED)
        return Verdict(score, p_value, is_ood, dict(zip(detector.layers, layers.T, strict=True)), predicted)

    def _check_finite(self, rows: Tensor, images: Tensor) -> None:
        finite = torch.isfinite(rows)
        if finite.all():
            return
        bad = (~finite.all(1)).nonzero().flatten().tolist()
        where = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
        if not torch.isfinite(images[bad[0]]).all():
            raise UsageError(f"images with NaN or infinite pixels in the batch, rows {where}: leave them out")
        column = int((~finite[bad[0]]).nonzero()[0])
        layer = self.detector.extractor_.layout.named(column).name
        hint = "; float16 ends at 65,504: use bfloat16" if torch.float16 in _precisions(self.classifier) else ""
        raise UsageError(f"layer {layer!r} gives NaN or infinite values for rows {where} of the batch{hint}")

    # ---- save and load ----

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the fitted detector, without the classifier; see :meth:`featdiff.Detector.save_pretrained`."""
        self.detector.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        classifier: nn.Module,
        *,
        fpr: float | None = None,
        abstain: bool = False,
        local_files_only: bool = False,
        **runtime: Any,
    ) -> Guard:
        """A saved guard for the classifier it was fitted on, or a saved detector for one on its backbone.

        Parameters
        ----------
        name : folder, or hub repository ``org/name``
        runtime : further keywords of :meth:`featdiff.Detector.from_pretrained`

        Raises
        ------
        ModelError
            No model, a damaged one, or another classifier (its weights and structure are compared).
        """
        network = _unwrapped(classifier)
        options: dict[str, Any] = {"device": str(device_of(network)), **runtime}
        folder = locate(name, local_files_only)
        config, tensors = load(folder)
        if config.get("backbone", {}).get("source") == "module":
            options["backbone"] = network  # else the backbone has a name: Detector.on compares it
        detector = Detector.from_loaded(folder, config, tensors, **options)
        return cls(classifier, detector, fpr=fpr, abstain=abstain)


class _Tapped(nn.Module):
    """What DataParallel copies to each GPU: a classifier that gives (logits, features)."""

    def __init__(self, guard: Guard, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._read = guard._rows
        self._recording = guard._recording

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        images = args[0] if args else kwargs["pixel_values"]
        with self._recording(images) as found:
            output = self.network(*args, **kwargs)
        return self._read(found, output, len(images))


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=_CALLER)
