"""Finds the layer in which a NaN or an infinity arose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_detecting = False


class NonFiniteError(FloatingPointError):
    """A layer gave a NaN or an infinity. ``path`` names it: ``flow.get_submodule(error.path)``, of a
    :class:`~inverse_flow.models.ConditionalFlow` that of its ``flow``."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)  # all arguments, which is what pickle makes it from again
        self.path = path
        self.what = what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@contextmanager
def detect_nonfinite() -> Iterator[None]:
    """Within it, flows check the result of every layer and raise :class:`NonFiniteError` naming the first bad one.

    Off by default, since each check waits for the device.
    """
    global _detecting
    before, _detecting = _detecting, True
    try:
        yield
    finally:
        _detecting = before


def is_detecting() -> bool:
    """Whether the code runs within :func:`detect_nonfinite`."""
    return _detecting


def check_finite(path: str, what: str, values: Any) -> None:
    """Refuses a tensor, or several, with a NaN or an infinity."""
    for tensor in values if isinstance(values, (tuple, list)) else (values,):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise NonFiniteError(path, f"{bad} of {tensor.numel()} values of {what} are NaN or infinite")
