"""What a student is trained with: distillation, the margin between energies, and CLUB's bound of information."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from featdiff.hardening.club import Club
from featdiff.hardening.losses import FeatureDistillation, ProjectedTeacher, distillation, energy_margin
from featdiff.hardening.objective import Objective, TrainingBatch
from featdiff.hardening.recipe import HardenRecipe


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_distillation_is_zero_for_equal_answers_and_the_divergence_else() -> None:
    teacher = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert distillation(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-7)
    student = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    p, q = teacher.softmax(1).double(), student.softmax(1).double()
    assert distillation(student, teacher).item() == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)


def test_temperature_softens_both_and_keeps_the_scale_of_gradients() -> None:
    teacher, student = torch.randn(8, 5), torch.randn(8, 5)
    softened = distillation(student, teacher, 4.0)
    assert softened.item() == pytest.approx(16 * distillation(student / 4, teacher / 4).item(), rel=1e-5)


def best(loss: nn.Module, student: Tensor, teacher: Tensor) -> float:
    """What a loss comes to when its projection has learnt all it can from rows that stay as they are."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    return float(loss(student, teacher).item())


def test_features_are_compared_as_far_as_the_student_tells_of_the_teacher() -> None:
    teacher = torch.randn(64, 12) * torch.arange(1, 13) + 5
    silent, loss = torch.ones(64, 5), FeatureDistillation(12, 5)
    nn.init.zeros_(loss.project.weight), nn.init.zeros_(loss.project.bias)
    assert loss(silent, teacher).item() == pytest.approx(1, abs=1e-4)
    assert best(loss, silent, teacher) == pytest.approx(1, abs=1e-2)
    assert best(FeatureDistillation(12, 5), teacher[:, :5] / 10, teacher) == pytest.approx(7 / 12, abs=0.1)
    assert best(FeatureDistillation(12, 14), torch.cat([teacher, teacher[:, :2]], 1) / 10, teacher) < 0.05


def test_as_published_a_silent_student_satisfies_the_projected_teacher() -> None:
    """The projection drops what the student does not know, which is why it is not the default."""
    teacher, silent = torch.randn(64, 12), torch.randn(5).expand(64, 5)
    loss = ProjectedTeacher(12, 5)
    assert loss(silent, teacher).item() > 0.2 and best(loss, silent, teacher) < 0.02


@pytest.mark.parametrize("kind", [FeatureDistillation, ProjectedTeacher])
def test_either_comparison_of_features_moves_the_student(kind: type[nn.Module]) -> None:
    student = torch.randn(16, 5, requires_grad=True)
    kind(12, 5)(student, torch.randn(16, 12)).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0


def test_the_margin_is_softplus_of_what_is_missing_over_all_pairs() -> None:
    images, outliers = torch.tensor([[4.0, 0.0], [6.0, 0.0]]), torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0]])

    def lse(row: Tensor) -> float:
        return math.log(sum(math.exp(value) for value in row.tolist()))

    wanted = [math.log1p(math.exp(5 - (lse(i) - lse(o)))) for i in images for o in outliers]
    assert energy_margin(images, outliers, 5.0).item() == pytest.approx(sum(wanted) / 6, rel=1e-5)


def test_the_margin_pushes_energies_apart() -> None:
    images, outliers = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    energy_margin(images, outliers, 2.0).backward()
    assert images.grad is not None and outliers.grad is not None
    assert (images.grad < 0).all() and (outliers.grad > 0).all()  # descent: logits of images up, of outliers down


# ---- CLUB ----


def test_the_bound_is_that_of_all_combinations() -> None:
    club, o, h = Club(6, 4), torch.randn(9, 6), torch.randn(9, 4)
    mean, log_variance = club.mean(o), club.log_variance(o)
    densities = torch.stack([-((mean - h_j) ** 2 / log_variance.exp()).sum(1) / 2 for h_j in h], dim=1)
    assert club(o, h).item() == pytest.approx((densities.diagonal() - densities.mean(1)).mean().item(), rel=1e-4)


def test_the_likelihood_is_a_gaussian_one() -> None:
    club, o, h = Club(6, 4), torch.randn(9, 6), torch.randn(9, 4)
    q = torch.distributions.Normal(club.mean(o), club.log_variance(o).div(2).exp())
    constant = 2 * math.log(2 * math.pi)  # half of it for each of 4 numbers
    assert club.log_likelihood(o, h).item() == pytest.approx(q.log_prob(h).sum(1).mean().item() + constant, rel=1e-4)


