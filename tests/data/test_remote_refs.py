"""Which images a URL holds: web servers that list folders, files and memory as URLs, and streams of references."""

from __future__ import annotations

import functools
import http.server
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from featdiff import Detector
from featdiff.data.image_refs import ImageRef, MissingRef
from featdiff.data.listing import Listing
from featdiff.data.references import RemoteRef, iter_images, list_images, ref_of
from featdiff.exceptions import UsageError
from featdiff.files.remote import write_whole


@pytest.fixture
def tree(few_images: Path) -> Path:
    """a.png .. c.png, below/d.png .. f.png, and more that is no image."""
    (few_images / "below").mkdir()
    for name in "def":
        (few_images / f"{name}.png").rename(few_images / "below" / f"{name}.png")
    (few_images / ".hidden").mkdir()
    (few_images / ".hidden" / "g.png").write_bytes(b"x")
    (few_images / "notes.txt").write_text("x")
    return few_images


NAMES = ["a.png", "b.png", "below/d.png", "below/e.png", "below/f.png", "c.png"]


@pytest.fixture
def web(tree: Path) -> Iterator[str]:
    """Python's own web server, which lists folders as pages of links."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tree.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_folder_of_a_web_server(web: str, tree: Path) -> None:
    refs = list_images(f"{web}/few/")
    assert [ref.path for ref in refs] == [f"{web}/few/{name}" for name in NAMES]
    assert refs[2].read() == (tree / "below" / "d.png").read_bytes()
    assert [ref.path for ref in list_images(f"{web}/few/b*.png")] == [f"{web}/few/b.png"]


def test_one_file_of_a_web_server_is_not_asked_for_before(web: str) -> None:
    (ref,) = list_images("http://127.0.0.1:9/none.jpg?width=3")
    assert ref == RemoteRef("http://127.0.0.1:9/none.jpg?width=3", "http://127.0.0.1:9/none.jpg?width=3")


@pytest.mark.parametrize("root", ["file://{}", "memory://few"])
def test_files_and_memory_as_urls(tree: Path, root: str) -> None:
    root = root.format(tree)
    for name in NAMES:
        write_whole(f"{root}/{name}", (tree / name).read_bytes())
    refs = list_images(root)
    assert [ref.path.rpartition("few/")[2] for ref in refs] == NAMES
    assert all(ref.bytes_to_read() for ref in refs)
    again = [ref_of(ref.path, ref.bytes_to_read()) for ref in pickle.loads(pickle.dumps(refs))]
    assert again == refs
    assert [ref.read() for ref in again] == [(tree / name).read_bytes() for name in NAMES]


def test_the_same_image_by_two_names_is_one_row(tree: Path) -> None:
    assert len(list(iter_images([f"file://{tree}", f"file://{tree}/a.png"]))) == 6
    assert len(list_images([f"file://{tree}", f"file://{tree}"])) == 6


def test_a_folder_of_files_is_sorted_as_its_paths(tree: Path) -> None:
    for name in ("below.png", "below-a/x.png", "Z.png"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"x")
    paths = [ref.path for ref in iter_images(tree)]
    assert paths == sorted(paths)
    assert len(paths) == 9


# ---- names ----


def test_names_lead_back_to_what_they_name(tree: Path, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tree / "a.png", "./in/a.png")
    assert ref_of(str(tree / "a.png")).read() == (tree / "a.png").read_bytes()
    (ref,) = list_images(tmp_path / "a.zip")
    assert ref_of(ref.path).read() == (tree / "a.png").read_bytes()
    for name in (str(tree / "none.png"), str(tmp_path / "a.zip" / "none.png"), str(tmp_path / "none.zip" / "a.png")):
        with pytest.raises((OSError, ValueError)):
            ref_of(name).read()


# ---- listings ----


def test_a_listing_can_be_looked_at_ahead(tree: Path) -> None:
    listing = Listing(iter_images(tree))
    listing.check()
    first = [ref.path for ref in listing.first(2)]
    assert [ref.path for ref in listing.first(4)][:2] == first
    assert next(listing).path == first[0]
    assert len(listing.first(100)) == 5
    assert len(list(listing)) == 5


@pytest.mark.parametrize("refs", [[], [MissingRef("a", "gone")], [MissingRef("a", "gone"), MissingRef("b", "gone")]])
def test_a_listing_of_nothing(refs: list[ImageRef]) -> None:
    with pytest.raises(UsageError, match="a: gone" if refs else "no images"):
        Listing(iter(refs)).check()


def test_a_listing_is_scored_like_its_list(tiny_detector: Detector, tree: Path) -> None:
    expected = tiny_detector.score(tree)
    for source in (iter_images(tree), Listing(iter_images(tree)), (ref for ref in list_images(tree))):
        parts = list(tiny_detector.iter_scores(source))
        assert [path for part in parts for path in part.path] == expected.path
        np.testing.assert_allclose(np.concatenate([part.ood_score for part in parts]), expected.ood_score, rtol=1e-5)


def test_an_engine_is_chosen_by_the_first_of_a_listing(tiny_model: Path) -> None:
    """As for a list: from 1,000 images on; not more of them are listed before the first row."""
    detector = Detector.from_pretrained(tiny_model)
    seen = 0

    def endless() -> Iterator[ImageRef]:
        nonlocal seen
        picture = list_images(np.zeros((20, 20, 3), np.uint8))[0]
        while True:
            seen += 1
            yield picture

    parts = detector.iter_scores(Listing(endless()))
    assert next(parts).status[0] == "ok"
    assert 1000 <= seen < 1500
    assert detector.engine_note_
    parts.close()
