"""Scores of each layer -> which layers of a stream have changed. Knows no images.

A change of the camera may leave the score of the whole picture nearly as it was, and show in one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from ..exceptions import UsageError
from .calibration import Calibration
from .drift import STRANGE, DriftTest

_VERSION = 1


class LayerDrift:
    """A :class:`featdiff.verdicts.drift.DriftTest` for each layer, which share the chance of a false alarm.

    The chance that any layer of a stream of normal images ever gives an alarm is at most ``alpha`` + ``delta``, beside
    that of the test of the whole score.

    Parameters
    ----------
    calibration : Calibration
        With that of its layers: ``detector.calibration_``.
    alpha, delta : float, default 0.01
        See there; each layer gets an equal part.
    sides : sequence of str, default ("strange",)

    Attributes
    ----------
    tests : dict of str to DriftTest
        By layer.

    Raises
    ------
    UsageError
        A calibration without layers: of a model saved by an older featdiff, of vectors, or of the pixel mode. Settings
        outside their range, or too few held-out images.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> layers = {"early": rng.standard_normal(1000), "late": rng.standard_normal(1000)}
    >>> drift = LayerDrift(Calibration(rng.standard_normal(1000), layers=layers))
    >>> drift.update({"early": rng.standard_normal(300) + 2, "late": rng.standard_normal(300)})
    ['early']
    >>> drift.strongest()
    'early'
    """

    def __init__(
        self, calibration: Calibration, alpha: float = 0.01, delta: float = 0.01, sides: Sequence[str] = (STRANGE,)
    ) -> None:
        if not calibration.layers:
            raise UsageError("this calibration holds no scores of layers: train the model again")
        parts = len(calibration.layers)
        self._calibration = calibration
        self.tests = {
            name: DriftTest(calibration.groups, alpha / parts, delta / parts, sides) for name in calibration.layers
        }

    def update(self, layers: Mapping[str, np.ndarray]) -> list[str]:
        """See the scores of one or many images, in the order of the stream.

        Parameters
        ----------
        layers : mapping of str to ndarray of shape (N,)
            As :attr:`featdiff.Scores.layers` has them, without the images that have no score.

        Returns
        -------
        list of str
            Layers whose alarm came with these.

        Raises
        ------
        UsageError
            A layer is missing.
        """
        missing = [name for name in self.tests if name not in layers]
        if missing:
            raise UsageError(f"scores of these layers are missing: {', '.join(missing)}")
        p_values = {name: self._calibration.layers[name].p_values(np.asarray(layers[name])) for name in self.tests}
        return [name for name, test in self.tests.items() if test.update(p_values[name])]

    def restart(self) -> None:
        """Begin anew with all layers."""
        for test in self.tests.values():
            test.restart()

    @property
    def evidence(self) -> dict[str, dict[str, float]]:
        """Layer -> side -> evidence; see :attr:`featdiff.verdicts.drift.DriftTest.evidence`."""
        return {name: test.evidence for name, test in self.tests.items()}

    def strongest(self) -> str:
        """The layer with the most evidence, on any side; of equal ones the first."""
        return max(self.tests, key=lambda name: max(self.tests[name].evidence.values()))

    # ---- state ----

    def to_json(self) -> dict[str, Any]:
        """All of it but the calibration, as what JSON can hold."""
        return {"version": _VERSION, "layers": {name: test.to_json() for name, test in self.tests.items()}}

    def resumed(self, state: Mapping[str, Any] | None) -> Self:
        """What :meth:`to_json` has written, behind the calibration of this one.

        Raises
        ------
        UsageError
            It was written by another version, for other layers, or is damaged.
        """
        state = state or {}
        try:
            if state["version"] != _VERSION:
                raise UsageError(f"this state of layers has version {state['version']}, not {_VERSION}")
            tests = {name: DriftTest.from_json(test) for name, test in state["layers"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"this is no state of layers: {error!r}") from None

        held_out = {test.held_out for test in tests.values()}
        if list(tests) != list(self.tests) or held_out != {self._calibration.groups}:
            raise UsageError("this state of layers is of another model")
        other = copy.copy(self)
        other.tests = tests
        return other
