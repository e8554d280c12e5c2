"""Requests over a network: which failures pass by themselves, how often to try again, and what to tell people."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..exceptions import FeatdiffError, UsageError, one_line

_Result = TypeVar("_Result")

#: How often a request is made before it counts as failed.
TRIES = 4
# Seconds: the longest wait before the second try, which doubles with each, and the longest of all.
_WAIT = 0.5
_LONGEST = 20.0
# Answers of HTTP that another try may change.
_PASSING = (408, 425, 429, 500, 502, 503, 504, 509)
# Errors of the system that may pass; EREMOTEIO is what s3fs makes of an internal error of the server.
_PASSING_ERRORS = {errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO), errno.EAGAIN, errno.ETIMEDOUT}
_PASSING_ERRORS |= {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE}
_PASSING_ERRORS |= {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}
# Errors of clients that are no OSErrors: of botocore, aiohttp, urllib3 and httpx, told without importing these.
_PASSING_TYPES = {"HTTPClientError", "ClientError", "HTTPError", "TransportError", "IncompleteRead", "RetryError"}
_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_CREDENTIALS |= {"DefaultCredentialsError", "ClientAuthenticationError", "LocalTokenNotFoundError"}
_CUT = {"ClientPayloadError", "IncompleteRead"}
_CERTIFICATES = {"ClientConnectorCertificateError", "SSLError"}
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)

#: Scheme -> the extra that brings its client.
EXTRAS = {
    **{"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"},
    **{"az": "azure", "abfs": "azure", "abfss": "azure", "adl": "azure"},
}
# What to set, where there are no credentials.
_SET_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; for a public bucket FSSPEC_S3_ANON=true",
    "gcs": "run gcloud auth application-default login; for a public bucket set FSSPEC_GS_TOKEN=anon",
    "azure": "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


# Somebody waits for all requests to end.
_leaving = threading.Event()


@contextmanager
def no_more_tries() -> Iterator[None]:
    """Inside the block, requests of all threads that fail are not made again: after Ctrl-C nobody wants to wait."""
    _leaving.set()
    try:
        yield
    finally:
        _leaving.clear()


def retried(url: str, action: Callable[[], _Result]) -> _Result:
    """What ``action`` gives, tried again where the failure may pass.

    Parameters
    ----------
    url : str
        What the request is about, for messages.
    action : callable
        Makes the request; called up to four times, after waits that double and vary by chance.

    Raises
    ------
    UsageError
        The scheme of ``url`` is unknown, its client is not installed, or it cannot do this.
    OSError
        Anything else, with a reason of one line as ``strerror`` and ``url`` as ``filename``.
    """
    for number in range(1, TRIES + 1):
        try:
            return action()
        except (FeatdiffError, MemoryError):
            raise
        except Exception as error:  # each client has errors of its own
            failure = error
        if number == TRIES or _leaving.is_set() or not is_passing(failure):
            raise explained(url, failure, number) from failure
        _leaving.wait(_pause(failure, number))
    raise AssertionError("unreachable")


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    error = _behind(error)
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, (*_FINAL, ValueError, ImportError, NotImplementedError)) or names & _CERTIFICATES:
        return False

    status = status_of(error)
    if status:
        return status in _PASSING
    if isinstance(error, TimeoutError | ConnectionError | EOFError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING_ERRORS or error.errno < 0  # below 0: no such host
    return isinstance(error, OSError) or bool(names & _PASSING_TYPES)


def status_of(error: BaseException | None) -> int:
    """The status of the HTTP answer behind an error, 0 if there was none."""
    cause = error.__cause__ if isinstance(error, OSError) else None  # s3fs makes OSErrors of what botocore raises
    for failure in (error, cause):
        response = getattr(failure, "response", None)
        if isinstance(response, dict):  # botocore
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(response, "status_code", None) or getattr(failure, "status", None)
            found = found or getattr(failure, "status_code", None) or getattr(failure, "code", None)
        if isinstance(found, int):
            return found
    return 0


def _behind(error: BaseException) -> BaseException:
    """The failure itself: fsspec says of any failure to ask a web server for a size that there is no such file."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    status = status_of(cause)
    another = status not in (404, 410) if status else is_passing(cause)
    return cause if another else error


def _pause(error: BaseException, number: int) -> float:
    """Seconds until the next try: by chance, up to a time that doubles, or what the server asks for."""
    headers = getattr(error, "headers", None) or {}
    try:
        asked = float(headers.get("Retry-After", 0))
    except (ValueError, TypeError, AttributeError):  # a date
        asked = 0.0
    return min(_LONGEST, max(asked, random.uniform(0.1, _WAIT * 2 ** (number - 1))))


def explained(url: str, error: BaseException, tries: int = 1) -> UsageError | OSError:
    """An error of a client as one that says on one line what to do."""
    error = _behind(error)
    scheme = url.split("::")[-1].partition("://")[0]
    if isinstance(error, ImportError):
        return UsageError(_install(url, scheme, error))
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return UsageError(f"{url}: {scheme}:// is no known scheme; s3, gs, az, https, hf and others are")
    if isinstance(error, NotImplementedError):
        return UsageError(f"{url}: {scheme}:// can only be read")

    names = {kind.__name__ for kind in type(error).__mro__}
    status = status_of(error)
    if names & _CREDENTIALS:
        todo = _SET_CREDENTIALS.get(EXTRAS.get(scheme, ""), "set those of this store")
        return PermissionError(errno.EACCES, f"no credentials: {todo}", url)
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(errno.EACCES, f"access is refused: {_told(error)}", url)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        bucket = "bucket does not exist" in str(error)
        return FileNotFoundError(errno.ENOENT, "no such bucket" if bucket else "no such object", url)

    again = f" ({tries} tries)" if tries > 1 else ""
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return TimeoutError(errno.ETIMEDOUT, f"the server does not answer in time{again}", url)
    if names & _CUT:
        return OSError(errno.EIO, f"the answer was cut short{again}", url)
    return OSError(getattr(error, "errno", None) or errno.EIO, f"cannot be had: {_told(error)}{again}", url)


def _told(error: BaseException) -> str:
    status = status_of(error)
    reason = getattr(error, "message", "") or getattr(error, "strerror", "") or ""
    text = str(reason) if reason and isinstance(reason, str) else one_line(error)
    return f"{status} {text}" if status and str(status) not in text else " ".join(text.split())


def _install(url: str, scheme: str, error: ImportError) -> str:
    extra = EXTRAS.get(scheme)
    if extra:
        return f"{url}: {scheme}:// needs a client that is not installed: pip install 'featdiff[{extra}]'"
    return f"{url}: {scheme}:// needs a client that is not installed: {one_line(error)}"
