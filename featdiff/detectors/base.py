"""What detectors of both modes share: images to rows of numbers, rows held out, streams of scores, verdicts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch, batches_from_loader, is_loader, iter_batches, iter_loaded
from ..data.decoding import Transform
from ..data.references import list_images
from ..data.splits import Split, split
from ..diffusion.training import Recipe
from ..exceptions import NotFittedError, UsageError
from ..features.extraction import Extraction, Extractor, extract, featurise
from ..features.store import FeatureStore, FeatureTable
from ..files.cache import default_cache
from ..files.model_folder import save
from ..runtime.devices import resolve_device
from ..runtime.progress import Progress
from ..verdicts.calibration import check_fpr, flagged, p_values
from ..verdicts.results import OK, UNREADABLE, Scores
from .checks import RUNTIME, make_recipe


class BaseDetector:
    """A detector is fitted on ordinary images and scores others.

    Its methods say how rows of ``extractor_`` become scores: :meth:`fit`, :meth:`score_features`, :meth:`layer_scores`,
    :meth:`all_heads`, :meth:`config` and :meth:`tensors`; the rest is here.

    Attributes
    ----------
    arguments : dict
        All arguments of the constructor.
    extractor_ : Extractor
        Decoded images -> rows.
    calibration_ : (n,)
        Sorted scores of held-out in-domain images.
    calibration_digests_ : list of bytes
        Which images these were; known where the detector was fitted, and not saved.
    validation_loss_, training_seconds_ : float
        What came of training, and how long it took over all runs.
    """

    #: Which mode a saved model names.
    mode = ""
    #: Image batches that are scored together, and rows that are scored at once when they are at hand.
    batches_at_once = 1
    rows_at_once = 1024
    # Folder of the cache for what ``extractor_`` gives, and the type of its numbers.
    _kept_in: tuple[str, type[np.number]] = ("features", np.float32)

    extractor_: Extractor
    calibration_: np.ndarray
    validation_loss_: float
    training_seconds_: float

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = dict(arguments)
        self.recipe: Recipe = make_recipe(arguments["recipe"])
        self.fpr, self.seed = arguments["fpr"], arguments["seed"]
        self.image_batch, self.workers = arguments["image_batch"], arguments["workers"]
        self.max_pixels = arguments["max_pixels"]
        self.cache = Path(arguments["cache"]) if arguments["cache"] else default_cache()
        self.device = resolve_device(arguments["device"])

    # ---- what a mode says ----

    @property
    def name(self) -> str:
        """What images are looked at with."""
        raise NotImplementedError

    @property
    def layers(self) -> list[str]:
        """Names of the layer scores."""
        return []

    def fit(self, images: object, progress: Progress | None = None) -> Self:
        """Learn what is in-domain from ordinary images."""
        raise NotImplementedError

    def score_features(self, features: Tensor) -> np.ndarray:
        """Rows of ``extractor_`` (B, D) -> ood_score (B,), higher = more OOD."""
        return self.layer_scores(features)[0]

    def layer_scores(self, features: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows (B, D) -> (ood_score (B,), a score for each layer (B, L))."""
        raise NotImplementedError

    def all_heads(self, features: Tensor) -> dict[str, np.ndarray]:
        """Rows (B, D) -> scores (B,) by name; ``featdiff`` is the ood_score."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """All that ``config.json`` says besides the format."""
        from importlib.metadata import version

        self.check_fitted()
        arguments = {name: value for name, value in self.arguments.items() if name not in RUNTIME}
        weights = arguments["weights"]
        arguments["weights"] = str(Path(weights).absolute()) if weights else None
        arguments["recipe"] = asdict(self.recipe)
        return {
            "featdiff_version": version("featdiff"),
            "mode": self.mode,
            "images": {"different": self.n_images_, "calibration": len(self.calibration_)},
            "validation_loss": self.validation_loss_,
            "training_seconds": self.training_seconds_,
            "arguments": arguments,
        }

    def _take_facts(self, config: Mapping[str, Any]) -> None:
        """Know again what :meth:`config` said of the training."""
        self.n_images_, self.validation_loss_ = config["images"]["different"], config["validation_loss"]
        self.training_seconds_ = config["training_seconds"]

    def tensors(self) -> dict[str, Tensor]:
        """All that ``model.safetensors`` holds."""
        return {"calibration": torch.from_numpy(self.calibration_)}

    # ---- images -> rows ----

    def feature_store(self, variant: str = "") -> FeatureStore:
        """Where rows of ``extractor_`` are kept; ``variant`` names another preparation of the images."""
        folder, dtype = self._kept_in
        return FeatureStore(self.cache / folder / self.extractor_.key(variant), self.extractor_.width, dtype)

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

    def _extract(self, images: object, progress: Progress | None) -> tuple[Extraction, FeatureStore]:
        kept = self.feature_store()
        batches, total = self.batches(images, kept)
        found = extract(batches, self.extractor_, kept, total, progress)
        self.unreadable_ = found.unreadable
        if not found.paths:
            path, reason = found.unreadable[0] if found.unreadable else ("the images", "none were given")
            raise UsageError(f"none of the images could be read; the first: {path}: {reason}")
        return found, kept

    def features(self, images: object, progress: Progress | None = None) -> tuple[list[str], FeatureTable]:
        """Paths of the images that can be read (N), and their rows (N, D), which stay in the feature store.

        Parameters
        ----------
        images : as for ``fit``
            Those that cannot be read are listed in ``unreadable_``.

        Raises
        ------
        NotFittedError, UsageError
            There is no extractor yet; none of the images can be read.
        """
        self.check_fitted()
        found, kept = self._extract(images, progress)
        return found.paths, kept.table(found.digests)

    def _held_out(
        self, digests: list[bytes], kept: FeatureStore, rows: Split | None = None
    ) -> tuple[list[bytes], FeatureTable, Split]:
        """Different contents, their rows, and which of them train, validate and calibrate: ``rows``, or random ones.

        Copies of one image are one row: they must not sit on both sides.
        """
        unique = list(dict.fromkeys(digests))
        self.n_images_, self.n_duplicates_ = len(unique), len(digests) - len(unique)
        if rows is None:
            rows = split(len(unique), self.arguments["calibration"], self.arguments["validation"], self.seed)
        else:
            rows.check(len(unique))
        check_fpr(self.fpr, len(rows.calibration))
        self.calibration_digests_ = [unique[i] for i in rows.calibration]
        return unique, kept.table(unique), rows

    def _calibrate(self, table: FeatureTable, rows: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """Keep the scores of held-out images, sorted; returns them in the order of ``rows``."""
        scores: list[np.ndarray] = []
        for start in range(0, len(rows), self.rows_at_once):
            part = rows[start : start + self.rows_at_once]
            scores.append(self.score_features(table[part]))
            if progress:
                progress("calibrating", start + len(part), len(rows))
        found = np.concatenate(scores)
        self.calibration_ = np.sort(found)
        return found

    def _training_key(self, digests: list[bytes], rows: Split, version: int, names: tuple[str, ...]) -> str:
        """A hash of all that decides a training run: its images, arguments of these names, and the recipe."""
        facts = repr([version, self.recipe, [self.arguments[name] for name in names]])
        seen = b"".join(digests[i] for part in (rows.training, rows.validation) for i in part)
        return hashlib.sha256(f"{facts} {len(rows.training)} ".encode() + seen).hexdigest()[:16]

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
        images : as for ``fit``
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
        at_once = 1 if is_loader(images) else self.batches_at_once * self.image_batch  # a loader may be a live stream
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
                if len(paths) >= at_once:  # taken out first: what is interrupted here is not begun again below
                    part, paths, vectors, failed = (paths, vectors, failed), [], {}, {}
                    yield self._verdict(*part, fpr)
        except GeneratorExit:  # nobody listens any more
            raise
        except BaseException:  # Ctrl-C, too: what went through the backbone is not lost
            if paths:
                yield self._verdict(paths, vectors, failed, fpr)
            raise
        if paths:
            yield self._verdict(paths, vectors, failed, fpr)

    def _verdict(self, paths: list[str], vectors: dict[int, np.ndarray], failed: dict[int, str], fpr: float) -> Scores:
        """Rows in the order of ``paths``; those without a vector are unreadable."""
        n, good = len(paths), sorted(vectors)
        score, layers = np.full(n, np.nan), np.full((n, len(self.layers)), np.nan)
        if good:
            score[good], layers[good] = self.layer_scores(torch.from_numpy(np.stack([vectors[i] for i in good])))
        p = p_values(score, self.calibration_)
        status = [UNREADABLE if i in failed else OK for i in range(n)]
        reason = [failed.get(i, "") for i in range(n)]
        columns = dict(zip(self.layers, layers.T, strict=True))
        return Scores(paths, status, reason, score, p, flagged(p, fpr), columns)

    def check_fitted(self, needed: str = "calibration_") -> None:
        """Raise ``NotFittedError`` unless there is something to score with."""
        if not hasattr(self, needed):
            kind = type(self).__name__
            raise NotFittedError(f"this detector is not fitted: call fit(images), or {kind}.from_pretrained(folder)")

    # ---- save ----

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
        save(folder, self.config(), self.tensors())
