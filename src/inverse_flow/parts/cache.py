"""The outputs of parts that do not change, computed once for all the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inverse_flow.parts.split import Carried, Part, run_frozen
from inverse_flow.training import Batches, TrainConfig, dequantize
from inverse_flow.training.batches import generator
from inverse_flow.training.method import autocast
from inverse_flow.training.metrics import EVALUATION_BATCH

# Random streams of their own, beyond those of a run.
FROZEN_NOISE, FROZEN_FLIP = 100, 101


class FrozenOutputs:
    """What frozen parts make of every training image, in the memory of the CPU.

    A flow is a bijection, so that an image takes as much room as its D values in float32, and one more number, however
    many parts lie behind: 3.1 kB for 28 × 28, 188 MB for 60,000 of them.

    The dequantization noise and the mirroring of an image are drawn once, as a function of the seed and ``draw`` alone:
    computing the outputs again, as a resumed run must, gives the same ones.

    Args:
        parts: the frozen ones, from the first on.
        batches: whose images, contexts and flips they are.
        config: seed, bit depth and precision.
        draw: which noise and which flips.
    """

    def __init__(self, parts: Sequence[Part], batches: Batches, config: TrainConfig, draw: int) -> None:
        self.draw = draw
        device = next(parts[0].flow.parameters()).device
        noise = generator(config.seed, FROZEN_NOISE, draw)
        coins = generator(config.seed, FROZEN_FLIP, draw)
        chunks = []
        for rows in torch.arange(len(batches.images)).split(EVALUATION_BATCH):
            images = batches.images[rows]
            if config.flip:
                mirrored = torch.rand(len(images), generator=coins) < 0.5
                images = torch.where(mirrored.view(-1, *[1] * (images.dim() - 1)), images.flip(-1), images)
            context = None if batches.all_context is None else batches.all_context[rows].to(device)
            with autocast(config, device):
                carried = run_frozen(parts, dequantize(images, config.bit_depth, noise).to(device), context)
            chunks.append(carried.map(Tensor.cpu))
        self.carried = Carried(
            torch.cat([chunk.x for chunk in chunks]),
            tuple(map(torch.cat, zip(*(chunk.latents for chunk in chunks), strict=True))),
            torch.cat([chunk.logdet for chunk in chunks]),
        )

    def __call__(self, rows: Tensor) -> Carried:
        """The outputs of the images in these rows."""
        return self.carried.map(lambda values: values[rows])

    @property
    def bytes(self) -> int:
        """Memory that the outputs take."""
        return sum(values.nbytes for values in (self.carried.x, *self.carried.latents, self.carried.logdet))
