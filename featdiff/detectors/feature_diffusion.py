"""The main path: images -> features -> noise -> denoise -> residual -> fuse -> calibrate -> verdict."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones import DEFAULT_BACKBONE, load_backbone
from ..calibration import Split, check_fpr, flagged, p_values, split
from ..exceptions import ModelError, NotFittedError, UsageError
from ..features import FeatureExtractor, Layers
from ..images import MAX_PIXELS, Batch, Transform, batches_from_loader, is_loader, iter_batches, iter_loaded
from ..persist import load, locate, save
from ..scores import OK, UNREADABLE, Scores
from ..sources import list_images
from ..store import (
    Extraction,
    FeatureStore,
    Progress,
    default_cache,
    extract,
    featurise,
)
from ..training import Recipe
from .arguments import RUNTIME, check_arguments, make_recipe, resolve_device
from .fitting import as_digests, choose_bank, train_denoiser
from .heads import DIFFUSION, HEADS, FusedHeads
from .loading import check_backbone, load_tensors, saved_arguments, take_digests

#: Heads work on this many image batches at once: on few rows they would mostly wait for memory.
BATCHES_AT_ONCE = 4
# Raised when the same settings give another result: finished trainings in the cache are not used then.
_TRAINING_VERSION = 3
# Arguments that are handed on to the heads; training depends on the first ones alone.
_TRAINING_ARGUMENTS = ("joint", "hidden_ratio", "hidden_max", "blocks", "timesteps", "seed")
_SCORING_ARGUMENTS = ("start_times", "draws", "stride", "neighbors", "fusion", "backend")


class Detector:
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
        a callable from an RGB picture to a (3, H, W) tensor if files are to be read).
    weights, pretrained, model_args, transform
        See :func:`featdiff.backbones.load_backbone`.
    layers : "auto", or names or indices of layers
        See :func:`featdiff.features.resolve_layers`.
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
    head : "fused", "layerwise", "mse", "mfsim" or "lr"
        Which score becomes ``ood_score``; all but ``fused`` are diffusion alone, see
        :meth:`featdiff.detectors.heads.DiffusionHeads.forward`, and keep no bank.
    fusion : "mean", "max", "fisher", "tippett" or "covariance"
        How ``fused`` joins its heads; see :class:`featdiff.fusion.Fusion`.
    neighbors : int
        Nearest in-domain vectors that count; 0 does without them.
    bank_size, coreset
        The most in-domain vectors kept for that, and how they are chosen; see :func:`featdiff.neighbors.coreset`.
    backend : str
        How neighbours are searched; see :func:`featdiff.neighbors.make_index`.
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
        self.arguments: dict[str, Any] = {name: value for name, value in locals().items() if name != "self"}
        check_arguments(self.arguments, HEADS)
        self.recipe = make_recipe(recipe)
        self.head, self.fpr, self.seed = head, fpr, seed
        self.calibration, self.validation = calibration, validation
        self.image_batch, self.workers, self.max_pixels = image_batch, workers, max_pixels
        self.cache = Path(cache) if cache else default_cache()
        self.device = resolve_device(device)

    # ---- fit ----

    def fit(self, images: object, progress: Progress | None = None) -> Detector:
        """Learn what is in-domain from ordinary images; no labels, no OOD images.

        Parameters
        ----------
        images : as for :func:`featdiff.sources.list_images`, or a DataLoader of preprocessed batches
            Files that cannot be read are skipped and listed in ``unreadable_``; images of the same content count once.
        progress : callable (stage, done, total), optional

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
        self.extractor_ = self._extractor()
        found, kept = self._extract(images, progress)
        unique = list(dict.fromkeys(found.digests))
        self.n_images_, self.n_duplicates_ = len(unique), len(found.digests) - len(unique)
        table, rows = kept.table(unique), self._split(len(unique))
        # features -> noise -> denoise -> residual -> fuse
        self.heads_ = self._new_heads(min(self.arguments["bank_size"], len(rows.training)))
        checkpoint = kept.folder / f"training-{self._training_key(unique)}.pt"
        trained = train_denoiser(self.heads_, table, rows, self.recipe, self.seed, checkpoint, progress)
        self.validation_loss_, self.training_seconds_ = trained.best_loss, trained.seconds
        size, method = self.arguments["bank_size"], self.arguments["coreset"]
        bank = choose_bank(self.heads_, table, rows.training, size, method, self.seed)
        self.heads_.fill_banks(table[bank])
        self.bank_digests_ = as_digests(unique, bank)
        self.heads_.fit_statistics(table[rows.validation])
        # -> calibrate
        chunks = np.array_split(rows.calibration, len(rows.calibration) // 1024 + 1)
        self.calibration_ = np.sort(np.concatenate([self.score_features(table[part]) for part in chunks]))
        return self

    def _extractor(self) -> FeatureExtractor:
        given, layers, transform = (self.arguments[name] for name in ("backbone", "layers", "transform"))
        if isinstance(given, nn.Module):
            return FeatureExtractor(given, layers, self.device, transform=transform)
        weights, pretrained, model_args = (self.arguments[name] for name in ("weights", "pretrained", "model_args"))
        loaded = load_backbone(given, weights, pretrained, model_args, transform)
        return FeatureExtractor(loaded, layers, self.device)

    def _new_heads(self, bank_rows: int) -> FusedHeads:
        arguments = {name: self.arguments[name] for name in (*_TRAINING_ARGUMENTS, *_SCORING_ARGUMENTS)}
        if self.head != "fused":
            arguments["neighbors"] = 0  # what the score does not look at costs nothing
        return FusedHeads(self.extractor_.columns, bank_rows=bank_rows, **arguments).to(self.device)

    def _extract(self, images: object, progress: Progress | None) -> tuple[Extraction, FeatureStore]:
        kept = self.feature_store()
        batches, total = self.batches(images, kept)
        found = extract(batches, self.extractor_, kept, total, progress)
        self.unreadable_ = found.unreadable
        if not found.paths:
            path, reason = found.unreadable[0] if found.unreadable else ("the images", "none were given")
            raise UsageError(f"none of the images could be read; the first: {path}: {reason}")
        return found, kept

    def feature_store(self, variant: str = "") -> FeatureStore:
        """Where features of this backbone are kept; ``variant`` names another preparation of the images."""
        return FeatureStore(self.cache / "features" / self.extractor_.key(variant), self.extractor_.width)

    def batches(
        self, images: object, known: FeatureStore | tuple[()] = (), transform: Transform | None = None
    ) -> tuple[Iterator[Batch], int]:
        """Decoded batches of whatever the user gave, and how many images there are (0 if unknown).

        Images in ``known`` are not decoded; ``transform`` stands in for the extractor's.
        """
        if is_loader(images):
            return batches_from_loader(images, known), 0
        refs = list_images(images)
        loaded = iter_loaded(
            refs,
            transform or self.extractor_.transform,
            self.workers,
            self.max_pixels,
            known,
            ahead=2 * self.image_batch,
        )
        return iter_batches(loaded, self.image_batch), len(refs)

    def _split(self, n: int) -> Split:
        """Rows for training, validation and calibration. Copies of one image are one row: they must not sit on
        both sides."""
        rows = split(n, self.calibration, self.validation, self.seed)
        check_fpr(self.fpr, len(rows.calibration))
        return rows

    def _training_key(self, digests: list[bytes]) -> str:
        """A hash of all that decides a training run: images, settings and seed."""
        settings = [self.arguments[name] for name in _TRAINING_ARGUMENTS]
        facts = repr([_TRAINING_VERSION, self.recipe, settings, self.calibration, self.validation])
        return hashlib.sha256(facts.encode() + b"".join(digests)).hexdigest()[:16]

    # ---- score ----

    def score(self, images: object, fpr: float | None = None, progress: Progress | None = None) -> Scores:
        """Scores of all images at once; :meth:`iter_scores` gives the same as a stream."""
        return Scores.concatenate(self.iter_scores(images, fpr, progress))

    def iter_scores(
        self, images: object, fpr: float | None = None, progress: Progress | None = None
    ) -> Iterator[Scores]:
        """Score images part by part, in their order; memory does not grow with their number.

        The request is checked at once, images are read as the iterator is used.

        Parameters
        ----------
        images : as for :meth:`fit`
            An image that cannot be read becomes a row with a status and a reason.
        fpr : float, optional
            False-alarm rate; default: the one given at fit.

        Raises
        ------
        NotFittedError
        UsageError
            Nothing to score, or an ``fpr`` that the calibration images cannot support.
        """
        self.check_fitted()
        fpr = self.fpr if fpr is None else fpr
        check_fpr(fpr, len(self.calibration_))
        at_once = 1 if is_loader(images) else BATCHES_AT_ONCE * self.image_batch  # a loader may be a live stream
        return self._stream(*self.batches(images), at_once, fpr, progress)

    def _stream(
        self, batches: Iterator[Batch], total: int, at_once: int, fpr: float, progress: Progress | None
    ) -> Iterator[Scores]:
        paths: list[str] = []
        vectors: dict[int, np.ndarray] = {}
        failed: dict[int, str] = {}
        done = 0
        try:
            for batch in batches:
                found, bad = featurise(batch, self.extractor_)
                vectors |= {len(paths) + i: vector for i, vector in found.items()}
                failed |= {len(paths) + i: reason for i, reason in bad.items()}
                paths += [item.ref.path for item in batch.loaded]
                done += len(batch.loaded)
                if progress:
                    progress("scoring", done, max(total, done))
                if len(paths) >= at_once:
                    yield self._verdict(paths, vectors, failed, fpr)
                    paths, vectors, failed = [], {}, {}
        except GeneratorExit:  # nobody listens any more
            raise
        except BaseException:  # Ctrl-C, too: what went through the backbone is not lost
            if paths:
                yield self._verdict(paths, vectors, failed, fpr)
            raise
        if paths:
            yield self._verdict(paths, vectors, failed, fpr)

    def score_features(self, features: Tensor) -> np.ndarray:
        """Pooled features (B, D) of ``extractor_`` -> ood_score (B,), higher = more OOD."""
        self.check_fitted("bank_digests_")
        return self.heads_(features, (self.head,))[0][self.head].double().cpu().numpy()

    def all_heads(self, features: Tensor) -> dict[str, np.ndarray]:
        """Pooled features (B, D) -> scores (B,) by name: ``featdiff`` (ood_score), other heads, ``layer_<name>``."""
        self.check_fitted("bank_digests_")
        scores, layers = self.heads_(features, HEADS if self.head == "fused" else DIFFUSION)
        scores = {"featdiff": scores.pop(self.head)} | scores
        scores |= {f"layer_{name}": layers[:, i] for i, name in enumerate(self.heads_.layers)}
        return {name: values.double().cpu().numpy() for name, values in scores.items()}

    def _verdict(self, paths: list[str], vectors: dict[int, np.ndarray], failed: dict[int, str], fpr: float) -> Scores:
        """Rows in the order of ``paths``; those without a vector are unreadable."""
        n, good = len(paths), sorted(vectors)
        score, layers = np.full(n, np.nan), np.full((n, len(self.heads_.layers)), np.nan)
        if good:
            heads, by_layer = self.heads_(torch.from_numpy(np.stack([vectors[i] for i in good])), (self.head,))
            score[good], layers[good] = heads[self.head].cpu(), by_layer.cpu()
        p = p_values(score, self.calibration_)
        status = [UNREADABLE if i in failed else OK for i in range(n)]
        reason = [failed.get(i, "") for i in range(n)]
        columns = dict(zip(self.heads_.layers, layers.T, strict=True))
        return Scores(paths, status, reason, score, p, flagged(p, fpr), columns)

    def check_fitted(self, needed: str = "calibration_") -> None:
        """Raise ``NotFittedError`` unless there is something to score with."""
        if not hasattr(self, needed):
            raise NotFittedError("this detector is not fitted: call fit(images), or Detector.from_pretrained(folder)")

    # ---- save and load ----

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, whole or not at all.

        Raises
        ------
        NotFittedError, UsageError
            Nothing to save; the folder holds something else.
        ModelError
            The disk is full. Features and training stay in the cache: fitting again ends at once.
        """
        self.check_fitted()
        extra = {"calibration": self.calibration_, "bank_digests": self.bank_digests_}
        tensors = self.heads_.state_dict() | {name: torch.from_numpy(values) for name, values in extra.items()}
        save(folder, self.config(), tensors)

    def config(self) -> dict[str, Any]:
        """All that ``config.json`` says besides the format."""
        from importlib.metadata import version

        self.check_fitted()
        backbone = self.extractor_.backbone
        arguments = {name: value for name, value in self.arguments.items() if name not in RUNTIME}
        arguments["backbone"] = backbone.tag
        arguments["transform"] = {} if backbone.source == "module" else backbone.data_config
        arguments["layers"] = self.extractor_.layers
        arguments["weights"] = str(Path(arguments["weights"]).absolute()) if arguments["weights"] else None
        arguments["recipe"] = asdict(self.recipe)
        return {
            "featdiff_version": version("featdiff"),
            "backbone": {"tag": backbone.tag, "source": backbone.source, "fingerprint": backbone.fingerprint},
            "layers": dict(zip(self.extractor_.layers, self.extractor_.widths, strict=True)),
            "images": {
                "different": self.n_images_,
                "calibration": len(self.calibration_),
                "bank": len(self.bank_digests_),
            },
            "validation_loss": self.validation_loss_,
            "training_seconds": self.training_seconds_,
            "arguments": arguments,
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
        try:
            detector = cls(**arguments)
            detector.extractor_ = detector._extractor()
        except (TypeError, UsageError) as error:
            raise ModelError(f"the model at {folder} is damaged or cannot be used here: {error}") from None
        check_backbone(detector.extractor_, config, folder)
        detector.bank_digests_ = take_digests(tensors, config["images"]["bank"], folder)
        detector.heads_ = detector._new_heads(len(detector.bank_digests_))
        detector.calibration_ = load_tensors(detector.heads_, tensors, config["images"]["calibration"], folder)
        detector.n_images_, detector.validation_loss_ = config["images"]["different"], config["validation_loss"]
        detector.training_seconds_ = config["training_seconds"]
        return detector
