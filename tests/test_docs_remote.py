"""The pages are true: what reads from a store, with a real one on loopback (see pages)."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import typed
from pages import EXPECTED, STORE, Block, blocks_at, commands_at
from PIL import Image
from stores import s3_store


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, sample_folders: dict[str, Path], tiny_model: Path
) -> Iterator[Path]:
    """``my-model/`` and ``clip.mp4``; in the store, the bucket ``photos``."""
    folder = tmp_path_factory.mktemp("remote")
    shutil.copytree(tiny_model, folder / "my-model")
    files = sorted(sample_folders["test"].iterdir())[:20]
    with av.open(str(folder / "clip.mp4"), "w") as video:
        stream: Any = video.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for file in files:
            frame = av.VideoFrame.from_image(Image.open(file).convert("RGB").resize((64, 64)))
            video.mux(stream.encode(frame))
        video.mux(stream.encode())

    with s3_store() as client:
        client.create_bucket(Bucket="photos")
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as whole:
            for i, file in enumerate(files):
                client.put_object(Bucket="photos", Key=f"new/deep/{i}_{i % 2}.png", Body=file.read_bytes())
                whole.write(file, f"test/a_{i}_1.png")
        client.put_object(Bucket="photos", Key="all.zip", Body=archive.getvalue())
        rows = io.BytesIO()
        pq.write_table(pa.table({"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files]}), rows)
        client.put_object(Bucket="photos", Key="rows-0.parquet", Body=rows.getvalue())
        yield folder


def test_commands(folder: Path) -> None:
    commands = commands_at(STORE)
    assert len(commands) >= 3
    for command in commands:
        result = typed(command, folder)
        assert result.returncode == EXPECTED.get(command, 0), f"{command}: {result.stderr}"
    assert len((folder / "stored.csv").read_text().splitlines()) == 1 + 10 + 20
    assert len((folder / "rows.csv").read_text().splitlines()) == 1 + 20 + 2


@pytest.mark.parametrize("block", blocks_at(STORE, language="python"), ids=lambda block: f"{block.page}:{block.line}")
def test_python_blocks(block: Block, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "AWS_ENDPOINT_URL" in os.environ
    with contextlib.chdir(folder):
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "s3://photos/new/deep/0_0.png" in printed
    assert "['clip.mp4#t=0.000', 'clip.mp4#t=1.000', 's3://photos/all.zip/test/a_0_1.png']" in printed
