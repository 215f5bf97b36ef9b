"""Finds the layer in which a NaN or an infinity arose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_detecting = False


class NonFiniteError(FloatingPointError):
    """A layer gave a NaN or an infinity. ``path`` names it: ``flow.get_submodule(error.path)``."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = path
        self.what = what


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


def call_layer(path: str, layer: nn.Module, x: Any, context: Tensor | None, *, inverse: bool) -> tuple[Any, Tensor]:
    """Runs one direction of a layer, checking its result when detection is on."""
    function: Callable[..., tuple[Any, Tensor]] = layer.inverse if inverse else layer  # type: ignore[assignment]
    if not _detecting:
        return function(x, context)
    direction = f"{type(layer).__name__}.{'inverse' if inverse else 'forward'}"
    _check(path, f"the input of {direction}", x)
    try:
        result, logdet = function(x, context)
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}.{error.path}", error.what) from None
    _check(path, f"the result of {direction}", result)
    _check(path, f"the log-determinant of {direction}", logdet)
    return result, logdet


def _check(path: str, what: str, values: Any) -> None:
    for tensor in values if isinstance(values, (tuple, list)) else (values,):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise NonFiniteError(path, f"{bad} of {tensor.numel()} values of {what} are NaN or infinite")
