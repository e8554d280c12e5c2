"""The local score: how strange the strangest places of a picture are, from maps of features before pooling.

A defect that covers one percent of a picture hardly moves its pooled features. So small denoisers, each shared by all
places of a picture, reconstruct what every place looks like, and the mean of the worst few percent is the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.fit import fit_denoiser
from ..diffusion.lfdn import LFDN
from ..diffusion.reconstruction import reconstruct
from ..diffusion.schedules import draw_noise, make_scheduler
from ..diffusion.training import Recipe
from ..runtime.progress import Progress, part_of
from ..runtime.randomness import seeded
from .diffusion import full_precision
from .fusion import log

#: Share of the places of a picture that make its score.
TOP = 0.03
#: How the places' denoisers are trained.
RECIPE = Recipe(
    epochs=1, batch_size=512, learning_rate=2e-3, weight_decay=1e-3, min_steps=1000, max_steps=1000, patience=1000
)
# Dimensions that a denoiser sees of each layer, its hidden width, blocks, start time and stored noise draws.
_DIMENSIONS = 32
_HIDDEN = 64
_BLOCKS = 2
_START = 60
_DRAWS = 1
# Squares over a picture, each with a mean and a deviation of its own.
_GRID = 16
# Standard deviations of a square count as at least this share of the mean one: few images say little about each.
_LEAST_DEVIATION = 0.5
_TINY = 1e-6


class View(nn.Module):
    """One way to look at places, and a denoiser that knows what normal ones look like.

    The maps of each layer are smoothed over 3 x 3 places, brought to the finest map's size, and cut down to their
    principal directions, of which a denoiser reconstructs the noised values. Its squared error, and the energy outside
    those directions, say how strange a place is.

    Parameters
    ----------
    channels : sequence of int
        Of the maps, the finest first.
    contrast : bool
        Whether each channel is brought to mean 0 and deviation 1 over the picture first. Then exposure and gain do not
        count, and neither does what the whole picture has in common.
    seed : int
        Decides the initial weights, the noise and the order of training.
    """

    noise: Tensor
    scale: Tensor

    def __init__(self, channels: Sequence[int], contrast: bool, seed: int) -> None:
        super().__init__()
        self.contrast = contrast
        self.seed = seed
        widths = [min(_DIMENSIONS, count) for count in channels]
        for i, (count, width) in enumerate(zip(channels, widths, strict=True)):
            self.register_buffer(f"mean_{i}", torch.zeros(count))
            self.register_buffer(f"basis_{i}", torch.zeros(count, width))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("noise", draw_noise(_DRAWS, sum(widths), seed))
        self.scheduler = make_scheduler()
        with seeded(seed):
            self.denoiser = LFDN(sum(widths), _HIDDEN, _BLOCKS)
        self.requires_grad_(False).eval()

    def prepare(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Smoothed maps (B, C, h, w) of each layer -> the same, as this view sees them."""
        return [_normalised(values) for values in maps] if self.contrast else list(maps)

    def fit(self, places: Sequence[Tensor], checkpoint: Path | None = None, progress: Progress | None = None) -> None:
        """Learn what normal places look like.

        Parameters
        ----------
        places : sequence of Tensors of shape (n, C)
            Of each layer, prepared, at the same n places of normal images.
        checkpoint : Path, optional
            File in which the training is kept.
        progress : callable (stage, done, total), optional
        """
        vectors = []
        for i, values in enumerate(places):
            values = values.float()
            mean, basis = _principal(values, self._get("basis", i).shape[1])
            self._get("mean", i).copy_(mean)
            self._get("basis", i).copy_(basis)
            vectors.append((values - mean) @ basis)
        rows = torch.cat(vectors, dim=1)
        self.scale.copy_(rows.square().mean().sqrt().clamp_min(_TINY))
        self._train(rows / self.scale, RECIPE, checkpoint, progress)

    def fit_further(self, places: Sequence[Tensor], recipe: Recipe, progress: Progress | None = None) -> None:
        """Train on from where the denoiser is, on places of older and further images; directions and scale stay.

        Parameters
        ----------
        places : sequence of Tensors of shape (n, C)
            As for :meth:`fit`.
        recipe : Recipe
        progress : callable (stage, done, total), optional
        """
        vectors = [(values.float() - self._get("mean", i)) @ self._get("basis", i) for i, values in enumerate(places)]
        self._train(torch.cat(vectors, dim=1) / self.scale, recipe, None, progress)

    def _train(self, rows: Tensor, recipe: Recipe, checkpoint: Path | None, progress: Progress | None) -> None:
        fit_denoiser(
            self.denoiser,
            self.scheduler,
            lambda indices: rows[torch.from_numpy(indices)],
            len(rows),
            rows[::20],
            recipe,
            self.seed,
            checkpoint,
            progress,
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Smoothed maps (B, C, h, w), the finest first -> logarithms of errors (B, h, w) on the grid of the finest."""
        vectors = []
        rests = []
        size = maps[0].shape[2:]
        for i, values in enumerate(self.prepare(maps)):
            centred = values.movedim(1, -1) - self._get("mean", i)
            vector = centred @ self._get("basis", i)
            rest = (centred.square().sum(-1) - vector.square().sum(-1)).clamp_min(0)
            vectors.append(_resized(vector.movedim(-1, 1), size))
            rests.append(_resized(rest[:, None], size))

        rows = torch.cat(vectors, dim=1).movedim(1, -1) / self.scale
        flat = rows.flatten(0, 2)
        found = reconstruct(self.denoiser, self.scheduler, flat, self.noise, _START).mean(1)
        errors = (found - flat).square().sum(-1).unflatten(0, rows.shape[:3])
        rest = torch.cat(rests, dim=1).sum(1) / self.scale.square()
        return log(errors + rest)

    def _get(self, name: str, layer: int) -> Tensor:
        return getattr(self, f"{name}_{layer}")


class Local(nn.Module):
    """Maps of features -> where a picture is strange, and how strange the strangest places are.

    Two views, of the maps as they are and of their contrast (:class:`View`), each standardised by what held-out normal
    images have at the same place of the picture. The stranger of both counts.

    Parameters
    ----------
    channels : sequence of int
        Of the maps, the finest first.
    seed : int, default 0

    Attributes
    ----------
    mean, deviation : Tensors of shape (views, 16, 16)
        Of log errors over squares of the picture, from normal images that trained nothing.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        views = [View(channels, contrast, seed) for contrast in (False, True)]
        self.views: Sequence[View] = nn.ModuleList(views)  # type: ignore[assignment]
        self.register_buffer("mean", torch.zeros(len(views), _GRID, _GRID))
        self.register_buffer("deviation", torch.ones(len(views), _GRID, _GRID))

    # ---- fit ----

    @torch.inference_mode()
    def sample(self, maps: Sequence[Tensor], count: int, seeds: Sequence[int]) -> list[list[Tensor]]:
        """What each view sees at random places of normal images, to be trained on.

        Parameters
        ----------
        maps : sequence of Tensors of shape (B, C, h, w)
        count : int
            Places of each image; all if it has fewer.
        seeds : sequence of B int
            Which places of an image are taken follows from its seed alone.

        Returns
        -------
        list of list of Tensors of shape (B * count, C)
            By view and layer, bfloat16: half the memory, and no number is too large for it.
        """
        maps = _smoothed(maps)
        height, width = maps[0].shape[2:]
        places = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            places.append(torch.randperm(height * width, generator=generator)[:count])
        taken = torch.stack(places).to(maps[0].device)

        found = []
        for view in self.views:
            layers = [_resized(values, (height, width)).flatten(2) for values in view.prepare(maps)]
            found.append([_at(values, taken).bfloat16().cpu() for values in layers])
        return found

    def fit(
        self, places: Sequence[Sequence[Tensor]], checkpoint: Path | None = None, progress: Progress | None = None
    ) -> None:
        """Train the views on :meth:`sample` of normal images, end to end.

        Parameters
        ----------
        places : sequence of sequences of Tensors of shape (n, C)
            By view and layer.
        checkpoint : Path, optional
            File in which the training is kept; each view adds its number to the name.
        progress : callable (stage, done, total), optional
        """
        for number, (view, values) in enumerate(zip(self.views, places, strict=True)):
            file = checkpoint and checkpoint.with_name(f"{checkpoint.stem}-{number}{checkpoint.suffix}")
            view.fit(values, file, part_of(progress, number, len(self.views)))

    def fit_further(self, places: Sequence[Sequence[Tensor]], recipe: Recipe, progress: Progress | None = None) -> None:
        """Train the views on from where they are; see :meth:`View.fit_further`. ``places`` as for :meth:`fit`."""
        for number, (view, values) in enumerate(zip(self.views, places, strict=True)):
            view.fit_further(values, recipe, part_of(progress, number, len(self.views)))

    @torch.inference_mode()
    def errors(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, h, w) of each layer -> log errors (B, views, h, w), not yet standardised."""
        with full_precision(self.mean):
            smoothed = _smoothed(maps)
            return torch.stack([view(smoothed) for view in self.views], dim=1)

    @torch.inference_mode()
    def fit_statistics(self, errors: Sequence[Tensor]) -> None:
        """Set what places are standardised with.

        Parameters
        ----------
        errors : sequence of Tensors of shape (views, h, w)
            :meth:`errors` of normal images that trained nothing, at least one.
        """
        squares = _squares(errors)
        self._set_statistics(squares.mean(0), squares.std(0, correction=0))

    @torch.inference_mode()
    def fit_statistics_further(
        self, older: Local, pairs: Sequence[tuple[Tensor, Tensor]], fresh: Sequence[Tensor], share: float
    ) -> None:
        """Set them for older and further images, where the denoisers were trained on.

        What the older score has is kept, for few images tell so much less: it is only moved by what training on has
        changed, which a few older images show exactly. Then the further images are mixed in.

        Parameters
        ----------
        older : Local
        pairs : sequence of pairs of Tensors of shape (views, h, w)
            Errors of older images, by the older denoisers and by these.
        fresh : sequence of Tensors of shape (views, h, w)
            Errors of further images that trained nothing, at least one.
        share : float
            Of further images among all.
        """
        place = self.mean.device
        before, after = (_squares(errors).to(place) for errors in zip(*pairs, strict=True))
        squares = _squares(fresh).to(place)
        parts = [
            (1 - share, older.mean.to(place) + (after - before).mean(0), older.deviation.to(place)),
            (share, squares.mean(0), squares.std(0, correction=0)),
        ]
        mean = sum((weight * own for weight, own, _ in parts), torch.zeros_like(self.mean))
        variance = sum(
            (weight * (deviation.square() + (own - mean).square()) for weight, own, deviation in parts),
            torch.zeros_like(self.mean),
        )
        self._set_statistics(mean, variance.sqrt())

    def _set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        usual = deviation.square().mean((1, 2), keepdim=True).sqrt()
        self.mean.copy_(mean)
        self.deviation.copy_(torch.maximum(deviation, _LEAST_DEVIATION * usual).clamp_min(_TINY))

    # ---- score ----

    @torch.inference_mode()
    def standardised(self, errors: Tensor) -> Tensor:
        """:meth:`errors` (B, views, h, w) -> heat (B, h, w), in standard deviations of normal images at that place."""
        size = errors.shape[2:]
        z = (errors - _resized(self.mean[None], size)) / _resized(self.deviation[None], size)
        return z.amax(1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps of features -> the score of each image, and of each of its places.

        Parameters
        ----------
        maps : sequence of Tensors of shape (B, C, h, w)
            Of each layer, the finest first.

        Returns
        -------
        score : Tensor of shape (B,)
        heat : Tensor of shape (B, h, w)
            In standard deviations of normal images at the same place. Both higher = more OOD.
        """
        heat = self.standardised(self.errors(maps))
        return worst(heat), heat


def worst(heat: Tensor, share: float = TOP) -> Tensor:
    """The mean of the largest values of each map.

    Parameters
    ----------
    heat : Tensor of shape (B, h, w)
    share : float, default 0.03
        Of all places; at least one counts.

    Returns
    -------
    Tensor of shape (B,)

    Examples
    --------
    >>> worst(torch.tensor([[[1.0, 5.0], [3.0, 2.0]]]), share=0.5)
    tensor([4.])
    """
    values = heat.flatten(1).sort(dim=1, descending=True).values
    # the last place that counts may count in part, for sizes of maps differ a little
    counted = (share * torch.ones_like(values[0]).sum()).clamp_min(1)
    weights = (counted - torch.arange(values.shape[1], device=heat.device)).clamp(0, 1)
    return (values * weights).sum(1) / weights.sum()


def _squares(errors: Sequence[Tensor]) -> Tensor:
    """Log errors (views, h, w) of images -> means over squares of the picture (n, views, 16, 16)."""
    return torch.stack([_resized(values[None], (_GRID, _GRID))[0] for values in errors])


def _smoothed(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, C, h, w) -> their means over 3 x 3 places."""
    return [F.avg_pool2d(values.float(), 3, 1, 1, count_include_pad=False) for values in maps]


def _normalised(values: Tensor) -> Tensor:
    """Each channel of maps (B, C, h, w) to mean 0 and deviation 1 over the picture; an even one to 0."""
    values = values - values.mean((2, 3), keepdim=True)
    deviation = values.square().mean((2, 3), keepdim=True).sqrt()
    usual = deviation.square().mean(1, keepdim=True).sqrt()
    return values / (deviation + 0.1 * usual + _TINY)


def _principal(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and the directions of largest variance (C, count) of vectors (n, C)."""
    mean = values.mean(0)
    centred = values - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(values))
    return mean, vectors[:, -count:].flip(1)


def _resized(values: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) of another size."""
    if values.shape[2:] == tuple(size):
        return values
    return F.interpolate(values, tuple(size), mode="bilinear", align_corners=False)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """(B, C, N) at places (B, n) -> (B * n, C)."""
    index = places[:, None].expand(-1, values.shape[1], -1)
    return values.gather(2, index).movedim(1, 2).flatten(0, 1)
