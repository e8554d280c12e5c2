"""LMD, the reference mode: images -> pixels -> mask -> inpaint -> distance -> calibrate -> verdict."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..diffusion.fit import fit_denoiser
from ..diffusion.schedules import plain_config
from ..exceptions import ModelError, UsageError
from ..features.networks import fingerprint
from ..features.pixels import Pixels
from ..features.store import FeatureStore, FeatureTable
from ..files.model_folder import load, locate
from ..runtime.processes import make_accelerator
from ..runtime.progress import Progress
from ..scores.distances import FeatureCosine
from ..scores.inpainting import PixelHeads
from ..verdicts.calibration import Calibration
from .base import BaseDetector
from .checks import make_recipe
from .config import PixelSettings
from .constructors import takes
from .pixel_parts import NETWORK, SCORING, make_distances, make_heads, make_network
from .saved import load_tensors, pixel_values, take_facts
from .training_log import TrainingLog

_TRAINING_VERSION = 1
_TRAINING_SETTINGS = ("size", "channels", *NETWORK, "timesteps", "flip", "mixed_precision", "seed")


class PixelDetector(BaseDetector[PixelSettings]):
    """Lift, Map, Detect (Liu et al., ICML 2023, arXiv 2302.10326): slow and classic.

    Part of an image is masked, a diffusion model trained on in-domain images fills it in, and what comes back is
    compared with the original: strange images come back changed. Departures from the paper: the noise belongs to the
    image and the repetition, so that a score can be had again and depends on no other image; a discrete schedule
    (DDPM); and conformal p-values.

    Parameters
    ----------
    size, channels : int, optional
        Side of the images in pixels, and 3 or 1 channels; default: 32 and 3, or what a ``pretrained`` model takes.
    width, multipliers, blocks, attention, dropout
        The U-Net, see :func:`featdiff.diffusion.unet.make_unet`.
    timesteps : int
        Length of the noise schedule.
    flip : bool
        Train on mirror images, too.
    pretrained : str, optional
        A diffusers unconditional pipeline (folder, or ``org/name`` on the hub) to use in place of training.
    mask, mask_blocks, mask_patch, mask_ratio
        See :func:`featdiff.diffusion.masks.make_masks`.
    repetitions : int
        How often each image is inpainted, with other noise and another mask.
    sampler, steps, resamplings
        See :func:`featdiff.diffusion.schedules.make_sampler` and
        :func:`featdiff.diffusion.reconstruction.inpaint`; LMD takes 1000 steps.
        Samplers with fresh noise at every step (``ddpm``) make known and unknown pixels agree better.
    distances : sequence of names in :data:`featdiff.scores.distances.DISTANCES`
        The first is the score, all are measured by ``eval``. ``lpips`` and ``ssim`` need images of some size.
    aggregate : "median", "mean", "min" or "max"
        Over repetitions.
    trunk, weights
        What ``lpips`` looks through, see :class:`featdiff.scores.distances.LPIPS`.
    backbone : str
        What ``features`` looks through: a timm name.
    recipe : Recipe or mapping of its fields
        How the U-Net is trained.
    mixed_precision : "no" or "bf16"
        Precision of training.
    calibration, validation, fpr, seed, device, image_batch, workers, max_pixels, cache
        As for :class:`featdiff.Detector`. ``image_batch`` images go through the U-Net at once, each with all its
        repetitions.

    Raises
    ------
    UsageError
        An argument outside its range, or a mask, network or size that do not fit each other.
    """

    mode = "pixel"
    _stored_in = ("pixels", np.uint8)
    extractor_: Pixels
    heads_: PixelHeads

    @takes(PixelSettings)
    def __init__(self, settings: PixelSettings) -> None:
        super().__init__(settings)
        self.rows_at_once = 4 * settings.image_batch  # so often are distances written to disk

    @property
    def name(self) -> str:
        """What the images are compared with."""
        return str(self.settings.pretrained or f"U-Net at {self.extractor_.size} px")

    # ---- fit ----

    def fit(self, images: object, progress: Progress | None = None) -> Self:
        """Learn what is in-domain from ordinary images; no labels, no OOD images.

        Of several processes (``accelerate launch``) all train, and the first one alone goes on: the detectors of the
        others stay unfitted.

        Parameters
        ----------
        images : as for :func:`featdiff.data.references.list_images`
            Or a DataLoader of (B, C, size, size) tensors in [-1, 1].
            Files that cannot be read are skipped and listed in ``unreadable_``; images of the same content count once.
        progress : callable (stage, done, total), optional

        Raises
        ------
        UsageError
            No images, or too few for ``fpr``.
        WeightsError, FeatdiffError
            A pipeline or the weights of a distance cannot be had, the cache cannot be written, or training diverged.
        """
        for name in ("calibration_", "examples_", "_distance_store"):
            vars(self).pop(name, None)  # until this fit is through, there is nothing to score with
        self.prepare()
        # images -> pixels
        extraction, store = self._extract(images, progress)
        digests, pixels, rows = self._divide(extraction.digests, store, None)

        # pixels -> noise -> denoise
        self.validation_loss_ = 0.0
        self.training_seconds_ = 0.0
        if self.settings.pretrained is None:
            key = self._training_key(digests, rows, _TRAINING_VERSION, _TRAINING_SETTINGS)
            self.training_log_ = store.folder / f"training-{key}"
            if not self._train(pixels.select(rows.training), pixels[rows.validation], progress):
                return self

        # mask -> inpaint -> distance -> calibrate
        held_out = pixels.select(rows.calibration)
        distances = torch.cat([self._distances(chunk) for chunk in self._in_chunks(held_out, progress)])
        self.heads_.fit_statistics(distances)
        scores = self.heads_.scores(distances)[:, 0].double().cpu().numpy()
        self.calibration_ = Calibration(scores)
        self.examples_ = held_out[least_and_most(scores)]
        return self

    def prepare(self) -> Self:
        """Build the network, the masks and the distances; :meth:`fit` begins with it. No image is needed.

        Raises
        ------
        UsageError, WeightsError
            They do not fit each other, or cannot be had.
        """
        unet, scheduler = make_network(self.settings)
        distances = make_distances(self.settings, self.device)
        self.heads_ = make_heads(self.settings, unet, scheduler, distances).to(self.device)
        self.extractor_ = self.heads_.pixels
        return self

    def _train(self, training: FeatureTable, validation: Tensor, progress: Progress | None) -> bool:
        """Train the network; whether this process goes on from there."""
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

    # ---- distances, kept on disk: they take long ----

    @cached_property
    def _distance_store(self) -> FeatureStore:
        heads = self.heads_
        hasher = hashlib.sha256()
        weights = [fingerprint(heads.denoiser), fingerprint(heads.distances), self._perceptual_fingerprint()]
        settings = [getattr(self.settings, name) for name in SCORING]
        facts = [weights, heads.names, settings, plain_config(heads.scheduler.config)]
        hasher.update(json.dumps(facts, sort_keys=True).encode())
        hasher.update(heads.masks.cpu().numpy().tobytes())
        folder = self.settings.cache_folder / "distances" / hasher.hexdigest()[:16]
        return FeatureStore(folder, len(heads.names))

    def _distances(self, rows: Tensor) -> Tensor:
        """Rows (B, D) -> all distances (B, n); each content is inpainted once, over all runs."""
        store = self._distance_store
        digests = [_digest(row) for row in rows]
        batch = self.settings.image_batch
        new = [i for i, digest in enumerate(digests) if digest not in store]
        try:
            for start in range(0, len(new), batch):
                part = new[start : start + batch]
                for i, values in zip(part, self.heads_(rows[part]).cpu().numpy(), strict=True):
                    store.add(digests[i], values)
        finally:  # Ctrl-C, too
            store.flush()
        return store.table(digests)[:]

    # ---- score ----

    @torch.inference_mode()
    def layer_scores(self, features: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows of pixels (B, D) -> (ood_score (B,), nothing (B, 0)), higher = more OOD."""
        self.check_fitted()
        parts = features.split(self.settings.image_batch)
        found = torch.cat([self.heads_.scores(self.heads_(rows, self.heads_.names[:1])) for rows in parts])
        return found[:, 0].double().cpu().numpy(), np.empty((len(found), 0))

    def score_features(self, features: Tensor) -> np.ndarray:
        """Rows of pixels (B, D) -> ood_score (B,), higher = more OOD; what has been inpainted before is looked up."""
        return self.heads_.scores(self._distances(features))[:, 0].double().cpu().numpy()

    def all_heads(self, features: Tensor) -> dict[str, np.ndarray]:
        """Rows of pixels (B, D) -> scores (B,) by name: ``featdiff`` (ood_score), and each distance."""
        self.check_fitted()
        scores = self.heads_.scores(self._distances(features)).double().cpu().numpy()
        return {"featdiff": scores[:, 0]} | dict(zip(self.heads_.names, scores.T, strict=True))

    # ---- look ----

    def inpaintings(self, images: object = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What inpainting does to images: what :func:`featdiff.report.figures.save_inpaintings` draws.

        Parameters
        ----------
        images : as for :meth:`fit`, few
            Those that cannot be read are left out. Default: the least and the most strange images held out at fit.

        Returns
        -------
        images, masked and inpainted images, each (N, C, H, W) in [-1, 1], and ood_scores (N,)
            The inpainting is the repetition whose distance is nearest to the image's.

        Raises
        ------
        NotFittedError, UsageError
            Not fitted; loaded, so that images must be given; none of them can be read.
        """
        self.check_fitted()
        if images is None and not hasattr(self, "examples_"):
            raise UsageError("this detector was loaded, and does not hold the images it was fitted with: give some")
        if images is None:
            rows = self.examples_
        else:
            decoded = [batch.pixels for batch in self.batches(images)[0] if batch.pixels is not None]
            if not decoded:
                raise UsageError("none of the images to inpaint could be read")
            rows = torch.cat([self.extractor_(pixels) for pixels in decoded])
        parts = [self.heads_.shown(part) for part in rows.split(self.settings.image_batch)]
        x, masked, inpainted, scores = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return x, masked, inpainted, scores

    # ---- save and load ----

    def config(self) -> dict[str, Any]:
        """All that ``config.json`` says besides the format."""
        config, heads = super().config(), self.heads_
        parts = {"unet": heads.denoiser.unet.config, "scheduler": heads.scheduler.config}
        plain = {name: plain_config(part) for name, part in parts.items()}
        return config | plain | {"features": self._perceptual_fingerprint()}

    def _perceptual_fingerprint(self) -> str:
        """The fingerprint of the distance ``features``; its backbone is not part of the model."""
        cosine = self.heads_.distances["features"] if "features" in self.heads_.names else None
        return cosine.fingerprint if isinstance(cosine, FeatureCosine) else ""

    def tensors(self) -> dict[str, Tensor]:
        """The heads and the calibration scores."""
        return self.heads_.state_dict() | super().tensors()

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, local_files_only: bool = False, **runtime: Any
    ) -> PixelDetector:
        """Load a saved detector, strictly.

        Parameters
        ----------
        name : folder, or hub repository ``org/name``
        local_files_only : bool
            Never ask the hub for the detector.
        runtime : ``device``, ``image_batch``, ``workers``, ``max_pixels``, ``cache``

        Raises
        ------
        ModelError
            No model, a damaged or newer one, or one of another mode.
        """
        folder = locate(name, local_files_only)
        config, tensors = load(folder)
        return cls.from_loaded(folder, config, tensors, **runtime)

    @classmethod
    def from_loaded(
        cls, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], **runtime: Any
    ) -> PixelDetector:
        """Build what was saved in ``folder`` from its config and tensors; see :meth:`from_pretrained`."""
        from diffusers import DDPMScheduler, UNet2DModel

        values = pixel_values(config, folder, runtime)
        try:
            detector = cls.from_settings(PixelSettings.of(values))
            unet = UNet2DModel.from_config(config["unet"])
            scheduler = DDPMScheduler.from_config(config["scheduler"])
            distances = make_distances(detector.settings, detector.device, load=False)
            heads = make_heads(detector.settings, unet, scheduler, distances, blank=True)
            detector.heads_ = heads.to(detector.device)
        except (TypeError, ValueError, NotImplementedError) as error:  # UsageError, too
            raise ModelError(f"the model at {folder} is damaged or cannot be used here: {error}") from None

        detector.extractor_ = detector.heads_.pixels
        detector.calibration_ = load_tensors(detector.heads_, tensors, config["images"]["calibration"], folder)
        if detector._perceptual_fingerprint() != config["features"]:
            backbone = detector.settings.backbone
            raise ModelError(f"{backbone} has other weights than the detector at {folder} was fitted with")
        take_facts(detector, config)
        return detector


def _digest(row: Tensor) -> bytes:
    return hashlib.blake2b(row.cpu().numpy().tobytes(), digest_size=16).digest()


def least_and_most(scores: np.ndarray, each: int = 4) -> np.ndarray:
    """Positions of the least and of the most strange images, ``each`` of them, by rising score; NaN are left out."""
    order = np.argsort(scores)[: np.isfinite(scores).sum()]
    return order if len(order) <= 2 * each else np.concatenate([order[:each], order[-each:]])


def flip_half(x: Tensor, source: torch.Generator) -> Tensor:
    """Mirror every other image of (B, C, H, W), by chance."""
    heads = torch.rand(len(x), 1, 1, 1, generator=source, device=x.device) < 0.5
    return torch.where(heads, x.flip(-1), x)
