"""The blocks of a run -> all its rows, once each and in the order of the manifest, or which blocks are missing."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..data.parquet_refs import open_parquet
from ..exceptions import FeatdiffError, UsageError, first_line, some_of
from ..report.writers import open_writer
from ..verdicts.counts import Counts
from ..verdicts.results import FDR_FLAG, Scores
from .cluster import RECORD, Run, read_record
from .manifest import Block, Manifest, arrow
from .places import Folder

if TYPE_CHECKING:
    from pyarrow import Table

_LAYER = "layer_"
_P_VALUE = "p_value_"


def open_run(folder: str, manifest: str | None = None) -> tuple[Run, dict[str, Any]]:
    """A run as it was begun, and what else its record holds.

    Parameters
    ----------
    folder : str
        A path or a URL.
    manifest : str, optional
        Default: the place where it was when the run began.

    Raises
    ------
    UsageError
        No run was begun there, or with another manifest.
    FeatdiffError
        The manifest or the folder cannot be read.
    """
    place = Folder(folder)
    record = read_record(place)
    if record is None:
        raise UsageError(f"{folder} holds no run: there is no {RECORD}")
    hints = record.get("hints", {})
    made_with = dict(record["decided by"])
    digest = made_with.pop("manifest")
    block = made_with.pop("images of a block")

    opened = Manifest(manifest or hints["manifest"])
    if opened.digest != digest:
        raise UsageError(
            f"{opened.name} is not the manifest that {folder} was begun with, or was edited since: give that one",
            argument="manifest",
        )
    return Run(folder, opened, made_with, block), hints | made_with


@dataclass
class Found:
    """What is in the folder of a run.

    Attributes
    ----------
    missing : list of int
        Blocks without a file.
    foreign : list of str
        Files that belong to no block.
    """

    missing: list[int]
    foreign: list[str]


def look_at(run: Run) -> Found:
    """Compare the files of a folder with the manifest; none of them is opened."""
    names = run.folder.names() - {RECORD}
    missing = []
    for number in range(run.blocks):
        name = run.name_of(run.read(number))
        if name not in names:
            missing.append(number)
        names.discard(name)
    return Found(missing, sorted(names))


def blocks_of(run: Run) -> Iterator[Table]:
    """The rows of all blocks, a table each, in the order of the manifest.

    Raises
    ------
    FeatdiffError
        A file is gone or damaged, or holds other rows than the manifest; the message names it.
    """
    for number in range(run.blocks):
        yield table_of(run, run.read(number))


def table_of(run: Run, block: Block) -> Table:
    """The rows of one block; errors are those of :func:`blocks_of`."""
    file = run.name_of(block)
    name = run.folder.place(file)
    content = run.folder.read(file)
    if content is None:
        raise FeatdiffError(f"{name} is gone: score that block again")
    try:
        table = open_parquet(io.BytesIO(content)).read()
        paths = table["path"].to_pylist()
    except Exception as error:  # of pyarrow, on a damaged file
        raise FeatdiffError(f"{name} is damaged ({first_line(error)}): delete it and score that block again") from None
    if paths != block.uris:
        raise FeatdiffError(f"{name} holds other rows than the manifest: delete it and score that block again")
    return table


def scores_of(table: Table, fpr: float) -> Scores:
    """The rows of a block as a part of a run."""

    def numbers(name: str) -> np.ndarray:
        column: np.ndarray = table[name].cast("float64").fill_null(np.nan).to_numpy()
        return column

    names = table.column_names
    return Scores(
        path=table["path"].to_pylist(),
        status=table["status"].to_pylist(),
        reason=table["reason"].to_pylist(),
        ood_score=numbers("ood_score"),
        p_value=numbers("p_value"),
        is_ood=table["is_ood"].fill_null(False).to_numpy(),
        layers={name.removeprefix(_LAYER): numbers(name) for name in names if name.startswith(_LAYER)},
        fpr=fpr,
        p_values={name.removeprefix(_P_VALUE): numbers(name) for name in names if name.startswith(_P_VALUE)},
    )


def with_marks(table: Table, largest: float) -> Table:
    """The rows of a block with a column ``fdr_flag``: those with a p-value up to ``largest`` are marked."""
    pa = arrow()
    p_values = table["p_value"].cast("float64").fill_null(np.nan).to_numpy()
    return table.append_column(FDR_FLAG, pa.array(p_values <= largest, mask=np.isnan(p_values)))


def counts_of(table: Table, fpr: float) -> Counts:
    """What became of the images of a block."""
    counts = Counts()
    counts.add(scores_of(table, fpr))
    return counts


class TableWriter:
    """Writes blocks one after the other in any format of rows; Parquet without a look at single rows.

    Parameters
    ----------
    format : {"csv", "jsonl", "parquet", "table"}
    stream : binary stream
    raw_csv : bool, default False
        As for :func:`featdiff.report.writers.open_writer`.
    """

    def __init__(self, format: str, stream: IO[bytes], raw_csv: bool = False) -> None:
        self._stream = stream
        self._rows = None if format == "parquet" else open_writer(format, stream, raw_csv=raw_csv)
        self._writer: Any = None

    def write(self, table: Table) -> None:
        """Append the rows of a block."""
        if self._rows is not None:
            self._rows.write_rows(table.to_pylist(), table.column_names)
            return
        if self._writer is None:
            self._writer = arrow().parquet.ParquetWriter(self._stream, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Finish the file."""
        if self._rows is not None:
            self._rows.close()
        if self._writer is not None:
            self._writer.close()


def shards_to_run(run: Run, missing: Sequence[int], hints: Mapping[str, Any]) -> str:
    """Which shards have to run again, in words."""
    count = hints.get("shards") or 1
    shards = sorted({run.shard_of(number, count) for number in missing})
    return some_of([f"--shard {number}/{count}" for number in shards])


def missing_in_words(run: Run, missing: Sequence[int], hints: Mapping[str, Any]) -> str:
    """Which blocks are missing, and what to do, on one line."""
    rows = sum(map(run.rows_of, missing))
    return (
        f"{len(missing):,} of {run.blocks:,} blocks ({rows:,} rows) are missing in {run.folder.name}, namely "
        f"{some_of([str(number) for number in missing])}: run the same featdiff score again with "
        f"{shards_to_run(run, missing, hints)}"
    )
