"""The features of a manifest's images, in blocks, here or on a Ray cluster; the feature store says what is done.

All actors write into one store, in a folder that every machine has. Their answers are what came of a block, in words
and numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from ..detectors.config import FeatureSettings
from ..detectors.filling import Filled, Filling
from .manifest import Manifest
from .ray_pool import Cluster, Task, Worker, answers

# Images from whose beginning those are taken on which engines are compared.
_FIRST = 100


def filling(manifest: Manifest, arguments: Mapping[str, Any]) -> Filling:
    """What computes the features of a manifest's images, with the settings of a detector.

    Errors are those of :class:`featdiff.detectors.filling.Filling`.
    """
    return Filling(FeatureSettings.of(arguments), manifest.block(0, _FIRST).refs(), manifest.rows)


def fill_on(cluster: Cluster, task: Task, blocks: Sequence[int]) -> Iterator[Filled]:
    """Compute the features of blocks on a cluster.

    Parameters
    ----------
    cluster : Cluster
    task : Task
        Its ``arguments`` are :class:`featdiff.detectors.config.FeatureSettings`; ``cache`` is a path that every
        machine has.
    blocks : sequence of int

    Yields
    ------
    Filled
        Of each block, in the order in which they are done.

    Raises
    ------
    UsageError, FeatdiffError
        As for :func:`featdiff.serving.ray_pool.answers`.
    """
    for answer in answers(cluster, Filler, task, blocks):
        yield Filled(**json.loads(answer["filled"]))


class Filler(Worker):
    """An actor that computes features: it answers with what came of a block."""

    nothing: ClassVar[Mapping[str, Any]] = {"filled": ""}
    task: Task

    def open(self) -> None:
        """Load the backbone, and look at what the store has."""
        self._manifest = Manifest(self.task.manifest)
        self._filling = filling(self._manifest, self.task.arguments)

    def do(self, number: int) -> dict[str, str]:
        """Compute the features of a block."""
        images = self._manifest.block(number, self.task.block).refs()
        return {"filled": json.dumps(asdict(self._filling.add(images)))}
