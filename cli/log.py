"""What a command says, as records of :mod:`logging`: on standard error as JSON lines, or in a file beside it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

#: The logger of all that commands say; below ``featdiff``, as those of the library are.
LOGGER = "featdiff.cli"
FORMATS = ("text", "json")
# Beginning of a line for people -> its level.
_LEVELS = {"Error: ": logging.ERROR, "WARNING: ": logging.WARNING, "ALARM: ": logging.WARNING}


class JsonLines(logging.Formatter):
    """A record as one line: ``time`` (UTC), ``level``, ``logger``, ``message``, and the fields of the record.

    All but ASCII is escaped, so that no name of a file can steer a terminal or end the line.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: value for name, value in _fields_of(record).items() if name not in entry}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextLines(logging.Formatter):
    """A record as a line for people, with time and level."""

    def format(self, record: logging.LogRecord) -> str:
        from featdiff.files.text import for_terminal

        line = f"{_time_of(record)} {record.levelname:<7} {record.name}: {for_terminal(record.getMessage())}"
        fields = " ".join(f"{name}={value}" for name, value in _fields_of(record).items())
        return line + (f" [{for_terminal(fields)}]" if fields else "")


class _OnStandardError(logging.Handler):
    """Writes to whatever standard error is at that moment; under ``-q`` only warnings and errors."""

    def __init__(self, context: click.Context) -> None:
        super().__init__()
        self._context = context

    def emit(self, record: logging.LogRecord) -> None:
        is_quiet = self._context.params.get("quiet") or getattr(record, "quiet", False)
        if sys.stderr is not None and (record.levelno >= logging.WARNING or not is_quiet):
            click.echo(self.format(record), file=sys.stderr)


class _InFile(logging.FileHandler):
    """Appends to a file; one that cannot be written any more is given up, and the work goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        from .speech import say

        error = sys.exc_info()[1]
        logging.getLogger().removeHandler(self)
        _state.handlers.remove(self)
        self.close()
        say(f"WARNING: the log file cannot be written: {error}")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was said already: the last lines have no place
            super().close()


@dataclass
class _State:
    """The handlers of the command that runs, when it began, and whether lines for people are replaced."""

    handlers: list[logging.Handler] = field(default_factory=list)
    started: float = 0.0
    replaces_lines: bool = False


_state = _State()


def replaces_lines() -> bool:
    """Whether standard error holds JSON lines alone: no lines for people, and no bars."""
    return _state.replaces_lines


def log_options() -> list[click.Option]:
    """``--log-format`` and ``--log-file``, for every command; they begin the log when they are parsed."""

    def begin(context: click.Context, option: click.Parameter, file: Path | None) -> None:
        _begin(context, context.meta.get(f"{LOGGER}.format"), file)

    def keep(context: click.Context, option: click.Parameter, value: str | None) -> None:
        context.meta[f"{LOGGER}.format"] = value

    format_ = click.Option(
        ["--log-format"],
        type=click.Choice(FORMATS),
        envvar="FEATDIFF_LOG_FORMAT",
        expose_value=False,
        is_eager=True,  # before the file
        callback=keep,
        help="json: what is said on standard error as one JSON object a line [text; in a --log-file json].",
    )
    file = click.Option(
        ["--log-file"],
        type=click.Path(path_type=Path),
        envvar="FEATDIFF_LOG_FILE",
        expose_value=False,
        callback=begin,
        help="Append to FILE what is said, also with -q; standard error stays as it is.",
    )
    return [format_, file]


def _begin(context: click.Context, format_: str | None, file: Path | None) -> None:
    from featdiff.exceptions import UsageError

    from .speech import is_first_process

    handler: logging.Handler
    if file is not None and is_first_process():
        try:
            handler = _InFile(file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UsageError(f"{file} cannot be written: {error.strerror}", argument="log_file") from None
        handler.setFormatter(TextLines() if format_ == "text" else JsonLines())
    elif file is None and format_ == "json":
        handler = _OnStandardError(context)
        handler.setFormatter(JsonLines())
        _state.replaces_lines = True
    else:
        return

    handler.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)  # other libraries' warnings, too
    logging.getLogger("featdiff").setLevel(logging.INFO)
    _state.handlers.append(handler)
    _state.started = time.monotonic()
    record_line(f"featdiff {context.info_name} began", event="began", command=context.info_name)


def record_line(text: str, quiet: bool = False, **fields: Any) -> None:
    """Log a line for people; what it begins with decides its level."""
    if not _state.handlers:
        return
    beginning = next((word for word in _LEVELS if text.startswith(word)), "")
    level = _LEVELS.get(beginning, logging.INFO)
    extra = {"fields": fields, "quiet": quiet}
    logging.getLogger(LOGGER).log(level, "%s", text.removeprefix(beginning), extra=extra)


def record_traceback() -> bool:
    """Log the exception that is handled, with its traceback; False if standard error is to show it to people."""
    if _state.handlers:
        logging.getLogger(LOGGER).error("traceback", exc_info=True)
    return _state.replaces_lines


def end(code: int) -> None:
    """Log the exit code of the command and the seconds it took, and close the log."""
    seconds = round(time.monotonic() - _state.started, 3)
    record_line(f"ended with exit code {code}", event="ended", exit_code=code, seconds=seconds)
    for handler in _state.handlers:
        logging.getLogger().removeHandler(handler)
        handler.close()
    if _state.started:
        logging.getLogger("featdiff").setLevel(logging.NOTSET)
    _state.handlers = []
    _state.started = 0.0
    _state.replaces_lines = False


def _time_of(record: logging.LogRecord) -> str:
    """ISO 8601 in UTC, with milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}
