"""The training batches, a function of the step; and the random streams that make them so."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inverse_flow.training.config import TrainConfig
from inverse_flow.training.dequantization import dequantize

# The streams of a run; their numbers are part of what makes a run repeatable.
ORDER, NOISE, FLIP, EVALUATION, SAMPLES, VALIDATION = range(6)


def generator(seed: int, stream: int, index: int = 0) -> torch.Generator:
    """A CPU generator for element ``index`` of a stream, whatever was drawn before: a run resumed at any step draws
    what it would have drawn.
    """
    words = np.random.SeedSequence([seed, stream, index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


class Batches:
    """Dequantized batches of uint8 images.

    The batch of a step depends on the seed and the step alone, so that a resumed run sees the batches that an uncut
    one would have seen. Every epoch has its own order; images that do not fill a last batch are left out of it.

    Args:
        images: (N, C, H, W), uint8.
        config: batch size, bit depth, flips and seed.
        context: one row per image, for a conditional model.
    """

    def __init__(self, images: Tensor, config: TrainConfig, context: Tensor | None = None) -> None:
        if not len(images):
            raise ValueError("there are no images to train on")
        if context is not None and len(context) != len(images):
            raise ValueError(f"the context must have one row per image: {len(images)}, got {len(context)}")
        self.images = images
        self.all_context = context
        self.config = config
        self.batch_size = min(config.batch_size, len(images))
        self.per_epoch = len(images) // self.batch_size

    def epoch(self, step: int) -> int:
        return step // self.per_epoch

    def rows(self, step: int) -> Tensor:
        """Which of the images are the batch of a step."""
        epoch, position = divmod(step, self.per_epoch)
        order = torch.randperm(len(self.images), generator=generator(self.config.seed, ORDER, epoch))
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def context(self, step: int) -> Tensor | None:
        """The context of a step's images; None if there is none."""
        return None if self.all_context is None else self.all_context[self.rows(step)]

    def __call__(self, step: int) -> Tensor:
        """The dequantized images of a step, in float32."""
        seed = self.config.seed
        batch = self.images[self.rows(step)]
        if self.config.flip:
            mirrored = torch.rand(len(batch), generator=generator(seed, FLIP, step)) < 0.5
            batch = torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch)
        return dequantize(batch, self.config.bit_depth, generator(seed, NOISE, step))
