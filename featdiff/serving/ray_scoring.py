"""The blocks of a run on a Ray cluster; the folder says what is done.

An actor opens the manifest, reads and decodes images, and puts the file of a block in place itself, so that whatever
dies, at most its blocks are done again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..verdicts.counts import Counts
from . import ray_pool
from .cluster import Run
from .manifest import Manifest
from .merging import counts_of, table_of
from .models import load_model, scoring
from .ray_pool import Cluster, Worker, answers


@dataclass(frozen=True, kw_only=True)
class Task(ray_pool.Task):
    """All that an actor needs to score blocks.

    Parameters
    ----------
    manifest, block, arguments, working_folder
        As for :class:`featdiff.serving.ray_pool.Task`.
    out : str
        A path that every machine has, or a URL.
    made_with : mapping
        As for :class:`featdiff.serving.cluster.Run`.
    model : str
        A folder that every machine has, or a repository on the hub.
    fpr : float
    exclude_known : bool
    """

    out: str
    made_with: Mapping[str, Any]
    model: str
    fpr: float
    exclude_known: bool = False

    def open(self) -> Run:
        """The run, as this machine sees it."""
        return Run(self.out, Manifest(self.manifest), self.made_with, self.block)


def score_on(cluster: Cluster, task: Task, blocks: Iterable[int]) -> Iterator[Counts]:
    """Score blocks on a cluster.

    Parameters
    ----------
    cluster : Cluster
    task : Task
        Of a run that has begun.
    blocks : iterable of int
        Those that have a file already are passed over.

    Yields
    ------
    Counts
        Of each block, in the order in which they are done.

    Raises
    ------
    UsageError, FeatdiffError
        As for :func:`featdiff.serving.ray_pool.answers`.
    """
    done = task.open().done()
    left = [number for number in blocks if number not in done]
    for answer in answers(cluster, Scorer, task, left):
        yield Counts(**{name: int(value) for name, value in answer.items()})


class Scorer(Worker):
    """An actor that scores: it answers with counts of rows."""

    nothing = asdict(Counts())
    task: Task

    def open(self) -> None:
        """Load the model."""
        detector = load_model(self.task.model, self.task.arguments)
        self._score = scoring(detector, self.task.fpr, self.task.exclude_known)
        self._run = self.task.open()

    def do(self, number: int) -> dict[str, int]:
        """Score one block, and count its rows."""
        run = self._run
        run.begin()  # a manifest that is another one on this machine is refused here

        block = run.read(number)
        if run.folder.has(run.name_of(block)):  # by an actor that died before it could answer
            return asdict(counts_of(table_of(run, block), self.task.fpr))
        return asdict(run.score(number, self._score))
