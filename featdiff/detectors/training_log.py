"""Files to follow a long training run: the loss at every step, and grids of samples."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..diffusion.reconstruction import inpaint
from ..diffusion.schedules import make_sampler, noise_sources
from ..diffusion.training import Step, TrainingState
from ..features.pixels import Pixels

#: Seconds between two grids.
SAMPLE_SECONDS = 60
_GRID = 4  # images a side
_STEPS = 25
_COLUMNS = ("step", "epoch", "loss", "val_loss", "lr")


class TrainingLog:
    """``loss.csv`` and ``samples-<step>.png`` in a folder; a run that goes on appends.

    Parameters
    ----------
    folder : Path
        Created if missing.
    pixels : Pixels
        Shape and range of the images.
    scheduler : diffusers scheduler
        The noise schedule of the training.
    seed : int
        Decides the noise that samples start from: grids of one run show the same images improving.
    """

    def __init__(self, folder: Path, pixels: Pixels, scheduler: Any, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.loss = folder / "loss.csv"
        self._pixels = pixels
        self._scheduler = scheduler
        self._seed = seed
        self._sampled = time.monotonic()
        self._started = False

    def __call__(self, step: Step, state: TrainingState) -> None:
        """Log a step; draw a grid at the end of an epoch, if the last one is a minute old or this is the last step."""
        if not self._started:
            self._begin(step.step)
        with self.loss.open("a", newline="") as file:
            row = [step.step, step.epoch, f"{step.loss:.6g}", _text(step.val_loss), f"{step.lr:.4g}"]
            csv.writer(file).writerow(row)

        if step.val_loss is None:
            return
        if time.monotonic() - self._sampled > SAMPLE_SECONDS or step.step == step.steps:
            self.sample(state.average.module, step.step)
            self._sampled = time.monotonic()

    def _begin(self, first: int) -> None:
        """Drop lines of steps that a stopped run made after its last checkpoint: they are repeated."""
        rows = [list(_COLUMNS)]
        if first > 1 and self.loss.exists():
            with self.loss.open(newline="") as file:
                logged = list(csv.reader(file))[1:]
            rows += [row for row in logged if row and int(row[0]) < first]

        with self.loss.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        self._started = True

    @torch.inference_mode()
    def sample(self, denoiser: nn.Module, step: int) -> Path:
        """Write a grid of unconditional samples: images of which no pixel is known, inpainted."""
        denoiser.eval()
        device = next(denoiser.parameters()).device
        n = _GRID**2
        size = self._pixels.size
        sources = noise_sources([bytes([i]) for i in range(n)], 1, self._seed)
        sampler = make_sampler("ddim", self._scheduler, min(_STEPS, self._scheduler.config.num_train_timesteps))

        blank = torch.zeros(n, self._pixels.channels, size, size, device=device)
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        samples = inpaint(denoiser, sampler, blank, mask, sources)

        file = self.folder / f"samples-{step:07d}.png"
        self._grid(samples).save(file)
        return file

    def _grid(self, images: Tensor) -> Image.Image:
        """(n * n, C, H, W) in [-1, 1] -> one picture."""
        b, c, h, w = images.shape
        side = round(b**0.5)
        values = self._pixels(images.clamp(-1, 1)).cpu()
        tiled = values.reshape(side, side, c, h, w).permute(0, 3, 1, 4, 2).reshape(side * h, side * w, c)
        return Image.fromarray(tiled.squeeze(-1).numpy())


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
