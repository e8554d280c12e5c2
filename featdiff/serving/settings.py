"""What a server is told: which model, where it listens, and what it takes on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..exceptions import UsageError

#: Requests with more bytes are refused unread.
MAX_REQUEST = 32_000_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server is told.

    Parameters
    ----------
    model : str
        A saved model, a hardened student, or what ``featdiff export`` has written.
    options : mapping, default {}
        Arguments of the detector: ``device``, ``engine``, ``workers``, ``max_pixels``, ``cache``, ``weights``.
    name : str, default ""
        The name of the model in ``/v2/models/<name>``; default: that of its folder.
    fpr : float, optional
        False-alarm rate; default: that of the model.
    host : str, default "127.0.0.1"
        The address that is listened on.
    port : int, default 8000
        0 takes a free one.
    processes : int, default 1
        Each holds the model.
    max_batch : int, default 32
        Images of one pass.
    max_wait : float, default 0.005
        Seconds that a batch waits for images that are being read.
    max_queue : int, default 128
        Images, and requests, that a process holds at once; what comes beyond is refused with 503.
    max_request : int, default 32,000,000
        Bytes of a request.
    timeout : float, default 30
        Seconds in which a request must have come, and then those in which it must be answered. As many has a stopped
        server for what it has accepted.
    api_key : str, default ""
        What clients must send as ``Authorization: Bearer KEY``; empty: nothing.

    Raises
    ------
    UsageError
        A value outside its range.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    fpr: float | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    processes: int = 1
    max_batch: int = 32
    max_wait: float = 0.005
    max_queue: int = 128
    max_request: int = MAX_REQUEST
    timeout: float = 30.0
    api_key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name in ("processes", "max_batch", "max_queue", "max_request", "timeout"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name):g}", argument=name)
        if self.max_wait < 0:
            raise UsageError(f"max_wait must be 0 or more, not {self.max_wait:g}", argument="max_wait")
        if not re.fullmatch(r"[\w.-]+", self.public_name):
            raise UsageError(f"the name {self.public_name!r} has other signs than letters, digits, _ . -", "name")

    @property
    def public_name(self) -> str:
        """The name of the model for clients."""
        return self.name or re.sub(r"[^\w.-]+", "-", Path(self.model).name) or "featdiff"
