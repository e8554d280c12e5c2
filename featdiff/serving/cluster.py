"""A manifest that is scored block by block, on any number of machines that know nothing of each other.

Each block of rows becomes one Parquet file in a folder, by one atomic write. Its name says which block it is, and ends
in a hash of these rows of the manifest, of the model and of its settings. So the folder itself is all there is to know:
a block whose file exists is done, whoever did it, and a block that is done twice is the same file. No clock, lock or
order of events decides anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..data.image_refs import ImageRef
from ..exceptions import FeatdiffError, UsageError
from ..report.writers import open_writer
from ..runtime.progress import Progress
from ..verdicts.counts import Counts
from ..verdicts.results import Scores
from .manifest import Block, Manifest
from .places import Folder

#: What the blocks of a folder have in common.
RECORD = "run.json"
#: Rows of a block.
BLOCK = 10_000
_FORMAT = "featdiff-run"
_VERSION = 1
_NAME = re.compile(r"(\d{9})-([0-9a-f]{8})-[0-9a-f]{24}\.parquet")

#: From images to the parts of their rows, in order.
Score = Callable[[list[ImageRef]], Iterable[Scores]]


class Run:
    """One manifest, one model, one folder of blocks.

    Parameters
    ----------
    out : str
        Folder or URL of the blocks.
    manifest : Manifest
    made_with : mapping of str to JSON values
        What decides the rows, by a name for people: the model's digest, the rate, limits ...
    block : int, default 10,000
        Rows of a block.
    hints : mapping of str to JSON values, optional
        What is kept beside that for :func:`read_record`, and decides nothing.

    Attributes
    ----------
    folder : Folder
    manifest : Manifest
    blocks : int
        How many there are.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from featdiff import Scores
    >>> from featdiff.data.image_refs import MissingRef
    >>> from featdiff.serving.cluster import Run
    >>> from featdiff.serving.manifest import Manifest, write_manifest
    >>> def score(refs):
    ...     n = len(refs)
    ...     yield Scores([r.path for r in refs], ["ok"] * n, [""] * n, np.zeros(n), np.ones(n), np.zeros(n, bool), {})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_manifest([MissingRef(name, "") for name in "abc"], f"{folder}/m.parquet")
    ...     run = Run(f"{folder}/out", Manifest(f"{folder}/m.parquet"), {"model": "a digest"}, block=2)
    ...     run.begin()
    ...     [run.score(number, score).rows for number in run.left(run.shard(1, 1))], list(run.left(run.shard(1, 1)))
    ([2, 1], [])
    """

    def __init__(
        self,
        out: str,
        manifest: Manifest,
        made_with: Mapping[str, Any],
        block: int = BLOCK,
        hints: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Folder(out)
        self.manifest = manifest
        self.block_rows = block
        self.blocks = manifest.blocks(block)
        facts = {**made_with, "images of a block": block}
        self._fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self._decisive = json.loads(json.dumps({"manifest": manifest.digest, **facts}))  # as it is read again
        self._hints = dict(hints or {})

    # ---- the folder ----

    def begin(self) -> None:
        """Make the folder this run's own, or find that it is.

        Raises
        ------
        UsageError
            It was begun with another manifest, model or setting, or holds something else.
        FeatdiffError
            It cannot be read or written.
        """
        if self._is_ours():
            return
        others = self.folder.names() - {RECORD}
        if others and self.folder.read(RECORD) is None:  # not another process that has begun a moment ago
            raise UsageError(f"{self.folder.name} holds other files, such as {min(others)}: choose another folder")
        record = {"format": _FORMAT, "version": _VERSION, "decided by": self._decisive, "hints": self._hints}
        self.folder.write(RECORD, json.dumps(record, indent=2).encode() + b"\n")
        self._is_ours()

    def _is_ours(self) -> bool:
        """Whether the folder belongs to this run already (``UsageError``: to another)."""
        record = read_record(self.folder)
        if record is None:
            return False
        before = record["decided by"]
        for name in (*self._decisive, *before):
            if before.get(name) != self._decisive.get(name):
                raise UsageError(
                    f"{self.folder.name} was begun with another {name} ({_shown(before.get(name))}, now "
                    f"{_shown(self._decisive.get(name))}): give the same as then, or another folder"
                )
        return True

    # ---- blocks ----

    def shard(self, number: int, count: int) -> range:
        """Blocks of one of ``count`` shards, counted from 1; each block belongs to exactly one."""
        return shard(self.blocks, number, count)

    def shard_of(self, block: int, count: int) -> int:
        """The shard, counted from 1, that a block belongs to."""
        return ((block + 1) * count - 1) // self.blocks + 1

    def rows_of(self, block: int) -> int:
        """How many rows it has."""
        return self.manifest.rows_of(block, self.block_rows)

    def left(self, blocks: Iterable[int]) -> Iterator[int]:
        """Those that have no file yet; it is looked for again before each."""
        done = self.done()
        for number in blocks:
            if number not in done and not self.folder.has(self.name_of(self.read(number))):
                yield number

    def done(self) -> set[int]:
        """Blocks that have a file of this model and these settings."""
        found = filter(None, map(_NAME.fullmatch, self.folder.names()))
        return {int(match[1]) for match in found if match[2] == self._fingerprint[:8]}

    def read(self, number: int) -> Block:
        """Its rows of the manifest."""
        return self.manifest.block(number, self.block_rows)

    def name_of(self, block: Block) -> str:
        """The name of its file."""
        digest = hashlib.sha256(f"{self._fingerprint} {block.digest()}".encode()).hexdigest()
        return f"{block.number:09}-{self._fingerprint[:8]}-{digest[:24]}.parquet"

    def score(self, number: int, score: Score, progress: Progress | None = None) -> Counts:
        """Score one block and put its file in place.

        Parameters
        ----------
        number : int
        score : callable
            From images to the parts of their rows.
        progress : callable (stage, done, total), optional

        Returns
        -------
        Counts
            Of its rows.

        Raises
        ------
        UsageError
            Meanwhile the folder belongs to another run.
        FeatdiffError
            The file cannot be written; nothing is left of it.
        """
        block = self.read(number)
        counts = Counts()
        stream = io.BytesIO()
        writer = open_writer("parquet", stream)
        for part in score(block.refs()):
            writer.write(part)
            counts.add(part)
            if progress:
                progress("scoring", counts.rows, len(block))
        writer.close()
        if counts.rows != len(block):
            raise FeatdiffError(f"block {number} has {len(block):,} images, and {counts.rows:,} rows came")

        if not self._is_ours():
            raise FeatdiffError(f"{self.folder.place(RECORD)} is gone: the folder was emptied while this run went on")
        self.folder.write(self.name_of(block), stream.getvalue())
        return counts


def shard(blocks: int, number: int, count: int) -> range:
    """Which of so many blocks belong to shard ``number`` of ``count``, counted from 1; each belongs to exactly one.

    Examples
    --------
    >>> from featdiff.serving.cluster import shard
    >>> [list(shard(5, number, 3)) for number in (1, 2, 3)]
    [[0], [1, 2], [3, 4]]
    """
    return range((number - 1) * blocks // count, number * blocks // count)


def read_record(folder: Folder) -> dict[str, Any] | None:
    """What the blocks of a folder were made with; None if no run has begun there.

    Raises
    ------
    UsageError
        The record is damaged, or of a newer featdiff.
    """
    content = folder.read(RECORD)
    if content is None:
        return None
    try:
        record = json.loads(content)
        is_record = record["format"] == _FORMAT and isinstance(record["decided by"], dict)
    except (ValueError, TypeError, KeyError):
        is_record = False
    if not is_record:
        raise UsageError(f"{folder.place(RECORD)} is damaged, or no record of featdiff: choose another folder")
    if record.get("version") != _VERSION:
        raise UsageError(f"{folder.name} was begun by another version of featdiff: pip install -U featdiff")
    return dict(record)


def _shown(value: object) -> str:
    """Enough of a value to tell it from another."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text
