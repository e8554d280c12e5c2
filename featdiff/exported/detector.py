"""A detector that ``featdiff export`` has written, without PyTorch: images -> the rows that the detector gives."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..data.batches import Batch
from ..data.decoding import MAX_PIXELS, Transform
from ..data.limits import MAX_BYTES
from ..data.loaders import read_batches
from ..data.preprocessing import Preprocessing
from ..exceptions import ModelError, UsageError
from ..runtime.progress import Progress, shown
from ..verdicts.calibration import Calibration
from ..verdicts.judge import judge
from ..verdicts.results import Scores
from .layout import CALIBRATION, LAYER_SCORES, OUTPUTS, PART_SCORES, check_shape, onnx_file
from .sessions import AUTO, open_session

_SCORE, _ = OUTPUTS
_NOT_FINITE = "it holds NaN or infinite values"


class ExportedDetector:
    """A detector as ``featdiff export`` writes it, run by ONNX Runtime or OpenVINO; PyTorch is not needed.

    It gives the rows of the detector that it was exported from: same columns, scores up to rounding, and so the same
    p-values and verdicts. What needs PyTorch is missing: heat maps, neighbours, and which images were in training.

    Parameters
    ----------
    path : path
        A folder that ``featdiff export`` has written, or its .onnx file.
    engine : {"auto", "onnxruntime", "openvino"}, default "auto"
        What runs it. ``auto`` takes the first of the other two that is installed.
    transform : callable, optional
        RGB picture -> float32 array (3, H, W). Needed where the detector was fitted on a network with preprocessing of
        its own; other files say themselves how pictures are prepared.
    image_batch : int, default 32
        Images of one pass.
    workers : int, optional
        Decoding threads. Default: one for each usable CPU.
    max_pixels, max_bytes : int
        The largest picture that is opened, and the largest file that is read.

    Attributes
    ----------
    fpr : float
        False-alarm rate of the detector, which ``score`` may replace.
    layers : list of str
        Names of the layers that have a score.
    parts : tuple of str
        ``global`` and ``local``, where the detector has a local score.
    calibration_ : Calibration
        Scores of held-out in-domain images.
    facts : dict
        All metadata of the file.
    engine : str
        Name and version of the engine.

    Raises
    ------
    ModelError
        No such file, one of another program or format, or a damaged one.
    UsageError
        The engine is not installed.

    Examples
    --------
    >>> import tempfile
    >>> from featdiff import Detector
    >>> from featdiff.export.export import export
    >>> photos = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)  # yours go here
    >>> arguments = {"pretrained": False, "layers": ["layer1"], "recipe": {"epochs": 1, "min_steps": 5}, "fpr": 0.2}
    >>> folder = tempfile.mkdtemp()
    >>> _ = export(Detector("test_resnet", **arguments).fit(photos), folder, ["onnx"])
    >>> ExportedDetector(folder).score(photos[:3]).p_value.shape
    (3,)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        engine: str = AUTO,
        transform: Transform | None = None,
        image_batch: int = 32,
        workers: int | None = None,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.file = onnx_file(path)
        session = open_session(self.file, engine)
        self._run = session.run
        self.engine = session.engine
        self.facts = session.facts
        self.image_batch = image_batch
        self.workers = workers
        self.max_pixels = max_pixels
        self.max_bytes = max_bytes

        facts = self.facts
        try:
            self.fpr = float(facts["fpr"])
            self.layers = list(facts[LAYER_SCORES])
            self.parts = tuple(facts[PART_SCORES])
            groups = facts["calibration_groups"]
            scores = {name: Calibration(values, groups) for name, values in facts[CALIBRATION].items()}
            self.calibration_ = scores[_SCORE]
            self._calibrations = {name: scores[name] for name in self.parts}
            self._transform = transform or _transform_of(facts)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise ModelError(f"{self.file} is damaged: its metadata: {type(error).__name__} {error}") from None

    def __repr__(self) -> str:
        images = f"{len(self.calibration_):,} images for calibration"
        return f"ExportedDetector({self.facts['backbone']}, {images}, fpr={self.fpr:g}, {self.engine})"

    @property
    def transform(self) -> Transform:
        """RGB picture -> float32 array (3, H, W) (``UsageError`` if it is not known)."""
        if self._transform is None:
            raise UsageError(
                "this detector was fitted with preprocessing of its own, which a file cannot hold: give ready batches, "
                "or a function that prepares pictures",
                argument="transform",
            )
        return self._transform

    def score(self, images: object, fpr: float | None = None, progress: Progress | bool | None = None) -> Scores:
        """Score all images at once; :meth:`iter_scores` gives the same as a stream.

        Parameters
        ----------
        images : object
            As for :meth:`featdiff.Detector.score`: paths, folders, archives, pictures, arrays, datasets, loaders. An
            image that cannot be read becomes a row with a status and a reason.
        fpr : float, optional
            False-alarm rate; default: that of the detector.
        progress : bool or callable (stage, done, total), optional
            True shows bars.

        Returns
        -------
        Scores
            In the order of the images. ``known`` is None: the file does not hold which images were in training.

        Raises
        ------
        UsageError
            Nothing to score, or an ``fpr`` that the calibration images cannot support.
        ModelError
            The file does not take images of this size, which a ``transform`` of one's own or a loader gave.
        """
        return Scores.concatenate(self.iter_scores(images, fpr, progress))

    def iter_scores(
        self, images: object, fpr: float | None = None, progress: Progress | bool | None = None
    ) -> Iterator[Scores]:
        """Score images part by part, in their order; memory does not grow with their number.

        The request is checked at once, images are read as the iterator is used. Parameters and errors are those of
        :meth:`score`.
        """
        rate = self.fpr if fpr is None else fpr
        self.calibration_.check(rate)
        batches, total = read_batches(
            images,
            lambda: self.transform,
            self.image_batch,
            workers=self.workers,
            max_pixels=self.max_pixels,
            max_bytes=self.max_bytes,
        )
        return self._stream(batches, total, rate, progress)

    def score_batches(self, batches: Iterable[Batch], fpr: float | None = None) -> Iterator[Scores]:
        """Score images that are decoded already, a part for each batch; see :meth:`score`."""
        return self._stream(batches, 0, self.fpr if fpr is None else fpr, None)

    def _stream(
        self, batches: Iterable[Batch], total: int, fpr: float, progress: Progress | bool | None
    ) -> Iterator[Scores]:
        done = 0
        with shown(progress) as report:
            for batch in batches:
                part = self._judge(batch, fpr)
                done += len(part)
                if report:
                    report("scoring", done, max(total, done))
                yield part

    def _judge(self, batch: Batch, fpr: float) -> Scores:
        """A row for every image of a batch."""
        count = len(batch.loaded)
        failed = {i: item.reason for i, item in enumerate(batch.loaded) if item.reason}
        scores = np.full(count, np.nan)
        layers = np.full((count, len(self.layers)), np.nan)
        parts = np.full((count, len(self.parts)), np.nan)

        for stack in batch.stacks:
            pixels = np.asarray(stack.pixels, dtype=np.float32)
            check_shape(pixels.shape, self.facts["sizes"], self.file)
            outputs = self._run(pixels)
            scores[stack.positions] = outputs[_SCORE]
            layers[stack.positions] = outputs[LAYER_SCORES]
            if self.parts:
                parts[stack.positions] = outputs[PART_SCORES]

            for i, image in zip(stack.positions, pixels, strict=True):
                if not np.isfinite(image).all():
                    failed[i] = _NOT_FINITE

        scored = [i for i in batch.decoded if i not in failed]
        p_values = {
            name: known.p_values(parts[scored, i]) for i, (name, known) in enumerate(self._calibrations.items())
        }
        return judge(
            names=[item.ref.path for item in batch.loaded],
            positions=scored,
            reasons=failed,
            ood_score=scores[scored],
            layers=dict(zip(self.layers, layers[scored].T, strict=True)),
            calibration=self.calibration_,
            fpr=fpr,
            notes={i: batch.loaded[i].note for i in scored if batch.loaded[i].note},
            p_values=p_values,
        )


def _transform_of(facts: dict[str, Any]) -> Transform | None:
    """How a file says that pictures are prepared; None if it cannot say."""
    settings = facts["preprocessing"]
    if "mean" not in settings:
        return None
    return Preprocessing(settings | {"input_size": facts["input_size"]}, settings.get("rectangle", {}).get("area"))
