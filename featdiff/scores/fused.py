"""Features -> the detector's score: diffusion, neighbours and whatever else is wanted, standardised and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.training import TrainingState
from ..exceptions import UsageError
from ..features.layout import FeatureLayout
from .diffusion import DIFFUSION, Diffusion, Layerwise, LikelihoodRegret, full_precision
from .fusion import log, statistics, weighted_sum
from .registry import Context, Features, Score

#: The score that joins all others.
FUSED = "fused"
# Neighbours have 4, in three spaces.
_DIFFUSION_WEIGHT = 1.0
# How the names of the early denoiser's tensors begin.
_EARLY = "diffusion.early."


@dataclass(frozen=True)
class Measured:
    """What is measured about B images before anything is standardised.

    Attributes
    ----------
    errors : Tensor of shape (B, start times, stages)
        Reconstruction errors.
    members : Tensor of shape (B, members)
        Scores that are joined with the diffusion score, of distances the logarithm.
    single : Tensor of shape (B,), optional
        The detector's own score, where it is neither joined nor made of ``errors``.
    """

    errors: Tensor
    members: Tensor
    single: Tensor | None

    def __getitem__(self, rows: slice) -> Measured:
        """What was measured about some of the images."""
        single = None if self.single is None else self.single[rows]
        return Measured(self.errors[rows], self.members[rows], single)

    @classmethod
    def concatenate(cls, parts: Sequence[Measured]) -> Measured:
        """Parts end to end."""
        single = [part.single for part in parts if part.single is not None]
        return cls(
            torch.cat([part.errors for part in parts]),
            torch.cat([part.members for part in parts]),
            torch.cat(single) if single else None,
        )


class Heads(nn.Module):
    """All scores of a detector; its state dict is what a saved detector holds.

    It has the early denoiser only where the detector's own score needs that (``head="lr"``); elsewhere, there is no
    ``lr`` after loading.

    The diffusion score and each member become z-scores among held-out in-domain images (of a distance: its logarithm),
    and ``fused`` is their weighted sum. Whichever score is the detector's own is shifted and scaled to mean 0 and
    standard deviation 1 over the images that calibrate it, and so is the score of each layer.

    Parameters
    ----------
    diffusion : Diffusion
    members : sequence of Score
        What ``fused`` joins besides the diffusion score.
    head : str, default "fused"
        Which score is the detector's own: ``fused``, a diffusion score, or a member's name.

    Attributes
    ----------
    layers : list of str
        Layers that have a score of their own.
    mean, deviation : Tensors of shape (1 + members,)
        Of the scores that are joined, over held-out images.
    location, scale : Tensors of shape (1 + layers,)
        Of the detector's own score and of the layers' scores, over calibration images.

    Raises
    ------
    UsageError
        Two scores of one name, or a head that is none of the scores.
    """

    weights: Tensor
    mean: Tensor
    deviation: Tensor
    location: Tensor
    scale: Tensor

    def __init__(self, diffusion: Diffusion, members: Sequence[Score] = (), head: str = FUSED) -> None:
        super().__init__()
        _check_names([*DIFFUSION, *(score.name for score in members)], head)
        self.head = head
        self.diffusion = diffusion
        self.members = nn.ModuleList(members)
        self._scores: list[Score] = list(members)
        self._diffusion_scores = {name: kind(diffusion) for name, kind in DIFFUSION.items()}
        self.layers = self.layout.stage_names

        joined = 1 + len(members)
        weights = torch.tensor([_DIFFUSION_WEIGHT, *(score.weight for score in members)])
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("mean", torch.zeros(joined))
        self.register_buffer("deviation", torch.ones(joined))
        self.register_buffer("location", torch.zeros(1 + len(self.layers)))
        self.register_buffer("scale", torch.ones(1 + len(self.layers)))
        self.register_state_dict_post_hook(_without_early)
        self.requires_grad_(False).eval()

    @property
    def layout(self) -> FeatureLayout:
        """What a row of features holds."""
        return self.diffusion.layout

    @property
    def scores(self) -> dict[str, Score]:
        """The scores that are computed one by one, by name: those of diffusion, and the members."""
        scores: dict[str, Score] = {**self._diffusion_scores, **{score.name: score for score in self._scores}}
        if self.diffusion.early is None:
            del scores[LikelihoodRegret.name]
        return scores

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if not any(name.startswith(prefix + _EARLY) for name in state_dict):
            self.diffusion.early = None
        super()._load_from_state_dict(state_dict, prefix, *others)

    # ---- fit ----

    def fit(self, features: Features, context: Context) -> TrainingState:
        """Train the denoisers, fit the members, and set the statistics of both.

        Parameters
        ----------
        features : Features
            In-domain rows that members may keep: some of those that train.
        context : Context

        Returns
        -------
        TrainingState
            What came of training.
        """
        state = self.diffusion.fit(context)
        for score in self._scores:
            score.fit(features, replace(context, checkpoint=None))  # that file is the denoisers'
        self.fit_statistics(self.measure_all(context.validation))
        return state

    def fit_further(
        self, older: Heads, kept: np.ndarray, added: Features, bank: Features | None, context: Context
    ) -> TrainingState:
        """Go on from older heads of the same settings with further rows, in place of :meth:`fit`.

        Parameters
        ----------
        older : Heads
        kept : ndarray of int
            Which of the rows that its members keep count still, ascending.
        added : Features
            Further rows that members may keep.
        bank : Features or None
            Both, end to end; None where the older rows are not at hand.
        context : Context
            Older and further rows to train on and to validate with.

        Returns
        -------
        TrainingState
            What came of training on.
        """
        state = self.diffusion.fit_further(older.diffusion, context)
        for score, before in zip(self._scores, older._scores, strict=True):
            score.fit_further(before, kept, added, bank, replace(context, checkpoint=None))
        self.fit_statistics(self.measure_all(context.validation))
        return state

    @torch.no_grad()
    def fit_statistics(self, measured: Measured) -> None:
        """Set what scores are standardised with from held-out in-domain images."""
        with full_precision(self.mean):
            self.diffusion.fit_statistics(measured.errors)
            joined, _ = self._joined(measured)
            mean, deviation = statistics(joined)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    @torch.no_grad()
    def fit_scale(self, scores: Tensor) -> None:
        """Set ``location`` and ``scale`` from :meth:`unscaled` scores of the images that calibrate (N, 1 + layers)."""
        std = scores.std(0, correction=0)
        self.location.copy_(scores.mean(0))
        self.scale.copy_(torch.where(std > 0, std, 1.0))

    # ---- score ----

    def forward(self, features: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows of features -> the detector's own score and that of each layer.

        Parameters
        ----------
        features : Tensor of shape (B, D)
        own : Tensor of shape (B,) of int, optional
            Rows of the bank that are left out, one for each image; see :meth:`featdiff.scores.registry.Score.without`.

        Returns
        -------
        ood_score : Tensor of shape (B,)
        layer_scores : Tensor of shape (B, L)
            Both higher = more OOD, about 0 +- 1 for in-domain images.
        """
        scaled = self.rescaled(self.combined(self.measure(features, own)))
        return scaled[:, 0], scaled[:, 1:]

    def rescaled(self, scores: Tensor) -> Tensor:
        """:meth:`unscaled` scores (B, 1 + L) -> shifted and scaled."""
        return (scores - self.location) / self.scale

    def unscaled(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> the detector's own score, then that of each layer, as they come (B, 1 + L)."""
        return self.combined(self.measure(features))

    def measure_all(self, features: Features) -> Measured:
        """:meth:`measure` of many rows of features (N, D), some at a time."""
        return Measured.concatenate([self.measure(part) for part in features.chunks()])

    @torch.no_grad()
    def measure(self, features: Tensor, own: Tensor | None = None) -> Measured:
        """Rows of features (B, D) -> all that scores are made of, before it is standardised."""
        features = features.to(self.mean.device)
        with full_precision(self.mean):
            errors = self.diffusion.errors(self.diffusion.stages(features))
            values = {}
            members = []
            for score in self._scores:
                value = score(features) if own is None else score.without(features, own)
                values[score.name] = value
                members.append(log(value) if score.log_scale else value)

            single = None
            if self.head not in (FUSED, Layerwise.name):
                single = values[self.head] if self.head in values else self.scores[self.head](features)
            joined = torch.stack(members, dim=1) if members else errors[:, :0, 0]
            return Measured(errors, joined, single)

    @torch.no_grad()
    def combined(self, measured: Measured) -> Tensor:
        """What was measured of B images -> the detector's own score, then that of each layer (B, 1 + L)."""
        with full_precision(self.mean):
            joined, layers = self._joined(measured)
            own = measured.single
            if own is None:
                z = (joined - self.mean) / self.deviation
                own = weighted_sum(z, self.weights) if self.head == FUSED else joined[:, 0]
            return torch.cat([own[:, None], layers], dim=1)

    @torch.no_grad()
    def contributions(self, features: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What the detector's own score is made of.

        Parameters
        ----------
        features : Tensor of shape (B, D)

        Returns
        -------
        dict of str to (Tensor of shape (B,), Tensor of shape (B,))
            For each stage (``layer_<name>``, what diffusion says of it) and each member, its score in in-domain
            standard deviations, and its part of the own score. The parts add up to that score, as :meth:`forward`
            gives it. Empty where the own score is no such sum (``head`` is neither ``fused`` nor ``layerwise``).
        """
        if self.head not in (FUSED, Layerwise.name):
            return {}
        measured = self.measure(features)
        with full_precision(self.mean):
            joined, layers = self._joined(measured)
            z = (joined - self.mean) / self.deviation

            # own = sum of layer_weights * layers + shift, plus the members' part
            layer_weights = self.diffusion.layer_weights(layers)
            layer_weights = layer_weights / layer_weights.norm()
            weights = self.weights / self.weights.norm()
            shift = layers.new_zeros(())
            members = z[:, 1:] * weights[1:]
            if self.head == FUSED:
                factor = weights[0] / self.deviation[0]
                shift = -factor * self.mean[0]
                layer_weights = factor * layer_weights
            else:
                members = members[:, :0]

            # what is the same for all images is shared out by weight
            parts = torch.cat([layers * layer_weights, members], dim=1)
            shares = torch.cat([layer_weights, weights[1 : 1 + members.shape[1]]])
            amounts = (parts + (shift - self.location[0]) * shares / shares.sum()) / self.scale[0]

        scaled = (layers - self.location[1 : 1 + layers.shape[1]]) / self.scale[1 : 1 + layers.shape[1]]
        scores = torch.cat([scaled, z[:, 1:][:, : members.shape[1]]], dim=1)
        names = [f"layer_{name}" for name in self.layout.stage_names]
        names += [score.name for score in self._scores[: members.shape[1]]]
        return {name: (scores[:, i], amounts[:, i]) for i, name in enumerate(names)}

    def _joined(self, measured: Measured) -> tuple[Tensor, Tensor]:
        """What is standardised and joined (B, 1 + members), and the scores of the stages (B, stages)."""
        layers = self.diffusion.standardised(measured.errors)
        return torch.cat([self.diffusion.join(layers)[:, None], measured.members], dim=1), layers

    @torch.no_grad()
    def all_scores(self, features: Tensor) -> dict[str, Tensor]:
        """Rows of features (B, D) -> each of :attr:`scores` (B,) by name."""
        features = features.to(self.mean.device)
        with full_precision(self.mean):
            return {name: score(features) for name, score in self.scores.items()}


def _without_early(heads: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Drop the early network from a state dict of :class:`Heads`, unless the detector's own score needs it."""
    assert isinstance(heads, Heads)
    if heads.head == LikelihoodRegret.name:
        return
    for name in [name for name in state if name.startswith(prefix + _EARLY)]:
        del state[name]


def _check_names(names: Sequence[str], head: str) -> None:
    """Refuse names that stand twice, and a head that is not among them."""
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two scores are called {name!r}: give each a name of its own")
    if head not in (FUSED, *names):
        raise UsageError(
            f"{head!r} stands for several scores, of which none can be the detector's own: join them with head='fused'",
            argument="head",
        )
