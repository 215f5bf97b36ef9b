"""Samples of a trained model, and samples along the way."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inverse_flow.models import ImageFlow
from inverse_flow.training import figures, seeding
from inverse_flow.training.conditioning import context_of_samples
from inverse_flow.training.engine import Trainer
from inverse_flow.training.log import StepReport
from inverse_flow.training.tensorboard import TensorBoardLog

FOLDER = "samples"
NPZ = ".npz"
# Samples at a time.
BATCH = 256
PICTURED = figures.SAMPLE_COLUMNS**2


class Drawn(NamedTuple):
    """Samples with their densities.

    Attributes:
        images: (N, C, H, W), floats in about [0, 1).
        log_probs: (N,), log p in nats on that interval, at temperature 1 whatever that of the samples.
        labels: (N,), of a conditional model; None of another.
    """

    images: Tensor
    log_probs: Tensor
    labels: Tensor | None


@torch.no_grad()
def draw(
    model: ImageFlow, count: int, seed: int, *, classes: int = 0, label: int | None = None, temperature: float = 1.0
) -> Drawn:
    """Samples that the seed decides, on the CPU; of a conditional model, of one class or of the classes in turn.

    Raises:
        ValueError: a label that the model does not know.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seeding.generator(seed, seeding.SAMPLES).initial_seed())
    context = context_of_samples(classes, count, label)
    found = []
    for start in range(0, count, BATCH):
        rows = slice(start, min(count, start + BATCH))
        given = None if context is None else context[rows].to(device)
        size = rows.stop - rows.start
        found.append(model.sample_and_log_prob(size, given, temperature, generator=generator))
    images, log_probs = (torch.cat([pair[i].cpu() for pair in found]) for i in range(2))
    return Drawn(images, log_probs, None if context is None else context.argmax(1))


def save_npz(path: Path, drawn: Drawn) -> None:
    """Writes ``x``, (N, H, W, C) in uint8, ``log_prob``, (N,) in nats, and with labels ``y``.

    ``inverse_flow.data.load`` reads such a file.
    """
    images, log_prob = figures.to_uint8(drawn.images).permute(0, 2, 3, 1).numpy(), drawn.log_probs.numpy()
    if drawn.labels is None:
        np.savez(path, x=images, log_prob=log_prob)
    else:
        np.savez(path, x=images, log_prob=log_prob, y=drawn.labels.numpy())


class SampleGrids:
    """Writes ``samples/<step>.png`` every so many steps: the averaged weights on the same latents each time.

    Args:
        trainer: whose model is sampled.
        folder: of the run.
        every: steps between two pictures.
        board: that gets the pictures too.
    """

    def __init__(self, trainer: Trainer, folder: Path, every: int, board: TensorBoardLog | None = None) -> None:
        self.trainer = trainer
        self.folder = folder / FOLDER
        self.every = every
        self.board = board

    def __call__(self, report: StepReport) -> None:
        if report.step % self.every:
            return
        model, classes = self.trainer.averaged.model, int(self.trainer.extra.get("classes", 0))
        samples = figures.to_uint8(draw(model, PICTURED, self.trainer.config.seed, classes=classes).images)
        self.folder.mkdir(parents=True, exist_ok=True)
        figures.save_samples(self.folder / f"{report.step:06}.png", samples, title=f"step {report.step}")
        if self.board:
            self.board.image(torch.from_numpy(figures.tile(samples)), report.step)
