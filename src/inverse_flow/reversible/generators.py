"""Sources of random numbers, PyTorch's, Python's and NumPy's, whose states can be read and set."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


def shared(device: torch.device) -> list[Any]:
    """Those of the whole program: of the CPU and, outside of graph capture, which forbids it, of the device."""
    found = [torch.default_generator, random._inst, np.random.mtrand._rand]
    if device.type == "cuda" and not is_capturing(device):
        index = torch.cuda.current_device() if device.index is None else device.index
        found.append(torch.cuda.default_generators[index])
    return found


def states(sources: Iterable[Any]) -> list[Any]:
    """The state of each source."""
    return [_state(source) for source in sources]


def set_states(sources: Iterable[Any], states: Iterable[Any]) -> None:
    """Puts each source into its state."""
    for source, state in zip(sources, states, strict=True):
        if isinstance(source, random.Random):
            source.setstate(state)
        elif isinstance(source, np.random.Generator):
            source.bit_generator.state = state
        else:
            source.set_state(state)


def are_equal(first: Any, second: Any) -> bool:
    """Whether two states, or two lists of them, are the same."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, dict):
        return are_equal([*first.values()], [*second.values()])
    if isinstance(first, list):
        return all(map(are_equal, first, second))
    return bool(first == second)


def is_capturing(device: torch.device) -> bool:
    """Whether what runs on the device now is captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _state(source: Any) -> Any:
    if isinstance(source, random.Random):
        return source.getstate()
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.get_state(legacy=False) if isinstance(source, np.random.RandomState) else source.get_state()
