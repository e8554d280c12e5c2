"""A classifier that also reports, in the same forward pass, which images are out-of-distribution."""

from __future__ import annotations

import os
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..data.groups import Groups
from ..data.loaders import is_batch
from ..data.splits import Split
from ..detectors import Detector, Pushable
from ..detectors.saved import check_config
from ..exceptions import NotFittedError, UsageError
from ..features.layers import Layers, is_auto, resolve_layers, stage_names
from ..features.layout import Key
from ..features.networks import device_of, logits_of
from ..files.model_folder import load, locate
from ..runtime.progress import Progress
from .recording import _Recording, _run, _unwrapped, check_finite

#: The class that an abstaining guard predicts for flagged images.
ABSTAINED = -1
# Stack level of a warning: past this module and torch's, at the code that called the guard.
_CALLER = 8


@dataclass(frozen=True)
class Verdict:
    """The verdict on B images; all tensors are on the device of the logits.

    Attributes
    ----------
    ood_score : Tensor of shape (B,)
        Higher = more OOD; mean 0 and standard deviation 1 over the calibration images.
    p_value : Tensor of shape (B,)
        Conformal, in (0, 1]; small = OOD.
    is_ood : Tensor of shape (B,), bool
        ``p_value <= fpr``.
    layers : dict of Tensor
        Score (B,) of each layer, in in-domain standard deviations; higher = more OOD.
    predicted : Tensor of shape (B,), int64
        Class of the largest logit; -1 for flagged images if the guard abstains.
    p_values : dict of Tensor
        P-value (B,) of the ``global`` and the ``local`` score, where the detector has both.

    Examples
    --------
    A guard makes them; see :class:`Guard`.

    >>> flags = torch.tensor([False, True])
    >>> verdict = Verdict(torch.tensor([-0.2, 7.5]), torch.tensor([0.6, 0.01]), flags, {}, torch.tensor([3, -1]))
    >>> verdict.predicted[~verdict.is_ood]
    tensor([3])
    """

    ood_score: Tensor
    p_value: Tensor
    is_ood: Tensor
    layers: dict[str, Tensor]
    predicted: Tensor
    p_values: dict[str, Tensor] = field(default_factory=dict)


