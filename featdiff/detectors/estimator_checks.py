"""Parameters and rows of :class:`featdiff.FeatureDiffusion`, checked before any work."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from ..exceptions import TooFewRows, UsageError, first_line
from ..scores.coreset import CORESETS
from ..verdicts.calibration import check_fpr, check_supported
from .checks import check_choice, check_neighbors, check_share, check_times, check_whole, is_number
from .estimator_scores import TIMESTEPS


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse parameters outside their range (``UsageError``); layers are checked once the columns are known."""
    for name in ("hidden_max", "blocks", "draws", "bank_size"):
        check_whole(name, settings[name])
    check_share("calibration", settings["calibration"], "rows")
    check_fpr(settings["fpr"])
    check_times("start_times", settings["start_times"], TIMESTEPS - 1)
    check_neighbors(settings["neighbors"], settings["bank_size"])
    check_choice("coreset", settings["coreset"], CORESETS)

    share = settings["contamination"]
    if share != "auto" and (not is_number(share) or not 0 < share <= 0.5):
        message = f"contamination must be 'auto' or a share above 0 and up to 0.5, not {share!r}"
        raise UsageError(message, argument="contamination")


def layers_from_json(layers: Any) -> Any:
    """Layers of ``config.json``, as they were given to the constructor."""
    if layers is None:
        return None
    if isinstance(layers, Mapping):
        return {name: slice(*ends) for name, ends in layers.items()}
    return [slice(*ends) for ends in layers]


def draw_seed(random_state: object) -> int:
    """One seed for a fit."""
    if random_state is None:  # scikit-learn would take NumPy's global generator
        return int(np.random.default_rng().integers(2**31))
    try:
        return int(check_random_state(random_state).randint(2**31 - 1))
    except ValueError as error:
        message = f"random_state is no seed: {first_line(error)}"
        raise UsageError(message, argument="random_state") from None


def without_copies(rows: np.ndarray) -> np.ndarray:
    """Indices of the different rows: the first of each."""
    first_index: dict[bytes, int] = {}
    for i, row in enumerate(rows):
        positive_zeros = row + 0  # -0 + 0 is 0
        digest = hashlib.blake2b(positive_zeros.tobytes(), digest_size=16).digest()
        first_index.setdefault(digest, i)

    n = len(first_index)
    if n < 3:
        raise UsageError(f"{n} different rows are too few: one each is needed to train, validate and calibrate")
    return np.fromiter(first_index.values(), dtype=np.int64)


def supported_fpr(fpr: float, n_calibration: int, share: float) -> float:
    """``fpr``, or with a warning the smallest rate that so many calibration rows, a ``share`` of all, support."""
    try:
        check_supported(fpr, n_calibration)
    except UsageError:
        smallest = 1 / (n_calibration + 1)
        needed = math.ceil((1 / fpr - 1) / share)
        rounded = math.ceil(1000 * smallest) / 1000
        message = f"fpr {fpr:g} needs about {needed} different rows: fit on more, or ask for {rounded:g}"
        warnings.warn(TooFewRows(message, argument="fpr"), stacklevel=3)
        return smallest
    return fpr
