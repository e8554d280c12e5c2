"""The main path: images -> features -> scores -> calibration -> verdicts, with diffusion in feature space."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..data.decoding import Transform
from ..data.groups import AUTO, Groups, check_groups, is_word
from ..data.loaders import is_loader, peek_size
from ..data.references import list_images
from ..data.splits import Plan, Split
from ..exceptions import ModelError, UsageError
from ..features.backbones import load_backbone
from ..features.engines import TORCH
from ..features.extraction import Extraction
from ..features.extractor import FeatureExtractor
from ..features.networks import device_of, identity
from ..features.store import Features, FeatureStore
from ..features.views import settings_of
from ..files.model_folder import load, locate
from ..runtime.gradients import gradients
from ..runtime.progress import Progress, shown
from ..scores.diffusion import Diffusion
from ..scores.fused import Heads
from ..scores.registry import Context, Options, Score, make_scores
from ..verdicts.calibration import Calibration
from .bank_images import BankImages
from .checks import make_recipe
from .config import FeatureSettings
from .constructors import takes
from .feature_scoring import FeatureScoring
from .fitting import Bank, Fitted, as_digests, fit_heads
from .grouping import Grouping
from .kept_images import KeptImages
from .local_part import LocalPart, saved_maps
from .same_network import check_same_features, check_same_weights
from .saved import (
    building,
    check_fingerprint,
    check_layers,
    feature_values,
    load_tensors,
    take_digests,
    take_facts,
    widths_of,
)
from .start import load_extractor

# Raised when the same settings give another result: finished trainings in the cache are not used then.
_TRAINING_VERSION = 6
# Settings that decide the training of the denoisers, and those of how they are asked.
_TRAINING_SETTINGS = ("joint", "hidden_ratio", "hidden_max", "blocks", "timesteps", "seed")
_DIFFUSION_SETTINGS = (*_TRAINING_SETTINGS, "start_times", "draws", "stride")


class Detector(FeatureScoring):
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
        A timm name, ``hf-hub:ORG/NAME``, ``local-dir:PATH``, or any module (then ``transform`` is a callable from an
        RGB picture to a (3, H, W) tensor if pictures are to be read; see also :class:`featdiff.Guard`).
    weights, pretrained, model_args, transform
        See :func:`featdiff.features.backbones.load_backbone`.
    view : {"whole", "rectangle", "squash", "crop"}, default "whole"
        How much of a picture the backbone sees; ``crop`` is timm's own preprocessing. See there. A module sees what its
        ``transform`` makes of a picture.
    size : int, optional
        Side in pixels of the square whose area the backbone sees, such as 384; default: the backbone's own.
    layers : "auto", or names or indices of layers
        See :func:`featdiff.features.layers.resolve_layers`. For a module that is no timm model, ``auto`` finds the
        stages by a pass (:mod:`featdiff.features.stages`).
    precision : {"auto", "fp32", "bf16"}
        What the backbone computes in, when it is fitted and ever after: float32, or bfloat16 autocast, which is for
        processors that have it: it is faster there and slow elsewhere, and changes scores a little. ``auto`` is
        float32, on a GPU float16 autocast. A module runs as it is.
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
    extra_heads : sequence of str
        What else ``fused`` joins: ``energy``, ``msp`` and ``vim``, if the backbone is a classifier of your own
        (:mod:`featdiff.scores.logits`), or any score that is registered as a head (:mod:`featdiff.scores.registry`).
    head : "fused", "layerwise", "mse", "mfsim", "lr", or a registered head
        Which score becomes ``ood_score``: all joined, one of diffusion alone (:mod:`featdiff.scores.diffusion`), or
        another one, which stands beside the diffusion scores and is not joined with them.
    neighbors : int
        Nearest in-domain vectors that count; 0 does without them.
    bank_size, coreset
        The most in-domain vectors kept for that, and how they are chosen; see
        :func:`featdiff.scores.coreset.coreset`.
    backend : str
        How neighbours are searched; see :func:`featdiff.scores.neighbors.make_index`.
    local : {"auto", True, False}, default "auto"
        Whether places of a picture are looked at as well, for defects that a pooled vector averages away; see
        :mod:`featdiff.scores.local`. The verdict then joins a global and a local score
        (:class:`featdiff.scores.joint.Joint`), and results have a p-value of each. ``auto`` decides from the normal
        images alone: if they are alike, as pictures of one product are, and can be read again. For photographs of many
        things the local score would do harm.
    keep_paths : bool
        Keep the paths of these vectors' images in the model, so that :meth:`explain` can name and show the normal
        images that are like a new one. Without them it says ``image 17``.
    keep_thumbnails : bool
        Keep small pictures of these images too (96 pixels a side, 16 MB in all), so that they can be shown where the
        files are not. The images are decoded once more for that; those of a loader or generator have none.
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
    image_batch, workers, max_pixels, max_bytes
        Images per backbone pass, decoding threads, the largest picture that is opened, and the largest file that is
        read.
    cache : path, optional
        Folder of the feature store; default ``$FEATDIFF_CACHE`` or featdiff's folder in the user's cache.

    Raises
    ------
    UsageError
        An unknown argument, or one outside its range.

    Examples
    --------
    >>> import numpy as np
    >>> photos = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)  # yours go here
    >>> quick = {"epochs": 1, "min_steps": 5}
    >>> layers = ["layer1", "layer2"]
    >>> detector = Detector("test_resnet", pretrained=False, layers=layers, fpr=0.2, recipe=quick, device="cpu")
    >>> detector
    Detector(not fitted, fpr=0.2)
    >>> scores = detector.fit(photos).score(photos[:3])
    >>> scores.p_value.shape
    (3,)
    """

    mode = "feature"
    # on few rows the heads would mostly wait for memory
    batches_at_once = 4
    precision_: str

    @takes(FeatureSettings)
    def __init__(self, settings: FeatureSettings) -> None:
        super().__init__(settings)

    @property
    def name(self) -> str:
        """The backbone's name and tag."""
        return self.extractor_.backbone.tag

    # ---- fit ----

    def fit(
        self,
        images: object,
        progress: Progress | bool | None = None,
        split: Split | None = None,
        groups: Groups | None = None,
    ) -> Self:
        """Learn what is in-domain from ordinary images; no labels, no OOD images.

        Parameters
        ----------
        images : object
            As for :func:`featdiff.data.references.list_images`; a DataLoader of preprocessed batches; or a generator of
            such batches, or of single images as a dataset has them. What cannot be read is skipped and listed in
            ``unreadable_``; images of the same content count once.
        progress : bool or callable (stage, done, total), optional
            True shows bars.
        split : featdiff.data.splits.Split, optional
            Which of the different, readable images train, validate and calibrate, for example because a classifier was
            trained on others. Default: up to 500 images all calibrate, by five folds; of more, a fifth.
        groups : str, path, sequence or mapping, optional
            Which images belong together (bursts, video frames, patients), so that they are never on two sides of the
            split: ``auto``, ``none``, ``folder``, ``gap:N``, a regular expression, a CSV file, or labels; see
            :func:`featdiff.data.groups.label_images`. Default: near-copies are looked for, and are groups where a split
            by chance would make the false-alarm rate wrong.

        Returns
        -------
        Detector
            Itself.

        Raises
        ------
        UsageError
            No images, or too few for ``fpr``.
        WeightsError, FeatdiffError
            The backbone cannot be had, the cache cannot be written, or training diverged.

        Warns
        -----
        NearCopiesFound
            Near-copies were taken as groups without being asked for.
        """
        with shown(progress) as report, gradients():
            return self._fit(images, report, split, groups)

    def _fit(self, images: object, progress: Progress | None, split: Split | None, groups: Groups | None) -> Self:
        """The work of :meth:`fit`."""
        check_groups(groups)
        if not is_loader(images):
            images = list_images(images)  # they may be read again
        # images -> features
        extraction, store = self.read(images, progress)
        digests, features, plan = self._divide(extraction, store, split, groups)

        # features -> scores -> calibration
        fitted = self.fit_rows(features, digests, plan, store.folder, progress)
        self.bank_images_ = BankImages.of(images, extraction, self.bank_digests_, self.settings, progress)
        scores = self._fit_local(images, extraction, digests, store, plan, fitted.calibration, progress)
        numbers = self.grouping_.numbers if split is None else None
        self.kept_ = KeptImages.of_split(digests, features, plan.final, numbers, self.heads_.layout)
        if self.local_ is not None:  # an update needs the images themselves
            self.kept_ = self.kept_.without_rows()
        self.calibration_ = Calibration(scores, plan.groups, fitted.layers)
        if self.extractor_.engine != TORCH:
            self._confirm_engine(*self._some(images))
        return self

    def fit_rows(
        self, features: Features, digests: list[bytes], plan: Plan, folder: Path, progress: Progress | None
    ) -> Fitted:
        """The second step of :meth:`fit`: the scores.

        Parameters
        ----------
        features : Features
            Rows (N, D) of the extractor, of different images.
        digests : list of bytes
            Their contents.
        plan : Plan
            Which of them train, validate and calibrate.
        folder : Path
            Where trainings are kept.
        progress : callable (stage, done, total), optional

        Returns
        -------
        Fitted
            Scores of the rows that calibrate among it.
        """
        settings = self.settings
        fitted = fit_heads(
            features,
            plan,
            Bank(settings.bank_size, settings.coreset, settings.seed),
            self._make_heads,
            lambda part: self._context(features, digests, part, folder, progress),
        )
        self.heads_ = fitted.heads
        self.validation_loss_ = fitted.validation_loss
        self.training_seconds_ = fitted.seconds
        self.bank_digests_ = as_digests(digests, fitted.bank)
        return fitted

    def _group(self, extraction: Extraction, features: Features, groups: Groups | None) -> Grouping:
        """The group of each different image: given, or found in the features."""
        asked = is_word(groups, AUTO)
        if groups is None or asked:
            return Grouping.found(features, self.extractor_.layout, asked)
        return super()._group(extraction, features, groups)

    def read(self, images: object, progress: Progress | None = None) -> tuple[Extraction, FeatureStore]:
        """The first step of :meth:`fit`: the features of all images, computed where the cache does not hold them.

        Parameters
        ----------
        images : object
            As for :meth:`fit`.
        progress : callable (stage, done, total), optional

        Returns
        -------
        extraction : Extraction
            Which images these are, and which could not be read.
        store : FeatureStore
            Their features by digest.
        """
        vars(self).pop("calibration_", None)  # until a fit is through, there is nothing to score with
        self.local_ = None
        self.engine_note_ = ""
        images, size = self._input_size(images)
        self.extractor_ = self._make_extractor(size)
        self.precision_ = self.extractor_.precision
        extraction, store = self._extract(images, progress)
        self.engine_ = self.extractor_.engine
        return extraction, store

    def _input_size(self, images: object) -> tuple[object, Sequence[int] | None]:
        """The images, and the size that a module of the user's own is fitted for: that of a loader's first batch."""
        own = isinstance(self.settings.backbone, nn.Module)
        if own and is_loader(images) and self.settings.input_size is None:
            return peek_size(images)
        return images, self.settings.input_size

    def _context(
        self, features: Features, digests: list[bytes], split: Split, folder: Path, progress: Progress | None
    ) -> Context:
        key = self._training_key(digests, split, _TRAINING_VERSION, _TRAINING_SETTINGS)
        return Context(
            training=features.select(split.training),
            validation=features.select(split.validation),
            recipe=make_recipe(self.settings.recipe),
            seed=self.settings.seed,
            classifier=self._classifier(),
            checkpoint=folder / f"training-{key}.pt",
            progress=progress,
        )

    def check_layers(self) -> None:
        """Refuse layers that cannot be read, by passing one image through the backbone (``UsageError``)."""
        self._make_extractor(self.settings.input_size)

    def _make_extractor(self, input_size: Sequence[int] | None) -> FeatureExtractor:
        settings = self.settings
        transform: Any = settings.transform
        if isinstance(settings.backbone, nn.Module):
            logits = settings.needs_logits
            return FeatureExtractor(
                settings.backbone, settings.layers, self.device, "auto", transform, input_size, logits
            )
        backbone = load_backbone(
            settings.backbone,
            settings.weights,
            settings.pretrained,
            settings.model_args,
            transform,
            settings.view,
            settings.size,
        )
        return FeatureExtractor(backbone, settings.layers, self.device, settings.precision)

    def _classifier(self) -> nn.Linear | nn.Conv2d | None:
        """The layer that gives the logits, where scores need these and there is one."""
        if not self.settings.needs_logits:
            return None
        try:
            return self.extractor_.last_linear()
        except UsageError:
            return None

    def _make_heads(self, bank_size: int) -> Heads:
        """Unfitted scores of the extractor's features, with room for so many in-domain rows."""
        settings = self.settings
        layout = self.extractor_.layout
        options = Options(bank_size, settings.neighbors, settings.backend)
        diffusion = Diffusion(layout, **{name: getattr(settings, name) for name in _DIFFUSION_SETTINGS})

        members: list[Score] = []
        for name in settings.registered_heads:
            members += make_scores(name, layout, options)
        return Heads(diffusion, members, settings.head).to(self.device)

    def on(self, classifier: nn.Module) -> Detector:
        """The same fitted detector, on what ``classifier`` gives in its own forward pass.

        Parameters
        ----------
        classifier : nn.Module
            One that holds the network this detector was fitted on, under the same names.

        Raises
        ------
        NotFittedError
        ModelError
            Another network, or other weights.
        """
        self.check_fitted()
        backbone = self.extractor_.backbone
        check_same_weights(backbone.model, classifier)

        settings = self.settings.with_(
            backbone=classifier,
            weights=None,
            pretrained=True,
            model_args=None,
            view="whole",
            size=None,
            layers=self.extractor_.layers,
            precision="auto",
            device=str(device_of(classifier)),
            transform=self.settings.transform if backbone.source == "module" else self.extractor_.transform,
            input_size=backbone.data_config["input_size"],
        )
        other = Detector.from_settings(settings)
        other.extractor_ = other._make_extractor(settings.input_size)
        other.heads_ = copy.deepcopy(self.heads_)
        other.local_ = copy.deepcopy(self.local_)
        if other.local_ is not None:
            other.extractor_.keep_maps(list(self.extractor_.maps))
            other.local_.attach(other.extractor_)
        check_same_features(self.extractor_, other.extractor_)

        learned = (
            "calibration_",
            "bank_digests_",
            "bank_images_",
            "kept_",
            "recalibrations_",
            "n_images_",
            "precision_",
            "engine_",
            "validation_loss_",
            "training_seconds_",
        )
        for name in learned:
            setattr(other, name, getattr(self, name))
        return other

    # ---- save and load ----

    def tensors(self) -> dict[str, Tensor]:
        """The heads, the calibration scores, and what identifies and shows the images in the bank."""
        bank = {"bank_digests": torch.from_numpy(self.bank_digests_)} | self.bank_images_.tensors()
        local = self.local_.tensors() if self.local_ else {}
        kept = self.kept_.tensors()
        return self.heads_.state_dict() | bank | local | kept | super().tensors()

    def config(self) -> dict[str, Any]:
        """All that ``config.json`` says besides the format."""
        config = super().config()
        backbone = self.extractor_.backbone
        own = backbone.source == "module"
        config["images"]["bank"] = len(self.bank_digests_)
        config["settings"] |= {"backbone": backbone.tag, "layers": self.extractor_.layers}
        if own:
            config["settings"] |= {"transform": {}, "input_size": list(backbone.data_config["input_size"])}
        else:
            config["settings"] |= settings_of(backbone.data_config)
        config["backbone"] = {
            "tag": backbone.tag,
            "source": backbone.source,
            "fingerprint": backbone.fingerprint,
            "precision": self.precision_,
            "engine": self.engine_,
        }
        config["layers"] = widths_of(self.extractor_)
        config["local"] = self.extractor_.maps if self.local_ else None
        return config

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        backbone: nn.Module | None = None,
        transform: Transform | None = None,
        weights: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        **runtime: Any,
    ) -> Detector:
        """Load a saved detector, strictly.

        Parameters
        ----------
        name : path or str
            A folder, or a hub repository ``org/name``.
        backbone, transform : nn.Module and callable, optional
            For a detector that was fitted on a module.
        weights : path, optional
            Where the backbone's weights file lies now.
        local_files_only : bool, default False
            Never ask the hub for the detector.
        revision : str, optional
            Branch, tag or commit on the hub; also as ``org/name@revision``. Default: the main branch.
        token : str or bool, optional
            Of the hub; default: ``HF_TOKEN``, or that of ``hf auth login``. It is not stored.
        **runtime
            ``device``, ``image_batch``, ``workers``, ``max_pixels``, ``max_bytes``, ``cache``.

        Raises
        ------
        ModelError
            No model, a damaged or newer one, or a backbone whose weights are not those it was fitted with.
        WeightsError
            The backbone's weights cannot be had.
        """
        folder = locate(name, local_files_only, revision, token)
        config, tensors = load(folder)
        given: dict[str, Any] = {"backbone": backbone, "transform": transform, "weights": weights, **runtime}
        return cls.from_loaded(folder, config, tensors, **given)

    @classmethod
    def from_loaded(
        cls,
        folder: Path,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        *,
        backbone: nn.Module | None = None,
        transform: Transform | None = None,
        weights: str | os.PathLike[str] | None = None,
        **runtime: Any,
    ) -> Detector:
        """Build what was saved in ``folder`` from its config and tensors; see :meth:`from_pretrained`."""
        values = feature_values(config, folder, backbone, transform, weights, runtime)
        if backbone is not None:  # said before another network fails in its own way
            check_fingerprint(identity(backbone), config)
        with building(folder):
            detector = cls.from_settings(FeatureSettings.of(values))
            build = functools.partial(detector._make_extractor, detector.settings.input_size)
            detector.extractor_ = load_extractor(detector.settings, config, build)
        check_fingerprint(detector.extractor_.backbone.fingerprint, config)
        check_layers(detector.extractor_, config, folder)

        maps = saved_maps(config, folder)
        if maps:
            with building(folder):
                detector.extractor_.keep_maps(list(maps))
            if detector.extractor_.maps != maps:
                raise ModelError(f"the maps of the backbone are not those the detector at {folder} was fitted with")
            detector.local_ = LocalPart.take(
                tensors, list(maps.values()), config["images"], detector.settings.seed, folder
            ).to(detector.device)
        detector.bank_digests_ = take_digests(tensors, config["images"]["bank"], folder)
        detector.bank_images_ = BankImages.take(tensors, detector.bank_digests_, detector.settings, folder)
        detector.kept_ = KeptImages.take(tensors, detector.extractor_.layout, config["images"], folder)
        with building(folder):
            detector.heads_ = detector._make_heads(len(detector.bank_digests_))
        detector.calibration_ = load_tensors(detector.heads_, tensors, config["images"], folder, detector.heads_.layers)
        if detector.local_:
            detector.local_.attach(detector.extractor_)
        take_facts(detector, config)
        detector.precision_ = config["backbone"]["precision"]
        detector.engine_ = config["backbone"]["engine"]
        return detector
