"""A pool of actors on a Ray cluster: Ray places them and starts them again, each does whole blocks.

Only numbers of blocks and short answers cross Ray's object store. What could not be done is an answer, too, since an
exception would end the work of all others.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..exceptions import FeatdiffError, UsageError, first_line, one_line

# Blocks that may fail, each on its own, before the whole work stops.
_MOST_FAILURES = 10
# Actors that may die one after the other while they start, as one does that finds no place any more.
_MOST_DEATHS = 20
# Blocks that wait at an actor while it works; with one there would be no sign that the pool may grow.
_AT_ACTOR = 2
# Portions of work that Ray knows of at most: its driver needs memory and time for each. An actor does the blocks of a
# portion one after the other; after a death, those that are done are only looked at again.
_PORTIONS = 2_000
# How long a cluster may take to answer.
_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that an actor needs; small, and the same on every machine.

    Parameters
    ----------
    manifest : str
        A path that every machine has, or a URL.
    block : int
        Rows of a block.
    arguments : mapping
        How to run: ``device``, ``image_batch``, ``workers`` ...; without ``workers``, an actor decodes with its CPUs.
    working_folder : str
        What relative names in the manifest are seen from, where a machine has such a folder.
    """

    manifest: str
    block: int
    arguments: Mapping[str, Any]
    working_folder: str = ""


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


class Worker:
    """An actor. A subclass says what it does with a block (:meth:`do`), and what it answers where that failed.

    Parameters
    ----------
    task : Task
    """

    #: Name -> number or text, of a block of which nothing was done.
    nothing: ClassVar[Mapping[str, Any]]

    def __init__(self, task: Any) -> None:
        self.task = task
        self._is_open = False

    def open(self) -> None:
        """Load what all blocks need, before the first of them."""
        raise NotImplementedError

    def do(self, number: int) -> Mapping[str, Any]:
        """Do one block; the answer has the names of :attr:`nothing`."""
        raise NotImplementedError

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Do the block ``batch["block"][0]``."""
        number = int(batch["block"][0])
        answer = self.nothing
        error = ""
        try:
            if not self._is_open:
                if os.path.isdir(self.task.working_folder):
                    os.chdir(self.task.working_folder)
                self.open()
                self._is_open = True
            answer = self.do(number)
        except FeatdiffError as failure:
            error = one_line(failure)
        except Exception as failure:  # of a device that has no memory left, say
            error = f"{type(failure).__name__}: {one_line(failure)}"
        return {name: [value] for name, value in {"block": number, "error": error, **answer}.items()}


def answers(cluster: Cluster, worker: type[Worker], task: Task, blocks: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Have blocks done on a cluster.

    Parameters
    ----------
    cluster : Cluster
    worker : class
    task : Task
        For each of the workers.
    blocks : sequence of int

    Yields
    ------
    dict
        What :meth:`Worker.do` answered, in the order in which blocks are done.

    Raises
    ------
    UsageError
        Ray is not installed, there is no such cluster, or no node of it has what an actor needs.
    FeatdiffError
        Some blocks failed; the others are done.
    """
    if not blocks:
        return
    failures: list[str] = []
    with _connected(cluster.address) as ray:
        for answer in _answers(ray, cluster, worker, task, blocks):
            error = str(answer.pop("error"))
            number = answer.pop("block")
            if error:
                failures.append(f"block {number}: {error}")
            else:
                yield answer
            if len(failures) >= _MOST_FAILURES:
                break
    if failures:
        raise FeatdiffError(f"{len(failures):,} blocks failed, which the same command does again; {failures[0]}")


def _answers(
    ray: Any, cluster: Cluster, worker: type[Worker], task: Task, blocks: Sequence[int]
) -> Iterator[dict[str, Any]]:
    import ray.data as ray_data

    context = ray_data.DataContext.get_current()
    quiet = {"enable_progress_bars": False, "print_on_execution_start": False}
    settings = quiet | {"max_consecutive_actor_init_deaths": _MOST_DEATHS}  # for them, Ray would end the whole work
    before = {name: getattr(context, name) for name in settings if hasattr(context, name)}
    for name in before:
        setattr(context, name, settings[name])
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends the work is said below
    try:
        actors, cpus, gpus = _sizes(ray.nodes(), cluster, len(blocks))
        arguments = {"workers": int(cpus), **task.arguments}
        pool = ray_data.ActorPoolStrategy(
            min_size=1, initial_size=actors, max_size=actors, max_tasks_in_flight_per_actor=_AT_ACTOR
        )
        portions = min(len(blocks), _PORTIONS)
        items = ray_data.from_items([{"block": number} for number in blocks], override_num_blocks=portions)
        done = items.map_batches(
            worker,
            fn_constructor_args=(replace(task, arguments=arguments),),
            batch_size=1,
            compute=pool,
            num_cpus=cpus,
            num_gpus=gpus,
        )  # Ray starts actors that die again, and gives them their blocks again, as often as it takes
        yield from done.iter_rows()
    except FeatdiffError:
        raise
    except Exception as error:
        message = f"Ray ended the work ({first_line(error)}): the same command does what is left"
        raise FeatdiffError(message) from error
    finally:
        for name, value in before.items():
            setattr(context, name, value)


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
