"""LMD, the reference mode: images -> pixels -> mask -> inpaint -> distance -> calibrate -> verdict."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..data.groups import AUTO, Groups, check_groups, is_word
from ..diffusion.fit import fit_denoiser
from ..diffusion.schedules import plain_config
from ..exceptions import ModelError, UsageError
from ..features.networks import fingerprint
from ..features.pixels import Pixels
from ..features.store import Features, FeatureStore, FeatureTable
from ..files.model_folder import load, locate
from ..runtime.gradients import gradients
from ..runtime.processes import make_accelerator
from ..runtime.progress import Progress, shown
from ..scores.distances import FeatureCosine
from ..scores.inpainting import PixelHeads
from ..verdicts.calibration import Calibration
from .base import BaseDetector
from .checks import make_recipe
from .config import PixelSettings
from .constructors import takes
from .pixel_parts import NETWORK, SCORING, make_distances, make_heads, make_network
from .saved import building, check_arguments, load_tensors, pixel_values, take_facts
from .soundness import check_spread
from .training_log import TrainingLog

_TRAINING_VERSION = 2
_TRAINING_SETTINGS = ("size", "channels", *NETWORK, "timesteps", "flip", "mixed_precision", "seed")


class PixelDetector(BaseDetector[PixelSettings]):
    """Lift, Map, Detect (Liu et al., ICML 2023, arXiv 2302.10326): slow and classic.

    Part of an image is masked, a diffusion model trained on in-domain images fills it in, and the result is compared
    with the original: OOD images change more. Departures from the paper: the noise depends only on the image and the
    repetition, so that scores are reproducible and depend on no other image; a discrete schedule (DDPM); and conformal
    p-values.

    Defaults of all parameters: :class:`featdiff.detectors.config.PixelSettings`.

    Parameters
    ----------
    size : int, optional
        Side of the images in pixels; default: 32, or that of a ``pretrained`` model.
    channels : int, optional
        3 or 1; default: 3, or those of a ``pretrained`` model.
    width, multipliers, blocks, attention, dropout
        The U-Net, see :func:`featdiff.diffusion.unet.make_unet`.
    timesteps : int
        Length of the noise schedule.
    flip : bool
        Also train on mirror images.
    pretrained : str, optional
        A diffusers unconditional pipeline (folder, or ``org/name`` on the hub) to use instead of training.
    mask, mask_blocks, mask_patch, mask_ratio
        See :func:`featdiff.diffusion.masks.make_masks`.
    repetitions : int
        Inpaintings of each image, with different noise and masks.
    sampler, steps, resamplings
        See :func:`featdiff.diffusion.schedules.make_sampler` and
        :func:`featdiff.diffusion.reconstruction.inpaint`; LMD takes 1000 steps.
        Samplers with fresh noise at every step (``ddpm``) make known and unknown pixels agree better.
    distances : sequence of str
        Names in :data:`featdiff.scores.distances.DISTANCES`. The first is the score; ``eval`` measures all of them.
        ``lpips`` and ``ssim`` need images of a minimum size.
    aggregate : {"median", "mean", "min", "max"}
        How the distances of all repetitions become one.
    trunk, weights
        The perceptual network of ``lpips`` and its weights, see :class:`featdiff.scores.distances.LPIPS`.
    backbone : str
        The backbone of the distance ``features``: a timm name.
    recipe : Recipe or mapping of its fields
        How the U-Net is trained.
    mixed_precision : {"no", "bf16"}
        Precision of training.
    calibration, validation, fpr, seed, device, image_batch, workers, max_pixels, max_bytes, cache
        As for :class:`featdiff.Detector`. ``image_batch`` images go through the U-Net at once, each with all its
        repetitions.

    Attributes
    ----------
    calibration_ : Calibration
        ``ood_score`` of the calibration images.
    heads_ : PixelHeads
        The fitted score.
    training_log_ : Path
        Folder with the loss and samples of a training.

    Raises
    ------
    UsageError
        An argument outside its range, or a mask, network or size that do not fit each other.

    Examples
    --------
    >>> photos = np.random.default_rng(0).integers(0, 255, (30, 8, 8, 3), dtype=np.uint8)  # yours go here
    >>> small = {"size": 8, "width": 8, "multipliers": [1], "attention": [], "blocks": 1, "mask_blocks": 2}
    >>> quick = {"steps": 2, "repetitions": 1, "recipe": {"epochs": 1, "min_steps": 1}, "device": "cpu"}
    >>> detector = PixelDetector(**small, **quick, distances=["mse"], fpr=0.2)
    >>> scores = detector.fit(photos).score(photos[:3])
    >>> scores.p_value.shape
    (3,)
    """

    mode = "pixel"
    _stored_in = ("pixels", np.uint8)
    extractor_: Pixels
    heads_: PixelHeads

    @takes(PixelSettings)
    def __init__(self, settings: PixelSettings) -> None:
        super().__init__(settings)
        self.rows_at_once = 4 * settings.image_batch  # how often distances are written to disk

    @property
    def name(self) -> str:
        """Name of the diffusion model."""
        return str(self.settings.pretrained or f"U-Net at {self.extractor_.size} px")

    # ---- fit ----

    def fit(self, images: object, progress: Progress | bool | None = None, groups: Groups | None = None) -> Self:
        """Learn what is in-domain from ordinary images; no labels, no OOD images.

        With several processes (``accelerate launch``), all train, and only the first one continues: the detectors of
        the others stay unfitted.

        Parameters
        ----------
        images : images
            As for :func:`featdiff.data.references.list_images`; a DataLoader of (B, C, size, size) tensors in [-1, 1];
            or a generator of such batches, or of single images as a dataset has them. What cannot be read is skipped
            and listed in ``unreadable_``; images of the same content count once.
        progress : bool or callable (stage, done, total), optional
            True shows bars.
        groups : str, path, sequence or mapping, optional
            Which images belong together; see :func:`featdiff.data.groups.label_images` (``auto`` needs the feature
            mode). Default: each image is on its own.

        Returns
        -------
        PixelDetector
            Itself.

        Raises
        ------
        UsageError
            No images, or too few for ``fpr``.
        WeightsError, FeatdiffError
            A pipeline or the weights of a distance cannot be loaded, the cache cannot be written, or training diverged.
        """
        with shown(progress) as report, gradients():
            return self._fit(images, report, groups)

    def _fit(self, images: object, progress: Progress | None, groups: Groups | None) -> Self:
        """The work of :meth:`fit`."""
        check_groups(groups)
        if is_word(groups, AUTO):
            raise UsageError("groups='auto' needs the feature mode: say which images belong together", "groups")
        for name in ("calibration_", "examples_", "_distance_store"):
            vars(self).pop(name, None)  # unfitted until this fit ends
        self.prepare()

        # images -> pixels
        extraction, store = self._extract(images, progress)
        digests, pixels, plan = self._divide(extraction, store, None, groups)
        split = plan.final

        # pixels -> noise -> denoise
        self.validation_loss_ = 0.0
        self.training_seconds_ = 0.0
        if self.settings.pretrained is None:
            key = self._training_key(digests, split, _TRAINING_VERSION, _TRAINING_SETTINGS)
            self.training_log_ = store.folder / f"training-{key}"
            if not self._train(pixels.select(split.training), pixels[split.validation], progress):
                return self

        # mask -> inpaint -> distance -> calibrate
        held_out = pixels.select(split.calibration)
        distances = torch.cat([self._distances(chunk) for chunk in _in_chunks(held_out, self.rows_at_once, progress)])
        self.heads_.fit_statistics(distances)
        scores = self.heads_.scores(distances)[:, 0].double().cpu().numpy()
        check_spread(scores)
        self.calibration_ = Calibration(scores, plan.groups)
        self.examples_ = held_out[least_and_most(scores)]
        return self

    def prepare(self) -> Self:
        """Build the network, the masks and the distances, the first step of :meth:`fit`. No image is needed.

        Raises
        ------
        UsageError, WeightsError
            They do not fit each other, or cannot be loaded.
        """
        unet, scheduler = make_network(self.settings)
        distances = make_distances(self.settings, self.device)
        self.heads_ = make_heads(self.settings, unet, scheduler, distances).to(self.device)
        self.extractor_ = self.heads_.pixels
        return self

    def _train(self, training: FeatureTable, validation: Tensor, progress: Progress | None) -> bool:
        """Train the network; returns whether this process continues after it."""
        accelerator = make_accelerator(self.settings.mixed_precision, self.device)
        if accelerator is not None and accelerator.num_processes > 1:
            self.device = accelerator.device
        heads = self.heads_.to(self.device)

        def images(rows: Tensor) -> Tensor:
            return heads.pixels.images(rows.to(self.device))

        trained = fit_denoiser(
            heads.denoiser,
            heads.scheduler,
            lambda indices: images(training[indices]),
            len(training),
            images(validation),
            make_recipe(self.settings.recipe),
            self.settings.seed,
            self.training_log_.with_suffix(".pt"),
            progress,
            flip_half if self.settings.flip else None,
            accelerator,
            TrainingLog(self.training_log_, heads.pixels, heads.scheduler, self.settings.seed),
        )
        self.validation_loss_ = trained.best_loss
        self.training_seconds_ = trained.seconds
        return accelerator is None or accelerator.is_main_process

    # ---- distances, stored on disk because they take long ----

    @cached_property
    def _distance_store(self) -> FeatureStore:
        """One folder for each model and way of scoring."""
        heads = self.heads_
        weights = [fingerprint(heads.denoiser), fingerprint(heads.distances), self._perceptual_fingerprint()]
        settings = [getattr(self.settings, name) for name in SCORING]
        facts = [weights, heads.names, settings, plain_config(heads.scheduler.config)]

        hasher = hashlib.sha256()
        hasher.update(json.dumps(facts, sort_keys=True).encode())
        hasher.update(heads.masks.cpu().numpy().tobytes())
        folder = self.settings.cache_folder / "distances" / hasher.hexdigest()[:16]
        return FeatureStore(folder, len(heads.names))

    def _distances(self, rows: Tensor) -> Tensor:
        """Rows (B, D) -> all distances (B, n); equal rows are inpainted only once, even across runs."""
        store = self._distance_store
        digests = [_digest(row) for row in rows]
        batch = self.settings.image_batch
        missing = [i for i, digest in enumerate(digests) if digest not in store]
        try:
            for start in range(0, len(missing), batch):
                indices = missing[start : start + batch]
                distances = self.heads_(rows[indices]).cpu().numpy()
                for i, values in zip(indices, distances, strict=True):
                    store.add(digests[i], values)
        finally:  # also after Ctrl-C
            store.flush()
        return store.table(digests)[:]

    # ---- score ----

    @torch.inference_mode()
    def _measured(
        self, features: Tensor, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Rows of pixels (B, D) -> ood_score (B,), higher = more OOD; no scores of layers (B, 0), and no parts."""
        self.check_fitted()
        own_distance = self.heads_.names[:1]
        parts = []
        for rows in features.split(self.settings.image_batch):
            distances = self.heads_(rows, own_distance)
            parts.append(self.heads_.scores(distances))

        scores = torch.cat(parts)
        return scores[:, 0].double().cpu().numpy(), np.empty((len(scores), 0)), {}

    def score_features(self, features: Tensor) -> np.ndarray:
        """Rows of pixels (B, D) -> ood_score (B,), higher = more OOD; stored distances are reused."""
        return self.heads_.scores(self._distances(features))[:, 0].double().cpu().numpy()

    def all_heads(self, features: Tensor) -> dict[str, np.ndarray]:
        """Rows of pixels (B, D) -> scores (B,) by name: ``featdiff`` (ood_score), and each distance."""
        self.check_fitted()
        scores = self.heads_.scores(self._distances(features)).double().cpu().numpy()
        return {"featdiff": scores[:, 0]} | dict(zip(self.heads_.names, scores.T, strict=True))

    # ---- look ----

    def inpaintings(self, images: object = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Images, masked and inpainted, for :func:`featdiff.report.figures.save_inpaintings`.

        Parameters
        ----------
        images : images, optional
            A few, as for :meth:`fit`; unreadable ones are left out. Default: the calibration images with the lowest and
            highest scores.

        Returns
        -------
        images : ndarray of shape (N, C, H, W)
            In [-1, 1].
        masked : ndarray of shape (N, C, H, W)
            The same with grey in place of unknown pixels.
        inpainted : ndarray of shape (N, C, H, W)
            The repetition whose distance is nearest to the aggregated one.
        ood_scores : ndarray of shape (N,)

        Raises
        ------
        NotFittedError, UsageError
            Not fitted; loaded and called without images; none of the images can be read.
        """
        self.check_fitted()
        rows = self._example_rows() if images is None else self._read_rows(images)
        parts = [self.heads_.shown(part) for part in rows.split(self.settings.image_batch)]
        x, masked, inpainted, scores = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return x, masked, inpainted, scores

    def _example_rows(self) -> Tensor:
        if not hasattr(self, "examples_"):
            raise UsageError("this detector was loaded, and does not hold the images it was fitted with: give some")
        return self.examples_

    def _read_rows(self, images: object) -> Tensor:
        batches, _ = self.batches(images)
        rows = [self.extractor_(stack.pixels) for batch in batches for stack in batch.stacks]
        if not rows:
            raise UsageError("none of the images to inpaint could be read")
        return torch.cat(rows)

    # ---- save and load ----

    def config(self) -> dict[str, Any]:
        """The content of ``config.json`` besides the format."""
        return super().config() | {
            "unet": plain_config(self.heads_.denoiser.unet.config),
            "scheduler": plain_config(self.heads_.scheduler.config),
            "features": self._perceptual_fingerprint(),
        }

    def _perceptual_fingerprint(self) -> str:
        """The fingerprint of the distance ``features``; its backbone is not part of the model."""
        if "features" not in self.heads_.names:
            return ""
        cosine = self.heads_.distances["features"]
        return cosine.fingerprint if isinstance(cosine, FeatureCosine) else ""

    def tensors(self) -> dict[str, Tensor]:
        """The heads and the calibration scores."""
        return self.heads_.state_dict() | super().tensors()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        **runtime: Any,
    ) -> PixelDetector:
        """Load a saved detector, strictly.

        Parameters
        ----------
        name : str or path
            Folder, or hub repository ``org/name``.
        local_files_only : bool, default False
            Never ask the hub for the detector.
        revision : str, optional
            Branch, tag or commit on the hub; also as ``org/name@revision``. Default: the main branch.
        token : str or bool, optional
            Of the hub; default: ``HF_TOKEN``, or that of ``hf auth login``. It is not stored.
        **runtime
            ``device``, ``image_batch``, ``workers``, ``max_pixels``, ``max_bytes``, ``cache``.

        Returns
        -------
        PixelDetector

        Raises
        ------
        ModelError
            No model, a damaged or newer one, or one of another mode.
        """
        folder = locate(name, local_files_only, revision, token)
        config, tensors = load(folder)
        return cls.from_loaded(folder, config, tensors, **runtime)

    @classmethod
    def from_loaded(
        cls, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], **runtime: Any
    ) -> PixelDetector:
        """Build a saved detector from its config and tensors; see :meth:`from_pretrained`."""
        from diffusers import DDPMScheduler, UNet2DModel

        values = pixel_values(config, folder, runtime)
        check_arguments(config["unet"], UNet2DModel, folder)
        check_arguments(config["scheduler"], DDPMScheduler, folder)
        with building(folder):
            detector = cls.from_settings(PixelSettings.of(values))
            unet = UNet2DModel.from_config(config["unet"])
            scheduler = DDPMScheduler.from_config(config["scheduler"])
            distances = make_distances(detector.settings, detector.device, load=False)
            heads = make_heads(detector.settings, unet, scheduler, distances, blank=True)
            detector.heads_ = heads.to(detector.device)

        detector.extractor_ = detector.heads_.pixels
        detector.calibration_ = load_tensors(detector.heads_, tensors, config["images"], folder)
        if detector._perceptual_fingerprint() != config["features"]:
            backbone = detector.settings.backbone
            raise ModelError(f"{backbone} has other weights than the detector at {folder} was fitted with")
        take_facts(detector, config)
        return detector


def _digest(row: Tensor) -> bytes:
    return hashlib.blake2b(row.cpu().numpy().tobytes(), digest_size=16).digest()


def least_and_most(scores: np.ndarray, each: int = 4) -> np.ndarray:
    """Indices of the ``each`` lowest and ``each`` highest scores, ascending by score, without NaN."""
    order = np.argsort(scores)[: np.isfinite(scores).sum()]
    if len(order) <= 2 * each:
        return order
    return np.concatenate([order[:each], order[-each:]])


def flip_half(x: Tensor, source: torch.Generator) -> Tensor:
    """Mirror each image of (B, C, H, W) with probability 1/2."""
    flipped = torch.rand(len(x), 1, 1, 1, generator=source, device=x.device) < 0.5
    return torch.where(flipped, x.flip(-1), x)


def _in_chunks(features: Features, size: int, progress: Progress | None) -> Iterator[Tensor]:
    """Rows that calibrate, as many at a time as are scored at once."""
    done = 0
    for chunk in features.chunks(size):
        yield chunk
        done += len(chunk)
        if progress:
            progress("calibrating", done, len(features))
