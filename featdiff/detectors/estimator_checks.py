"""Parameters and rows of :class:`featdiff.FeatureDiffusion`, checked before any work."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from ..exceptions import TooFewRows, UsageError, first_line
from ..scores.coreset import CORESETS
from ..verdicts.calibration import check_fpr, is_supported, offered
from .checks import check_choice, check_neighbors, check_share, check_times, check_whole, is_number
from .estimator_scores import TIMESTEPS
from .grouping import needed_in_all


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse parameters outside their range (``UsageError``); layers are checked once the columns are known."""
    for name in ("hidden_max", "blocks", "draws", "bank_size"):
        check_whole(name, settings[name])
    if settings["calibration"] != "auto":
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


def row_digest(row: np.ndarray) -> bytes:
    """A hash of a row's numbers, 16 bytes."""
    positive_zeros = row + 0  # -0 + 0 is 0
    return hashlib.blake2b(positive_zeros.tobytes(), digest_size=16).digest()


def first_of_each(digests: Sequence[bytes]) -> np.ndarray:
    """Indices of the different rows: the first of each (``UsageError`` if they are fewer than three)."""
    first_index: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        first_index.setdefault(digest, i)

    n = len(first_index)
    if n < 3:
        raise UsageError(f"too few different rows, {n}: one each is needed to train, validate and calibrate")
    return np.fromiter(first_index.values(), dtype=np.int64)


def supported_fpr(fpr: float, n: int, share: float | str) -> float:
    """``fpr``, or with a warning the smallest rate that ``n`` groups of rows support; ``share``: how many calibrate."""
    if is_supported(fpr, n):
        return fpr
    needed = needed_in_all(fpr, share)
    message = f"fpr {fpr:g} needs about {needed:,} different rows or groups: fit on more, or ask for {offered(n)}"
    warnings.warn(TooFewRows(message, argument="fpr"), stacklevel=4)  # the line that called fit
    return 1 / (n + 1)
