"""Which images are held out, where the data's maker did not say."""

from __future__ import annotations

import torch
from torch import Tensor


def held_out(labels: Tensor, every: int, generator: torch.Generator) -> Tensor:
    """Every so many'th of N images drawn at random, of each class alike: (N,), bool.

    The images are shuffled, put in order of their classes, and every ``every``-th is taken from a random first one on:
    so each class gives its share, rounded up or down, and so do all of them together. At least one image is taken.

    Args:
        labels: (N,), int64, with N at least 1.
        every: one of how many is taken.
        generator: of the random order, on the CPU.
    """
    count = len(labels)
    shuffled = torch.randperm(count, generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    first = int(torch.randint(min(every, count), (), generator=generator))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[by_class[first::every]] = True
    return chosen
