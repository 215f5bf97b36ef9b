"""Layers in FrEIA, and FrEIA's modules as layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inverse_flow.adapters.layer import flattened
from inverse_flow.flows import Compose
from inverse_flow.flows.base import zero_logdet
from inverse_flow.reversible.layer import Shape, call_layer, output_shape, splits_off_latent


class FreiaModule(nn.Module):
    """A layer with the interface of ``FrEIA.modules.InvertibleModule``: tuples of tensors, and ``rev`` for the inverse.

    A layer that splits off a latent has two outputs.

    Args:
        layer: the layer.
        dims_in: the shape of its one input.
        dims_c: the shapes of its conditions.

    Raises:
        ValueError: more inputs than one; conditions that the layer has no use for; other numbers of tensors.
    """

    def __init__(self, layer: nn.Module, dims_in: Iterable[Shape], dims_c: Iterable[Shape] | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.dims_in = [tuple(shape) for shape in dims_in]
        self.dims_c = [tuple(shape) for shape in dims_c or ()]
        if len(self.dims_in) != 1:
            raise ValueError(f"{type(layer).__name__} has one input, got the shapes {self.dims_in}")

    def forward(
        self, x_or_z: Iterable[Tensor], c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """(results, log-determinant of the direction). It costs nothing extra, so it is given without ``jac`` too."""
        given, conditions = tuple(x_or_z), list(c or ())
        joins = rev and splits_off_latent(self.layer)
        if len(given) != 1 + joins or len(conditions) != len(self.dims_c):
            raise ValueError(
                f"{type(self.layer).__name__} takes {1 + joins} tensor(s) and {len(self.dims_c)} condition(s) here, "
                f"got {len(given)} and {len(conditions)}"
            )
        # As FrEIA's own blocks see several conditions.
        context = torch.cat(conditions, dim=1) if conditions else None
        x = given if joins else given[0]
        result, logdet = call_layer(type(self.layer).__name__, self.layer, x, context, inverse=rev)
        return (result,) if isinstance(result, Tensor) else tuple(result), logdet

    def output_dims(self, input_dims: Sequence[Shape]) -> list[Shape]:
        """Shapes of the outputs for an input of this shape."""
        shape = tuple(input_dims[0])
        latents = [self.layer.latent_shape(shape)] if splits_off_latent(self.layer) else []  # type: ignore[operator]
        return [output_shape(self.layer, shape), *latents]


class FreiaLayer(nn.Module):
    """A module of FrEIA with one input and one output as a layer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @property
    def uses_context(self) -> bool:
        """Whether the module has a condition."""
        return bool(self.module.dims_c)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, rev=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, rev=True)

    def _run(self, x: Tensor, context: Tensor | None, *, rev: bool) -> tuple[Tensor, Tensor]:
        conditions: dict[str, Any] = {}
        if self.uses_context:
            if context is None:
                raise ValueError(f"{type(self.module).__name__} has a condition, and no context was given")
            conditions["c"] = [context]
        result, logdet = self.module((x,), rev=rev, jac=True, **conditions)
        if not isinstance(result, Tensor):
            if len(result) != 1:
                raise ValueError(f"a layer has one output, {type(self.module).__name__} gives {len(result)}")
            (result,) = result
        return result, zero_logdet(x) + logdet  # some modules give a number


def to_freia(layer: nn.Module) -> Callable[..., FreiaModule]:
    """A layer or a flow as a class of modules for FrEIA, from data to latents.

    ``inn.append(to_freia(layer))`` on a ``SequenceINN``, ``Node(input, to_freia(layer), {})`` in a ``GraphINN``: both
    call it with the shapes that come in. Conditions are the layer's context, several of them concatenated along the
    channels. A :class:`~inverse_flow.flows.Split` is a node with two outputs.

    Args:
        layer: a layer; or a flow, whose latents are flattened to one vector an example.

    Returns:
        ``build(dims_in, dims_c=None) -> module``. Every module that it builds shares the layer's parameters.

    Raises:
        TypeError: no layer.
        ValueError: when it builds, more inputs than one; when it runs, another number of inputs or conditions.
    """
    found = flattened(layer)

    def build(dims_in: Iterable[Shape], dims_c: Iterable[Shape] | None = None) -> FreiaModule:
        return FreiaModule(found, dims_in, dims_c)

    build.__name__ = type(layer).__name__  # a GraphINN prints it
    return build


def from_freia(module: Any) -> nn.Module:
    """A module of FrEIA as a layer: ``forward(x, context=None) -> (z, logdet)`` and ``inverse``.

    A ``SequenceINN`` becomes a :class:`~inverse_flow.flows.Compose` of its modules as they are now, so that a
    :class:`~inverse_flow.reversible.ReversibleSequential` rebuilds one after the other. The parameters are shared.

    Args:
        module: a ``FrEIA.modules.InvertibleModule`` with one input, one output and at most one condition, which is the
            context.

    Raises:
        TypeError: no module of FrEIA.
        ValueError: more inputs, outputs or conditions; when called, a condition without a context.
    """
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import InvertibleModule

    if isinstance(module, SequenceINN) and type(module).forward is SequenceINN.forward:
        if len(set(module.conditions) - {None}) > 1:
            raise ValueError("a layer has one context, and the modules of this SequenceINN have several conditions")
        return Compose(*map(from_freia, module))
    if not isinstance(module, InvertibleModule | FreiaModule):
        raise TypeError(f"from_freia takes an InvertibleModule of FrEIA, got {type(module).__name__}")
    if len(module.dims_in) != 1 or len(module.dims_c) > 1:
        raise ValueError(
            f"a layer has one input and at most one context, {type(module).__name__} has the inputs {module.dims_in} "
            f"and the conditions {module.dims_c}"
        )
    return FreiaLayer(module)
