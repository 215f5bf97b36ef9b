"""Which images are held out, where the data's maker did not say."""

from __future__ import annotations

import torch
from torch import Tensor


def held_out(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many of N images drawn at random, of each class alike: (N,), bool.

    The images are shuffled, put in order of their classes, and taken at even distances from a random first one on: so
    each class gives its share, rounded up or down.

    Args:
        labels: (N,), int64, with N at least 1.
        count: how many are taken, at most N.
        generator: of the random order, on the CPU.
    """
    total = len(labels)
    shuffled = torch.randperm(total, generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    first = torch.randint(total, (), generator=generator)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[by_class[(first + total * torch.arange(count)) // count]] = True
    return chosen
