"""Products with the Jacobian of a layer or a whole flow, without forming it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def jvp(
    layer: nn.Module,
    x: Any,
    tangent: Any,
    context: Tensor | None = None,
    *,
    parameter_tangents: Mapping[str, Tensor] | None = None,
    inverse: bool = False,
) -> tuple[Any, Any]:
    """(f(x), ∂f/∂x · tangent + Σ ∂f/∂θ · θ̇), in forward mode: one pass, nothing is kept for a backward pass.

    Args:
        layer: any layer, or a whole :class:`~inverse_flow.flows.Flow`; f is its map, without the log-determinant.
        x: where the Jacobian is taken: a tensor, or a sequence of tensors where the layer takes several.
        tangent: a change of x, of its shape.
        context: of the layer; held fixed.
        parameter_tangents: changes θ̇ of parameters, by their names in ``layer.named_parameters()``; others stay.
        inverse: take f to be ``layer.inverse``.

    Returns:
        f(x) and the product, both of the shape of f(x).

    Raises:
        TypeError: what is no tensor, nor a sequence of tensors; a tangent of another dtype.
        ValueError: shapes that differ from what they are a change of; a parameter that does not exist.
        RuntimeError: an ActNorm in training mode that would be initialised by this call.
    """
    x, tangent = _as_values(x), _as_values(tangent)
    _check_like("the tangent", tangent, "x", x)
    parameters = dict(layer.named_parameters())
    changes = dict(parameter_tangents or {})
    for name, change in changes.items():
        if name not in parameters:
            raise ValueError(f"{type(layer).__name__} has no parameter {name!r}")
        _check_like(f"the tangent of {name}", change, "the parameter", parameters[name])
    function = _function(layer, context, inverse)
    changed = {name: parameters[name].detach() for name in changes}
    return torch.func.jvp(function, (x, changed), (tangent, changes))  # type: ignore[return-value]


def vjp(
    layer: nn.Module, x: Any, cotangent: Any, context: Tensor | None = None, *, inverse: bool = False
) -> tuple[Any, Any, dict[str, Tensor]]:
    """(f(x), (∂f/∂x)ᵀ · cotangent, {θ: (∂f/∂θ)ᵀ · cotangent}), in reverse mode: the adjoint of :func:`jvp`.

    Args:
        layer: any layer, or a whole :class:`~inverse_flow.flows.Flow`.
        x: where the Jacobian is taken, as in :func:`jvp`.
        cotangent: of the shape of f(x).
        context: of the layer; held fixed.
        inverse: take f to be ``layer.inverse``.

    Returns:
        f(x), the product with the adjoint Jacobian, of the shape of x, and the products for all the parameters by their
        names, zero for one that f does not read. The ``grad`` of no tensor changes.

    Raises:
        TypeError: as :func:`jvp`.
        ValueError: a cotangent of another shape than f(x).
        RuntimeError: as :func:`jvp`.
    """
    x, cotangent = _as_values(x), _as_values(cotangent)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    pulled: Any = torch.func.vjp(_function(layer, context, inverse), x, parameters)
    result, pull_back = pulled
    _check_like("the cotangent", cotangent, "the result", result)
    grad_x, grad_parameters = pull_back(cotangent)
    return result, grad_x, grad_parameters


class _Map(nn.Module):
    """One direction of a layer without its log-determinant, as a module that ``functional_call`` can run."""

    def __init__(self, layer: nn.Module, inverse: bool) -> None:
        super().__init__()
        self.layer = layer
        self.run_inverse = inverse

    def forward(self, x: Any, context: Tensor | None) -> Any:
        return (self.layer.inverse if self.run_inverse else self.layer)(x, context)[0]  # type: ignore[operator]


def _function(layer: nn.Module, context: Tensor | None, inverse: bool) -> Any:
    """f(x, parameters): what is not among the parameters stays as the layer has it."""
    module = _Map(layer, inverse)
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    # Of a module that stands in several places, functional_call would not put the parameters back, were it told of
    # more than one of them; of a parameter that several modules share, it has to be told of all.
    places = {
        f"{path}.{own}": names[id(parameter)]
        for path, part in module.named_modules()
        for own, parameter in part._parameters.items()
        if parameter is not None
    }

    def function(x: Any, parameters: dict[str, Tensor]) -> Any:
        state = {place: parameters[name] for place, name in places.items() if name in parameters}
        return torch.func.functional_call(module, state, (x, context), tie_weights=False)

    return function


def _as_values(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


def _check_like(what: str, values: Any, other_name: str, other: Any) -> None:
    for value in values if isinstance(values, tuple) else (values,):
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} must be a tensor, or a sequence of them, got {type(value).__name__}")
    given, expected = _shapes(values), _shapes(other)
    if given != expected:
        raise ValueError(f"{what} must have the shape of {other_name}, {expected}, got {given}")
    pairs = [(values, other)] if isinstance(values, Tensor) else zip(values, other, strict=True)
    for value, like in pairs:
        if value.dtype != like.dtype:
            raise TypeError(f"{what} must be {like.dtype} as {other_name} is, got {value.dtype}")


def _shapes(values: Any) -> Any:
    return tuple(values.shape) if isinstance(values, Tensor) else [tuple(part.shape) for part in values]
