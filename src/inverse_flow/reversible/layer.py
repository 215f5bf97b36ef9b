"""What a layer says of itself, and how one direction of it runs.

A layer is any module with ``forward(x, context=None) -> (z, logdet)`` and ``inverse(z, context=None) -> (x, logdet)``.
What else there is to know, it says itself, by members that may be missing; ``inverse_flow.flows.FlowLayer`` has their
defaults:

``output_shape(shape)``, ``input_shape(shape)``
    The shape of z for one x of ``shape``, without the batch, and the other way round. Missing: found by running a copy
    of the layer on zeros; a layer that cannot run so, as without its context, is taken to keep the shape.
``splits_off_latent``, ``latent_shape(shape)``
    True: ``forward`` gives a pair (x, latent), ``inverse`` takes one, and ``output_shape`` and ``input_shape`` speak of
    x. Missing: False.
``uses_context``
    False: the layer ignores its context. Missing: it may use it.
``links(inverse)``
    A container's layers, as (path, layer, inverse) in the order in which they run. Missing: the layer is elementary,
    unless it is a container of nflows, which are known.
``backward_from_output(z, grad_z, grad_logdet, context) -> (x, grad_x)``
    The closed form of its backward pass. Missing: it is run again.

The last two are shortcuts, which hold for the ``forward`` and ``inverse`` they were written beside: a subclass that
replaces one of these has lost them. :func:`shortcut` is the only way to them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from inverse_flow.ops.bijection import bare, run_pre_hooks
from inverse_flow.reversible.finite import NonFiniteError, check_finite, is_detecting

Shape: TypeAlias = tuple[int, ...]
"""The shape of one example, (C, H, W) or (C, D, H, W), without the batch."""

DIRECTIONS = ("forward", "inverse")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_layers(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers as a list.

    Raises:
        TypeError: one of them is no layer.
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers are a sequence of modules with an inverse, got {type(layers).__name__}")
    result = list(layers)
    for layer in result:
        if not isinstance(layer, nn.Module) or not callable(getattr(layer, "inverse", None)):
            raise TypeError(f"layers are modules with an inverse, got {type(layer).__name__}")
    return result


def splits_off_latent(layer: nn.Module) -> bool:
    """Whether ``forward`` gives a latent besides what goes on."""
    return bool(getattr(layer, "splits_off_latent", False))


def uses_context(layer: nn.Module) -> bool:
    """Whether the layer may use its context."""
    return bool(getattr(layer, "uses_context", True))


def output_shape(layer: nn.Module, shape: Shape) -> Shape:
    """Shape of ``layer(x)`` for one example; of what goes on, where it splits."""
    return _shape(layer, "output_shape", shape)


def input_shape(layer: nn.Module, shape: Shape) -> Shape:
    """Shape of ``layer.inverse(z)`` for one example."""
    return _shape(layer, "input_shape", shape)


def shortcut(layer: nn.Module, name: str) -> Callable[..., Any] | None:
    """The layer's method ``name``, where it tells what both directions of the layer do.

    It does not where a subclass, or the object itself, has replaced a direction since, nor where hooks are to see the
    layer run.
    """
    if not hasattr(type(layer), name) or is_changed(layer, _definer(type(layer), name), DIRECTIONS):
        return None
    method: Callable[..., Any] = getattr(layer, name)
    return method


def is_changed(layer: nn.Module, kind: type, names: Iterable[str] | None = None) -> bool:
    """Whether ``layer`` differs from an object of its base class ``kind`` in one of these methods, or has hooks; in any
    method or property but its construction and its text, if no names are given.
    """
    mro = type(layer).__mro__
    below = {name for members in (vars(layer), *map(vars, mro[: mro.index(kind)])) for name in members}
    replaced = any(_is_method(kind, name) for name in below) if names is None else not below.isdisjoint(names)
    return replaced or any(getattr(layer, hooks) for hooks in HOOKS)


def call_layer(path: str, layer: nn.Module, x: Any, context: Tensor | None, *, inverse: bool) -> tuple[Any, Tensor]:
    """Runs one direction of a layer.

    Forward pre-hooks run before the ``inverse`` of every module, be it a :class:`~inverse_flow.ops.bijection.Bijection`
    or not: those of pruning and of weight normalisation set the weights.

    Returns:
        Its result, and the log-determinant as (B,), however the layer gave it: a number or a tensor without dimensions
        is that of every example.

    Raises:
        TypeError, ValueError: a layer that does not give both, or a log-determinant that is neither; naming the layer.
        RuntimeError: a forward pre-hook that changes the input, which an inverse cannot undo.
        NonFiniteError: within ``detect_nonfinite``.
    """
    run: Callable[..., tuple[Any, Any]] = layer
    if inverse:
        run = layer.inverse  # type: ignore[assignment]
        if layer._forward_pre_hooks:
            run_pre_hooks(f"{path} ({type(layer).__name__})", layer, (x, context))
            run = bare(run)
    if not is_detecting():
        result, logdet = _pair(path, layer, run(x, context))
        return result, _as_logdet(path, layer, logdet, x)
    direction = f"{type(layer).__name__}.{DIRECTIONS[inverse]}"
    check_finite(path, f"the input of {direction}", x)
    if context is not None:
        check_finite(path, f"the context of {direction}", context)
    try:
        result, logdet = _pair(path, layer, run(x, context))
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}.{error.path}", error.what) from None
    logdet = _as_logdet(path, layer, logdet, x)
    check_finite(path, f"the result of {direction}", result)
    check_finite(path, f"the log-determinant of {direction}", logdet)
    return result, logdet


def _pair(path: str, layer: nn.Module, found: Any) -> tuple[Any, Any]:
    # Two rows of a batch would unpack as well.
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError(
            f"{path}: a layer gives its result and the log-determinant, {type(layer).__name__} gave "
            f"{type(found).__name__}"
        )
    result, logdet = found
    return result, logdet


def _shape(layer: nn.Module, name: str, shape: Shape) -> Shape:
    if hasattr(layer, name):
        said: Shape = getattr(layer, name)(shape)
        return said
    like = next(chain(layer.parameters(), layer.buffers()), torch.empty(0))
    dtype = like.dtype if like.is_floating_point() else None
    devices = [like.device] if like.device.type == "cuda" else []
    try:
        twin: Any = copy.deepcopy(layer).eval()
        with torch.no_grad(), torch.random.fork_rng(devices):
            zeros = torch.zeros(1, *shape, device=like.device, dtype=dtype)
            result, _ = twin(zeros) if name == "output_shape" else twin.inverse(zeros)
        return tuple(result.shape[1:])
    except Exception:  # whatever a layer of a user's own may raise: running it says what is wrong
        return shape


def _as_logdet(path: str, layer: nn.Module, logdet: Any, x: Any) -> Tensor:
    batch = x if isinstance(x, Tensor) else x[0]
    if isinstance(logdet, (int, float)):
        logdet = batch.new_tensor(logdet, dtype=torch.promote_types(batch.dtype, torch.float32))
    if not isinstance(logdet, Tensor):
        raise TypeError(
            f"{path}: the log-determinant of {type(layer).__name__} must be a tensor, got {type(logdet).__name__}"
        )
    if logdet.dim() == 0:
        logdet = logdet.expand(batch.shape[0])
    if logdet.dim() != 1 or logdet.shape[0] != batch.shape[0]:
        raise ValueError(
            f"{path}: the log-determinant of {type(layer).__name__} must have one entry per example, "
            f"({batch.shape[0]},), got shape {tuple(logdet.shape)}"
        )
    return logdet


def _is_method(kind: type, name: str) -> bool:
    member = getattr(kind, name, None)
    described = name.startswith("__") or name == "extra_repr"
    return not described and (callable(member) or isinstance(member, property))


def _definer(kind: type, name: str) -> type:
    """The class that ``kind`` has the member ``name`` from."""
    return next(base for base in kind.__mro__ if name in vars(base))
