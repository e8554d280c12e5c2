"""What a long training run leaves to look at while it goes: the loss at every step, and grids of samples."""

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
_GRID, _STEPS = 4, 25
_COLUMNS = ("step", "epoch", "loss", "val_loss", "lr")


class TrainingLog:
    """``loss.csv`` and ``samples-<step>.png`` in a folder; a run that goes on appends.

    Parameters
    ----------
    folder : Path
        Made when missing.
    pixels, scheduler
        What rows mean, and the schedule of the training.
    seed : decides the noise that samples begin with: grids of one run show the same images getting better
    """

    def __init__(self, folder: Path, pixels: Pixels, scheduler: Any, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.loss = folder, folder / "loss.csv"
        self._pixels, self._scheduler, self._seed = pixels, scheduler, seed
        self._sampled = time.monotonic()
        self._started = False

    def __call__(self, step: Step, state: TrainingState) -> None:
        """Write a step down; at an epoch's end, now and then, draw a grid, and one last of all."""
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
        """Drop lines of steps that a stopped run took after its last checkpoint: they are taken again."""
        kept = []
        if first > 1 and self.loss.exists():
            with self.loss.open(newline="") as file:
                kept = [row for row in list(csv.reader(file))[1:] if row and int(row[0]) < first]
        with self.loss.open("w", newline="") as file:
            csv.writer(file).writerows([list(_COLUMNS), *kept])
        self._started = True

    @torch.inference_mode()
    def sample(self, denoiser: nn.Module, step: int) -> Path:
        """Write a grid of unconditional samples."""
        denoiser.eval()
        device = next(denoiser.parameters()).device
        sources = noise_sources([bytes([i]) for i in range(_GRID**2)], 1, self._seed)
        sampler = make_sampler("ddim", self._scheduler, min(_STEPS, self._scheduler.config.num_train_timesteps))
        nothing = torch.zeros(_GRID**2, self._pixels.channels, self._pixels.size, self._pixels.size, device=device)
        known = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        file = self.folder / f"samples-{step:07d}.png"
        self._grid(inpaint(denoiser, sampler, nothing, known, sources)).save(file)
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
