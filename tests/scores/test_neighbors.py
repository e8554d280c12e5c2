"""k nearest neighbours: exact search against scikit-learn, FAISS against exact search, and forked processes."""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from featdiff.exceptions import FeatdiffError, UsageError
from featdiff.scores import neighbors
from featdiff.scores.coded import CodedIndex, multiplies_whole_numbers
from featdiff.scores.neighbors import BACKENDS, FaissIndex, Index, TorchIndex, check_backend
from featdiff.scores.neighbors import make_index as make

APPROXIMATE = ("faiss-ivf", "faiss-hnsw", "faiss-pq")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(n: int, seed: int = 1) -> Tensor:
    """(n, 8): 30 groups, as features of 30 classes would be."""
    return 4 * normal(30, 8).repeat(n // 30 + 1, 1)[:n] + normal(n, 8, seed=seed)


@functools.cache
def approximate(backend: str, n: int) -> Index:
    """An index of ``clustered(n)``, built once: training takes most of the time."""
    pytest.importorskip("faiss")
    return make(clustered(n), backend)


def reference(bank: Tensor, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's tree in float64, which never expands the square."""
    tree = NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(bank.double().numpy())
    return tree.kneighbors(queries.double().numpy())


def true_distances(bank: Tensor, queries: Tensor, indices: Tensor) -> np.ndarray:
    return np.linalg.norm(bank.double().numpy()[indices.numpy()] - queries.double().numpy()[:, None], axis=2)


@pytest.fixture(params=["torch", "faiss"])
def exact(request: pytest.FixtureRequest) -> str:
    if request.param == "faiss":
        pytest.importorskip("faiss")
    return str(request.param)


@pytest.fixture
def faiss_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform where ``auto`` may choose FAISS."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(sys, "platform", "linux")


# ---- exact search ----


@pytest.mark.parametrize(("n", "width", "k"), [(500, 8, 1), (500, 37, 5), (300, 3, 50), (20, 4, 19), (1, 6, 1)])
def test_exact_neighbours_are_those_of_scikit_learn(exact: str, n: int, width: int, k: int) -> None:
    bank, queries = normal(n, width), normal(40, width, seed=1)
    distances, indices = make(bank, exact).search(queries, k)
    expected, ids = reference(bank, queries, k)
    assert distances.shape == indices.shape == (40, k)
    assert np.array_equal(indices.numpy(), ids)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-6)


def test_all_of_the_bank_in_order(exact: str) -> None:
    bank, queries = normal(60, 5), normal(7, 5, seed=1)
    distances, indices = make(bank, exact).search(queries, 60)
    expected, ids = reference(bank, queries, 60)
    assert np.array_equal(indices.numpy(), ids)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-6)


def test_vectors_of_the_bank_find_themselves_at_distance_zero(exact: str) -> None:
    bank = normal(200, 16) + 30
    distances, indices = make(bank, exact).search(bank, 2)
    assert indices[:, 0].tolist() == list(range(200))
    assert (distances[:, 0] == 0).all()
    assert (distances[:, 1] > 0).all()


def test_among_equals_the_lower_index_is_first(exact: str) -> None:
    bank = torch.tensor([[3.0, 0], [0, 1], [1, 0], [0, -1], [-1, 0], [0, 1]])
    distances, indices = make(bank, exact).search(torch.zeros(2, 2), 6)
    assert indices.tolist() == [[1, 2, 3, 4, 5, 0]] * 2
    assert distances.tolist() == [[1, 1, 1, 1, 1, 3]] * 2


def test_near_duplicates_far_from_the_origin_are_told_apart(exact: str) -> None:
    """Groups of 6 about 0.001 wide, where |q|^2 + |b|^2 - 2 q b alone is wrong by 0.01."""
    centres = 100 + 5 * normal(50, 16)
    bank = centres.repeat_interleave(6, 0) + 0.001 * normal(300, 16, seed=1)
    queries = centres + 0.001 * normal(50, 16, seed=2)
    distances, indices = make(bank, exact).search(queries, 6)
    expected, ids = reference(bank, queries, 6)
    assert expected.max() < 0.02
    assert np.array_equal(indices.numpy(), ids)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_an_offset_of_all_vectors_changes_no_neighbour(exact: str, offset: float) -> None:
    bank, queries = normal(2000, 64) + offset, normal(30, 64, seed=1) + offset
    distances, indices = make(bank, exact).search(queries, 5)
    expected, ids = reference(bank, queries, 5)
    assert np.array_equal(indices.numpy(), ids)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 100, 1000])
