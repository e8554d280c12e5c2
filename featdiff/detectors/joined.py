"""Several encoders -> one verdict: a detector for each, on the same split, whose scores are joined and calibrated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..data.groups import Groups, check_groups
from ..data.loaders import is_loader
from ..data.references import list_images
from ..data.splits import Plan, Split
from ..exceptions import ModelError
from ..features.engines import TORCH
from ..features.extraction import Extraction
from ..features.joined import Columns, JoinedExtractor
from ..features.store import Features
from ..files.cache import cache_errors
from ..files.model_folder import check_tensors, load, locate
from ..runtime.gradients import gradients
from ..runtime.progress import Progress, part_of, shown
from ..verdicts.calibration import Calibration
from .bank_images import BankImages
from .constructors import takes
from .feature import Detector
from .grouping import Grouping
from .joined_scoring import JoinedScoring
from .joined_settings import JoinedSettings
from .joining import join
from .kept_images import KeptImages
from .saved import as_calibration, building, check_config, check_runtime, take_facts
from .soundness import check_spread

# The tensor of a saved model that holds mean and standard deviation of the joined score.
_SCALE = "join_scale"
# Of tensors with such names, those that are the same for all members are saved with the first.
_SHARED = ("bank_", "kept_")


class JoinedDetector(JoinedScoring):
    """Detector that looks through several encoders of similar strength.

    Each encoder has features, denoisers and neighbours of its own: a :class:`featdiff.Detector`, fitted on the same
    images and the same split. Their scores are joined, and the joined score is calibrated on its own, by the held-out
    images of all. Each picture is read and decoded once. A weak encoder beside a strong one does harm.

    Parameters
    ----------
    backbone : sequence of str
        Two encoders or more, each as for :class:`featdiff.Detector`.
    weights : sequence of path or None, optional
        A weights file for each, in that order; None: as for :class:`featdiff.Detector`.
    join : {"z-sum", "min-p"}, default "z-sum"
        ``z-sum``: the sum of the encoders' scores in in-domain standard deviations, over the root of their number.
        ``min-p``: the smallest of their p-values, calibrated as any other score; see
        :func:`featdiff.detectors.joining.min_p`.
    local
        Several encoders have no local score; True is refused.
    engine
        PyTorch alone.
    coreset
        The encoders share one bank, chosen by chance.
    transform, model_args, input_size
        Are each encoder's own.
    **others
        As for :class:`featdiff.Detector`; they hold for each encoder.

    Attributes
    ----------
    encoders : list of str
        A name for each encoder; results have a p-value of each, and layers are called ``encoder/layer``.
    members_ : list of Detector
        The detector of each.

    Raises
    ------
    UsageError
        An unknown argument, one outside its range, or one that several encoders cannot have.

    Examples
    --------
    >>> import numpy as np
    >>> photos = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)  # yours go here
    >>> quick = {"pretrained": False, "recipe": {"epochs": 1, "min_steps": 5}, "fpr": 0.2, "device": "cpu"}
    >>> detector = JoinedDetector(["test_resnet", "test_efficientnet"], **quick).fit(photos)
    >>> detector.encoders
    ['test_resnet', 'test_efficientnet']
    >>> scores = detector.score(photos[:3])
    >>> sorted(scores.p_values)
    ['test_efficientnet', 'test_resnet']
    """

    mode = "joined"
    batches_at_once = 4

    @takes(JoinedSettings)
    def __init__(self, settings: JoinedSettings) -> None:
        super().__init__(settings)

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
        images, progress, split
            As for :meth:`featdiff.Detector.fit`; but no batches that are preprocessed already.
        groups : optional
            As there. Near-copies are those that the first encoder finds.

        Returns
        -------
        JoinedDetector
            Itself.

        Raises
        ------
        UsageError, WeightsError, FeatdiffError
            As for :meth:`featdiff.Detector.fit`.
        """
        with shown(progress) as report, gradients():
            return self._fit(images, report, split, groups)

    def _fit(self, images: object, progress: Progress | None, split: Split | None, groups: Groups | None) -> Self:
        check_groups(groups)
        if not is_loader(images):
            images = list_images(images)
        vars(self).pop("calibration_", None)  # until a fit is through, there is nothing to score with
        self.members_ = [Detector.from_settings(settings) for settings in self.settings.members()]
        for member in self.members_:
            member.extractor_ = member._make_extractor(None)
            member.precision_ = member.extractor_.precision
            member.engine_ = TORCH
        self.extractor_ = JoinedExtractor([member.extractor_ for member in self.members_])
        extraction, store = self._extract(images, progress)
        digests, features, plan = self._divide(extraction, store, split, groups)

        own = []
        numbers = self.grouping_.numbers if split is None else None
        for i, member in enumerate(self.members_):
            folder = store.folder / f"encoder-{i + 1}"
            with cache_errors(folder):
                folder.mkdir(exist_ok=True)
            columns = Columns(features, self.extractor_.columns[i])
            part = part_of(progress, i, len(self.members_))
            own.append(self._fit_member(member, columns, digests, plan, numbers, folder, part))
        first = self.members_[0]
        shown_images = BankImages.of(images, extraction, first.bank_digests_, self.settings, progress)
        for member in self.members_:
            member.bank_images_ = shown_images

        self.validation_loss_ = float(np.mean([member.validation_loss_ for member in self.members_]))
        self.training_seconds_ = sum(member.training_seconds_ for member in self.members_)
        self._calibrate(np.stack(own, axis=1), plan.groups)
        return self

    def _fit_member(
        self,
        member: Detector,
        features: Features,
        digests: list[bytes],
        plan: Plan,
        numbers: np.ndarray | None,
        folder: Path,
        progress: Progress | None,
    ) -> np.ndarray:
        """Fit the detector of one encoder on its columns; its scores (n,) of the images that calibrate."""
        fitted = member.fit_rows(features, digests, plan, folder, progress)
        kept = KeptImages.of_split(digests, features, plan.final, numbers, member.heads_.layout)
        member.kept_ = kept.without_rows()
        member.calibration_ = Calibration(fitted.calibration, plan.groups, fitted.layers)
        member.n_images_ = self.n_images_
        member.n_duplicates_ = self.n_duplicates_
        return fitted.calibration

    def _group(self, extraction: Extraction, features: Features, groups: Groups | None) -> Grouping:
        return self.members_[0]._group(extraction, Columns(features, self.extractor_.columns[0]), groups)

    def _calibrate(self, z: np.ndarray, groups: int) -> None:
        """Set the scale of the joined score, and its calibration, from the scores of held-out images (n, encoders)."""
        joined = join(self.settings.join, z, self._calibrations, calibrates=True)
        check_spread(joined)
        self._location = float(joined.mean())
        self._scale = float(joined.std())
        self.calibration_ = Calibration(self._scaled(joined), groups, self._calibrations_of_layers())

    def _calibrations_of_layers(self) -> dict[str, np.ndarray]:
        return {
            f"{name}/{layer}": calibration.scores
            for name, member in self._named()
            for layer, calibration in member.calibration_.layers.items()
        }

    # ---- save and load ----

    def tensors(self) -> dict[str, Tensor]:
        """Those of each encoder, what all share with the first, and the scale and calibration of the joined score."""
        tensors = super().tensors()
        tensors.pop("calibration_of_layers", None)  # the members have them
        tensors[_SCALE] = torch.tensor([self._location, self._scale], dtype=torch.float64)
        first: dict[str, Tensor] = {}
        for i, member in enumerate(self.members_):
            own = member.tensors()
            tensors |= {f"{i}.{name}": value for name, value in own.items() if not _is_same(name, value, first)}
            first = first or {name: value for name, value in own.items() if name.startswith(_SHARED)}
        return tensors

    def config(self) -> dict[str, Any]:
        """All that ``config.json`` says besides the format; ``encoders`` holds that of each encoder's detector."""
        config = super().config()
        members = [member.config() for member in self.members_]
        config["settings"]["backbone"] = [member["settings"]["backbone"] for member in members]
        config["images"]["bank"] = members[0]["images"]["bank"]
        config["encoders"] = members
        return config

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        weights: Sequence[str | os.PathLike[str] | None] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        **runtime: Any,
    ) -> JoinedDetector:
        """Load a saved detector, strictly; parameters and errors are those of
        :meth:`featdiff.Detector.from_pretrained`, with ``weights`` for each encoder.
        """
        folder = locate(name, local_files_only, revision, token)
        config, tensors = load(folder)
        return cls.from_loaded(folder, config, tensors, weights=weights, **runtime)

    @classmethod
    def from_loaded(
        cls,
        folder: Path,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        *,
        weights: Sequence[str | os.PathLike[str] | None] | None = None,
        **runtime: Any,
    ) -> JoinedDetector:
        """Build what was saved in ``folder`` from its config and tensors; see :meth:`from_pretrained`."""
        chosen = check_runtime(runtime)
        check_config(config, folder, cls.mode)
        values = {**config["settings"], **chosen} | ({} if weights is None else {"weights": weights})
        with building(folder):
            detector = cls.from_settings(JoinedSettings.of(values))
        if len(config["encoders"]) != len(detector.settings.backbone):
            raise ModelError(f"the model at {folder} is damaged: config.json names other encoders than it has")

        files = detector.settings.weights if weights is not None else None
        shared = {name: value for name, value in tensors.items() if name.removeprefix("0.").startswith(_SHARED)}
        detector.members_ = []
        for i, saved in enumerate(config["encoders"]):
            own = {name.removeprefix("0."): value for name, value in shared.items()}
            own |= {n.removeprefix(f"{i}."): tensors.pop(n) for n in list(tensors) if n.startswith(f"{i}.")}
            given: dict[str, Any] = {"weights": files[i] if files else None, **runtime}
            detector.members_.append(Detector.from_loaded(folder, saved, own, **given))

        detector._take(config, tensors, folder)
        return detector

    def _take(self, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
        """Take what is left of a saved model when the members are built: scale and calibration of the joined score."""
        self.extractor_ = JoinedExtractor([member.extractor_ for member in self.members_])
        scores = tensors.pop("calibration", None)
        check_tensors(tensors, {_SCALE: torch.zeros(2, dtype=torch.float64)}, folder)
        self._location, self._scale = tensors[_SCALE].tolist()
        if not self._scale > 0:
            raise ModelError(f"the model at {folder} is damaged: the scale of its score is not positive")

        same = {(member.n_images_, len(member.calibration_), member.calibration_.groups) for member in self.members_}
        images = config["images"]
        if same != {(images["different"], images["calibration"], images["calibration_groups"])}:
            raise ModelError(f"the model at {folder} is damaged: its encoders were not fitted on the same images")
        self.calibration_ = as_calibration(scores, images, folder, self._calibrations_of_layers())
        take_facts(self, config)


def _is_same(name: str, value: Tensor, others: dict[str, Tensor]) -> bool:
    """Whether another member has an equal tensor of this name."""
    return name in others and torch.equal(value, others[name])
