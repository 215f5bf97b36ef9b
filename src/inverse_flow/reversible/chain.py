"""The engine of :mod:`inverse_flow.reversible`: one ``autograd.Function`` over a whole chain of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from inverse_flow.ops.backpropagate import backpropagate
from inverse_flow.reversible.replay import Around, Replay, leaves

# Relative errors are measured against the root mean square of the true values; against this where they are smaller,
# since a batch of zeros has no scale of its own.
LEAST_RMS = 1e-2

DIRECTIONS = ("forward", "inverse")

CallLayer: TypeAlias = Callable[..., tuple[Any, Tensor]]
"""``call(path, layer, x, context, inverse=…)`` runs one direction of a layer."""


See: TypeAlias = Callable[[int, Tensor], object]
"""``see(i, x)`` is shown the tensor that goes into step i."""


class ReconstructionError(RuntimeError):
    """Rebuilt activations are too far from the true ones for their gradients to be trusted.

    ``path`` names the layer that rebuilds worst, and ``error`` is its relative error by itself.
    """

    def __init__(self, message: str, path: str, error: float) -> None:
        super().__init__(message)
        self.path = path
        self.error = error


class Step(NamedTuple):
    """One elementary layer, and the direction in which it runs."""

    path: str
    layer: nn.Module
    inverse: bool

    @property
    def splits(self) -> bool:
        """Whether it gives a latent besides what goes on."""
        return not self.inverse and hasattr(type(self.layer), "latent_shape")

    @property
    def joins(self) -> bool:
        """Whether it takes a latent besides what comes in."""
        return self.inverse and hasattr(type(self.layer), "latent_shape")


def elementary_steps(layer: nn.Module, *, inverse: bool = False, path: str = "") -> list[Step]:
    """The elementary layers that ``layer`` consists of, in the order in which they run.

    A class that runs other layers in a row says so with a method ``elementary_layers(inverse)``, which returns (path,
    layer, inverse) of each. A container within it counts as elementary when hooks wait for it as a whole, or when a
    subclass runs otherwise.
    """
    if not hasattr(type(layer), "elementary_layers"):
        return [Step(path, layer, inverse)]
    found: list[Step] = []
    for name, part, direction in layer.elementary_layers(inverse):  # type: ignore[operator]
        full = f"{path}.{name}" if path else name
        taken_apart = _speaks_for(part, "elementary_layers")
        found += elementary_steps(part, inverse=direction, path=full) if taken_apart else [Step(full, part, direction)]
    return found


def run(
    steps: Sequence[Step],
    inputs: tuple[Tensor, ...],
    context: Tensor | None,
    *,
    anchors: int | None = None,
    tolerance: float | None = None,
    call: CallLayer | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Runs the steps so that their backward pass rebuilds what it needs.

    Args:
        steps: from :func:`elementary_steps`.
        inputs: the latents that steps which join will take, in the order in which a forward pass splits them off,
            and after them x.
        context: for every step.
        anchors: as in :class:`inverse_flow.reversible.ReversibleSequential`.
        tolerance: as there.
        call: runs one direction of a layer.

    Returns:
        The latents that steps split off, in that order, and after them what comes out at the end; the
        log-determinant.
    """
    if context is not None and not isinstance(context, Tensor):
        raise TypeError(f"the context must be a tensor or None, got {type(context).__name__}")
    chain = Chain(steps, inputs[-1].device, call or call_directly, anchors, tolerance)
    # The transforms of torch.func want every kind of derivative; rebuilding gives the first one in reverse mode.
    if not steps or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return chain.run(inputs, context)
    *outputs, logdet = _Rebuild.apply(chain, len(inputs), context, *inputs, *chain.replay.parameters)
    return tuple(outputs), logdet


