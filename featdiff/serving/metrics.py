"""What a server counts, for Prometheus; the numbers of several processes add up."""

from __future__ import annotations

import os
from collections import deque

import numpy as np
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from ..verdicts.calibration import Calibration
from ..verdicts.drift import FEWEST, SIDES, DriftTest, distance
from ..verdicts.layer_drift import LayerDrift
from ..verdicts.results import OK, Scores

#: Names the folder through which processes share their numbers.
SHARED = "PROMETHEUS_MULTIPROC_DIR"
#: Type of the page of numbers.
CONTENT_TYPE = CONTENT_TYPE_LATEST
#: Latest images whose scores are compared with those of the calibration images.
WINDOW = 1000
# Fewer say nothing.
_FEWEST = 50
# Of Kolmogorov and Smirnov: what one of a hundred samples exceeds without any drift.
_ONE_IN_A_HUNDRED = 1.628
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_P_VALUES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *(round(i / 10, 1) for i in range(1, 11)))


class Metrics:
    """Counters, histograms and gauges of one process.

    Parameters
    ----------
    calibration : Calibration
        Scores with which drift is measured.
    """

    def __init__(self, calibration: Calibration) -> None:
        disable_created_metrics()  # a time for each number, which nobody asks for
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("featdiff_requests", "Answered requests.", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "featdiff_request_seconds", "From the first byte to the answer.", ["path"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._batches = Histogram(
            "featdiff_batch_images", "Images of one pass of the model.", buckets=_SIZES, registry=registry
        )
        self._images = Counter("featdiff_images", "Images by verdict.", ["verdict"], registry=registry)
        self._p_values = Histogram(
            "featdiff_p_value", "p-values of images with a score.", buckets=_P_VALUES, registry=registry
        )
        self._held = Gauge(
            "featdiff_queue_images", "Images that are accepted and not answered.", registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self._drift = Gauge(
            "featdiff_drift_statistic",
            f"Kolmogorov-Smirnov distance of the last {WINDOW} scores from those of the calibration images.",
            registry=registry,
            multiprocess_mode="liveall",
        )
        self._limit = Gauge(
            "featdiff_drift_limit",
            "What this distance exceeds once in a hundred such samples of images like the calibration images.",
            registry=registry,
            multiprocess_mode="liveall",
        )
        self._evidence = Gauge(
            "featdiff_drift_evidence",
            "Evidence that images have changed, by side: too many strange ones, or too few (normal); 1: an alarm.",
            ["side"],
            registry=registry,
            multiprocess_mode="liveall",
        )
        self._layer_evidence = Gauge(
            "featdiff_drift_layer_evidence",
            "The same by layer: a change may show in one layer long before it does in the whole score.",
            ["layer", "side"],
            registry=registry,
            multiprocess_mode="liveall",
        )
        enough = calibration.groups >= FEWEST
        self._test = DriftTest(calibration.groups, sides=SIDES) if enough else None
        self._layers = LayerDrift(calibration, sides=SIDES) if enough and calibration.layers else None
        self._calibration = calibration
        self._latest: deque[float] = deque(maxlen=WINDOW)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request has its answer."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def held(self, images: int) -> None:
        """So many images are accepted and not answered."""
        self._held.set(images)

    def scored(self, scores: Scores) -> None:
        """A batch has its rows."""
        self._batches.observe(len(scores))
        p_values = []
        for row in scores:
            verdict = row.status if row.status != OK else "ood" if row.is_ood else "normal"
            self._images.labels(verdict).inc()
            if row.status == OK:
                self._p_values.observe(row.p_value)
                p_values.append(row.p_value)
                self._latest.append(row.ood_score)
        if self._test:
            self._test.update(p_values)
            _show(self._test, self._evidence)
        if self._layers:
            self._layers.update(scores[np.array(scores.status) == OK].layers)
            for name, test in self._layers.tests.items():
                _show(test, self._layer_evidence, name)
        if len(self._latest) >= _FEWEST:
            self._drift.set(distance(np.array(self._latest), self._calibration.scores))
            sizes = len(self._latest), len(self._calibration)
            self._limit.set(_ONE_IN_A_HUNDRED * (sum(sizes) / (sizes[0] * sizes[1])) ** 0.5)

    def page(self) -> bytes:
        """All numbers in the text format of Prometheus, those of the other processes added."""
        if SHARED not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)


def _show(test: DriftTest, gauge: Gauge, *labels: str) -> None:
    """Set a gauge to the evidence of each side; it stays at 1 or more after an alarm."""
    for side, evidence in test.evidence.items():
        gauge.labels(*labels, side).set(max(evidence, side in test.alarms))


def forget_process(number: int | None) -> None:
    """The gauges of a process that has ended are no longer shown; its counters stay in the sums."""
    if SHARED in os.environ and number is not None:
        mark_process_dead(number)
