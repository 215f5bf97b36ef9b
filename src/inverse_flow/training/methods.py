"""The method that a configuration asks for."""

from __future__ import annotations

from functools import partial

from inverse_flow.parts.method import ByParts
from inverse_flow.training.batches import Batches
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.method import EndToEnd, MethodFactory


def of(config: TrainConfig, batches: Batches) -> MethodFactory:
    """By parts if the configuration has settings for it, else end to end."""
    return EndToEnd if config.parts is None else partial(ByParts, batches=batches)