def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    bank, queries = normal(150, 9), normal(11, 9, seed=1)
    bank[120:] = bank[:30]  # equals in different blocks
    whole = TorchIndex(bank).search(queries, 20)
    monkeypatch.setattr(neighbors, "BLOCK", block)
    distances, indices = TorchIndex(bank).search(queries, 20)
    assert torch.equal(indices, whole[1])
    assert torch.equal(distances, whole[0])


def test_a_few_queries_at_a_time_have_the_distances_of_all_at_once() -> None:
    """Candidates of 300 queries do not fit into a processor's cache at once."""
    bank, queries = torch.randn(400, 512), torch.randn(300, 512)
    distances, indices = TorchIndex(bank).search(queries, 60)
    expected = (bank[indices].double() - queries.double()[:, None]).square().sum(2).sqrt()
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(indices[:, 0], torch.cdist(queries.double(), bank.double()).argmin(1))


@pytest.mark.parametrize("batch", [1, 7, 256, 299])
def test_a_query_has_one_result_whatever_the_batch(exact: str, batch: int) -> None:
    index, queries = make(normal(400, 37), exact), normal(300, 37, seed=1)
    together = index.search(queries, 3)
    parts = [index.search(part, 3) for part in queries.split(batch)]
    assert torch.equal(torch.cat([d for d, _ in parts]), together[0])
    assert torch.equal(torch.cat([r for _, r in parts]), together[1])


@pytest.mark.parametrize(("n", "k"), [(500, 5), (500, 500), (1, 1), (12, 6)])
def test_search_among_8_bit_numbers_is_exact(n: int, k: int) -> None:
    """The same as among their products with the scales, which are never held at once."""
    codes = (40 * normal(n, 24)).round().clamp(-127, 127).to(torch.int8)
    scales, queries = 0.01 + normal(n, 1, seed=1).abs() / 50, normal(30, 24, seed=2)
    queries[0] = codes[-1] * scales[-1]
    index = CodedIndex(codes, scales)
    distances, indices = index.search(queries, k)
    expected, ids = TorchIndex(codes * scales).search(queries, k)
    assert torch.equal(distances, expected) and torch.equal(indices, ids)
    assert distances[0, 0] == 0 and indices[0, 0] == n - 1
    assert index.bank.shape == (n, 24) and index.codes.dtype == torch.int8


@pytest.mark.parametrize(("spread", "again"), [(40.0, False), (1.0, True)])
def test_rounded_products_change_nothing(spread: float, again: bool) -> None:
    """Candidates come from rounded products; vectors that these cannot tell apart are searched again."""
    centres = 100 * normal(2, 64, seed=3).sign()  # far from their mean
    codes = (centres.repeat(200, 1) + spread * normal(400, 64)).round().clamp(-127, 127).to(torch.int8)
    scales, queries = torch.full((400, 1), 0.01), 0.01 * centres.repeat(10, 1) + 0.01 * normal(20, 64, seed=1)
    index = CodedIndex(codes, scales)
    expected, ids = TorchIndex(codes * scales).search(queries, 5)

    for size in (1, 3, 16, 20):
        parts = [index.search(some, 5) for some in queries.split(size)]
        assert torch.equal(torch.cat([indices for _, indices in parts]), ids)
        assert torch.equal(torch.cat([distances for distances, _ in parts]), expected)
    assert all((index._among_rough(query[None], 5, index._in_bfloat16) is None) == again for query in queries)


@pytest.mark.skipif(not multiplies_whole_numbers(), reason="needs a processor with VNNI")
@pytest.mark.parametrize("count", [1, 7, 300])
@pytest.mark.parametrize("levels", [7, 127])
def test_products_of_whole_numbers_are_within_their_error(count: int, levels: int) -> None:
    codes = (levels / 3 * normal(500, 96)).round().clamp(-levels, levels).to(torch.int8)
    index, queries = CodedIndex(codes, torch.full((500, 1), 0.01)), normal(count, 96, seed=1)
    queries[0] = 0
    products, errors = index._in_whole_numbers(queries, queries.norm(dim=1))
    wrong = (products.double() - queries.double() @ codes.double().T).abs() / codes.double().norm(dim=1)
    assert (wrong <= errors[:, None]).all()
    assert (errors <= 0.002 * queries.norm(dim=1) + 1e-30).all()

    distances, indices = index.search(queries, 5)
    expected, ids = TorchIndex(codes * 0.01).search(queries, 5)
    assert torch.equal(distances, expected) and torch.equal(indices, ids)
    assert index._among_rough(queries[1:] if count > 1 else queries, 5, index._in_whole_numbers) is not None


