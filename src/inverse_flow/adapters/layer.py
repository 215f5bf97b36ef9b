"""What every adapter asks of a layer."""

from __future__ import annotations

from torch import nn

from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible.layer import check_layers, output_shape, splits_off_latent

IMAGE_AXES = 2


def flattened(layer: nn.Module) -> nn.Module:
    """The layer; of a flow, its ``flatten()``.

    Raises:
        TypeError: no layer.
    """
    (found,) = check_layers([layer.flatten() if hasattr(layer, "latent_shapes") else layer])  # type: ignore[operator]
    return found


def tensor_layer(layer: nn.Module) -> nn.Module:
    """The layer, from one tensor to one tensor; of a flow, its ``flatten()``.

    Raises:
        TypeError: no layer, or one that splits off a latent.
    """
    found = flattened(layer)
    if splits_off_latent(found):
        raise TypeError(f"{type(found).__name__} gives a latent of its own: put it into a Flow, which has one tensor")
    return found


def event_dims(layer: nn.Module, event_dim: int | None) -> tuple[int, int]:
    """How many dimensions one example has, as data and as latents.

    Of the data they are ``event_dim`` if given; else those of the flow's events; else a channel and the axes that one
    of its modules was built for; else those of images, three.
    """
    if event_dim is not None:
        check_integer("event_dim", event_dim)
    shape = getattr(layer, "event_shape", None)
    if shape is not None:
        if event_dim not in (None, len(shape)):
            raise ValueError(f"the events of this flow are {tuple(shape)}, of event_dim {len(shape)}, got {event_dim}")
        return len(shape), len(output_shape(layer, shape))
    if event_dim is None:
        axes = (getattr(module, "dimensions", None) for module in layer.modules())
        event_dim = 1 + next((count for count in axes if isinstance(count, int)), IMAGE_AXES)
    return event_dim, event_dim
