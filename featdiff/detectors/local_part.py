"""The local part of a detector: its score of places, beside the global one, with calibrations of both."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import samples
from ..exceptions import ModelError, UsageError
from ..features.extractor import FeatureExtractor
from ..features.store import Features
from ..files.model_folder import check_tensors
from ..scores.fused import FUSED
from ..scores.joint import NAMES, Joint
from ..scores.local import Local
from ..verdicts.calibration import Calibration
from .checks import is_whole
from .config import FeatureSettings
from .local_fit import FEWEST, FittedLocal
from .saved import as_calibration

# What the tensors of a saved model are called.
_JOINT = "joint."
_CALIBRATION = "calibration_"
#: The calibration by the strangest place of each image.
HEAT = "heat"
#: Below this variety, as a share of that of the built-in sample set, ``local="auto"`` counts images as alike.
ALIKE = 0.5
# Images that the variety is taken of; of the sample set each sixth, 65 in all.
_SAMPLE = 1000
_STEP = 6
# Of them, so many go through the network at once.
_BATCH = 32
# The colour scale of heat maps ends so many times as far above the median of those as their largest.
_ABOVE = 2.0


@dataclass(frozen=True)
class LocalPart:
    """What a detector has besides its heads, where it looks at places as well.

    Parameters
    ----------
    joint : Joint
        The local score, and how it is joined with the global one.
    calibrations : dict of str to Calibration
        ``global`` and ``local``, of these scores; ``heat``, of the strangest place of each image.
    """

    joint: Joint
    calibrations: Mapping[str, Calibration]
    _copies: dict[torch.device, Local] = field(default_factory=dict)

    @classmethod
    def of(cls, fitted: FittedLocal, global_scores: np.ndarray, groups: int) -> tuple[LocalPart, np.ndarray]:
        """The part, and the joint scores (n,) of the calibration images.

        Parameters
        ----------
        fitted : FittedLocal
        global_scores : ndarray of shape (n,)
            Of the calibration images, in the same order.
        groups : int
            Independent groups among them.
        """
        joint = Joint(fitted.local).to(fitted.local.mean.device)
        joint.fit(global_scores, fitted.scores)
        place = joint.scale.device
        both = [torch.from_numpy(values).float().to(place) for values in (global_scores, fitted.scores)]
        scores, parts = joint(*both)

        values = dict(zip(NAMES, parts.T.double().cpu().numpy(), strict=True)) | {HEAT: fitted.heat}
        calibrations = {name: Calibration(numbers, groups) for name, numbers in values.items()}
        return cls(joint, calibrations), scores.double().cpu().numpy()

    def attach(self, extractor: FeatureExtractor) -> None:
        """Make the extractor's rows end with the local score."""
        extractor.attach(self.look, self.digest())

    def look(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps (B, C, h, w) on any device -> the local score (B,) and heat (B, h, w) there.

        A classifier may have replicas on several devices, which run at the same time.
        """
        local = self.joint.local
        device = maps[0].device
        if local.mean.device == device:
            return local(maps)
        if device not in self._copies:
            self._copies[device] = copy.deepcopy(local).to(device)
        return self._copies[device](maps)

    def digest(self) -> str:
        """A short hash of the local score's tensors."""
        found = hashlib.sha256()
        for tensor in self.joint.local.state_dict().values():
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def p_values(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Standardised scores of the parts (B,) by name -> their conformal p-values (B,)."""
        return {name: self.calibrations[name].p_values(values) for name, values in parts.items()}

    def scale_of_heat(self, fpr: float) -> tuple[float, float]:
        """Where heat is strange (``fpr`` of the normal images have such a place), and where its colour scale ends."""
        heat = self.calibrations[HEAT]
        middle = float(np.median(heat.scores))
        return heat.threshold(fpr), middle + _ABOVE * max(float(heat.scores[-1]) - middle, 1e-3)

    def to(self, device: torch.device) -> LocalPart:
        """The same part, on another device."""
        self.joint.to(device)
        return self

    @property
    def nbytes(self) -> int:
        """Size in a saved model."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    # ---- save and load ----

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored."""
        tensors = {_JOINT + name: values for name, values in self.joint.state_dict().items()}
        for name, calibration in self.calibrations.items():
            tensors[_CALIBRATION + name] = torch.from_numpy(calibration.scores.copy())
        return tensors

    @classmethod
    def take(
        cls, tensors: dict[str, Tensor], channels: Sequence[int], images: Mapping[str, int], seed: int, folder: Path
    ) -> LocalPart:
        """Remove the part from a saved model's tensors, and check it (``ModelError``)."""
        joint = Joint(Local(channels, seed))
        own = {name.removeprefix(_JOINT): tensors.pop(name) for name in list(tensors) if name.startswith(_JOINT)}
        check_tensors(own, joint.state_dict(), folder)
        joint.load_state_dict(own)

        calibrations = {
            name: as_calibration(tensors.pop(_CALIBRATION + name, None), images, folder) for name in (*NAMES, HEAT)
        }
        return cls(joint, calibrations)


def saved_maps(config: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """The maps that a saved detector looks at, by module, and their channels; empty for one without a local score."""
    maps: Any = config.get("local", "")
    if maps is None:
        return {}
    sound = isinstance(maps, dict) and maps and all(is_whole(count) and count > 0 for count in maps.values())
    if not sound:
        raise ModelError(f"the model at {folder} is damaged: config.json: local is not what it should be")
    return dict(maps)


def decide(
    settings: FeatureSettings, rereadable: bool, features: Features, extractor: FeatureExtractor
) -> tuple[bool, str]:
    """Whether a detector gets a local score, and why, in a few words.

    Parameters
    ----------
    settings : FeatureSettings
    rereadable : bool
        Whether the images can be read again.
    features : Features
        Rows of the normal images.
    extractor : FeatureExtractor

    Raises
    ------
    UsageError
        It is asked for, and cannot be had.
    """
    asked = settings.local
    if asked is False:
        return False, "local score: off, as asked"
    why = "as asked"
    reason = _obstacle(settings, rereadable, features)
    if not reason and asked is not True:
        found = variety(features, extractor)
        measured = f"variety {found:.2f} of that of the built-in sample set"
        if found >= ALIKE:
            return False, f"local score: off, the images show different things ({measured}, from {ALIKE:g} on)"
        why = f"the images are alike ({measured}, below {ALIKE:g})"

    if not reason:  # only now, for maps that nobody looks at would be read in every pass
        try:
            extractor.keep_maps()
        except UsageError as error:
            reason = str(error)
    if reason and asked is True:
        raise UsageError(f"no local score: {reason}", argument="local")
    return (False, f"local score: off, {reason}") if reason else (True, f"local score: on, {why}")


def _obstacle(settings: FeatureSettings, rereadable: bool, features: Features) -> str:
    """Why these settings and images allow no local score; empty if they do."""
    if not rereadable:
        return "it needs images that can be read again (files, pictures or arrays, no loader or generator)"
    if settings.head != FUSED:
        return f"it is joined with head='{FUSED}' only"
    if len(features) < FEWEST:
        return f"it needs at least {FEWEST} different images"
    return ""


def variety(features: Features, extractor: FeatureExtractor) -> float:
    """How different images are, as a share of what the pictures of the built-in sample set are to the same network.

    Measured as 1 - the mean cosine between two of them in the deepest stage. To the default backbone it is 0.28 for
    tiles of one product, 0.6 and more for most photographs of one class, and 0.8 to 1.5 for sets of several classes.

    Parameters
    ----------
    features : Features
        Rows (N, D) of different images, N >= 2.
    extractor : FeatureExtractor
        That gave them.

    Returns
    -------
    float
        From 0 (all alike) on.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(features))[:_SAMPLE])
    pictures = list(samples.tiles()[0].values())[::_STEP]
    pixels = torch.stack([extractor.transform(picture) for picture in pictures])
    reference = torch.cat([extractor(part).cpu() for part in pixels.split(_BATCH)])

    columns = extractor.layout.last_stage.columns
    return _difference(features[chosen][:, columns]) / max(_difference(reference[:, columns]), 1e-6)


def _difference(rows: Tensor) -> float:
    """1 - the mean cosine of all pairs of rows (n, C), without those of a row with itself."""
    units = F.normalize(rows.float(), dim=1)
    count = len(units)
    return 1 - float((units.sum(0).square().sum() - count) / (count * (count - 1)))
