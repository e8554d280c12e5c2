"""The main path: images -> features -> noise -> denoise -> residual -> fuse -> calibrate -> verdict."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import is_loader, peek_size
from ..data.decoding import MAX_PIXELS, Transform
from ..data.splits import Split, evenly
from ..diffusion.training import Recipe
from ..exceptions import ModelError, UsageError
from ..features.backbones import load_backbone
from ..features.extractor import FeatureExtractor
from ..features.layers import Layers
from ..features.networks import device_of, identity
from ..features.weights import DEFAULT_BACKBONE
from ..files.model_folder import load, locate
from ..runtime.progress import Progress
from ..scores.diffusion import DIFFUSION
from ..scores.fused import HEADS, FusedHeads
from .base import BaseDetector
from .checks import check_arguments
from .fitting import as_digests, fit_heads
from .saved import check_fingerprint, check_layers, load_tensors, saved_arguments, take_digests

# Raised when the same settings give another result: finished trainings in the cache are not used then.
_TRAINING_VERSION = 3
# Arguments that are handed on to the heads; training depends on the first ones alone.
_TRAINING_ARGUMENTS = ("joint", "hidden_ratio", "hidden_max", "blocks", "timesteps", "seed")
_SCORING_ARGUMENTS = ("start_times", "draws", "stride", "neighbors", "fusion", "backend", "logit_heads")
# In-domain rows on which ViM's subspace is fitted: more would not help.
_VIM_ROWS = 20_000


class Detector(BaseDetector):
    """Feature-diffusion OOD detector after DLSR (Yang et al., NeurIPS 2024, arXiv 2411.10701), with neighbours.

    A frozen backbone gives one pooled vector per layer. Small denoisers, trained on noised in-domain vectors,
    reconstruct them; what they cannot reconstruct is out-of-distribution. Departures from the paper: one small
    denoiser per layer, noise drawn once and stored, reconstructions averaged over draws before they are compared,
    several start times, log errors standardised on held-out images, and conformal p-values. Its score is joined with
    distances to the nearest in-domain vectors of the deepest layers, which are better on classes close to the
    training images (``head="fused"``).

    Parameters
    ----------
    backbone : str or nn.Module
        A timm name, ``hf-hub:ORG/NAME``, ``local-dir:PATH``, or any module (then ``layers`` by name, and ``transform``
        a callable from an RGB picture to a (3, H, W) tensor if files are to be read; see also
        :class:`featdiff.Guard`).
    weights, pretrained, model_args, transform
        See :func:`featdiff.features.backbones.load_backbone`.
    layers : "auto", or names or indices of layers
        See :func:`featdiff.features.layers.resolve_layers`.
    joint : bool
        One denoiser on the concatenation of all layers, as in the paper, in place of one per layer.
    hidden_ratio, hidden_max, blocks
        Size of the denoisers: a layer of C channels gets a hidden width of ``hidden_ratio * C``, at most
        ``hidden_max``; ``joint`` takes ``hidden_max`` itself.
    timesteps : int
        Length of the noise schedule.
    start_times : sequence of int
        Times, 0 .. timesteps - 1, to which features are noised before they are reconstructed.
    draws : int
        Stored noise draws for each start time.
    stride : int, optional
        Reconstruct by DDIM steps of this stride; default: in one step.
    input_size : (C, H, W), optional
        Of the images for a module without ``transform``; default: that of the first batch it is fitted on.
    logit_heads : some of "energy", "msp" and "vim"
        What else ``fused`` joins, if the backbone is a classifier of your own; see
        :class:`featdiff.scores.logits.LogitHeads`.
    head : "fused", "layerwise", "mse", "mfsim" or "lr"
        Which score becomes ``ood_score``; all but ``fused`` are diffusion alone, see
        :meth:`featdiff.scores.diffusion.DiffusionHeads.forward`, and keep no bank.
    fusion : "mean", "max", "fisher", "tippett" or "covariance"
        How ``fused`` joins its heads; see :class:`featdiff.scores.fusion.Fusion`.
    neighbors : int
        Nearest in-domain vectors that count; 0 does without them.
    bank_size, coreset
        The most in-domain vectors kept for that, and how they are chosen; see
        :func:`featdiff.scores.neighbors.coreset`.
    backend : str
        How neighbours are searched; see :func:`featdiff.scores.neighbors.make_index`.
    recipe : Recipe or mapping of its fields
        How the denoisers are trained.
    calibration, validation : float
        Shares of the images held out for p-values, and for early stopping and standardising.
    fpr : float
        False-alarm rate: this share of in-domain images is flagged. Can be changed when scoring.
    seed : int
        Decides the split, the initial weights, the order of training and the stored noise.
    device : str
        ``auto``, ``cpu``, ``cuda`` ...
    image_batch, workers, max_pixels
        Images per backbone pass, decoding threads, and the largest picture that is opened.
    cache : path, optional
        Folder of the feature store; default ``$FEATDIFF_CACHE`` or featdiff's folder in the user's cache.

    Raises
    ------
    UsageError
        An argument outside its range.
    """

    mode = "feature"
    # on few rows the heads would mostly wait for memory
    batches_at_once = 4
    extractor_: FeatureExtractor

    def __init__(
        self,
        backbone: str | nn.Module = DEFAULT_BACKBONE,
        *,
        weights: str | os.PathLike[str] | None = None,
        pretrained: bool = True,
        model_args: Mapping[str, Any] | None = None,
        transform: Mapping[str, Any] | Transform | None = None,
        layers: Layers = "auto",
        joint: bool = False,
        hidden_ratio: float = 2.0,
        hidden_max: int = 320,
        blocks: int = 3,
        timesteps: int = 100,
        start_times: Sequence[int] = (70, 95),
        draws: int = 2,
        stride: int | None = None,
        head: str = "fused",
        fusion: str = "mean",
        neighbors: int = 5,
        bank_size: int = 10_000,
        coreset: str = "random",
        backend: str = "auto",
        input_size: Sequence[int] | None = None,
        logit_heads: Sequence[str] = (),
        recipe: Recipe | Mapping[str, Any] | None = None,
        calibration: float = 0.2,
        validation: float = 0.05,
        fpr: float = 0.05,
        seed: int = 0,
        device: str = "auto",
        image_batch: int = 32,
        workers: int | None = None,
        max_pixels: int = MAX_PIXELS,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(arguments, HEADS)
        super().__init__(arguments)
        self.head = head

    @property
    def name(self) -> str:
        """The backbone's name and tag."""
        return self.extractor_.backbone.tag

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have a score."""
        return self.heads_.layers

    # ---- fit ----

    def fit(self, images: object, progress: Progress | None = None, rows: Split | None = None) -> Self:
        """Learn what is in-domain from ordinary images; no labels, no OOD images.

        Parameters
        ----------
        images : as for :func:`featdiff.data.references.list_images`, or a DataLoader of preprocessed batches
            Files that cannot be read are skipped and listed in ``unreadable_``; images of the same content count once.
        progress : callable (stage, done, total), optional
        rows : featdiff.data.splits.Split, optional
            Which of the different, readable images train, validate and calibrate, for example because a classifier was
            trained on others. Default: random ones.

        Raises
        ------
        UsageError
            No images, or too few for ``fpr``.
        WeightsError, FeatdiffError
            The backbone cannot be had, the cache cannot be written, or training diverged.
        """
        for name in ("calibration_", "bank_digests_"):
            vars(self).pop(name, None)  # until this fit is through, there is nothing to score with
        # images -> features
        own = isinstance(self.arguments["backbone"], nn.Module)
        if own and is_loader(images) and self.arguments["input_size"] is None:
            images, self.arguments["input_size"] = peek_size(images)
        self.extractor_ = self._extractor()
        self.precision_ = self.extractor_.precision
        found, kept = self._extract(images, progress)
        unique, table, rows = self._held_out(found.digests, kept, rows)
        # features -> noise -> denoise -> residual -> fuse
        self.heads_ = self._new_heads(min(self.arguments["bank_size"], len(rows.training)))
        if "vim" in self.arguments["logit_heads"]:
            self._fit_vim(table[evenly(rows.training, _VIM_ROWS)])
        key = self._training_key(unique, rows, _TRAINING_VERSION, _TRAINING_ARGUMENTS)
        size, method = self.arguments["bank_size"], self.arguments["coreset"]
        checkpoint = kept.folder / f"training-{key}.pt"
        trained, bank = fit_heads(self.heads_, table, rows, self.recipe, self.seed, size, method, checkpoint, progress)
        self.validation_loss_, self.training_seconds_ = trained.best_loss, trained.seconds
        self.bank_digests_ = as_digests(unique, bank)
        # -> calibrate
        self._calibrate(table, rows.calibration)
        return self

    def _fit_vim(self, features: Tensor) -> None:
        last, heads = self.extractor_.last_linear(), self.heads_.logits
        assert heads is not None
        heads.fit_vim(features, last.weight, last.bias)

    def check_layers(self) -> None:
        """Refuse layers that cannot be read, by passing one image through the backbone (``UsageError``)."""
        self._extractor()

    def _extractor(self) -> FeatureExtractor:
        given, layers, transform = (self.arguments[name] for name in ("backbone", "layers", "transform"))
        if isinstance(given, nn.Module):
            size, logits = self.arguments["input_size"], bool(self.arguments["logit_heads"])
            return FeatureExtractor(given, layers, self.device, True, transform, size, logits)
        weights, pretrained, model_args = (self.arguments[name] for name in ("weights", "pretrained", "model_args"))
        loaded = load_backbone(given, weights, pretrained, model_args, transform)
        return FeatureExtractor(loaded, layers, self.device)

    def _new_heads(self, bank_rows: int) -> FusedHeads:
        arguments = {name: self.arguments[name] for name in (*_TRAINING_ARGUMENTS, *_SCORING_ARGUMENTS)}
        if self.head != "fused":
            arguments["neighbors"] = 0  # what the score does not look at costs nothing
        return FusedHeads(self.extractor_.columns, bank_rows=bank_rows, **arguments).to(self.device)

    def on(self, classifier: nn.Module) -> Detector:
        """The same fitted detector, on what ``classifier`` gives in its own forward pass.

        Parameters
        ----------
        classifier : module
            One that holds the network this detector was fitted on, under the same names.

        Raises
        ------
        NotFittedError
        ModelError
            Another network, or other weights.
        """
        self.check_fitted()
        own, theirs = self.extractor_.backbone.model.state_dict(), classifier.state_dict()
        for name, value in own.items():
            if name not in theirs or not _same(value, theirs[name]):
                what = "has other weights" if name in theirs else "has no such weights"
                raise ModelError(f"the classifier is not the network this detector was fitted on: {name} {what}")
        facts: dict[str, Any] = {"backbone": classifier, "weights": None, "pretrained": True, "model_args": None}
        facts["device"] = str(device_of(classifier))
        if self.extractor_.backbone.source != "module":
            facts["transform"] = self.extractor_.transform
        other = Detector(**self.arguments | facts | {"layers": self.extractor_.layers})
        other.extractor_ = other._extractor()
        if other.extractor_.columns != self.extractor_.columns or not _alike(self.extractor_, other.extractor_):
            raise ModelError("the classifier gives other layers than this detector was fitted on: call fit on it")
        other.heads_, other.bank_digests_ = copy.deepcopy(self.heads_), self.bank_digests_
        for name in ("calibration_", "n_images_", "validation_loss_", "training_seconds_", "precision_"):
            setattr(other, name, getattr(self, name))
        return other

    # ---- score ----

    @torch.inference_mode()
    def layer_scores(self, features: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Pooled features (B, D) of ``extractor_`` -> (ood_score (B,), layer scores (B, L)), higher = more OOD."""
        self.check_fitted("bank_digests_")
        heads, layers = self.heads_(features, (self.head,))
        return heads[self.head].double().cpu().numpy(), layers.double().cpu().numpy()

    def all_heads(self, features: Tensor) -> dict[str, np.ndarray]:
        """Pooled features (B, D) -> scores (B,) by name: ``featdiff`` (ood_score), other heads, ``layer_<name>``."""
        self.check_fitted("bank_digests_")
        scores, layers = self.heads_(features, HEADS if self.head == "fused" else DIFFUSION)
        scores = {"featdiff": scores.pop(self.head)} | scores
        scores |= {f"layer_{name}": layers[:, i] for i, name in enumerate(self.heads_.layers)}
        return {name: values.double().cpu().numpy() for name, values in scores.items()}

    # ---- save and load ----

    def tensors(self) -> dict[str, Tensor]:
        """The heads, the calibration scores, and the digests of the images in the banks."""
        return self.heads_.state_dict() | {"bank_digests": torch.from_numpy(self.bank_digests_)} | super().tensors()

    def config(self) -> dict[str, Any]:
        """All that ``config.json`` says besides the format."""
        config, backbone = super().config(), self.extractor_.backbone
        config["images"]["bank"] = len(self.bank_digests_)
        config["arguments"] |= {
            "backbone": backbone.tag,
            "transform": {} if backbone.source == "module" else backbone.data_config,
            "layers": self.extractor_.layers,
        }
        if backbone.source == "module":
            config["arguments"]["input_size"] = list(backbone.data_config["input_size"])
        return config | {
            "backbone": {
                **{"tag": backbone.tag, "source": backbone.source, "fingerprint": backbone.fingerprint},
                "precision": self.precision_,
            },
            "layers": dict(zip(self.extractor_.layers, self.extractor_.widths, strict=True)),
        }

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        backbone: nn.Module | None = None,
        transform: Transform | None = None,
        weights: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **runtime: Any,
    ) -> Detector:
        """Load a saved detector, strictly.

        Parameters
        ----------
        name : folder, or hub repository ``org/name``
        backbone, transform : module and callable, for a detector that was fitted on a module
        weights : path, optional
            Where the backbone's weights file lies now.
        local_files_only : bool
            Never ask the hub for the detector.
        runtime : ``device``, ``image_batch``, ``workers``, ``max_pixels``, ``cache``

        Raises
        ------
        ModelError
            No model, a damaged or newer one, or a backbone whose weights are not those it was fitted with.
        WeightsError
            The backbone's weights cannot be had.
        """
        folder = locate(name, local_files_only)
        config, tensors = load(folder)
        arguments = saved_arguments(config, folder, backbone, transform, weights, runtime)
        if backbone is not None:  # said before another network fails in its own way
            check_fingerprint(identity(backbone), config)
        try:
            detector = cls(**arguments)
            detector.extractor_ = detector._extractor()
        except (TypeError, UsageError) as error:
            raise ModelError(f"the model at {folder} is damaged or cannot be used here: {error}") from None
        check_fingerprint(detector.extractor_.backbone.fingerprint, config)
        check_layers(detector.extractor_, config, folder)
        detector.bank_digests_ = take_digests(tensors, config["images"]["bank"], folder)
        detector.heads_ = detector._new_heads(len(detector.bank_digests_))
        detector.calibration_ = load_tensors(detector.heads_, tensors, config["images"]["calibration"], folder)
        detector._take_facts(config)
        detector.precision_ = config["backbone"].get("precision", detector.extractor_.precision)
        return detector


def _alike(a: FeatureExtractor, b: FeatureExtractor) -> bool:
    """Whether two extractors give the same features of some picture, but for rounding."""
    pixels = a.probe()
    rows, others = a(pixels).cpu(), b(pixels).cpu()
    limit = 1e-3 if a.precision == b.precision else 5e-2
    return bool((rows - others).abs().max() <= limit * rows.abs().max())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