@pytest.mark.skipif(not multiplies_whole_numbers(), reason="needs a processor with VNNI")
def test_vectors_too_wide_for_sums_of_32_bits() -> None:
    codes = torch.arange(8, 128, 6, dtype=torch.int8)[:, None].expand(-1, 140_000).clone()
    codes[-1] = 127
    queries = torch.full((3, 140_000), 1.27)
    assert CodedIndex(codes, torch.full((20, 1), 0.01)).search(queries, 1)[1].tolist() == [[19]] * 3


def test_products_that_overflow_are_not_used() -> None:
    """As on processors without VNNI, where sums of two products of 8-bit numbers are cut off at 16 bits."""
    code = "from featdiff.scores.coded import multiplies_whole_numbers; print(multiplies_whole_numbers())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("width", [1, 8, 24, 31, 33])
@pytest.mark.parametrize("start", [0, 1, 8])
def test_a_few_queries_in_banks_of_any_width_and_alignment(width: int, start: int) -> None:
    """Products with 8-bit numbers would read past the ends of these, or crash."""
    numbers = (40 * normal(1, 300 * width + start)).round().clamp(-127, 127).to(torch.int8)
    codes, scales = numbers[0, start:].view(300, width), torch.full((300, 1), 0.01)
    queries = normal(2, width, seed=1)
    expected, ids = TorchIndex(codes * scales).search(queries, 5)
    distances, indices = CodedIndex(codes, scales).search(queries, 5)
    assert torch.equal(indices, ids) and torch.equal(distances, expected)


def test_exact_search_is_one_graph_when_compiled() -> None:
    index, queries = TorchIndex(normal(300, 8)), normal(7, 8, seed=1)
    compiled = torch.compile(index.search, backend="eager", fullgraph=True)
    for actual, expected in zip(compiled(queries, 5), index.search(queries, 5), strict=True):
        assert torch.equal(actual, expected)


def test_no_queries(exact: str) -> None:
    distances, indices = make(normal(5, 3), exact).search(torch.empty(0, 3), 2)
    assert distances.shape == indices.shape == (0, 2)


def test_half_precision_is_searched_in_single_precision(exact: str) -> None:
    bank, queries = normal(100, 8).half(), normal(9, 8, seed=1).half()
    distances, indices = make(bank, exact).search(queries, 4)
    expected, ids = reference(bank, queries, 4)
    assert distances.dtype == torch.float32
    assert np.array_equal(indices.numpy(), ids)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-6)


def test_torch_is_exact_at_a_thousand_deviations_from_the_origin() -> None:
    bank, queries = normal(2000, 64) + 1000, normal(30, 64, seed=1) + 1000
    assert np.array_equal(make(bank, "torch").search(queries, 5)[1].numpy(), reference(bank, queries, 5)[1])


# ---- approximate search ----


