"""The training loop: what it learns, how it stops and resumes, and what its records say."""

from __future__ import annotations

import copy
import io
import math
import random

import numpy as np
import pytest
import torch
from small_training import SHORT, WIDTH, data, network, reader, run, same
from torch import Tensor, nn

from featdiff.diffusion.loss import validation_loss
from featdiff.diffusion.schedules import make_pixel_scheduler, make_scheduler
from featdiff.diffusion.training import Recipe, start, train
from featdiff.exceptions import FeatdiffError

# ---- the generator and its records ----


def test_one_record_per_step_and_one_validation_per_epoch() -> None:
    recipe, x = Recipe(**SHORT), data(70)  # 4 steps an epoch, 6 rows left over
    steps = list(run(start(network(), recipe, 70), recipe, x))
    assert [step.step for step in steps] == list(range(1, 17))
    assert {step.steps for step in steps} == {16}
    assert [step.step for step in steps if step.val_loss is not None] == [4, 8, 12, 16]
    assert [step.epoch for step in steps if step.val_loss is not None] == [1, 2, 3, 4]
    assert all(math.isfinite(step.loss) and step.loss > 0 for step in steps)


def test_first_loss_is_the_mean_square_of_the_batch() -> None:
    """A fresh network answers 0, so its first loss is known."""
    recipe = Recipe(epochs=1, batch_size=64, min_steps=1)
    x = data(64)
    (step,) = run(start(network(), recipe, 64), recipe, x)
    assert step.loss == pytest.approx(x.square().mean().item(), rel=1e-5)


def test_nothing_happens_before_the_first_record_is_asked_for() -> None:
    recipe, denoiser, batches = Recipe(**SHORT), network(), []
    before = copy.deepcopy(denoiser.state_dict())
    state = start(denoiser, recipe, 96)

    def read(indices: np.ndarray) -> Tensor:
        batches.append(indices)
        return data()[torch.from_numpy(indices)]

    steps = train(state, read, 96, data(32), make_scheduler(), recipe, 0)
    assert not batches
    assert same(before, denoiser.state_dict())
    next(steps)
    assert len(batches) == 1
    assert not same(before, denoiser.state_dict())


