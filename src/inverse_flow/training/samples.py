"""Samples of a trained model, and samples along the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inverse_flow.models import ImageFlow
from inverse_flow.training import figures
from inverse_flow.training.batches import SAMPLES, generator
from inverse_flow.training.files import replacing
from inverse_flow.training.labels import context_of_samples
from inverse_flow.training.log import StepReport, TensorBoardLog
from inverse_flow.training.metrics import Watch, unwatched
from inverse_flow.training.trainer import Trainer

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
    model: ImageFlow,
    count: int,
    seed: int,
    *,
    classes: int = 0,
    label: int | None = None,
    temperature: float = 1.0,
    watch: Watch = unwatched,
) -> Drawn:
    """Samples that the seed decides, on the CPU; of a conditional model, of one class or of the classes in turn.
    ``watch`` is told how far it has come.

    Raises:
        ValueError: a label that the model does not know.
    """
    device = next(model.parameters()).device
    latents = torch.Generator(device).manual_seed(generator(seed, SAMPLES).initial_seed())
    context = context_of_samples(classes, count, label)
    found = []
    for start in range(0, count, BATCH):
        rows = slice(start, min(count, start + BATCH))
        given = None if context is None else context[rows].to(device)
        size = rows.stop - rows.start
        found.append(model.sample_and_log_prob(size, given, temperature, generator=latents))
        watch(rows.stop, count)
    images, log_probs = (torch.cat([pair[i].cpu() for pair in found]) for i in range(2))
    return Drawn(images, log_probs, None if context is None else context.argmax(1))


def save_npz(path: Path, drawn: Drawn, class_names: tuple[str, ...] = ()) -> None:
    """Writes ``x``, (N, H, W, C) in uint8, ``log_prob``, (N,) in nats, and with labels ``y`` and ``class_names``.

    ``inverse_flow.data.load`` reads such a file.
    """
    images, log_prob = figures.to_uint8(drawn.images).permute(0, 2, 3, 1).numpy(), drawn.log_probs.numpy()
    labels: dict[str, Any] = {} if drawn.labels is None else {"y": drawn.labels.numpy()}
    if class_names:
        labels["class_names"] = np.array(class_names)
    with replacing(path) as unfinished:
        np.savez(unfinished, x=images, log_prob=log_prob, **labels)


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
        model, data = self.trainer.averaged_model, self.trainer.data
        classes = data.classes if data else 0
        samples = figures.to_uint8(draw(model, PICTURED, self.trainer.config.seed, classes=classes).images)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{report.step:06}.png") as path:
            figures.save_samples(path, samples, title=f"step {report.step}")
        if self.board:
            self.board.image(torch.from_numpy(figures.tile(samples)), report.step)
