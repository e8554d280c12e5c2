"""Batches of decoded images -> features; of a whole set, each content once, kept in a store."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.decoding import Transform
from ..runtime.progress import Progress
from .store import FeatureStore
from .transfer import in_background


class Extractor(Protocol):
    """Decoded images -> one row of numbers each.

    :class:`featdiff.features.extractor.FeatureExtractor` and :class:`featdiff.features.pixels.Pixels` are such.
    ``width`` is a row's length, ``transform`` prepares a picture, ``key`` names everything that decides the numbers,
    ``device`` is where rows are computed.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def width(self) -> int: ...

    @property
    def transform(self) -> Transform: ...

    def key(self, variant: str = "") -> str: ...

    def __call__(self, pixels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FeatureBatch:
    """Features of some images, in their order, on the device where they were computed.

    Parameters
    ----------
    paths : list of str
        Names of all N images.
    features : Tensor of shape (n, D)
        Of those that have any.
    positions : list of int
        Which of the N images these are, ascending.
    failed : dict
        Position of each image that could not be read -> the reason.
    digests : list of bytes
        Content of the n images.
    notes : dict
        Position of each readable image of which there is something to tell -> what that is.
    """

    paths: list[str]
    features: Tensor
    positions: list[int]
    failed: dict[int, str]
    digests: list[bytes]
    notes: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def of(cls, batch: Batch, rows: Sequence[Tensor]) -> FeatureBatch:
        """A batch of images and the rows of each of its stacks; an image whose features are not finite has failed."""
        paths = [item.ref.path for item in batch.loaded]
        failed = {i: item.reason for i, item in enumerate(batch.loaded) if item.reason}

        kept: list[Tensor] = []
        positions: list[int] = []
        for stack, features in zip(batch.stacks, rows, strict=True):
            finite, reason = _finite(features, stack.pixels)
            failed |= {i: reason for i, good in zip(stack.positions, finite, strict=True) if not good}
            positions += [i for i, good in zip(stack.positions, finite, strict=True) if good]
            kept.append(features if all(finite) else features[finite])

        if not positions:
            return cls(paths, torch.empty(0, 0), [], failed, [])
        notes = {i: note for i in positions if (note := batch.loaded[i].note)}

        features = kept[0]
        if len(kept) > 1:
            order = sorted(range(len(positions)), key=positions.__getitem__)
            features = torch.cat(kept)[order]
            positions = sorted(positions)
        return cls(paths, features, positions, failed, [batch.loaded[i].digest for i in positions], notes)

    @classmethod
    def concatenate(cls, batches: Sequence[FeatureBatch]) -> FeatureBatch:
        """Batches end to end."""
        paths: list[str] = []
        positions: list[int] = []
        failed: dict[int, str] = {}
        digests: list[bytes] = []
        notes: dict[int, str] = {}
        for batch in batches:
            digests += batch.digests
            start = len(paths)
            paths += batch.paths
            positions += [start + position for position in batch.positions]
            failed |= {start + position: reason for position, reason in batch.failed.items()}
            notes |= {start + position: note for position, note in batch.notes.items()}

        with_features = [batch.features for batch in batches if batch.positions]
        features = torch.cat(with_features) if with_features else torch.empty(0, 0)
        return cls(paths, features, positions, failed, digests, notes)


def featurise(
    batches: Iterable[Batch], extractor: Extractor, ahead: int | None = None
) -> Iterator[tuple[Batch, FeatureBatch]]:
    """Run the backbone over batches.

    To look at a result is to wait for it. A GPU computes the next batch by then, so that it never waits for the host.

    Parameters
    ----------
    batches : iterable of Batch
    extractor : Extractor
    ahead : int, optional
        Batches that are begun before a result is looked at; default: one on a GPU, none on a CPU.

    Yields
    ------
    Batch, FeatureBatch
        In order. Should ``batches`` fail, those that were begun come first.
    """
    if ahead is None:
        ahead = 1 if extractor.device.type == "cuda" else 0
    begun: deque[_Begun] = deque()
    try:
        for batch in batches:
            begun.append(_Begun.of(batch, extractor))
            while len(begun) > ahead:
                yield begun.popleft().looked_at()
    except GeneratorExit:  # nobody listens any more
        raise
    except BaseException:  # Ctrl-C, too
        while begun:
            yield begun.popleft().looked_at()
        raise
    while begun:
        yield begun.popleft().looked_at()


@dataclass(frozen=True)
class _Begun:
    """A batch that the backbone has been given; ``ready`` waits for the rows of each of its stacks."""

    batch: Batch
    rows: list[Tensor]
    ready: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, batch: Batch, extractor: Extractor) -> _Begun:
        with in_background(extractor.device) as ready:
            rows = [extractor(stack.pixels) for stack in batch.stacks]
        return cls(batch, rows, ready)

    def looked_at(self) -> tuple[Batch, FeatureBatch]:
        return self.batch, FeatureBatch.of(self.batch, [self.ready(part) for part in self.rows])


def _finite(features: Tensor, pixels: Tensor) -> tuple[list[bool], str]:
    """Which rows of a stack can be used, and what is wrong with the others."""
    if features.is_floating_point():
        return torch.isfinite(features).all(1).tolist(), "the backbone gives NaN or infinite features for it"
    # whole numbers hide what was wrong
    return torch.isfinite(pixels.flatten(1)).all(1).tolist(), "it holds NaN or infinite values"


@dataclass
class Extraction:
    """What came of a set of images.

    Attributes
    ----------
    paths, digests, positions : lists
        Of the images that could be read, in their order; a position counts all images.
    total : int
        How many images there were.
    unreadable : list of (path, reason)
    computed : int
        How many went through the backbone just now.
    """

    paths: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    total: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    computed: int = 0

    def first_positions(self, digests: Sequence[bytes]) -> list[int]:
        """Where each content was read first, among all images."""
        first: dict[bytes, int] = {}
        for digest, position in zip(self.digests, self.positions, strict=True):
            first.setdefault(digest, position)
        return [first[digest] for digest in digests]


def extract(
    batches: Iterable[Batch],
    extractor: Extractor,
    store: FeatureStore,
    total: int = 0,
    progress: Progress | None = None,
) -> Extraction:
    """Features of all images, each content computed once, kept in ``store`` as they come.

    Whatever ends the run (Ctrl-C, a full disk), the features computed so far stay in the store.

    Parameters
    ----------
    batches : iterable of Batch
        Images whose digest is in ``store`` need not be decoded.
    extractor : Extractor
    store : FeatureStore
    total : int, default 0
        Number of images if known, for ``progress``.
    progress : callable (stage, done, total), optional
    """
    extraction = Extraction()
    done = 0
    try:
        for batch, featurised in featurise(batches, extractor):
            vectors = dict(zip(featurised.positions, featurised.features.cpu().numpy(), strict=True))

            for i, item in enumerate(batch.loaded):
                if i in featurised.failed:
                    extraction.unreadable.append((item.ref.path, featurised.failed[i]))
                    continue
                if i in vectors:
                    store.add(item.digest, vectors[i])
                extraction.paths.append(item.ref.path)
                extraction.digests.append(item.digest)
                extraction.positions.append(done + i)

            extraction.computed += len(vectors)
            done += len(batch.loaded)
            extraction.total = done
            if progress:
                progress("features", done, max(total, done))
    finally:
        store.flush()
    return extraction
