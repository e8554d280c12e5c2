"""Losses of trainings -> TensorBoard or MLflow, through the records that trainings log."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from ..exceptions import LogStopped, UsageError, did_you_mean, first_line

#: Loggers whose records have ``fields`` with ``step`` and numbers, at the end of an epoch at the level INFO.
TRAININGS = ("featdiff.diffusion.fit", "featdiff.hardening.run")
# Fields of a record that are no curves.
_COUNTS = ("step", "steps")
# Numbers that are sent to MLflow together, at most.
_BATCH = 500


class RunLog(Protocol):
    """Where numbers go."""

    def add(self, name: str, value: float, step: int) -> None:
        """Take a point of a curve; it may be kept for a while."""

    def flush(self) -> None:
        """Write what was kept."""

    def close(self, failed: bool) -> None:
        """Write what was kept, and say how the run ended."""


@contextmanager
def logged_to(targets: Sequence[str], settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Inside, losses and learning rates of all trainings go to these places, a point for each step.

    A run may train several times (folds, a local score): curves are called ``training-1/loss``, ``training-2/loss`` ...
    in their order. A training that the cache holds has no curves. A place that fails later on is given up with a
    warning (``LogStopped``); the training goes on.

    Parameters
    ----------
    targets : sequence of str
        ``tensorboard:FOLDER`` or ``mlflow:URI``, where the latter is a folder or what MLflow calls a tracking URI.
    settings : mapping, optional
        Written beside the curves.

    Raises
    ------
    UsageError
        Another kind of place, a package that is missing, or a place that cannot be written.

    Examples
    --------
    >>> with logged_to([]):  # nowhere
    ...     pass
    """
    with ExitStack() as stack:
        for logger in map(logging.getLogger, TRAININGS):
            stack.callback(logger.setLevel, logger.level)
        for target in targets:
            handler = _Curves(target, _open(target, settings or {}))
            stack.push(handler.end)
            for logger in map(logging.getLogger, TRAININGS):
                logger.addHandler(handler)
                logger.setLevel(logging.DEBUG)
        yield


def _open(target: str, settings: Mapping[str, Any]) -> RunLog:
    kind, _, place = target.partition(":")
    kinds: dict[str, type[_TensorBoard] | type[_MLflow]] = {"tensorboard": _TensorBoard, "mlflow": _MLflow}
    if kind not in kinds or not place:
        hint = did_you_mean(kind, list(kinds))
        raise UsageError(f"log_to is tensorboard:FOLDER or mlflow:URI, not {target!r}{hint}", argument="log_to")
    try:
        return kinds[kind](place, settings)
    except ImportError as error:
        raise UsageError(f"{target} needs {error.name or kind}: pip install 'featdiff[{kind}]'", "log_to") from None
    except Exception as error:  # each library has its own
        raise UsageError(f"{target} cannot be written: {first_line(error)}", argument="log_to") from None


class _Curves(logging.Handler):
    """Takes records of trainings apart."""

    def __init__(self, target: str, log: RunLog) -> None:
        super().__init__(logging.DEBUG)
        self._target = target
        self._log: RunLog | None = log
        self._training = 0
        self._step = sys.maxsize
        self._name = ""

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", {})
        if self._log is None or "step" not in fields:
            return
        if fields["step"] <= self._step or record.name != self._name:  # steps of another training
            self._training += 1
        self._step = fields["step"]
        self._name = record.name
        try:
            for name in fields.keys() - set(_COUNTS):
                self._log.add(f"training-{self._training}/{name}", float(fields[name]), self._step)
            if record.levelno >= logging.INFO:
                self._log.flush()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._log = None
        warnings.warn(LogStopped(f"{self._target} takes no more: {first_line(error)}"), stacklevel=2)

    def end(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the logger, and close the place."""
        for logger in map(logging.getLogger, TRAININGS):
            logger.removeHandler(self)
        if self._log is None:
            return
        try:
            self._log.close(failed=kind is not None)
        except Exception as error:
            self._give_up(error)


class _TensorBoard:
    """Event files in a folder."""

    def __init__(self, place: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(place)
        self._writer.add_text("settings", f"```json\n{json.dumps(settings, indent=2, default=str)}\n```")

    def add(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _MLflow:
    """A run in the experiment ``featdiff``."""

    def __init__(self, place: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=place)
        experiment = self._client.get_experiment_by_name("featdiff")
        number = experiment.experiment_id if experiment else self._client.create_experiment("featdiff")
        self._run = self._client.create_run(number).info.run_id
        self._points: list[Any] = []
        params = [Param(name, json.dumps(value, default=str)) for name, value in settings.items()]
        self._client.log_batch(self._run, params=params)

    def add(self, name: str, value: float, step: int) -> None:
        from mlflow.entities import Metric

        self._points.append(Metric(name, value, int(time.time() * 1000), step))
        if len(self._points) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        points, self._points = self._points, []
        self._client.log_batch(self._run, metrics=points)

    def close(self, failed: bool) -> None:
        self.flush()
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