@pytest.mark.parametrize(("correlation", "low", "high"), [(0.0, -0.05, 0.05), (0.7, 0.75, 1.25)])
def test_trained_by_likelihood_it_bounds_the_information_of_gaussians(
    correlation: float, low: float, high: float
) -> None:
    """For a known q, CLUB of two Gaussians is rho^2 / (1 - rho^2): 0.96 for 0.7, above the information of 0.34."""
    club = Club(1, 1)
    optimizer = torch.optim.Adam(club.parameters(), lr=3e-3)

    def pairs(n: int) -> tuple[Tensor, Tensor]:
        o = torch.randn(n, 1)
        return o, correlation * o + math.sqrt(1 - correlation**2) * torch.randn(n, 1)

    for _ in range(400):
        optimizer.zero_grad()
        (-club.log_likelihood(*pairs(256))).backward()
        optimizer.step()
    with torch.no_grad():
        assert low < club(*pairs(20_000)).item() < high


# ---- all of them together ----


class Answering(nn.Module):
    """The face of a timm classifier, over vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        return self.head


def make_batch() -> TrainingBatch:
    teacher = {"teacher_features": torch.randn(8, 9), "teacher_logits": torch.randn(8, 3)}
    outliers = (torch.randn(8, 6), torch.randn(8, 4))
    images = torch.randn(8, 7), torch.randint(3, (8,))
    return TrainingBatch(*images, **teacher, outliers=outliers, student_outliers=torch.randn(5, 5))


def test_losses_are_weighted_and_named() -> None:
    recipe = HardenRecipe(distillation=2.0, energy=0.5, micl=0.25, margin=1.0)
    objective, given = Objective(Answering(), 5, recipe, 9, (6, 4)), make_batch()
    losses = objective(given)
    assert [*losses] == [
        "labels",
        "distillation",
        "feature_distillation",
        "micl",
        "micl_likelihood",
        "micl_2",
        "micl_2_likelihood",
        "energy",
    ]
    features, logits = objective.answer(given.x)
    assert given.teacher_logits is not None and given.student_outliers is not None
    expected = {
        "labels": nn.functional.cross_entropy(logits, given.labels),
        "distillation": 2 * distillation(logits, given.teacher_logits),
        "micl_2": 2 * 0.25 * objective.clubs[1](given.outliers[1], features),
        "energy": 0.5 * energy_margin(logits, objective.network.head(given.student_outliers), 1.0),  # type: ignore[operator, union-attr]
    }
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_as_published_the_teacher_is_projected() -> None:
    assert isinstance(Objective(Answering(), 5, HardenRecipe.as_published(), 9).projection, ProjectedTeacher)
    assert isinstance(Objective(Answering(), 5, HardenRecipe(), 9).projection, FeatureDistillation)


def test_without_teacher_and_outliers_labels_are_all_there_is() -> None:
    objective = Objective(Answering(), 5, HardenRecipe())
    assert [*objective(TrainingBatch(torch.randn(4, 7), torch.randint(3, (4,))))] == ["labels"]


@pytest.mark.parametrize("as_loss", [False, True])
def test_what_trains_the_networks_of_the_bound(as_loss: bool) -> None:
    """The bound moves the student alone, the likelihood q alone; as in the released code, the bound moves both."""
    recipe = HardenRecipe(bound_as_loss=as_loss)
    objective, given = Objective(Answering(), 5, recipe, 0, (6,)), make_batch()
    given = TrainingBatch(given.x, given.labels, outliers=given.outliers[:1])
    losses = objective(given)
    assert ("micl_likelihood" in losses) is not as_loss
    student, club = objective.network.body.weight, objective.clubs[0].mean[0].weight  # type: ignore[union-attr, index]
    (moved,) = torch.autograd.grad(losses["micl"], [student], retain_graph=True)  # type: ignore[arg-type]
    assert moved.abs().sum() > 0
    (own,) = torch.autograd.grad(losses["micl"], [club], allow_unused=True, retain_graph=True)  # type: ignore[arg-type]
    assert (own is not None) is as_loss
    if not as_loss:
        wanted = [student, club]
        found = torch.autograd.grad(losses["micl_likelihood"], wanted, allow_unused=True)  # type: ignore[arg-type]
        assert found[0] is None and found[1].abs().sum() > 0