def test_rows_are_read_in_rising_order_each_once_an_epoch_in_changing_batches() -> None:
    recipe, batches = Recipe(**SHORT), []
    state, x = start(network(), recipe, 70), data(70)

    def read(indices: np.ndarray) -> Tensor:
        batches.append(indices.tolist())
        return x[torch.from_numpy(indices)]

    for _ in train(state, read, 70, data(32), make_scheduler(), recipe, 0):
        pass
    assert all(indices == sorted(indices) and len(indices) == 16 for indices in batches)
    epochs = [sum(batches[i : i + 4], []) for i in range(0, 16, 4)]
    assert all(len(set(epoch)) == 64 and set(epoch) <= set(range(70)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert set().union(*epochs) == set(range(70))


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    recipe = Recipe(epochs=2, batch_size=256, min_steps=1, check_steps=1)
    steps = list(run(start(network(), recipe, 3), recipe, data(3)))
    assert [step.val_loss is not None for step in steps] == [True, True]


@pytest.mark.parametrize(("count", "checked"), [(3, [20, 40, 50]), (40, [20, 40, 50]), (16 * 21, [21, 42, 63])])
def test_few_samples_are_not_held_out_against_at_each_step(count: int, checked: list[int]) -> None:
    """An epoch of one, two or 21 steps: the loss is measured after 20 steps at the earliest, and at the end."""
    recipe = Recipe(epochs=1 if count > 40 else 25, batch_size=16, min_steps=50)
    steps = list(run(start(network(), recipe, count), recipe, data(count)))
    assert [step.step for step in steps if step.val_loss is not None] == checked


def test_patience_counts_the_epochs_between_two_checks() -> None:
    """Each epoch makes it worse: 20 of two steps are 10 epochs, so that patience ends at the second or third check."""
    for patience, checks in ((10, 2), (11, 3)):
        recipe = Recipe(epochs=100, batch_size=32, min_steps=1, patience=patience, learning_rate=1e-2)
        state = start(network(), recipe, 64)
        steps = list(run(state, recipe, torch.ones(64, WIDTH), held_out=torch.zeros(32, WIDTH)))
        assert len(steps) == 20 * checks
        assert state.epoch == 10 * checks
        assert state.stale == 10 * (checks - 1)


def test_early_weights_are_those_after_the_first_epoch_also_where_nothing_was_measured_then() -> None:
    recipe = Recipe(epochs=25, batch_size=16, min_steps=1)
    state = start(network(), recipe, 16)
    for step in run(state, recipe, data(16)):
        if step.step == 1:
            after = copy.deepcopy(state.denoiser.state_dict())
    assert same(state.early, after)


def test_the_caller_may_stop_at_any_step() -> None:
    recipe, state = Recipe(**SHORT), start(network(), Recipe(**SHORT), 96)
    steps = run(state, recipe, data())
    for step in steps:
        if step.step == 7:
            break
    steps.close()  # type: ignore[attr-defined]
    assert state.epoch == 1
    assert not state.done
    assert state.best
    assert state.early


def test_trained_network_is_left_ready_for_use_with_its_best_weights() -> None:
    recipe, state = Recipe(**SHORT), start(network(), Recipe(**SHORT), 96)
    losses = [step.val_loss for step in run(state, recipe, data()) if step.val_loss is not None]
    assert state.done
    assert not state.denoiser.training
    assert same(state.denoiser.state_dict(), state.best)
    assert state.best_loss == min(losses)
    assert validation_loss(state.denoiser, data(32, seed=9), make_scheduler(), 0) == pytest.approx(state.best_loss)


def test_held_out_loss_is_that_of_the_averaged_weights() -> None:
    recipe, state = Recipe(**SHORT), start(network(), Recipe(**SHORT), 96)
    for step in run(state, recipe, data(), seed=3):
        if step.val_loss is not None:
            actual = validation_loss(state.average.module, data(32, seed=9), make_scheduler(), seed=3)
            assert step.val_loss == actual
            assert step.val_loss != validation_loss(state.denoiser, data(32, seed=9), make_scheduler(), seed=3)


def test_noise_and_times_change_from_epoch_to_epoch() -> None:
    """One batch of all rows: what the network sees differs by its noise and times only."""
    recipe, denoiser = Recipe(epochs=3, batch_size=96, min_steps=1), network()
    state = start(denoiser, recipe, 96)
    seen: list[tuple[Tensor, Tensor]] = []
    denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    list(run(state, recipe, data()))
    assert len(seen) == 3
    noisy, times = ([values[i] for values in seen] for i in (0, 1))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(noisy[i], noisy[j])
        assert not torch.equal(times[i], times[j])
    every = torch.cat(times)
    assert every.min() >= 0
    assert every.max() <= 99
    assert every.float().mean().item() == pytest.approx(49.5, abs=6)


def test_vectors_that_lie_far_apart_in_the_list_share_a_time_which_the_network_sees_once() -> None:
    """Of 32 vectors, eight share each of four times, one in each quarter of the schedule."""
    x = torch.arange(32.0)[:, None].expand(32, WIDTH)  # each row says which one it is
    recipe, denoiser = Recipe(epochs=40, batch_size=32, min_steps=1), network()
    seen: list[tuple[Tensor, Tensor]] = []
    denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    list(run(start(denoiser, recipe, 32), recipe, 1000 * x))

    batches = [(noisy, times) for noisy, times in seen if noisy.dim() == 3]  # the others are validations
    assert len(batches) == 40
    orders = set()
    for noisy, times in batches:
        assert noisy.shape == (4, 8, WIDTH)
        assert sorted((times // 25).tolist()) == [0, 1, 2, 3]
        orders.add(tuple((times // 25).tolist()))

        signal = make_scheduler().alphas_cumprod[times].sqrt()[:, None]
        rows = (noisy.mean(2) / signal / 1000).round().int()
        assert sorted(rows.flatten().tolist()) == list(range(32))
        assert (rows.diff(dim=1) > 1).all()  # neighbours do not share
    assert len(orders) > 10
    assert len(torch.cat([times for _, times in batches]).unique()) > 60


def test_a_batch_of_seven_vectors_has_seven_times() -> None:
    recipe, denoiser, seen = Recipe(epochs=1, batch_size=7, min_steps=1), network(), []
    denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    list(run(start(denoiser, recipe, 7), recipe, data(7)))
    assert seen[0].shape == (7,)
    for part, time in enumerate(sorted(seen[0].tolist())):
        assert part * 100 / 7 - 1 < time < (part + 1) * 100 / 7


def test_early_weights_are_those_after_the_first_epoch() -> None:
    recipe, state = Recipe(**SHORT), start(network(), Recipe(**SHORT), 96)
    for step in run(state, recipe, data()):
        if step.step == 6:  # the last of the first epoch
            after = copy.deepcopy(state.denoiser.state_dict())
    assert same(state.early, after)
    assert not same(state.early, state.best)


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    recipe, actual = Recipe(**SHORT), []
    for seed in (3, 3, 4):
        state = start(network(), recipe, 96)
        list(run(state, recipe, data(), seed))
        actual.append(state.best)
        torch.randn(5)  # the global state must not matter
    assert same(actual[0], actual[1])
    assert not same(actual[0], actual[2])


@pytest.mark.parametrize("seed", [2**32 - 1, 2**45, 2**63 - 1])
def test_large_seeds_work(seed: int) -> None:
    """Such as a time in nanoseconds."""
    recipe = Recipe(epochs=1, batch_size=96, min_steps=1)
    assert len(list(run(start(network(), recipe, 96), recipe, data(), seed))) == 1


def test_training_leaves_the_global_random_states_untouched() -> None:
    recipe, denoiser = Recipe(**SHORT), network()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    list(run(start(denoiser, recipe, 96), recipe, data()))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


# ---- stopping ----


def test_stops_when_the_held_out_loss_no_longer_falls() -> None:
    """Trained towards 1 and held out at 0, where the fresh network is perfect: each epoch makes it worse."""
    recipe = Recipe(epochs=50, batch_size=16, min_steps=1, patience=3, learning_rate=1e-2, check_steps=1)
    state = start(network(), recipe, 64)
    steps = list(run(state, recipe, torch.ones(64, WIDTH), held_out=torch.zeros(32, WIDTH)))
    losses = [step.val_loss for step in steps if step.val_loss is not None]
    assert len(losses) == 1 + 3
    assert losses == sorted(losses)
    assert state.done
    assert state.best_loss == losses[0]
    assert same(state.denoiser.state_dict(), state.best)


def test_patience_starts_again_after_progress() -> None:
    recipe = Recipe(epochs=12, batch_size=16, min_steps=1, patience=1, lr_schedule="constant", check_steps=1)
    state = start(network(), recipe, 64)
    steps = run(state, recipe, torch.ones(64, WIDTH), held_out=torch.ones(32, WIDTH))
    losses = [step.val_loss for step in steps if step.val_loss is not None]
    assert len(losses) == 12
    assert losses == sorted(losses, reverse=True)
    assert state.stale == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
def test_a_loss_that_is_no_number_ends_training_and_names_the_step(value: float) -> None:
    recipe, x = Recipe(**SHORT), data()
    state = start(network(), recipe, 96)
    seen = []

    def read(indices: np.ndarray) -> Tensor:
        seen.append(indices)
        return x[torch.from_numpy(indices)] * (value if len(seen) == 8 else 1)

    with pytest.raises(FeatdiffError, match=r"diverged at step 8 \(loss (nan|inf)\)"):
        list(train(state, read, 96, data(32), make_scheduler(), recipe, 0))


def test_diverging_rate_is_named() -> None:
    recipe = Recipe(**SHORT, learning_rate=1e30, lr_schedule="constant")
    with pytest.raises(FeatdiffError, match=r"diverged at step \d+ .*lower learning_rate"):
        list(run(start(network(), recipe, 96), recipe, data()))


def test_divergence_in_the_very_last_step_is_an_error_too() -> None:
    """The loss of the only step is fine, the weights after it are not: there is no network to give back."""
    recipe = Recipe(epochs=1, batch_size=96, min_steps=1, learning_rate=1e30, lr_schedule="constant")
    with pytest.raises(FeatdiffError, match="diverged"):
        list(run(start(network(), recipe, 96), recipe, data()))


# ---- resuming ----


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_run_resumed_at_an_epochs_end_is_bit_identical(schedule: str, stop_after: int) -> None:
    recipe = Recipe(**SHORT, lr_schedule=schedule)
    whole = start(network(), recipe, 96)
    expected = list(run(whole, recipe, data()))

    first = start(network(), recipe, 96)
    steps = run(first, recipe, data())
    head = [next(steps) for _ in range(stop_after * 6)]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    del first, steps

    file.seek(0)
    second = start(network(seed=77), recipe, 96)  # other weights: all must come from the file
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.epoch == stop_after
    tail = list(run(second, recipe, data()))
    assert head + tail == expected
    assert same(second.denoiser.state_dict(), whole.denoiser.state_dict())
    assert same(second.early, whole.early)
    assert same(second.best, whole.best)
    assert second.best_loss == whole.best_loss


def test_patience_is_remembered_when_resuming() -> None:
    recipe = Recipe(epochs=50, batch_size=16, min_steps=1, patience=4, learning_rate=1e-2, check_steps=1)
    x, held_out = torch.ones(64, WIDTH), torch.zeros(32, WIDTH)
    first = start(network(), recipe, 64)
    steps = run(first, recipe, x, held_out=held_out)
    for step in steps:
        if step.epoch == 3:
            break
    second = start(network(), recipe, 64)
    second.load_state_dict(first.state_dict())
    assert second.stale == 2
    assert len([s for s in run(second, recipe, x, held_out=held_out) if s.val_loss]) == 2


def test_a_finished_run_is_not_repeated() -> None:
    recipe = Recipe(**SHORT)
    first = start(network(), recipe, 96)
    list(run(first, recipe, data()))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = start(network(seed=77), recipe, 96)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert list(run(second, recipe, data())) == []
    assert second.done
    assert same(second.denoiser.state_dict(), first.denoiser.state_dict())
    assert same(second.early, first.early)
    assert not second.denoiser.training


# ---- what is learned ----


class IdealGaussian(nn.Module):
    """E[x_0 | x_t] for x_0 ~ N(0, S): sqrt(a) S (a S + (1 - a) I)^-1 x_t, the best any network can do."""

    def __init__(self, covariance: Tensor) -> None:
        super().__init__()
        a = make_scheduler().alphas_cumprod[:, None, None]
        inverse = torch.linalg.inv(a * covariance + (1 - a) * torch.eye(len(covariance)))
        self.gain = a.sqrt() * covariance @ inverse  # (T, D, D)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", self.gain[t], x_t)


def bayes_loss(eigenvalues: Tensor) -> float:
    """Mean over times and directions of s (1 - a) / (a s + 1 - a)."""
    a = make_scheduler().alphas_cumprod[:, None]
    return (eigenvalues * (1 - a) / (a * eigenvalues + 1 - a)).mean().item()


def test_learns_a_known_gaussian_to_within_four_percent_of_the_best_possible_loss() -> None:
    source = torch.Generator().manual_seed(0)
    eigenvalues = torch.tensor([3.0, 0.9, 0.1, 0.01])
    axes = torch.linalg.qr(torch.randn(4, 4, generator=source)).Q
    root = axes * eigenvalues.sqrt()
    train_x = torch.randn(4000, 4, generator=source) @ root.T
    held_out = torch.randn(4000, 4, generator=source) @ root.T
    recipe = Recipe(epochs=30, batch_size=250, min_steps=1, learning_rate=5e-3)
    state = start(network(hidden=32), recipe, len(train_x))
    list(run(state, recipe, train_x, held_out=held_out))

    ideal = validation_loss(IdealGaussian(root @ root.T), held_out, make_scheduler(), seed=5)
    actual = validation_loss(state.denoiser, held_out, make_scheduler(), seed=5)
    assert ideal == pytest.approx(bayes_loss(eigenvalues), rel=0.05)  # the yardstick itself is right
    assert ideal * 0.97 < actual < ideal * 1.04
    assert held_out.square().mean().item() > 3 * ideal  # what answering 0 would give


def test_validation_loss_is_repeatable_and_keeps_the_mode() -> None:
    denoiser, x = network(), data(50)
    with torch.no_grad():
        denoiser.project_out.bias.fill_(0.3)
    for training in (True, False):
        denoiser.train(training)
        first = validation_loss(denoiser, x, make_scheduler(), seed=1)
        assert validation_loss(denoiser, x, make_scheduler(), seed=1) == first
        assert denoiser.training is training
    assert first == pytest.approx((x - 0.3).square().mean().item(), rel=1e-5)


def test_validation_noise_follows_from_the_seed() -> None:
    denoiser, x = network(), data(50)
    torch.nn.init.ones_(denoiser.project_out.weight)
    first, again, other = (validation_loss(denoiser, x, make_scheduler(), seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("count", [3, 20, 100, 250])
def test_validation_times_are_spread_over_the_whole_schedule(count: int) -> None:
    """Also with fewer held-out count than times: else only the easy, early times decide when to stop."""
    asked: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            asked.append(t)
            return x_t

    validation_loss(Recorder(), data(count), make_scheduler(), seed=0)
    t = asked[0].float()
    assert t.min() >= 0
    assert t.max() <= 99
    assert t.mean().item() == pytest.approx(49.5, abs=20)
    assert len(t.unique()) == min(count, 100)


def test_a_schedule_of_noise_is_trained_to_predict_noise() -> None:
    """The loss of a network that gives nothing is the mean square of its target."""
    still = network()
    with torch.no_grad():
        still.project_out.weight.zero_()
        still.project_out.bias.zero_()
    x = 3 * data(4096)
    assert validation_loss(still, x, make_scheduler(), 0).item() == pytest.approx(9, rel=0.05)
    assert validation_loss(still, x, make_pixel_scheduler(), 0).item() == pytest.approx(1, rel=0.05)


def test_rows_can_be_changed_by_chance_and_the_run_repeats() -> None:
    seen: list[Tensor] = []

    def note(x: Tensor, source: torch.Generator) -> Tensor:
        seen.append(torch.rand(1, generator=source))
        return -x

    recipe = Recipe(**SHORT)
    first, second = (
        [
            step.loss
            for step in train(
                start(network(), recipe, 96), reader(data()), 96, data(32, 9), make_scheduler(), recipe, 0, augment
            )
        ]
        for augment in (note, note)
    )
    assert first == second
    assert len(seen) == 2 * len(first) and len({float(value) for value in seen}) == len(first)
    mirrored = [step.loss for step in run(start(network(), recipe, 96), recipe, -data())]
    assert first[0] == pytest.approx(mirrored[0])  # the source has moved on only after the first noise
