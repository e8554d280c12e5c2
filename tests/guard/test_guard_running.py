"""A guard under autocast, compiled, in parallel, in threads, and switched off."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import (
    OWN_LAYERS,
    RECIPE,
    hooks_of,
    loader,
    own_code,
    resnet,
    same,
    some_images,
)
from torch import Tensor, nn

from featdiff import Guard
from featdiff.exceptions import UsageError


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(mode: Any, guard: Guard, images: Tensor) -> None:
    _, usual = guard(images)
    with mode():
        logits, verdict = guard(images)
        assert torch.equal(logits, guard.classifier(images))
    assert not logits.requires_grad
    same(verdict, usual)


def test_autocast_as_at_fit(images: Tensor) -> None:
    """Features of 8 bits, heads of 32: ordinary pictures stay ordinary."""
    classifier = resnet()
    with torch.autocast("cpu", torch.bfloat16):
        guard = Guard(classifier, recipe=RECIPE, fpr=0.1).fit(loader(some_images(200, seed=1)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits, verdict = guard(images)
        assert torch.equal(logits, classifier(images))
        assert guard(some_images(100, seed=5))[1].is_ood.sum() < 25
    assert logits.dtype == torch.bfloat16
    assert verdict.ood_score.dtype == torch.float32
    assert verdict.is_ood[4:].all()
    assert {tensor.dtype for tensor in guard.detector.heads_.diffusion.denoiser.state_dict().values()} == {
        torch.float32
    }


def test_another_precision_than_at_fit_is_warned_of(saved: Path, images: Tensor) -> None:
    guard = Guard.from_pretrained(saved, resnet())
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="bfloat16 autocast.*fitted in float32"):
        _, verdict = guard(images)
    assert verdict.ood_score.dtype == torch.float32


def test_classifier_in_half_precision(images: Tensor) -> None:
    classifier = own_code().to(torch.bfloat16)
    guard = Guard(classifier, layers=OWN_LAYERS, recipe=RECIPE, fpr=0.1).fit(loader(some_images(120, seed=1)))
    logits, verdict = guard(images.to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert verdict.ood_score[4:].min() > verdict.ood_score[:4].max()


def test_compiled_guard_and_guard_of_a_compiled_classifier(tmp_path: Path, images: Tensor) -> None:
    """Also beside the same classifier, compiled without a guard: its code reads no layers."""
    classifier = own_code()
    guard = Guard(classifier, layers=OWN_LAYERS, recipe=RECIPE, fpr=0.1).fit(loader(some_images(60, seed=1)))
    guard.save_pretrained(tmp_path / "model")
    _, usual = guard(images)
    bare = torch.compile(classifier, backend="aot_eager")
    for guarded in (torch.compile(guard, backend="aot_eager"), Guard.from_pretrained(tmp_path / "model", bare)):
        with torch.inference_mode():
            bare(images)
            for count in (6, 3, 6):
                logits, verdict = guarded(images[:count])
                assert torch.equal(logits, bare(images[:count]))
                torch.testing.assert_close(verdict.ood_score, usual.ood_score[:count], rtol=1e-4, atol=1e-3)
    assert sum(hooks_of(classifier)) == 0


def test_classifier_compiled_in_place_after_it_ran(images: Tensor) -> None:
    classifier = own_code()
    guard = Guard(classifier, layers=OWN_LAYERS, recipe=RECIPE, fpr=0.1).fit(loader(some_images(60, seed=1)))
    classifier.compile(backend="eager")
    with torch.no_grad():
        classifier(images)
        with pytest.raises(UsageError, match="compile the guard"):
            guard(images)


def test_data_parallel(guard: Guard, saved: Path, images: Tensor) -> None:
    wrapped = Guard.from_pretrained(saved, nn.DataParallel(guard.classifier))
    logits, verdict = wrapped(images)
    assert torch.equal(logits, guard.classifier(images))
    same(verdict, guard(images)[1])


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(guard: Guard, saved: Path, images: Tensor) -> None:
    wrapped = Guard.from_pretrained(saved, nn.parallel.DistributedDataParallel(guard.classifier))
    logits, verdict = wrapped(images)
    assert torch.equal(logits, guard.classifier(images))
    same(verdict, guard(images)[1])


def test_off(guard: Guard, images: Tensor) -> None:
    with guard.off():
        logits, verdict = guard(images)
        assert verdict is None
        with guard.off():
            pass
        assert guard(images)[1] is None
    assert torch.equal(logits, guard.classifier(images))
    assert guard(images)[1] is not None


def test_threads(guard: Guard) -> None:
    """Each thread gets the verdict on its own images, whoever else uses the guard or the classifier."""
    batches = [some_images(3, seed=10 + i) for i in range(4)]
    expected = [guard(batch)[1].ood_score for batch in batches]
    wrong: list[str] = []

    def work(i: int) -> None:
        for turn in range(8):
            if turn % 4 == i:
                with guard.off():
                    if guard(batches[i])[1] is not None:
                        wrong.append("not off")
            guard.classifier(batches[i])
            score = guard(batches[i])[1].ood_score
            if not torch.allclose(score, expected[i], rtol=1e-4, atol=1e-4):
                wrong.append(f"{i}: {score} for {expected[i]}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(hooks_of(guard.classifier)) == 0