@pytest.mark.parametrize("backend", APPROXIMATE)
def test_approximate_search_finds_most_neighbours_and_returns_true_distances(backend: str) -> None:
    bank, queries = clustered(3000), clustered(60, seed=2)
    distances, indices = approximate(backend, 3000).search(queries, 10)
    _, ids = reference(bank, queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(indices.tolist(), ids.tolist(), strict=True)])
    assert recall >= (0.8 if backend == "faiss-pq" else 0.98)
    np.testing.assert_allclose(distances.numpy(), true_distances(bank, queries, indices), rtol=1e-6)
    assert (distances.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("backend", APPROXIMATE)
@pytest.mark.parametrize(("n", "k"), [(300, 298), (3000, 2990)])  # 3000: more lists than are looked at
def test_k_close_to_the_size_of_the_bank(backend: str, n: int, k: int) -> None:
    bank, queries = clustered(n), clustered(4, seed=2)
    distances, indices = approximate(backend, n).search(queries, k)
    assert indices.min() >= 0
    assert [len(set(neighbours)) for neighbours in indices.tolist()] == [k] * 4
    np.testing.assert_allclose(distances.numpy(), true_distances(bank, queries, indices), rtol=1e-6)
    assert (distances.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("backend", APPROXIMATE)
def test_all_of_the_bank_is_found_exactly(backend: str) -> None:
    bank, queries = clustered(3000), clustered(3, seed=2)
    distances, indices = approximate(backend, 3000).search(queries, 3000)
    expected, ids = TorchIndex(bank).search(queries, 3000)
    assert torch.equal(indices, ids)
    assert torch.equal(distances, expected)


def test_a_query_whose_lists_are_too_short_is_searched_exactly() -> None:
    pytest.importorskip("faiss")
    bank = torch.cat([normal(3000, 4), 50 + 0.1 * normal(20, 4)])  # 20 vectors in lists of their own
    index = make(bank, "faiss-ivf")
    assert isinstance(index, FaissIndex)
    index._index.nprobe = 1
    queries = torch.stack([bank[5], torch.full((4,), 50.0), bank[9]])
    distances, indices = index.search(queries, 40)
    expected, ids = reference(bank, queries[1:2], 40)
    assert np.array_equal(indices[1:2].numpy(), ids)
    np.testing.assert_allclose(distances[1:2].numpy(), expected, rtol=1e-6)
    assert indices[[0, 2], 0].tolist() == [5, 9]
    assert [len(set(neighbours)) for neighbours in indices.tolist()] == [40] * 3


@pytest.mark.parametrize("width", [1, 7, 67])
def test_compressed_search_of_any_width(width: int) -> None:
    pytest.importorskip("faiss")
    bank = normal(300, width)
    distances, indices = make(bank, "faiss-pq").search(bank[:5], 3)
    assert indices[:, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(distances.numpy(), true_distances(bank, bank[:5], indices), rtol=1e-6)


def test_too_few_vectors_to_compress_are_refused() -> None:
    pytest.importorskip("faiss")
    with pytest.raises(UsageError, match="faiss-pq needs at least 256 vectors, and there are 255"):
        make(normal(255, 8), "faiss-pq")


@pytest.mark.parametrize("backend", ["faiss-ivf", "faiss-hnsw"])
def test_a_bank_of_one_vector(backend: str) -> None:
    pytest.importorskip("faiss")
    distances, indices = make(torch.ones(1, 4), backend).search(torch.zeros(2, 4), 1)
    assert (distances.tolist(), indices.tolist()) == ([[2], [2]], [[0], [0]])


# ---- auto ----


def test_auto_is_exact_up_to_large(monkeypatch: pytest.MonkeyPatch, faiss_allowed: None) -> None:
    monkeypatch.setattr(neighbors, "LARGE", 400)
    assert isinstance(make(normal(400, 8)), TorchIndex)
    assert isinstance(make(normal(401, 8)), FaissIndex)


def test_auto_uses_lists_for_a_large_bank(monkeypatch: pytest.MonkeyPatch, faiss_allowed: None) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(neighbors, "LARGE", 100)
    index = make(normal(400, 8))
    assert isinstance(index, FaissIndex)
    assert isinstance(index._index, faiss.IndexIVFFlat)


def test_auto_compresses_a_huge_bank(monkeypatch: pytest.MonkeyPatch, faiss_allowed: None) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(neighbors, "LARGE", 100)
    monkeypatch.setattr(neighbors, "_COMPRESS_BYTES", 400 * 8 * 4)
    kinds = [type(make(normal(n, 8))._index) for n in (400, 401)]  # type: ignore[attr-defined]
    assert kinds == [faiss.IndexIVFFlat, faiss.IndexIVFPQ]


def test_auto_is_torch_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "LARGE", 10)
    monkeypatch.setattr(neighbors, "faiss_module", lambda: object())
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isinstance(make(normal(50, 4)), TorchIndex)


def test_auto_is_torch_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "LARGE", 10)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(neighbors, "faiss_module", lambda: None)
    assert isinstance(make(normal(50, 4)), TorchIndex)


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError])
def test_a_faiss_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def broken(name: str) -> None:
        raise error(name)

    monkeypatch.setattr("importlib.import_module", broken)
    assert neighbors.faiss_module() is None


