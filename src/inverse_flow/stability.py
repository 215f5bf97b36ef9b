r"""How far inverse convolutions may carry their input: a report, and a limit for training.

A solve is a recurrence, so what one pixel holds runs on over the image. The impulse response h of A(w)⁻¹, what the
solve makes of a single 1 where the order begins, says all of it: a 1 at another pixel gives a part of the same
response. So

.. math:: \|A^{-1}\|_\infty = \max_o \sum_c \sum_p |h_{oc}(p)|

is exact, and takes one solve of C / groups images. Taps damped by their distance from the corner tap,
:math:`W_\delta \to \gamma^{|\delta|} W_\delta` with :math:`|\delta|` the sum of the steps along the axes, are the
similarity :math:`D A D^{-1}` with :math:`D = \operatorname{diag}(\gamma^{|p|})`: h(p) becomes
:math:`\gamma^{|p|} h(p)`, while M, and with it the log-determinant, stays. So the response that shows a gain to be
too large also gives the γ that brings it to the limit.

docs/stability.md says when gains grow, and how to read a report.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from inverse_flow.conv import InverseConvNd
from inverse_flow.ops.causal import corner_index, corner_taps, folded_taps, with_corner_taps
from inverse_flow.ops.spec import check_integer, check_number

__all__ = ["LayerStability", "Limited", "StabilityReport", "gains", "limit_gain_", "stability_report"]

# In the runs of docs/stability.md the gains of a flow stay below 9. A single layer that goes on to blow up is past 50.
LARGE_GAIN = 50.0
# An error of rounding, 6e-8 in float32, may then grow to 6e-4 of the result.
LARGE_CONDITION = 1e4
# On an image of twice the size. A response that has faded within the image gives 1, one that lasts 2.
LARGE_GROWTH = 1.5

# How close to its limit a gain counts as on it: rounding the taps to float32 moves a gain of 100 by less.
ON_THE_LIMIT = 1e-5
# Newton's steps to a γ: at most the first number, until one is as small as the second.
MOST_STEPS, SMALL_STEP = 100, 1e-14
# Impulse responses are computed as many at a time as fit this memory.
CHUNK_BYTES = 64 * 2**20


Sizes: TypeAlias = tuple[int, ...]
"""Of an image along its axes, without the channels."""


class LayerStability(NamedTuple):
    """An inverse convolution z = A⁻¹(x − b), on the images that it sees.

    Attributes:
        path: of the layer: ``model.get_submodule(path)``.
        image_size: of the images that it sees, without the channels.
        gain: ‖A⁻¹‖∞, the most that a value of the output can be, for an input between −1 and 1.
        gain_at_twice: that for images of twice the size along every axis.
        norm: ‖A‖∞, the same of the other direction.
        condition: ‖A⁻¹‖∞ · ‖A‖∞, how much a relative error may grow.
        row_sum: s = max_o Σ |W′_δ| over inputs and taps δ ≠ 0, with W′_δ = M⁻¹ W_δ. May well be above 1.
        bound: ‖M⁻¹‖∞ / (1 − s) where s < 1, which no image size takes the gain above; else infinite.
    """

    path: str
    image_size: Sizes
    gain: float
    gain_at_twice: float
    norm: float
    condition: float
    row_sum: float
    bound: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is unhealthy about it; nothing follows from the row sum."""
        growth = self.gain_at_twice / self.gain if math.isfinite(self.gain) else 1.0
        # Written so that a NaN warns.
        found = {
            f"a gain of {self.gain:.3g}, above {LARGE_GAIN:g}": self.gain <= LARGE_GAIN,
            f"a condition of {self.condition:.3g}, above {LARGE_CONDITION:g}": self.condition <= LARGE_CONDITION,
            f"a gain {growth:.3g} times as large on images of twice the size": growth <= LARGE_GROWTH,
        }
        return tuple(text for text, healthy in found.items() if not healthy)


