"""The blocks of a run on a Ray cluster: Ray places models and starts them again, the folder says what is done.

Only numbers of blocks and counts cross Ray's object store. An actor opens the manifest, reads and decodes images, and
puts the file of a block in place itself, so that whatever dies, at most its blocks are done again. What could not be
done is an answer, too, since an exception would end the work of all others.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..exceptions import FeatdiffError, UsageError, first_line, one_line
from ..verdicts.counts import Counts
from .cluster import Run, Score
from .manifest import Manifest
from .merging import counts_of, table_of
from .models import load_model, scoring

# Blocks that may fail, each on its own, before the whole work stops.
_MOST_FAILURES = 10
# Blocks that wait at an actor while it works; with one there would be no sign that the pool may grow.
_AT_ACTOR = 2
# How long a cluster may take to answer.
_SECONDS = 10.0


@dataclass(frozen=True)
class Task:
    """All that an actor needs; small, and the same on every machine.

    Parameters
    ----------
    out, manifest : str
        Paths that every machine has, or URLs.
    made_with : mapping
        As for :class:`featdiff.serving.cluster.Run`.
    block : int
        Rows of a block.
    model : str
        A folder that every machine has, or a repository on the hub.
    arguments : mapping
        How the model runs, as for :func:`featdiff.serving.models.load_model`.
    fpr : float
    exclude_known : bool
    """

    out: str
    manifest: str
    made_with: Mapping[str, Any]
    block: int
    model: str
    arguments: Mapping[str, Any]
    fpr: float
    exclude_known: bool = False

    def open(self) -> Run:
        """The run, as this machine sees it."""
        return Run(self.out, Manifest(self.manifest), self.made_with, self.block)


@dataclass(frozen=True)
class Cluster:
    """Where to work.

    Parameters
    ----------
    address : str, optional
        Of a cluster; default: that of this machine or of ``$RAY_ADDRESS``, or one that ends with the work.
    actors : int, optional
        How many models are at work at most; default: one for each GPU, or without GPUs one for each node.
    gpus_per_actor : float, optional
        Default: 1 where there are GPUs.
    """

    address: str | None = None
    actors: int | None = None
    gpus_per_actor: float | None = None


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
    UsageError
        Ray is not installed, there is no such cluster, or no node of it has what an actor needs.
    FeatdiffError
        Some blocks failed; the others are done.
    """
    done = task.open().done()
    left = [number for number in blocks if number not in done]
    if not left:
        return
    failures: list[str] = []
    with _connected(cluster.address) as ray:
        for answer in _answers(ray, cluster, task, left):
            error = str(answer.pop("error"))
            number = answer.pop("block")
            if error:
                failures.append(f"block {number}: {error}")
            else:
                yield Counts(**{name: int(value) for name, value in answer.items()})
            if len(failures) >= _MOST_FAILURES:
                break
    if failures:
        raise FeatdiffError(f"{len(failures):,} blocks failed, which the same command does again; {failures[0]}")


class Scorer:
    """An actor: it loads the model for its first block, and answers with counts of rows."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._opened: tuple[Run, Score] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score the block ``batch["block"][0]``."""
        number = int(batch["block"][0])
        counts = Counts()
        error = ""
        try:
            counts = self._score(number)
        except FeatdiffError as failure:
            error = one_line(failure)
        except Exception as failure:  # of a device that has no memory left, say
            error = f"{type(failure).__name__}: {one_line(failure)}"
        answer = {"block": number, "error": error, **asdict(counts)}
        return {name: [value] for name, value in answer.items()}

    def _score(self, number: int) -> Counts:
        if self._opened is None:
            task = self._task
            detector = load_model(task.model, task.arguments)
            self._opened = task.open(), scoring(detector, task.fpr, task.exclude_known)
        run, score = self._opened
        run.begin()  # a manifest that is another one on this machine is refused here

        block = run.read(number)
        if run.folder.has(run.name_of(block)):  # by an actor that died before it could answer
            return counts_of(table_of(run, block), self._task.fpr)
        return run.score(number, score)


def _answers(ray: Any, cluster: Cluster, task: Task, blocks: list[int]) -> Iterator[dict[str, Any]]:
    import ray.data as ray_data

    context = ray_data.DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        actors, cpus, gpus = _sizes(ray.nodes(), cluster, len(blocks))
        arguments = {"workers": int(cpus), **task.arguments}
        pool = ray_data.ActorPoolStrategy(
            min_size=1, initial_size=actors, max_size=actors, max_tasks_in_flight_per_actor=_AT_ACTOR
        )
        items = ray_data.from_items([{"block": number} for number in blocks], override_num_blocks=len(blocks))
        answers = items.map_batches(
            Scorer,
            fn_constructor_args=(replace(task, arguments=arguments),),
            batch_size=1,
            compute=pool,
            num_cpus=cpus,
            num_gpus=gpus,
        )  # Ray starts actors that die again, and gives them their blocks again, as often as it takes
        yield from answers.iter_rows()
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before


def _sizes(nodes: list[dict[str, Any]], cluster: Cluster, blocks: int) -> tuple[int, float, float]:
    """How many actors, and the CPUs and GPUs of each."""
    having = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [node.get("CPU", 0.0) for node in having if node.get("CPU", 0.0) >= 1]
    gpus = [node.get("GPU", 0.0) for node in having]
    if not cpus:
        raise UsageError("no node of the Ray cluster has a CPU to give")

    per_actor = cluster.gpus_per_actor
    if per_actor is None:
        per_actor = 1.0 if sum(gpus) >= 1 else 0.0
    if per_actor > max(gpus):
        raise UsageError(f"no node of the Ray cluster has {per_actor:g} GPUs", argument="gpus_per_actor")

    places = int(sum(gpus) // per_actor) if per_actor else len(cpus)
    actors = max(1, min(cluster.actors or places, blocks))
    return actors, max(1, min(sum(cpus) // actors, *cpus)), per_actor


def _knock(address: str | None) -> None:
    """``OSError`` if nobody listens there; Ray itself would try for a quarter of an hour."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected; a connection that was there before stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it has remarks of its own on actors of ray.data
    try:
        import ray
        import ray.data
    except ImportError:
        raise UsageError("Ray is not installed: pip install 'featdiff[ray]'", argument="ray") from None

    ours = not ray.is_initialized()
    if ours:
        try:
            _knock(address)
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:
            where = address or "this machine"
            message = f"no Ray cluster answers at {where} ({first_line(error)}): ray start --head starts one"
            raise UsageError(message, argument="ray") from None
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()
