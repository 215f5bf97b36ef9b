"""The gains of a model's inverse convolutions, as a run watches them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from inverse_flow.models import ImageFlow
from inverse_flow.stability import gains, largest


def largest_gain(model: ImageFlow, context: Tensor | None = None) -> tuple[str, float] | None:
    """The path and the gain of the inverse convolution with the largest one. None if there is none, or if a layer of
    one's own cannot run without values, by which :func:`gains` finds the sizes of image: a run goes on without.
    """
    try:
        return largest(gains(model, model.event_shape, context))
    except (RuntimeError, TypeError, ValueError):
        return None


@contextmanager
def naming_largest_gain(model: ImageFlow, context: Tensor | None = None) -> Iterator[None]:
    """Within it, the error of a value that is not finite also says which inverse convolution has the largest gain."""
    try:
        yield
    except FloatingPointError as error:
        found = largest_gain(model, context)
        if found is None or not error.args:
            raise
        *where, what = error.args
        path, gain = found
        raise type(error)(*where, f"{what}; the largest gain is {gain:.3g}, of {path}") from error
