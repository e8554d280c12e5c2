"""Listens, starts processes, and ends them when all that was accepted has its answer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..exceptions import FeatdiffError, UsageError
from ..runtime.cpus import THREAD_COUNTS, available_cpus
from .settings import Settings

_PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "python_multipart")
# As the module that must not be imported before the variable is set calls it.
_SHARED = "PROMETHEUS_MULTIPROC_DIR"
# Seconds without a whole head of a request, or between two requests, after which a connection is closed; at most.
_MOST_IDLE = 15
_BACKLOG = 2048


def need_packages() -> None:
    """Raise ``UsageError`` unless everything is installed that a server needs."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"a server needs {', '.join(missing)}: pip install 'featdiff[serve]'")


def run(settings: Settings, ready: Callable[[str], None] = print) -> None:
    """Serve until the process is asked to end (SIGTERM, Ctrl-C); then answer what was accepted.

    Parameters
    ----------
    settings : Settings
    ready : callable, default print
        Called with the address as soon as connections are accepted; with several processes, as soon as they start.

    Raises
    ------
    ModelError, UsageError, WeightsError
        The model cannot be loaded, or a package is missing.
    FeatdiffError
        The address is taken, or is none of this machine.
    KeyboardInterrupt
        Ctrl-C, after all answers.
    """
    need_packages()
    many_connections()
    with listening(settings) as place:
        host, port = place.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if settings.processes == 1:
            _run_one(settings, place, partial(ready, address))
        else:
            _run_many(settings, place, partial(ready, address))


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """A socket at the address of a server, bound before the model is loaded (``FeatdiffError`` if it cannot be)."""
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        place = _bound(family, address, settings.processes > 1)
    except (OSError, OverflowError) as error:
        problem = getattr(error, "strerror", None) or error
        raise FeatdiffError(f"cannot listen on {settings.host} port {settings.port}: {problem}", "port") from None
    with place:
        yield place


def _bound(family: int, address: Any, shared: bool) -> socket.socket:
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared and sys.platform == "linux":
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    place.bind(address)
    return place


def _beside(place: socket.socket, processes: int) -> list[socket.socket]:
    """A socket at the same address for each process.

    Linux deals connections out among them. From one socket, the process that wakes first would take all that wait, and
    a few clients that keep their connections would be served by one process. Elsewhere they share the one.
    """
    others = range(1, processes)
    if sys.platform != "linux":
        return [place, *(place.dup() for _ in others)]
    return [place, *(_bound(place.family, place.getsockname(), True) for _ in others)]


def many_connections() -> None:
    """Let this process, and those that it starts, have as many connections as the system allows."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _config(settings: Settings, app: Any, **options: Any) -> Any:
    import uvicorn

    from .connections import Connection

    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=max(1, round(min(settings.timeout, _MOST_IDLE))),
        timeout_graceful_shutdown=max(1, round(2 * settings.timeout)),
        **options,
    )


def _run_one(settings: Settings, place: socket.socket, ready: Callable[[], None]) -> None:
    import uvicorn

    from .app import create

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    config = _config(settings, create(settings))
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when all is done
    try:
        Server(config).run(sockets=[place])
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_many(settings: Settings, place: socket.socket, ready: Callable[[], None]) -> None:
    """The model is loaded here once, too, so that what is wrong with it is one error and not one of each process."""
    from uvicorn.supervisors import Multiprocess

    from .served import open_served

    class Supervisor(Multiprocess):
        """Each process has a socket of its own, which stays when the process is started again."""

        def one_by_one(self, do: Callable[[], None]) -> None:
            everyone = self.processes
            self.processes_num = 1
            for i, own in enumerate(places):
                self.sockets, self.processes = [own], everyone[i : i + 1]
                do()
                everyone[i : i + 1] = self.processes
            self.processes, self.processes_num = everyone, len(everyone)

        def init_processes(self) -> None:
            self.one_by_one(super().init_processes)

        def restart_all(self) -> None:
            self.one_by_one(super().restart_all)

        def keep_subprocess_alive(self) -> None:
            before = {process.pid for process in self.processes}
            self.one_by_one(super().keep_subprocess_alive)
            for dead in before - {process.pid for process in self.processes}:
                forget_process(dead)

        def terminate_all(self) -> None:
            for own in places:
                own.close()  # or connections would still be accepted, and never answered
            super().terminate_all()

    if not any(name in os.environ for name in THREAD_COUNTS):
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cpus() // settings.processes))
    open_served(settings)

    with tempfile.TemporaryDirectory(prefix="featdiff-metrics-") as folder:
        os.environ[_SHARED] = folder  # before the package is imported that looks for it
        from .metrics import forget_process

        config = _config(settings, partial(_create, settings), factory=True, workers=settings.processes)
        places = _beside(place, settings.processes)
        for own in places:
            own.listen(_BACKLOG)  # who comes before the processes have loaded the model waits for them
        supervisor = Supervisor(config, sockets=places)
        ready()
        supervisor.run()


def _create(settings: Settings) -> Any:
    """The application, in a process of its own."""
    from .app import create

    return create(settings)
