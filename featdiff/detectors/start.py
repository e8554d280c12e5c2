"""The extractor of a saved detector, without its network where the backbone's forward pass is in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..features.extractor import FeatureExtractor
from ..features.prepared import FOLDER, PreparedExtractor, pass_key
from .config import FeatureSettings

# Where weights come from that do not change; a file or folder of the user's may have changed since.
_SOURCES = ("embedded", "hub", "random")
# Settings that decide a pass.
_SETTINGS = ("backbone", "pretrained", "model_args", "transform", "view", "size", "layers")


def load_extractor(
    settings: FeatureSettings, config: dict[str, Any], build: Callable[[], FeatureExtractor]
) -> FeatureExtractor:
    """The extractor that ``build`` would build, which is built only where that is needed.

    Parameters
    ----------
    settings : FeatureSettings
        Of the saved detector.
    config : dict
        All that its ``config.json`` says.
    build : callable
        Builds the extractor with its network.

    Returns
    -------
    FeatureExtractor
        Its fingerprint is still to be compared with the saved one.
    """
    facts = config["backbone"]
    if (
        settings.place.type != "cpu"
        or settings.weights is not None
        or settings.precision == "bf16"
        or facts["source"] not in _SOURCES
    ):
        return build()

    decisive = {name: getattr(settings, name) for name in _SETTINGS}
    key = pass_key({"backbone": facts, "settings": decisive, "local": config.get("local")})
    return PreparedExtractor(settings.cache_folder / FOLDER / key, facts["fingerprint"], build)