# ---- refusals ----


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("faiss")])
def test_a_missing_faiss_names_what_to_install(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(neighbors, "faiss_module", lambda: None)
    with pytest.raises(UsageError, match=r"pip install 'featdiff\[faiss\]'.*or use the backend torch") as caught:
        make(normal(300, 4), backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_name_the_row(exact: str, value: float) -> None:
    bad = normal(9, 4)
    bad[3, 2] = bad[7, 0] = value
    with pytest.raises(UsageError, match="the bank of neighbours hold NaN or infinite values, first in row 3$"):
        make(bad, exact)
    with pytest.raises(UsageError, match="the queries hold NaN or infinite values, first in row 3$"):
        make(normal(20, 4), exact).search(bad, 2)


@pytest.mark.parametrize("shape", [(6, 3), (6, 5), (4,), (1, 6, 4)])
def test_queries_of_another_shape_are_refused(exact: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"queries must have shape \(Q, 4\)"):
        make(normal(20, 4), exact).search(torch.zeros(shape), 2)


@pytest.mark.parametrize("k", [0, -1, 21, 1000])
def test_k_outside_the_bank_is_refused(exact: str, k: int) -> None:
    with pytest.raises(UsageError, match=rf"k must lie in 1 \.\. 20 .*not {k}$"):
        make(normal(20, 4), exact).search(normal(3, 4), k)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 3, 4)])
def test_a_bank_without_vectors_is_refused(exact: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"a bank of neighbours must have shape \(n, d\)"):
        make(torch.zeros(shape), exact)


def test_an_unknown_backend_is_refused_with_a_hint() -> None:
    with pytest.raises(UsageError, match="unknown backend 'fais-ivf'; did you mean faiss-ivf.*known: auto, torch"):
        make(normal(5, 2), "fais-ivf")
    for backend in BACKENDS:
        check_backend(backend)


# ---- forked processes ----


def in_a_fork(work: Callable[[], str]) -> str:
    """What ``work`` returns in a forked child; a child that hangs is ended after 20 s and fails the test."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as a DataLoader does in its workers: OpenMP's threads are gone
        try:
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    try:
        if not select.select([reading], [], [], 20)[0]:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the forked process hangs")
        return os.read(reading, 1 << 16).decode()
    finally:
        os.close(reading)
        os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs a fork that is safe")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
class TestFork:
    @pytest.mark.parametrize("backend", ["faiss", "faiss-ivf", "faiss-hnsw", "faiss-pq"])
    def test_an_index_of_the_parent_is_refused(self, backend: str) -> None:
        pytest.importorskip("faiss")
        index, queries = make(normal(300, 8), backend), normal(50, 8, seed=1)
        before = index.search(queries, 3)
        answer = in_a_fork(lambda: str(index.search(queries, 3)))
        assert answer.startswith("FeatdiffError: FAISS hangs in forked processes")
        assert "'spawn'" in answer
        assert torch.equal(index.search(queries, 3)[0], before[0])  # the parent goes on

    def test_a_new_index_is_refused(self) -> None:
        pytest.importorskip("faiss")
        bank = normal(300, 8)
        make(bank, "faiss").search(bank, 3)
        answer = in_a_fork(lambda: str(make(bank, "faiss")))
        assert answer.startswith("FeatdiffError: FAISS hangs in forked processes")

    def test_auto_is_torch(self, monkeypatch: pytest.MonkeyPatch, faiss_allowed: None) -> None:
        bank = normal(300, 8)
        make(bank, "faiss").search(bank, 3)
        monkeypatch.setattr(neighbors, "LARGE", 100)
        assert isinstance(make(bank), FaissIndex)

        def work() -> str:
            index = make(bank)
            return f"{type(index).__name__} {index.search(bank[:3], 1)[1].flatten().tolist()}"

        assert in_a_fork(work) == "TorchIndex [0, 1, 2]"


def test_a_wrong_process_is_known_without_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    index = make(normal(20, 4), "faiss")
    monkeypatch.setattr(neighbors, "_forked", True)
    with pytest.raises(FeatdiffError, match="spawn"):
        make(normal(20, 4), "faiss")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(FeatdiffError, match="spawn"):
        index.search(normal(2, 4), 1)