class Chain:
    """One call of a chain: its steps and how they ran."""

    def __init__(
        self,
        steps: Sequence[Step],
        device: torch.device,
        call: CallLayer,
        anchors: int | None,
        tolerance: float | None,
    ) -> None:
        self.steps = steps
        self.call = call
        self.tolerance = tolerance
        self.anchored = range(anchors, len(steps), anchors) if anchors else range(0)
        self._device = device

    @cached_property
    def replay(self) -> Replay:
        """The conditions of the first run, as they are when this is first asked for: before that run."""
        return Replay([step.layer for step in self.steps], self._device)

    def run(
        self,
        inputs: Sequence[Tensor],
        context: Tensor | None,
        *,
        around: Around | None = None,
        see: See | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """All of the steps in a row, each within ``around(i)``. ``see(i, x)`` is shown what goes into each."""
        *latents, x = inputs
        logdet = x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
        for i, step in enumerate(self.steps):
            if see is not None:
                see(i, x)
            with nullcontext() if around is None else around(i):
                result, change = self._call(step, (x, latents.pop()) if step.joins else x, context)
            logdet = logdet + change
            x = result
            if step.splits:
                x, latent = result
                latents.append(latent)
        return (*latents, x), logdet

    def first_run(
        self, inputs: Sequence[Tensor], context: Tensor | None, see: See | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """:meth:`run`, remembered by ``replay``."""
        with self.replay.first() as around:
            return self.run(inputs, context, around=around, see=see)

    def unwind(
        self,
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        grad_logdet: Tensor,
        context: Tensor | None,
        rebuilt: Callable[[int, Tensor], Tensor],
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """From the outputs and their gradients to the rebuilt inputs and theirs, within ``replay.again``.

        ``rebuilt(i, x)`` is shown the rebuilt input of step i, and returns the one to go on with.
        """
        *latents, x = outputs
        *latent_grads, grad = grads
        for i in reversed(range(len(self.steps))):
            step = self.steps[i]
            z: Any = (x, latents.pop()) if step.splits else x
            grad_z: Any = (grad, latent_grads.pop()) if step.splits else grad
            x, grad = self._step_back(i, z, grad_z, grad_logdet, context)
            if step.joins:
                (x, latent), (grad, latent_grad) = x, grad
                latents.append(latent)
                latent_grads.append(latent_grad)
            x = rebuilt(i, x)
        return (*latents, x), (*latent_grads, grad)

    def errors_one_by_one(
        self, inputs: Sequence[Tensor], context: Tensor | None, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(i, relative error) of the steps from ``start`` to ``stop``, each rebuilt from its own true output, within
        ``replay.again``; ``inputs`` are those of step ``start``.
        """
        *latents, x = inputs
        zero_logdet = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        for i in range(start, len(self.steps) if stop is None else stop):
            step = self.steps[i]
            argument = (x, latents.pop()) if step.joins else x
            with self.replay.layer(i):
                result, _ = self._call(step, argument, context)
            zeros = tuple(torch.zeros_like(part) for part in _parts(result))
            back, _ = self._step_back(i, result, zeros if step.splits else zeros[0], zero_logdet, context)
            yield i, _largest_error(back, argument)
            x = result[0] if step.splits else result

    def _call(self, step: Step, x: Any, context: Tensor | None) -> tuple[Any, Tensor]:
        result, logdet = self.call(step.path, step.layer, x, context, inverse=step.inverse)
        if isinstance(result, Tensor) == step.splits:
            raise TypeError(
                f"{step.path}: a reversible chain takes layers from one tensor to one tensor, but "
                f"{type(step.layer).__name__} gave {type(result).__name__}"
            )
        return result, logdet

    def _step_back(self, i: int, z: Any, grad_z: Any, grad_logdet: Tensor, context: Tensor | None) -> tuple[Any, Any]:
        """Rebuilds the input of step i and gives its gradient; parameters and context collect theirs in ``.grad``."""
        step = self.steps[i]
        with self.replay.layer(i):
            if not step.inverse and has_closed_form(step.layer):
                return step.layer.backward_from_output(z, grad_z, grad_logdet, context)  # type: ignore[operator]
            x, _ = self.call(step.path, step.layer, z, context, inverse=not step.inverse)
            parts = tuple(part.detach().requires_grad_() for part in _parts(x))
            self.replay.rewind(i)
            with torch.enable_grad():
                again, logdet = self._call(step, parts if step.joins else parts[0], context)
            backpropagate([*_parts(again), logdet], [*_parts(grad_z), grad_logdet])
        values = tuple(part.detach() for part in parts)
        grads = tuple(torch.zeros_like(part) if part.grad is None else part.grad for part in parts)
        return (values, grads) if step.joins else (values[0], grads[0])


class _Rebuild(torch.autograd.Function):
    """``apply(chain, number of inputs, context, *inputs, *parameters) -> (*outputs, logdet)``"""

    @staticmethod
    def forward(ctx: Any, chain: Chain, arity: int, context: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, parameters = tensors[:arity], tensors[arity:]
        anchors: dict[int, Tensor] = {}

        def see(i: int, x: Tensor) -> None:
            if i in chain.anchored:
                anchors[i] = x

        outputs, logdet = chain.first_run(inputs, context, see)
        ctx.chain = chain
        ctx.sizes = (1, len(inputs), len(outputs), len(anchors), len(parameters))
        # The inputs are there to be compared with; the caller has them anyway.
        ctx.save_for_backward(context, *inputs, *outputs, *anchors.values(), *parameters)
        return (*outputs, logdet)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        saved = iter(ctx.saved_tensors)
        (context,), inputs, outputs, anchors, parameters = (tuple(islice(saved, size)) for size in ctx.sizes)
        _, _, context_needed, *needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return None, None, *_differentiable_backward(chain, (context, *inputs, *parameters), len(inputs), grads)

        checks = _Checks(chain, inputs, dict(zip(chain.anchored, anchors, strict=True)))
        context_leaf = None if context is None else context.detach().requires_grad_(context_needed)
        parameter_leaves = leaves(parameters, needed[len(inputs) :])
        with chain.replay.again(parameter_leaves):
            rebuilt, found = chain.unwind(outputs, grads[:-1], grads[-1], context_leaf, checks.at_anchor)
            spoil = checks.settle(rebuilt, context_leaf)
        collected = [None if leaf is None else leaf.grad for leaf in (context_leaf, *parameter_leaves)]
        all_grads = [collected[0], *found, *collected[1:]]
        if spoil is not None:
            all_grads = [None if grad is None else grad + spoil.to(grad.dtype) for grad in all_grads]
        return None, None, *all_grads


class _Checks:
    """Compares what a backward pass rebuilds with what it knows to be true: the inputs of the chain, and anchors."""

    def __init__(self, chain: Chain, inputs: tuple[Tensor, ...], anchors: dict[int, Tensor]) -> None:
        self._chain = chain
        self._inputs = inputs
        self._anchors = anchors
        self._off = chain.tolerance == math.inf
        self._errors: dict[int, Tensor] = {}

    def at_anchor(self, i: int, rebuilt: Tensor) -> Tensor:
        """The anchor at step i, if there is one, else what was rebuilt."""
        if i not in self._anchors:
            return rebuilt
        if not self._off:
            self._errors[i] = relative_error(rebuilt, self._anchors[i])
        return self._anchors[i]

    def settle(self, rebuilt: tuple[Tensor, ...], context: Tensor | None) -> Tensor | None:
        """Decides, once for the whole backward pass, so that a GPU is waited for once.

        Returns:
            None, or, within the capture of a CUDA graph, what to add to every gradient: 0 or NaN.

        Raises:
            ReconstructionError: an error above the tolerance.
        """
        if self._off:
            return None
        dtype = rebuilt[-1].dtype
        tolerance = self._chain.tolerance or math.sqrt(torch.finfo(dtype).eps)
        self._errors[0] = _largest_error(rebuilt, self._inputs)
        errors = torch.stack(list(self._errors.values()))
        if _may_capture(errors) and torch.cuda.is_current_stream_capturing():
            return torch.where((errors <= tolerance).all(), 0.0, math.nan)
        # In the order of the backward pass: the first one that is too large comes before all that it has spoilt.
        for start, error in zip(self._errors, errors.tolist(), strict=True):
            if not error <= tolerance:
                self._explain(start, error, tolerance, context)
        return None

    def _explain(self, start: int, error: float, tolerance: float, context: Tensor | None) -> NoReturn:
        """Runs the layers from ``start`` to the next anchor once more, one by one, and names the worst."""
        chain = self._chain
        latents, x = self._inputs[:-1], self._anchors.get(start, self._inputs[-1])
        taken = sum(step.joins for step in chain.steps[:start])
        stop = min((i for i in self._anchors if i > start), default=len(chain.steps))
        found = chain.errors_one_by_one((*latents[: len(latents) - taken], x), context, start, stop)
        own = {i: float(value) for i, value in found}
        # NaN is worse than any number.
        worst = max(own, key=lambda i: math.inf if math.isnan(own[i]) else own[i])
        path, layer = chain.steps[worst].path, type(chain.steps[worst].layer).__name__
        raise ReconstructionError(
            f"the input of {chain.steps[start].path} was rebuilt with a relative error of {error:.1e}, above the "
            f"tolerance of {tolerance:.1e}, so the gradients cannot be trusted. From there to "
            f"{chain.steps[stop - 1].path} the worst layer is {path} ({layer}): by itself its input is rebuilt with "
            f"{own[worst]:.1e}. Keep true activations with anchors=n, use a wider dtype, or set a tolerance if this "
            "error is small enough for you; reconstruction_errors shows every layer",
            path,
            own[worst],
        )


def _differentiable_backward(
    chain: Chain, tensors: Sequence[Tensor | None], arity: int, grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of the chain with a graph of their own, from a second forward pass that stores activations."""
    # Views, so that hooks of the originals do not run here as well as after this backward pass.
    views: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    context, inputs, parameters = views[0], views[1 : 1 + arity], views[1 + arity :]
    with chain.replay.again(parameters):
        outputs, logdet = chain.run(inputs, context, around=chain.replay.layer)
        roots = [(out, grad) for out, grad in zip((*outputs, logdet), grads, strict=True) if out.requires_grad]
        wanted = [view for view in views if view is not None and view.requires_grad]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in roots], wanted, [grad for _, grad in roots], create_graph=True, allow_unused=True
            )
        )
    return tuple(next(found) if view is not None and view.requires_grad else None for view in views)


def call_directly(path: str, layer: nn.Module, x: Any, context: Tensor | None, *, inverse: bool) -> tuple[Any, Tensor]:
    """One direction of a layer, and nothing besides."""
    return layer.inverse(x, context) if inverse else layer(x, context)  # type: ignore[operator]


def _parts(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _largest_error(found: Any, true: Any) -> Tensor:
    errors = [relative_error(f, t) for f, t in zip(_parts(found), _parts(true), strict=True)]
    return torch.stack(errors).amax()


def relative_error(found: Tensor, true: Tensor) -> Tensor:
    """‖found − true‖ / ‖true‖, see ``LEAST_RMS``. Zero where the true values are not finite themselves: whatever is
    wrong there, rebuilding is not the cause.
    """
    dtype = torch.promote_types(true.dtype, torch.float32)
    true = true.to(dtype)
    scale = torch.linalg.vector_norm(true)
    error = torch.linalg.vector_norm(found.to(dtype) - true)
    least = LEAST_RMS * math.sqrt(max(true.numel(), 1))
    return torch.where(scale.isfinite(), error / scale.clamp_min(least), 0.0)


def _may_capture(tensor: Tensor) -> bool:
    return tensor.is_cuda


def has_closed_form(layer: nn.Module) -> bool:
    """Whether the backward pass of ``layer`` may be left to its ``backward_from_output``."""
    return _speaks_for(layer, "backward_from_output")


def _speaks_for(layer: nn.Module, method: str) -> bool:
    """Whether ``method`` tells what the two directions of ``layer`` do: not where a subclass, or the object itself, has
    replaced one of them since, and not where hooks are to see the layer run.
    """
    kind: Any = type(layer)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        _defined_with_directions(kind, method)
        and not any(name in vars(layer) for name in DIRECTIONS)
        and not any(getattr(layer, name) for name in hooks)
    )


def _defined_with_directions(kind: type, method: str) -> bool:
    def depth(name: str) -> int:
        return next(i for i, base in enumerate(kind.__mro__) if name in vars(base))

    return hasattr(kind, method) and all(depth(method) <= depth(name) for name in DIRECTIONS if hasattr(kind, name))
