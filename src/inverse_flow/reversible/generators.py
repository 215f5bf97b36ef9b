"""Sources of random numbers, PyTorch's, Python's and NumPy's, whose states can be read and set."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

KINDS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


def of_torch(device: torch.device) -> list[Any]:
    """PyTorch's own: of the CPU and, outside of graph capture, which forbids it, of the device."""
    found = [torch.default_generator]
    if device.type == "cuda" and not is_capturing(device):
        index = torch.cuda.current_device() if device.index is None else device.index
        found.append(torch.cuda.default_generators[index])
    return found


def of_others() -> list[Any]:
    """Python's and NumPy's."""
    return [random._inst, np.random.mtrand._rand]


def may_use_others(modules: Iterable[nn.Module]) -> bool:
    """Whether a module may draw from :func:`of_others`: PyTorch's and ours do not, unless their hooks do.

    It is asked since reading these states takes longer than a small layer.
    """
    return any(
        type(m).__module__.partition(".")[0] not in ("torch", "inverse_flow")
        or m._forward_hooks
        or m._forward_pre_hooks
        for m in modules
    )


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
