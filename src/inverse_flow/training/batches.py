"""The training batches: a function of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from inverse_flow.training import seeding
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.metrics import dequantize


class Batches:
    """Dequantized batches of uint8 images.

    The batch of a step depends on the seed and the step alone, so that a resumed run sees the batches that an uncut
    one would have seen. Every epoch has its own order; images that do not fill a last batch are left out of it.
    """

    def __init__(self, images: Tensor, config: TrainConfig) -> None:
        if not len(images):
            raise ValueError("there are no images to train on")
        self.images = images
        self.config = config
        self.batch_size = min(config.batch_size, len(images))
        self.per_epoch = len(images) // self.batch_size

    def epoch(self, step: int) -> int:
        return step // self.per_epoch

    def __call__(self, step: int) -> Tensor:
        seed = self.config.seed
        epoch, position = divmod(step, self.per_epoch)
        order = torch.randperm(len(self.images), generator=seeding.generator(seed, seeding.ORDER, epoch))
        batch = self.images[order[position * self.batch_size : (position + 1) * self.batch_size]]
        if self.config.flip:
            mirrored = torch.rand(len(batch), generator=seeding.generator(seed, seeding.FLIP, step)) < 0.5
            batch = torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch)
        return dequantize(batch, self.config.bit_depth, seeding.generator(seed, seeding.NOISE, step))