@dataclass(frozen=True)
class StabilityReport:
    """What :func:`stability_report` found; ``print`` shows it as a table, with the warnings below.

    Attributes:
        layers: the inverse convolutions, in the order of ``model.named_modules()``.
    """

    layers: tuple[LayerStability, ...]

    @property
    def largest(self) -> LayerStability | None:
        """The layer with the largest gain; None if there is no layer."""
        return max(self.layers, key=lambda layer: _order(layer.gain), default=None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each layer that has any."""
        return tuple(
            f"{_name(layer.path)} has {' and '.join(layer.warnings)}" for layer in self.layers if layer.warnings
        )

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values for JSON, where None stands for a number that is not finite."""
        return [
            {
                name: value if name in ("path", "image_size") or math.isfinite(value) else None
                for name, value in layer._asdict().items()
            }
            for layer in self.layers
        ]

    def __str__(self) -> str:
        if not self.layers:
            return "no inverse convolutions"
        head = ("inverse convolution", "image", "gain", "at twice the size", "norm", "condition", "row sum", "bound")
        rows = [head, *(_cells(layer) for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


class Limited(NamedTuple):
    """A layer whose gain :func:`limit_gain_` brought to the limit.

    Attributes:
        path: of the layer: ``model.get_submodule(path)``.
        gain: what it was before.
        factor: γ, by which a tap was multiplied for every step that it lies away from the corner tap.
    """

    path: str
    gain: float
    factor: float


@torch.no_grad()
def stability_report(
    model: nn.Module, image_size: int | Sequence[int], context: Tensor | None = None
) -> StabilityReport:
    """Gain, norm, condition and row sum of every inverse convolution in a model, exactly, in float64.

    ```python
    print(inverse_flow.stability_report(model, (3, 32, 32)))
    ```

    Args:
        model: any module. What size of image a layer sees is found by running a copy without values, so that nothing of
            the model changes. Layers that its ``forward`` does not run are left out.
        image_size: of one example: (C, H, W), or as many sizes as the model has axes. Of a layer by itself, or a model
            with an ``event_shape``, the channels may be left out, and an integer stands for a square or a cube.
        context: one row, for a model that needs one.

    Returns:
        A report to print or to read. It warns of a gain above 50, a condition above 10⁴, and a gain that is more than
        1.5 times as large on images of twice the size; never of a row sum.

    Raises:
        ValueError: an image size that the model does not take.
        RuntimeError: the model cannot be run without values.
    """
    return StabilityReport(tuple(_stability(*found) for found in _layers(model, image_size, context)))


@torch.no_grad()
def gains(model: nn.Module, image_size: int | Sequence[int], context: Tensor | None = None) -> dict[str, float]:
    """‖A⁻¹‖∞ of every inverse convolution by its path: what is cheap of :func:`stability_report`."""
    found = _layers(model, image_size, context)
    return {path: _gain(layer, _weight(layer), _apart(layer, sizes)) for path, layer, sizes in found}


@torch.no_grad()
def limit_gain_(
    model: nn.Module, image_size: int | Sequence[int], limit: float = 100.0, context: Tensor | None = None
) -> tuple[Limited, ...]:
    r"""Damps the inverse convolutions of a model whose gain is above a limit, in place, to the limit.

    .. math:: W_\delta \to \gamma^{|\delta|} W_\delta

    with one γ < 1 for each such layer, and |δ| the number of steps from the corner tap. M and the log-determinant
    stay, and so does every bit of the other layers. To be called after each optimizer step, as the gradient is clipped
    before it:

    ```python
    optimizer.step()
    inverse_flow.limit_gain_(model, (3, 32, 32))
    ```

    Args:
        model: as for :func:`stability_report`. The image sizes that its layers see are found once, and again when its
            modules are others.
        image_size: as for :func:`stability_report`.
        limit: the largest ‖A⁻¹‖∞, for images of this size.
        context: one row, for a model that needs one.

    Returns:
        The layers that it damped, with their gains before; empty in most steps.

    Raises:
        ValueError: ‖M⁻¹‖∞ of a layer is above the limit by itself, so that no damping can help; a limit that is not
            above 0; as :func:`stability_report`.
        TypeError: a layer whose weight is no parameter, but computed from others.
        FloatingPointError: a layer with weights that are not finite.
    """
    check_number("limit", limit)
    if not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    damped = []
    for path, layer, sizes in _layers(model, image_size, context):
        weight = _weight(layer)
        response = _response(layer, weight, _apart(layer, sizes))
        gain = _largest_sum(response)
        if not gain <= limit * (1 + ON_THE_LIMIT):
            if layer._parameters.get("weight") is None:
                raise TypeError(f"{_name(path)}: its weight is computed from other parameters, and cannot be damped")
            if not bool(weight.isfinite().all()):
                raise FloatingPointError(f"{_name(path)}: weights that are not finite have no gain to limit")
            damped.append((layer, weight, Limited(path, gain, _damping(path, layer, weight, response, limit))))
    # All of them are known before any changes.
    for layer, weight, limited in damped:
        taps = with_corner_taps(
            _damped(layer, weight, limited.factor).to(layer.weight.dtype),
            corner_taps(layer.weight, layer.spec.orders),
            layer.spec.orders,
        )
        layer.weight.copy_(taps)
    return tuple(limited for _, _, limited in damped)


# ---- One layer ----


def _weight(layer: InverseConvNd) -> Tensor:
    """The weight of A as the layer's solve reads it, in float64."""
    return layer.complete_weight().detach().double()


def _stability(path: str, layer: InverseConvNd, sizes: Sizes) -> LayerStability:
    weight = _weight(layer)
    here, doubled = _apart(layer, sizes), _apart(layer, tuple(2 * size for size in sizes))
    gain, twice = _gain(layer, weight, here), _gain(layer, weight, doubled)
    # The response of A itself ends where its window does.
    norm = _largest_sum(_response(layer, weight, tuple(map(min, here, layer.kernel_size)), solve=False))
    row_sum = _largest_sum(folded_taps(weight, layer.spec).abs())
    bound = _gain(layer, weight, (1,) * len(sizes)) / (1 - row_sum) if row_sum < 1 else math.inf
    return LayerStability(path, sizes, gain, twice, norm, gain * norm, row_sum, bound)


def _apart(layer: InverseConvNd, sizes: Sizes) -> Sizes:
    """Of the images that a dilation takes apart, every d-th pixel each, the size of the one that begins where the
    order does. What a pixel holds stays within one of them."""
    return tuple(-(-size // step) for size, step in zip(sizes, layer.dilation, strict=True))


def _gain(layer: InverseConvNd, weight: Tensor, sizes: Sizes) -> float:
    """‖A⁻¹‖∞; on images of one pixel it is ‖M⁻¹‖∞."""
    try:
        return _largest_sum(_response(layer, weight, sizes))
    except ValueError:  # a singular M
        return math.inf


def _largest_sum(values: Tensor) -> float:
    """max_o Σ of values (C, …)"""
    return float(values.flatten(1).sum(1).amax())


def _response(layer: InverseConvNd, weight: Tensor, sizes: Sizes, *, solve: bool = True) -> Tensor:
    """(C, *sizes): Σ_c |h_oc(p)|, what A⁻¹, or A, makes of a 1 in input channel c of every group at once, at the pixel
    where the group's order begins; without the dilation."""
    channels, groups = layer.channels, layer.groups
    members, pixels = channels // groups, math.prod(sizes)
    device = weight.device
    starts = torch.tensor([_flat(_start(order, sizes), sizes) for order in layer.spec.orders], device=device)
    operator, arguments = layer.solve if solve else layer.convolve, {**layer.arguments, "dilation": 1}
    total = weight.new_zeros(channels, *sizes)
    for inputs in torch.arange(members, device=device).split(max(1, CHUNK_BYTES // (8 * channels * pixels))):
        impulses = weight.new_zeros(len(inputs), groups, members, pixels)
        images = torch.arange(len(inputs), device=device)[:, None]
        impulses[images, torch.arange(groups, device=device), inputs[:, None], starts] = 1
        total += operator(impulses.view(-1, channels, *sizes), weight, **arguments).abs().sum(0)
    return total


# ---- Damping ----


def _damping(path: str, layer: InverseConvNd, weight: Tensor, response: Tensor, limit: float) -> float:
    """The γ that brings a gain above the limit to it; ``response`` is that of ``weight``."""
    sizes = tuple(response.shape[1:])
    least, factor, most = 0.0, 1.0, 1.0
    while True:
        sums = _sums_by_distance(layer, response)
        if not float(sums[:, 0].amax()) <= limit:
            raise ValueError(
                f"{_name(path)}: ‖M⁻¹‖∞ of its corner tap is {float(sums[:, 0].amax()):.3g}, which damping does not "
                f"change: the limit must be above that, got {limit:g}"
            )
        gain = float(sums.sum(1).amax())
        if math.isfinite(gain) and gain >= limit:
            return factor * _root(sums, limit)
        # A response that float64 cannot hold: the γ at which it can, and the gain is still above the limit.
        least, most = (factor, most) if math.isfinite(gain) else (least, factor)
        factor = (least + most) / 2
        response = _response(layer, _damped(layer, weight, factor), sizes)


def _root(sums: Tensor, limit: float) -> float:
    """The γ ≤ 1 with max_o Σ_k γᵏ sums[o, k] = limit, where γ = 1 gives more.

    The logarithm of the sum is convex in log γ, so that Newton's steps come from above, and soon: it is nearly linear
    where a response explodes.
    """
    logs = sums.cpu().log()
    distances = torch.arange(sums.shape[1], dtype=sums.dtype)
    log_factor = 0.0
    for _ in range(MOST_STEPS):
        terms = logs + log_factor * distances
        totals = terms.logsumexp(1)
        row = terms[totals.argmax()]
        step = float((totals.amax() - math.log(limit)) / (row.softmax(0) * distances).sum())
        log_factor -= step
        if step < SMALL_STEP:
            break
    return math.exp(log_factor)


def _sums_by_distance(layer: InverseConvNd, response: Tensor) -> Tensor:
    """(C, K): the sum of a response (C, *sizes) over the pixels k steps away from where the group's order begins."""
    sizes, parts = tuple(response.shape[1:]), response.unflatten(0, (layer.groups, -1)).flatten(2)
    found = parts.new_zeros(*parts.shape[:2], sum(sizes) - len(sizes) + 1)
    for sums, part, order in zip(found, parts, layer.spec.orders, strict=True):
        sums.index_add_(1, _distances(_start(order, sizes), sizes).flatten().to(part.device), part)
    return found.flatten(0, 1)


def _damped(layer: InverseConvNd, weight: Tensor, factor: float) -> Tensor:
    """γ^|δ| W_δ"""
    orders, kernel = layer.spec.orders, layer.kernel_size
    steps = torch.stack([_distances(corner_index(order, kernel), kernel) for order in orders]).to(weight)
    return (weight.unflatten(0, (len(orders), -1)) * (factor**steps)[:, None, None]).flatten(0, 1)


def _start(order: int, sizes: Sizes) -> Sizes:
    """The pixel where an order begins, opposite to where its corner tap lies in the window."""
    return tuple(size - 1 - index for size, index in zip(sizes, corner_index(order, sizes), strict=True))


def _flat(index: Sizes, sizes: Sizes) -> int:
    found = 0
    for i, size in zip(index, sizes, strict=True):
        found = found * size + i
    return found


def _distances(index: Sizes, sizes: Sizes) -> Tensor:
    """(*sizes): how many steps along the axes each place lies away from one, in integers."""
    axes = [(torch.arange(size) - i).abs() for i, size in zip(index, sizes, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(0)


# ---- The layers of a model ----


class _Seen(NamedTuple):
    """The sizes of image that the layers of a model see, by their paths, and the modules that it had then."""

    shape: Sizes
    modules: tuple[weakref.ref[nn.Module], ...]
    sizes: dict[str, Sizes]


# A limit is kept up at every step, and running a model, though without values, takes milliseconds.
_seen: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()


def _layers(
    model: nn.Module, image_size: int | Sequence[int], context: Tensor | None
) -> list[tuple[str, InverseConvNd, Sizes]]:
    """The inverse convolutions with their paths, and the sizes of image that they see."""
    for size in image_size if isinstance(image_size, Sequence) else [image_size]:
        check_integer("image_size", size)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, InverseConvNd):
        return [("", model, _sizes_of(model, image_size))]
    shape = _example_shape(model, image_size)
    modules = list(model.modules())
    known = _seen.get(model)
    if (
        known is None
        or known.shape != shape
        or len(known.modules) != len(modules)
        or any(reference() is not module for reference, module in zip(known.modules, modules, strict=True))
    ):
        _seen[model] = known = _Seen(shape, tuple(map(weakref.ref, modules)), _sizes_seen(model, shape, context))
    layers: Any = {path: model.get_submodule(path) for path in known.sizes}
    return [(path, layer, known.sizes[path]) for path, layer in layers.items()]


def _sizes_of(layer: InverseConvNd, image_size: int | Sequence[int]) -> Sizes:
    axes = layer.dimensions
    given = tuple(map(int, image_size if isinstance(image_size, Sequence) else (image_size,) * axes))
    sizes = given[1:] if len(given) == axes + 1 and given[0] == layer.channels else given
    if len(sizes) != axes:
        raise ValueError(f"image_size must be {axes} sizes for {layer}, got {image_size!r}")
    return sizes


def _example_shape(model: nn.Module, image_size: int | Sequence[int]) -> Sizes:
    event: Any = getattr(model, "event_shape", None)
    if not isinstance(image_size, Sequence):
        if event is None:
            raise ValueError(f"image_size must be the shape of an example, such as (C, H, W), got {image_size}")
        return (event[0], *(image_size,) * (len(event) - 1))
    shape = tuple(image_size)
    return (event[0], *shape) if event is not None and len(shape) == len(event) - 1 else shape


def _sizes_seen(model: nn.Module, shape: Sizes, context: Tensor | None) -> dict[str, Sizes]:
    """Runs a copy of the model whose tensors have no values: nothing is computed, drawn or initialised."""
    if not any(isinstance(layer, InverseConvNd) for layer in model.modules()):
        return {}
    found: dict[str, Sizes] = {}

    def record(path: str, layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook before either direction. A layer that several scales share is measured on the largest."""
        x = (*given, *named.values())[0]
        sizes = tuple(x.shape[-layer.dimensions :])
        found[path] = max(found.get(path, sizes), sizes, key=math.prod)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    like = next((t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()), torch.empty(0))
    what = f"the sizes that layers of {type(model).__name__} see are found by running a copy on {shape} without values"
    try:
        with FakeCopyMode(mode):
            twin: Any = copy.deepcopy(model).eval()
        for path, layer in twin.named_modules():
            layer._forward_hooks.clear()
            layer._forward_pre_hooks.clear()
            if isinstance(layer, InverseConvNd):
                layer.register_forward_pre_hook(partial(record, path), with_kwargs=True)
        with mode, torch.no_grad():
            images = torch.zeros(1, *shape, dtype=like.dtype, device=like.device)
            twin(images) if context is None else twin(images, context[:1].to(like.device))
    except (TypeError, ValueError):
        raise  # the model says what it does not take
    except Exception as error:
        advice = "give the whole shape of an input, channels first, or its layers one by one"
        raise RuntimeError(f"{what}, which failed: {error or type(error).__name__}; {advice}") from error
    if not found:
        raise RuntimeError(f"{what}, and no inverse convolution ran; give its layers one by one")
    return {path: found[path] for path, _ in model.named_modules() if path in found}


# ---- Text ----


def largest(found: dict[str, float]) -> tuple[str, float] | None:
    """The path and gain of the layer with the largest gain; of one that is no number, if there is one."""
    return max(found.items(), key=lambda item: _order(item[1]), default=None)


def _order(gain: float) -> float:
    return math.inf if math.isnan(gain) else gain


def _name(path: str) -> str:
    return path or "the layer"


def _cells(layer: LayerStability) -> tuple[str, ...]:
    numbers = (layer.gain, layer.gain_at_twice, layer.norm, layer.condition, layer.row_sum, layer.bound)
    size = " × ".join(map(str, layer.image_size))
    return (_name(layer.path), size, *("∞" if number == math.inf else f"{number:.3g}" for number in numbers))