class Guard(Pushable, nn.Module):
    """Wraps a classifier: ``logits, verdict = guard(images)``, from one pass through it.

    The classifier runs as it would without the guard: same mode, precision, gradients and logits to the last bit. Its
    layers are read by hooks that exist only during the pass. A guard is safe to use from several threads, and can be
    compiled by ``torch.compile``. The classifier may itself be compiled, or be wrapped in ``DataParallel`` or
    ``DistributedDataParallel``.

    Parameters
    ----------
    classifier : nn.Module
        Takes (B, C, H, W); returns logits (B, classes), or an object with ``logits``. Registered as a submodule.
    detector : Detector, optional
        Fitted on this classifier, or on its backbone. Default: call :meth:`fit`.
    layers : "auto" or sequence of str, default "auto"
        For :meth:`fit`; see :func:`featdiff.features.layers.resolve_layers`. ``auto`` takes the stages of any network
        whose resolution changes or that has a list of blocks, and the input of its last linear layer.
    fpr : float, optional
        False-alarm rate: this share of in-domain images is flagged. Default: the detector's, or 0.05. Can be changed.
    abstain : bool, default False
        Predict class -1 for flagged images.
    **arguments
        Further arguments of :class:`featdiff.Detector` for :meth:`fit`, for example ``extra_heads=("energy",)``.

    Attributes
    ----------
    detector : Detector
        Reads the classifier's features; fitted after :meth:`fit`.

    Raises
    ------
    UsageError
        An unknown layer, or an argument outside its range.
    ModelError
        The detector was fitted on another network.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from featdiff import Guard
    >>> _ = torch.manual_seed(0)
    >>> stage = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> classifier = nn.Sequential(stage, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    >>> guard = Guard(classifier.eval(), layers=["0"], recipe={"epochs": 1}, hidden_max=16)
    >>> images = torch.randn(100, 3, 16, 16)
    >>> logits, verdict = guard.fit(images)(images[:4])
    >>> logits.shape, verdict.p_value.shape
    (torch.Size([4, 5]), torch.Size([4]))
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
        if layers is not None:
            arguments["layers"] = layers
        if detector is not None and arguments:
            raise UsageError(
                f"{next(iter(arguments))} is decided by the detector: drop it, or drop the detector and fit"
            )

        self.classifier = classifier
        self.abstain = abstain
        network = _unwrapped(classifier)
        if detector is None:
            self._arguments = {"layers": "auto"} | arguments
            if fpr is not None:
                self._arguments["fpr"] = fpr
            self._check_names(network)
            self.detector = self._new_detector()
        else:
            self.detector = detector.on(network)
            if fpr is not None:
                self.fpr = fpr
        self._prepare()

    def _check_names(self, network: nn.Module) -> None:
        """Refuse layers that the network does not have, before any image is there to find its stages with."""
        layers: Any = self._arguments["layers"]
        stages = stage_names(network)
        if stages or not is_auto(layers):
            names = [name for name, _ in network.named_modules() if name]
            resolve_layers(layers, stages, names, has_classifier=True)

    @property
    def fpr(self) -> float:
        """False-alarm rate. Setting one that the calibration images cannot support raises ``UsageError``."""
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
        """Set what cannot be pickled."""
        # torch.compile caches compiled code per code object. A copy keeps what was compiled for the bare classifier,
        # without hooks, from being reused for the guard.
        run: Any = types.FunctionType(_run.__code__.replace(), globals())
        classifier: Any = self.classifier
        self._run = classifier.dynamo_ctx(run) if isinstance(classifier, torch._dynamo.OptimizedModule) else run
        self._thread = threading.local()
        self._moving = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_run", "_thread", "_moving"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def _new_detector(self) -> Detector:
        options = {"device": str(device_of(self.classifier)), **self._arguments}
        return Detector(_unwrapped(self.classifier), **options)

    # ---- fit ----

    def check_layers(self) -> None:
        """Pass one image through the classifier to check that all layers can be read, before any long work.

        Raises
        ------
        UsageError
            A layer is not reached, or its output is no feature.
        """
        self._new_detector().check_layers()

    def fit(
        self,
        loader: object,
        progress: Progress | bool | None = None,
        split: Split | None = None,
        groups: Groups | None = None,
    ) -> Self:
        """Learn what is in-domain from ordinary images, in the classifier's own features; no labels are needed.

        Parameters
        ----------
        loader : iterable of batches, or Tensor of shape (N, C, H, W)
            Preprocessed images (B, C, H, W), alone, first in a tuple, or as ``pixel_values``; or any images that
            :meth:`featdiff.Detector.fit` takes, with ``transform=`` among the arguments.
            Fit in the precision of later use: in half precision, or under the same ``autocast``.
        progress : bool or callable (stage, done, total), optional
            True shows bars.
        split : featdiff.data.splits.Split, optional
            Which of the different images train, validate and calibrate; see :meth:`featdiff.Detector.fit`.
        groups : str, path, sequence or mapping, optional
            Which images belong together; see :meth:`featdiff.Detector.fit`.

        Returns
        -------
        Guard
            Itself.

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
            self.detector = detector.fit(loader, progress, split, groups)
        return self

    # ---- the forward pass ----

    # torch.compile sees only the classifier, in _run; hooks and scores stay outside it
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Verdict | None]:
        """Run the classifier, and judge its features.

        Parameters
        ----------
        *args, **kwargs
            All arguments of the classifier, with the images (B, C, H, W) first or as ``pixel_values``.

        Returns
        -------
        logits : Tensor of shape (B, classes)
        verdict : Verdict or None
            None while the guard is :meth:`off`.

        Raises
        ------
        NotFittedError
        UsageError
            An empty batch, images or layers with NaN (the message names the images), images of another precision than
            the classifier, or logits whose number differs from that of the images.
        """
        if self._is_off():
            return logits_of(self.classifier(*args, **kwargs)), None

        images = self._images_in(args, kwargs)
        network = self.classifier
        if isinstance(network, torch._dynamo.OptimizedModule):
            network = network._orig_mod

        if isinstance(network, nn.DataParallel):
            logits, features = self._on_replicas(network, args, kwargs)
        else:
            with self._recording(images) as recorded:
                output = self._run(network, *args, **kwargs)
            logits, features = self._read(recorded, output, len(images))
        return logits, self._verdict(logits, features, images)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside ``with guard.off():``, in this thread, ``guard(images)`` returns (logits, None)."""
        before = self._is_off()
        self._thread.off = True
        try:
            yield
        finally:
            self._thread.off = before

    @torch.compiler.disable
    def _is_off(self) -> bool:
        return getattr(self._thread, "off", False)

    @torch.compiler.disable
    def _images_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The images among the arguments; checks them and the classifier."""
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
        now = self.detector.extractor_.precision
        at_fit = self.detector.precision_
        if now != at_fit:
            _warn(
                f"the classifier runs in {now}, and the guard was fitted in {at_fit}: scores shift, so fit as you run"
            )
        return images

    @torch.compiler.disable
    def _recording(self, images: Tensor) -> _Recording:
        return _Recording(self.detector.extractor_, images, self.classifier)

    @torch.compiler.disable
    def _read(self, recorded: dict[Key, Tensor], output: Any, count: int) -> tuple[Tensor, Tensor]:
        """Recorded layers and output of ``count`` images -> (logits (B, classes), features (B, D))."""
        logits = logits_of(output)
        if logits.dim() != 2 or len(logits) != count:
            raise UsageError(f"the classifier gives logits of shape {tuple(logits.shape)} for {count} images")
        return logits, self.detector.extractor_.in_passing(recorded, output, count)

    @torch.compiler.disable
    def _on_replicas(
        self, network: nn.DataParallel[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Logits and features from all GPUs of a DataParallel: each replica reads its own layers."""
        output_device = getattr(network, "output_device", None)  # missing without a GPU
        replicas = nn.DataParallel(_Recorded(self, network.module), network.device_ids or None, output_device)
        logits, features = replicas(*args, **kwargs)
        return logits, features

    @torch.compiler.disable
    def _verdict(self, logits: Tensor, features: Tensor, images: Tensor) -> Verdict:
        """Score features (B, D) of the classifier."""
        detector = self.detector
        check = partial(check_finite, features, images, detector.extractor_.layout, self.classifier)
        is_gpu = features.is_cuda  # which is waited for only after it has got all its work
        if not is_gpu:
            check()
        with self._moving:
            if detector.heads_.mean.device != features.device:
                detector.heads_.to(features.device)
                if detector.local_:
                    detector.local_.to(features.device)

        score, layer_scores, parts = detector.measured(features)
        p_value, is_ood = detector.calibration_.flags(score, self.fpr)
        predicted = logits.detach().argmax(1)
        if self.abstain:
            predicted = predicted.masked_fill(is_ood, ABSTAINED)

        layers = dict(zip(detector.layers, layer_scores.T, strict=True))
        p_values = detector.local_.p_values(parts) if detector.local_ else {}
        if is_gpu:
            check()
        return Verdict(score, p_value, is_ood, layers, predicted, p_values)

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
        revision: str | None = None,
        token: str | bool | None = None,
        **runtime: Any,
    ) -> Guard:
        """Load a guard, or a detector fitted on the classifier's backbone.

        Parameters
        ----------
        name : str or path
            Folder, or hub repository ``org/name``.
        classifier : nn.Module
            The one it was fitted on.
        fpr : float, optional
            False-alarm rate; default: the saved one.
        abstain : bool, default False
            Predict class -1 for flagged images.
        local_files_only : bool, default False
            Never ask the hub.
        revision : str, optional
            Branch, tag or commit on the hub; also as ``org/name@revision``. Default: the main branch.
        token : str or bool, optional
            Of the hub; default: ``HF_TOKEN``, or that of ``hf auth login``. It is not stored.
        **runtime
            Further keywords of :meth:`featdiff.Detector.from_pretrained`.

        Returns
        -------
        Guard

        Raises
        ------
        ModelError
            No model, a damaged one, or another classifier (its weights and structure are compared).
        """
        network = _unwrapped(classifier)
        options: dict[str, Any] = {"device": str(device_of(network)), **runtime}

        folder = locate(name, local_files_only, revision, token)
        config, tensors = load(folder)
        check_config(config, folder, Detector.mode)
        if config["backbone"]["source"] == "module":
            options["backbone"] = network  # a backbone with a name is compared by Detector.on
        detector = Detector.from_loaded(folder, config, tensors, **options)
        return cls(classifier, detector, fpr=fpr, abstain=abstain)


class _Recorded(nn.Module):
    """The module that DataParallel copies to each GPU: a classifier that returns (logits, features)."""

    def __init__(self, guard: Guard, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._read = guard._read
        self._recording = guard._recording

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        images = args[0] if args else kwargs["pixel_values"]
        with self._recording(images) as recorded:
            output = self.network(*args, **kwargs)
        return self._read(recorded, output, len(images))


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=_CALLER)
