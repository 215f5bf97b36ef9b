"""A figure and its standard error."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inverse_flow.training.metrics import standard_error

RESAMPLES = 20


class Value(NamedTuple):
    """A figure.

    Attributes:
        value: from all the images.
        error: one standard error, as drawing other images would move it.
    """

    value: float
    error: float


def mean_of(values: Tensor) -> Value:
    """The mean of independent values (N,)."""
    values = values.double()
    return Value(float(values.mean()), standard_error(values))


def resampled(figure: Callable[..., float], *sets: Tensor) -> float:
    """The standard deviation of a figure over bootstrap samples of the rows of each set, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def again(rows: Tensor) -> Tensor:
        return rows[torch.randint(len(rows), (len(rows),), generator=generator)]

    return float(torch.tensor([figure(*map(again, sets)) for _ in range(RESAMPLES)], dtype=torch.float64).std())
