"""What a server answers: the rows of the command line, explanations, its state, and the Open Inference Protocol."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from http_servers import Server, rows_of, same
from PIL import Image

from featdiff import Detector
from featdiff.verdicts.drift import distance


@pytest.fixture(scope="module")
def expected(tiny_model: Path, pictures: Path) -> dict[str, dict[str, Any]]:
    """The rows of the command line, by the name of the file."""
    rows = {Path(row["path"]).name: row for row in rows_of(tiny_model, pictures)}
    assert [row["status"] for row in rows.values()].count("unreadable") == 2
    assert 1 <= sum(bool(row["is_ood"]) for row in rows.values()) < 20
    return rows


def test_one_image_at_a_time_has_the_very_row_of_the_command_line(
    server: Server, tiny_model: Path, pictures: Path
) -> None:
    for file in sorted(pictures.iterdir())[::6]:
        (row,) = rows_of(tiny_model, file)
        assert server.score(file.read_bytes(), row["path"]) == row


def test_a_form_and_json_have_a_row_for_each_image(
    server: Server, pictures: Path, expected: dict[str, dict[str, Any]]
) -> None:
    files = sorted(pictures.iterdir())
    form = [("image", (file.name, file.read_bytes())) for file in files]
    listed = [{"path": file.name, "data": base64.b64encode(file.read_bytes()).decode()} for file in files]
    for answer in (
        server.client.post("/v1/score", files=form),
        server.client.post("/v1/score", json={"images": listed}),
    ):
        found = answer.json()
        assert found["model"] == "tiny" and found["fpr"] == 0.05
        assert [row["path"] for row in found["images"]] == [file.name for file in files]
        for row in found["images"]:
            same(row, expected[row["path"]])


def test_images_of_many_clients_share_a_pass_and_keep_their_rows(
    server: Server, pictures: Path, expected: dict[str, dict[str, Any]]
) -> None:
    passes, images = (server.metric(f"featdiff_batch_images_{name}") for name in ("count", "sum"))
    files = sorted(pictures.iterdir()) * 4
    with ThreadPoolExecutor(16) as clients:
        rows = list(clients.map(lambda file: server.score(file.read_bytes()), files))
    for file, row in zip(files, rows, strict=True):
        same(row, expected[file.name])
    images = server.metric("featdiff_batch_images_sum") - images
    assert images == len(files)
    assert images / (server.metric("featdiff_batch_images_count") - passes) > 1.5


def test_a_name_is_repeated_so_that_it_can_steer_no_terminal(server: Server, pictures: Path) -> None:
    answer = server.client.post("/v1/score", params={"path": "a\x1b[31m.png"}, content=b"x")
    (row,) = answer.json()["images"]
    assert row["status"] == "unreadable" and "not an image" in row["reason"]
    assert "\x1b" not in answer.text


# ---- explanations ----


def test_explanations(server: Server, tiny_detector: Detector, sample_folders: dict[str, Path]) -> None:
    file = next(sample_folders["digits"].iterdir())
    answer = server.client.post("/v1/explain", params={"path": str(file), "nearest": 2}, content=file.read_bytes())
    wanted = tiny_detector.explain(file, nearest=2).to_json()
    found = answer.json()
    assert found.keys() == wanted.keys()
    assert len(found["nearest"]) == 2
    for name in ("path", "is_ood", "p_value", "reasons", "size"):
        assert found[name] == wanted[name]

    picture = server.client.post("/v1/explain", headers={"Accept": "image/png"}, content=file.read_bytes())
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.content)).width > 500
    broken = server.client.post("/v1/explain", headers={"Accept": "image/png"}, content=b"words")
    assert broken.json()["status"] == "unreadable"


# ---- state ----


def test_state_and_numbers(server: Server, pictures: Path) -> None:
    assert server.client.get("/healthz").json() == {"status": "alive"}
    assert server.client.get("/readyz").json() == {"status": "ready"}
    before = {name: server.metric(f"featdiff_{name}") for name in ("images_total", "p_value_count")}
    unreadable = server.metric('featdiff_images_total{verdict="unreadable"}')
    for file in sorted(pictures.iterdir()) * 2:
        server.score(file.read_bytes())
    assert server.metric("featdiff_images_total") == before["images_total"] + 64
    assert server.metric('featdiff_images_total{verdict="unreadable"}') == unreadable + 4
    assert server.metric("featdiff_p_value_count") == before["p_value_count"] + 60
    assert server.metric("featdiff_queue_images") == 0
    assert server.metric('featdiff_requests_total{path="/v1/score",status="200"}') >= 64


def test_drift_shows(server: Server, tiny_detector: Detector, sample_folders: dict[str, Path]) -> None:
    """Two hundred digits are like no calibration image; to the tiny network they are all alike, and none is strange."""
    layers = tiny_detector.layers
    for file in sample_folders["digits"].iterdir():
        server.score(file.read_bytes())
    assert server.metric("featdiff_drift_statistic") > server.metric("featdiff_drift_limit") > 0
    assert server.metric('featdiff_drift_evidence{side="normal"}') >= 1
    assert server.metric('featdiff_drift_evidence{side="strange"}') < 1
    evidence = [server.metric(f'featdiff_drift_layer_evidence{{layer="{name}",side="normal"}}') for name in layers]
    assert max(evidence) >= 1


def test_drift_is_the_distance_of_kolmogorov_and_smirnov() -> None:
    from scipy.stats import ks_2samp

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=70), np.sort(rng.normal(0.3, size=50))
    assert distance(a, b) == pytest.approx(ks_2samp(a, b).statistic)


def test_the_openapi_page_describes_the_routes(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/v1/score", "/v1/explain", "/healthz", "/readyz", "/metrics", "/v2/models/{name}/infer"} <= set(paths)
    body = paths["/v1/score"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/octet-stream", "multipart/form-data", "application/json"}
    assert "swagger" in server.client.get("/docs").text.lower()


# ---- what makes no sense ----

FORM = {"content-type": "multipart/form-data; boundary=x"}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "content", "status", "words"),
    [
        (JSON, b'{"images": [', 400, "the body is no JSON: Expecting value"),
        (JSON, b"[" * 100_000, 400, "the body is no JSON"),
        (JSON, b"\xff\xfe\x00", 400, "the body is no JSON"),
        (JSON, b"[]", 400, "the body must be a JSON object"),
        (JSON, b"{}", 400, 'the JSON must be {"images"'),
        (JSON, b'{"images": []}', 400, "holds no image"),
        (JSON, b'{"images": ["a"]}', 400, "images[0] must be"),
        (JSON, b'{"images": [{"url": "http://127.0.0.1/a.png"}]}', 400, "images[0] must be"),
        (JSON, b'{"images": [{"path": "/etc/passwd"}]}', 400, "images[0] must be"),
        (JSON, b'{"images": [{"path": 1, "data": ""}]}', 400, "images[0].path must be text"),
        (JSON, b'{"images": [{"data": "a%"}]}', 400, "images[0].data is no base64"),
        (JSON, b'{"images": [{"data": 3}]}', 400, "images[0].data is no base64"),
        (FORM, b"words", 400, ""),
        (FORM, b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nwords\r\n--x--\r\n', 400, "is no file"),
        ({"content-type": "multipart/form-data"}, b"words", 400, "boundary"),
        ({"content-encoding": "gzip"}, b"\x1f\x8b", 415, "compressed"),
    ],
)
def test_bodies_that_make_no_sense(
    server: Server, headers: dict[str, str], content: bytes, status: int, words: str
) -> None:
    answer = server.client.post("/v1/score", headers=headers, content=content)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/score", 405),
        ("GET", "/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/tiny/versions/7", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v1/explain?nearest=0", 400),
        ("POST", "/v1/explain?nearest=many", 400),
    ],
)
def test_requests_that_make_no_sense(server: Server, method: str, path: str, status: int) -> None:
    answer = server.client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}


def test_an_empty_body_is_an_unreadable_image(server: Server) -> None:
    assert server.score(b"")["reason"] == "empty file (0 bytes)"


def test_a_picture_that_would_fill_the_memory_is_not_opened(server: Server) -> None:
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    row = server.score(stream.getvalue())
    assert row["status"] == "unreadable" and "more than the limit of 89,478,485 pixels" in row["reason"]


# ---- the Open Inference Protocol ----


@pytest.fixture
def client(server: Server) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(server.url.removeprefix("http://"))


def test_a_client_of_triton(
    client: triton.InferenceServerClient, pictures: Path, expected: dict[str, dict[str, Any]]
) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1") and not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("tiny")
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    columns = [output["name"] for output in metadata["outputs"]]

    files = sorted(pictures.iterdir())
    images = triton.InferInput("image", [len(files)], "BYTES")
    images.set_data_from_numpy(np.array([file.read_bytes() for file in files], dtype=object))
    result = client.infer("tiny", [images], request_id="7")
    assert result.get_response()["id"] == "7"
    for i, file in enumerate(files):
        row = expected[file.name]
        assert columns == list(row)[1:]
        assert result.as_numpy("status")[i].decode() == row["status"]
        assert result.as_numpy("reason")[i].decode() == row["reason"]
        assert result.as_numpy("is_ood")[i] == bool(row["is_ood"])
        wanted = np.nan if row["p_value"] is None else row["p_value"]
        np.testing.assert_array_equal(result.as_numpy("p_value")[i], wanted)


def test_a_client_that_wants_some_outputs_as_json(
    client: triton.InferenceServerClient, pictures: Path, expected: dict[str, dict[str, Any]]
) -> None:
    name = "words.png"
    tile = next(name for name in expected if name.startswith("china"))
    contents = [base64.b64encode((pictures / file).read_bytes()) for file in (tile, name)]
    images = triton.InferInput("image", [2], "BYTES")
    images.set_data_from_numpy(np.array(contents, dtype=object), binary_data=False)
    wanted = [triton.InferRequestedOutput("p_value", binary_data=False), triton.InferRequestedOutput("status")]
    result = client.infer("tiny", [images], outputs=wanted)
    np.testing.assert_array_equal(result.as_numpy("p_value"), [expected[tile]["p_value"], np.nan])
    assert result.as_numpy("status").tolist() == [b"ok", b"unreadable"]
    assert result.as_numpy("ood_score") is None


TENSOR = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aGVsbG8="]}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "must have one input, image"),
        ({"inputs": [TENSOR, TENSOR]}, "must have one input, image"),
        ({"inputs": [{**TENSOR, "name": "pixels"}]}, "must be image of type BYTES"),
        ({"inputs": [{**TENSOR, "datatype": "FP32"}]}, "must be image of type BYTES"),
        ({"inputs": [{**TENSOR, "shape": [3]}]}, "1 images do not fill the shape [3]"),
        ({"inputs": [{**TENSOR, "shape": "1"}]}, "do not fill the shape"),
        ({"inputs": [{**TENSOR, "data": ["%"]}]}, "element 0 of image is no base64"),
        ({"inputs": [{**TENSOR, "data": {}}]}, "must be a list"),
        ({"inputs": [TENSOR], "outputs": [{"name": "colour"}]}, "no output 'colour'"),
        ({"inputs": [TENSOR], "outputs": 7}, "no output ''"),
    ],
)
def test_tensors_that_make_no_sense(server: Server, asked: dict[str, Any], words: str) -> None:
    answer = server.client.post("/v2/models/tiny/infer", json=asked)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


@pytest.mark.parametrize(("data", "length"), [(b"\x09\0\0\0abc", None), (b"\x09\0", None), (b"", "x"), (b"", "999")])
def test_binary_tensors_that_are_cut_short(server: Server, data: bytes, length: str | None) -> None:
    text = b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}]}'
    headers = {"Inference-Header-Content-Length": length or str(len(text))}
    answer = httpx.post(f"{server.url}/v2/models/tiny/infer", headers=headers, content=text + data, trust_env=False)
    assert answer.status_code == 400
