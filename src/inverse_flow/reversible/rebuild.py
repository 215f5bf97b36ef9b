"""Running a chain so that its backward pass rebuilds activations: one ``autograd.Function`` over all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from inverse_flow.ops.backpropagate import backpropagate
from inverse_flow.ops.causal import without_autocast
from inverse_flow.ops.checks import check_context
from inverse_flow.ops.spec import check_integer, check_number
from inverse_flow.reversible.chain import Link, elementary, run_links
from inverse_flow.reversible.generators import is_capturing
from inverse_flow.reversible.layer import shortcut
from inverse_flow.reversible.replay import Replay, leaves

# Relative errors are measured against the root mean square of the true values; against this where they are smaller,
# since a batch of zeros has no scale of its own.
LEAST_RMS = 1e-2


class ReconstructionError(RuntimeError):
    """Rebuilt activations are too far from the true ones for their gradients to be trusted.

    ``path`` names the layer that rebuilds worst, and ``error`` is its relative error by itself.
    """

    def __init__(self, message: str, path: str, error: float) -> None:
        super().__init__(message, path, error)  # all arguments, which is what pickle makes it from again
        self.message = message
        self.path = path
        self.error = error

    def __str__(self) -> str:
        return self.message


class Rebuilding(NamedTuple):
    """How to rebuild, as in :class:`inverse_flow.reversible.ReversibleSequential`."""

    anchors: int | None = None
    tolerance: float | None = None

    def checked(self) -> Rebuilding:
        """Itself.

        Raises:
            TypeError: no integer, or no number.
            ValueError: naming the one that is out of range.
        """
        anchors, tolerance = self
        if anchors is not None:
            check_integer("anchors", anchors)
        if tolerance is not None:
            check_number("tolerance", tolerance)
            if not tolerance > 0:
                raise ValueError(f"the tolerance of rebuilding must be above 0, got {tolerance!r}")
        return self


def run(
    links: Sequence[Link], inputs: tuple[Tensor, ...], context: Tensor | None, rebuilding: Rebuilding | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """:func:`run_links`, so that the backward pass rebuilds what it needs if ``rebuilding`` says how.

    Raises:
        TypeError, ValueError: an input that is no tensor; a context that is none.
    """
    check_context(context)
    for value in inputs:
        if not isinstance(value, Tensor):
            raise TypeError(f"a chain of layers takes tensors, got {type(value).__name__}")
    # The transforms of torch.func want every kind of derivative; rebuilding gives the first one in reverse mode. An
    # exported program consists of operators alone. Without values, on the meta device, nothing takes memory.
    stored = not torch.is_grad_enabled() or torch.compiler.is_exporting() or inputs[-1].is_meta
    if rebuilding is None or stored or torch._C._are_functorch_transforms_active():
        return run_links(links, inputs, context)
    if torch.compiler.is_dynamo_compiling():
        from inverse_flow.reversible.untraced import run_untraced

        return run_untraced(links, inputs, context, rebuilding)
    return run_rebuilding(links, inputs, context, rebuilding)


def run_rebuilding(
    links: Sequence[Link], inputs: tuple[Tensor, ...], context: Tensor | None, rebuilding: Rebuilding
) -> tuple[tuple[Tensor, ...], Tensor]:
    """:func:`run`, of a chain that is rebuilt; it keeps account of random numbers and buffers, and is not traced."""
    chain = RebuiltChain(elementary(links), inputs[-1].device, rebuilding)
    if not chain.links:
        return run_links(links, inputs, context)
    *outputs, logdet = _Rebuild.apply(chain, len(inputs), context, *inputs, *chain.replay.parameters)
    return tuple(outputs), logdet


class RebuiltChain:
    """One call of a chain of elementary links, and the way back from its outputs.

    A link is rebuilt from its output by the other direction of its layer. Where that would not find what the first run
    found, the input is kept. So it is for a layer that changed what it holds as it ran, such as a moving average,
    unless it has a closed form and its inner modules alone changed: these the closed form runs as the forward pass did.
    """

    def __init__(self, links: Sequence[Link], device: torch.device, rebuilding: Rebuilding) -> None:
        self.links = links
        self.tolerance = rebuilding.tolerance
        self.replay = Replay([link.layer for link in links], device)
        self.kept: dict[int, tuple[Tensor, ...]] = {}
        """What came into the links that are not rebuilt, and into those at anchors."""
        self.errors: dict[int, Tensor] = {}
        """Where :meth:`unwind` met a kept input, by the link: the relative error of what it had rebuilt till then."""
        self._anchors = range(rebuilding.anchors, len(links), rebuilding.anchors) if rebuilding.anchors else range(0)
        self._layouts: list[tuple[_Layout, ...]] = []

    def first_run(
        self, inputs: Sequence[Tensor], context: Tensor | None, see: Callable[[int, Any], None] | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Runs the links and takes down under which conditions. ``see(i, x)`` is shown what goes into link i."""

        def run(i: int, given: Any) -> tuple[Any, Tensor]:
            link, parts = self.links[i], _parts(given)
            self._layouts.append(tuple(_Layout(part.shape, part.stride()) for part in parts))
            if see is not None:
                see(i, given)
            with self.replay.first_of(i, link.path):
                result = link.run(given, context)
            if i in self._anchors or not self._is_rebuilt(i):
                self.kept[i] = parts
            return result

        with self.replay.first():
            return run_links(self.links, inputs, context, run)

    def unwind(
        self,
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        grad_logdet: Tensor,
        context: Tensor | None,
        see: Callable[[int, Any], None] | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """From the outputs and their gradients to the rebuilt inputs and theirs, within ``replay.again``.

        ``see(i, x)`` is shown what was rebuilt as the input of link i.
        """
        self.errors = {}
        x: Any
        grad: Any
        *latents, x = outputs
        *latent_grads, grad = grads
        for i, link in reversed(list(enumerate(self.links))):
            z: Any = (x, latents.pop()) if link.splits else x
            grad_z: Any = (grad, latent_grads.pop()) if link.splits else grad
            x, grad = self._step_back(i, z, grad_z, grad_logdet, context)
            if see is not None:
                see(i, x)
            if i in self._anchors and self._is_rebuilt(i):
                self._compare(i, x, self.kept[i])
                x = self.kept[i] if link.joins else self.kept[i][0]
            if link.joins:
                (x, latent), (grad, latent_grad) = x, grad
                latents.append(latent)
                latent_grads.append(latent_grad)
        return (*latents, x), (*latent_grads, grad)

    def errors_one_by_one(
        self, inputs: Sequence[Tensor], context: Tensor | None, start: int = 0, stop: int | None = None
    ) -> dict[int, float]:
        """The relative error of the links from ``start`` to ``stop``, each rebuilt from its own true output, within
        ``replay.again``; ``inputs`` are those of link ``start``.
        """
        errors: dict[int, float] = {}
        zero_logdet = inputs[-1].new_zeros(len(inputs[-1]), dtype=torch.promote_types(inputs[-1].dtype, torch.float32))

        def run(offset: int, given: Any) -> tuple[Any, Tensor]:
            i = start + offset
            with self.replay.layer(i):
                result, logdet = self.links[i].run(given, context)
            zeros = tuple(torch.zeros_like(part) for part in _parts(result))
            back, _ = self._step_back(i, result, zeros if self.links[i].splits else zeros[0], zero_logdet, context)
            errors[i] = float(_largest_error(back, given))
            return result, logdet

        run_links(self.links[start:stop], inputs, context, run)
        return errors

    def check(self, rebuilt: tuple[Tensor, ...], inputs: tuple[Tensor, ...], context: Tensor | None) -> Tensor | None:
        """Compares what :meth:`unwind` came to with the truth, within ``replay.again``; once for the whole backward
        pass, so that a GPU is waited for once.

        Returns:
            None, or, within the capture of a CUDA graph, what to add to every gradient: 0 or NaN.

        Raises:
            ReconstructionError: an error above the tolerance.
        """
        if self.tolerance == math.inf:
            return None
        tolerance = self.tolerance or math.sqrt(torch.finfo(rebuilt[-1].dtype).eps)
        self._compare(-1, rebuilt, inputs)
        errors = torch.stack(list(self.errors.values()))
        if is_capturing(errors.device):
            return torch.where((errors <= tolerance).all(), 0.0, math.nan)
        # In the order of the backward pass: the first one that is too large comes before all that it has spoilt.
        for start, error in zip(self.errors, errors.tolist(), strict=True):
            if not error <= tolerance:
                self._explain(max(start, 0), inputs, error, tolerance, context)
        return None

    def _explain(
        self, start: int, inputs: tuple[Tensor, ...], error: float, tolerance: float, context: Tensor | None
    ) -> NoReturn:
        """Runs the links from ``start`` to the next kept input once more, one by one, and names the worst."""
        *latents, x = inputs
        taken = sum(link.joins for link in self.links[:start])
        x = self.kept[start][0] if start in self.kept else x
        stop = min((i for i in self.kept if i > start), default=len(self.links))
        own = self.errors_one_by_one((*latents[: len(latents) - taken], x), context, start, stop)
        # NaN is worse than any number.
        worst = max(own, key=lambda i: math.inf if math.isnan(own[i]) else own[i])
        path, layer = self.links[worst].path, type(self.links[worst].layer).__name__
        raise ReconstructionError(
            f"what went into {self.links[start].path} was rebuilt with a relative error of {error:.1e}, above the "
            f"tolerance of {tolerance:.1e}, so the gradients cannot be trusted. From there to "
            f"{self.links[stop - 1].path} the worst layer is {path} ({layer}): by itself its input is rebuilt with "
            f"{own[worst]:.1e}. Keep true activations with anchors=n, use a wider dtype, or set a tolerance if this "
            "error is small enough for you; reconstruction_errors shows every layer",
            path,
            own[worst],
        )

    def _is_rebuilt(self, i: int) -> bool:
        """Whether the input of link i is rebuilt from its output."""
        link, changed = self.links[i], self.replay.changed(i)
        if (changed or self.replay.draws(i)) and (link.joins or any(map(_Layout.overlaps, self._layouts[i]))):
            return False  # the noise would fall on values in another order
        if not changed:
            return True
        own = {link.layer, *getattr(link.layer, "parametrizations", link.layer).modules()}
        return shortcut(link.layer, "backward_from_output") is not None and own.isdisjoint(changed)

    def _step_back(self, i: int, z: Any, grad_z: Any, grad_logdet: Tensor, context: Tensor | None) -> tuple[Any, Any]:
        """Rebuilds the input of link i and gives its gradient; parameters and context collect theirs in ``.grad``."""
        link, layouts, rebuilt = self.links[i], self._layouts[i], self._is_rebuilt(i)
        if rebuilt and isinstance(z, Tensor) and (self.replay.draws(i) or self.replay.changed(i)):
            z = layouts[0].of(z)  # noise falls on values in the order of memory
        closed_form = None if link.inverse or not rebuilt else shortcut(link.layer, "backward_from_output")
        if closed_form is not None:
            with self.replay.layer(i):
                x, grad = closed_form(z, grad_z, grad_logdet, context)
            return layouts[0].of(x), grad
        if rebuilt:
            with self.replay.layer(i):
                has_changed = self.replay.watch(i)
                x, _ = link.turned.run(z, context)
                updated = has_changed() and not self.replay.changed(i)
            if updated:  # this direction takes statistics of its own in training, which the first run had no part in
                with self.replay.layer(i), self.replay.evaluating(i):
                    x, _ = link.turned.run(z, context)
            given = tuple(layout.of(part) for layout, part in zip(layouts, _parts(x), strict=True))
        else:
            given = self.kept[i]
        parts = tuple(part.detach().requires_grad_() for part in given)
        with self.replay.layer(i), torch.enable_grad():
            again, logdet = link.run(parts if link.joins else parts[0], context)
            backpropagate([*_parts(again), logdet], [*_parts(grad_z), grad_logdet])
        if not rebuilt:
            self._compare(i, z, again)
        values = tuple(part.detach() for part in parts)
        grads = tuple(torch.zeros_like(part) if part.grad is None else part.grad for part in parts)
        return (values, grads) if link.joins else (values[0], grads[0])

    def _compare(self, i: int, found: Any, true: Any) -> None:
        if self.tolerance != math.inf:
            self.errors[i] = _largest_error(found, true)


class _Rebuild(torch.autograd.Function):
    """``apply(chain, number of inputs, context, *inputs, *parameters) -> (*outputs, logdet)``"""

    @staticmethod
    def forward(
        ctx: Any, chain: RebuiltChain, arity: int, context: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs, parameters = tensors[:arity], tensors[arity:]
        outputs, logdet = chain.first_run(inputs, context)
        kept = [part for parts in chain.kept.values() for part in parts]
        ctx.chain = chain
        ctx.sizes = (1, len(inputs), len(outputs), len(parameters), *map(len, chain.kept.values()))
        # The inputs are there to be compared with; the caller has them anyway.
        ctx.save_for_backward(context, *inputs, *outputs, *parameters, *kept)
        chain.kept = dict.fromkeys(chain.kept, ())  # autograd holds them until the graph is freed
        return (*outputs, logdet)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chain: RebuiltChain = ctx.chain
        saved = iter(ctx.saved_tensors)
        (context,), inputs, outputs, parameters, *kept = (tuple(islice(saved, size)) for size in ctx.sizes)
        _, _, context_needed, *needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return None, None, *_differentiable_backward(chain, (context, *inputs, *parameters), len(inputs), grads)
        chain.kept = dict(zip(chain.kept, kept, strict=True))
        context_leaf = None if context is None else context.detach().requires_grad_(context_needed)
        parameter_leaves = leaves(parameters, needed[len(inputs) :])
        with chain.replay.again(parameter_leaves):
            rebuilt, found = chain.unwind(outputs, grads[:-1], grads[-1], context_leaf)
            spoil = chain.check(rebuilt, inputs, context_leaf)
        chain.kept = dict.fromkeys(chain.kept, ())
        collected = [None if leaf is None else leaf.grad for leaf in (context_leaf, *parameter_leaves)]
        all_grads = [collected[0], *found, *collected[1:]]
        if spoil is not None:
            all_grads = [None if grad is None else grad + spoil.to(grad.dtype) for grad in all_grads]
        return None, None, *all_grads


def _differentiable_backward(
    chain: RebuiltChain, tensors: Sequence[Tensor | None], arity: int, grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of the chain with a graph of their own, from a second forward pass that stores activations."""
    # Views, so that hooks of the originals do not run here as well as after this backward pass.
    views: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    context, inputs, parameters = views[0], views[1 : 1 + arity], views[1 + arity :]

    def run(i: int, given: Any) -> tuple[Any, Tensor]:
        with chain.replay.layer(i):
            return chain.links[i].run(given, context)

    with chain.replay.again(parameters):
        outputs, logdet = run_links(chain.links, inputs, context, run)
        roots = [(out, grad) for out, grad in zip((*outputs, logdet), grads, strict=True) if out.requires_grad]
        wanted = [view for view in views if view is not None and view.requires_grad]
        with without_autocast(inputs[-1].device.type):
            found = iter(
                torch.autograd.grad(
                    [out for out, _ in roots], wanted, [grad for _, grad in roots], create_graph=True, allow_unused=True
                )
            )
    return tuple(next(found) if view is not None and view.requires_grad else None for view in views)


class _Layout(NamedTuple):
    """How a tensor lay in memory."""

    shape: torch.Size
    strides: tuple[int, ...]

    def overlaps(self) -> bool:
        """Whether one place in memory stands for several values, as in an expanded tensor."""
        return any(size > 1 and stride == 0 for size, stride in zip(self.shape, self.strides, strict=True))

    def of(self, x: Tensor) -> Tensor:
        """``x`` in this layout; as it is where it has another shape, or the layout overlaps."""
        if x.stride() == self.strides or x.shape != self.shape or self.overlaps():
            return x
        return torch.empty_strided(self.shape, self.strides, dtype=x.dtype, device=x.device).copy_(x)


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
