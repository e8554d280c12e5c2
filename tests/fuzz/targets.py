"""All fuzz targets, by name."""

from __future__ import annotations

from . import archives, configs, file_names, images, models, vectors
from .harness import Target

TARGETS: dict[str, Target] = {
    module.TARGET.name: module.TARGET for module in (images, archives, models, vectors, configs, file_names)
}
