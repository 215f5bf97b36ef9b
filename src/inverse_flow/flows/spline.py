r"""Monotone splines: an element-wise activation, and a coupling.

A spline has K bins between −B and B and is the identity outside. Its numbers of a bin come from an unconstrained
vector, so that every vector gives a strictly increasing function and zeros give the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, check_images, logdet_dtype, sum_example
from inverse_flow.flows.coupling import ChannelCoupling
from inverse_flow.ops.spec import check_integer, check_number

SplineKind: TypeAlias = Literal["rational_quadratic", "linear"]

DEFAULT_BINS = 8
# Behind an ActNorm or a squeeze nearly all values lie within four standard deviations.
DEFAULT_BOUND = 4.0
# The least share of a bin in the interval, in both directions, and the least slope at a knot: below them a float32
# round trip would lose digits.
MIN_SHARE = 1e-3
MIN_SLOPE = 1e-3
# softplus of this is 1 − MIN_SLOPE, so that a raw 0 is the slope 1.
UNIT_SLOPE = math.log(math.expm1(1 - MIN_SLOPE))


@dataclass(frozen=True)
class _Bin:
    """What the formulas need of the bin that each value lies in; every tensor has the shape of the values."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    slope_left: Tensor
    slope_right: Tensor


def rational_quadratic_spline(x: Tensor, raw: Tensor, bound: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""A monotone rational-quadratic spline and the logarithm of its slope.

    Within a bin of width w, height h and mean slope s = h/w, between knots of slopes d₀ and d₁, with
    :math:`\xi = (x - x_0)/w`,

    .. math:: z = y_0 + h\,\frac{s\xi^2 + d_0\xi(1-\xi)}{s + (d_1 + d_0 - 2s)\,\xi(1-\xi)}

    Durkan, Bekasov, Murray & Papamakarios, "Neural Spline Flows", 2019, equations 4 to 8 (Gregory & Delbourgo, 1982).
    The function and its slope are continuous: at ±B the slope is 1, that of the identity outside.

    Args:
        x: values, (\*lead, N).
        raw: (\*lead, 3K − 1), unconstrained: K for the widths, K for the heights, K − 1 for the slopes at the inner
            knots. All zero is the identity.
        bound: B.
        inverse: from z to x, by the quadratic formula in the form that does not cancel.

    Returns:
        (z, log dz/dx), or for the inverse (x, log dx/dz), both of the shape of ``x``. A NaN stays NaN.
    """
    bins = (raw.shape[-1] + 1) // 3
    widths, heights, slopes = raw.split((bins, bins, bins - 1), dim=-1)
    inner = MIN_SLOPE + F.softplus(slopes + UNIT_SLOPE)
    knot_slopes = F.pad(inner, (1, 1), value=1.0)
    inside, values, bin_ = _locate(x, _knots(widths, bound), _knots(heights, bound), knot_slopes, bound, inverse)
    mean = bin_.height / bin_.width
    bend = bin_.slope_right + bin_.slope_left - 2 * mean
    if inverse:
        rise = values - bin_.bottom
        a = bin_.height * (mean - bin_.slope_left) + rise * bend
        b = bin_.height * bin_.slope_left - rise * bend
        # The discriminant is positive, since the spline is monotone; only rounding could bring it to zero.
        root = (b.square() + 4 * a * mean * rise).clamp_min(torch.finfo(b.dtype).tiny).sqrt()
        # Of the two forms of the same root the one that adds numbers of one sign; a > 0 wherever b < 0.
        total, straight = b.abs() + root, b >= 0
        xi = torch.where(straight, 2 * mean * rise / total, total / torch.where(straight, torch.ones_like(a), 2 * a))
        # Rounding may carry a root out of its bin, where the slope can be negative; its gradient is right all the same.
        xi = xi + (xi.clamp(0, 1) - xi).detach()
    else:
        xi = (values - bin_.left) / bin_.width
    product = xi * (1 - xi)
    denominator = mean + bend * product
    slope = bin_.slope_right * xi.square() + 2 * mean * product + bin_.slope_left * (1 - xi).square()
    log_slope = 2 * (mean.log() - denominator.log()) + slope.log()
    if inverse:
        result, log_slope = bin_.left + bin_.width * xi, -log_slope
    else:
        result = bin_.bottom + bin_.height * (mean * xi.square() + bin_.slope_left * product) / denominator
    return torch.where(inside, result, x), torch.where(inside, log_slope, torch.zeros_like(log_slope))


def linear_spline(x: Tensor, raw: Tensor, bound: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""A monotone piecewise linear function and the logarithm of its slope h/w.

    Args:
        x: values, (\*lead, N).
        raw: (\*lead, 2K), unconstrained: K for the widths and K for the heights. All zero is the identity.
        bound: B; outside [−B, B] the function is the identity.
        inverse: from z to x.

    Returns:
        As :func:`rational_quadratic_spline`.
    """
    widths, heights = raw.chunk(2, dim=-1)
    inside, values, bin_ = _locate(x, _knots(widths, bound), _knots(heights, bound), None, bound, inverse)
    slope = bin_.height / bin_.width
    if inverse:
        result, log_slope = bin_.left + (values - bin_.bottom) / slope, -slope.log()
    else:
        result, log_slope = bin_.bottom + (values - bin_.left) * slope, slope.log()
    return torch.where(inside, result, x), torch.where(inside, log_slope, torch.zeros_like(log_slope))


_SPLINES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "rational_quadratic": rational_quadratic_spline,
    "linear": linear_spline,
}


class SplineActivation(FlowLayer):
    """z = f_c(x) for every value of channel c, f_c a monotone spline that is learned; log-determinant Σ log f_c′(x).

    The identity outside [−B, B], and everywhere at the start. Durkan et al., "Neural Spline Flows", 2019, section 3.

    Args:
        channels: C of the images (B, C, H, W), or volumes (B, C, D, H, W).
        kind: ``"rational_quadratic"``, with a continuous slope, or ``"linear"``.
        bins: K of the spline, at least 2.
        bound: B.

    Raises:
        ValueError: a kind that does not exist, fewer than 2 bins, a bound that is not above 0.
    """

    uses_context = False

    def __init__(
        self,
        channels: int,
        *,
        kind: SplineKind = "rational_quadratic",
        bins: int = DEFAULT_BINS,
        bound: float = DEFAULT_BOUND,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in [*_SPLINES]:
            raise ValueError(f'the kind of a spline must be "rational_quadratic" or "linear", got {kind!r}')
        _check_spline(bins, bound)
        check_integer("channels", channels)
        self.channels, self.kind, self.bins, self.bound = channels, kind, bins, bound
        numbers = 2 * bins if kind == "linear" else 3 * bins - 1
        self.raw = nn.Parameter(torch.zeros(channels, numbers, device=device, dtype=dtype))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_spline(x, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_spline(z, inverse=True)

    def extra_repr(self) -> str:
        return f'{self.channels}, kind="{self.kind}", bins={self.bins}, bound={self.bound}'

    def _apply_spline(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        check_images(self, x, self.channels)
        compute = logdet_dtype(x.dtype)
        # Channel by channel: the values of a channel are looked up in one table.
        by_channel = x.to(compute).transpose(0, 1)
        spline = _SPLINES[self.kind]
        z, log_slope = spline(by_channel.flatten(1), self.raw.to(compute), self.bound, inverse=inverse)
        z, log_slope = (result.reshape(by_channel.shape).transpose(0, 1) for result in (z, log_slope))
        return z.to(x.dtype).contiguous(), sum_example(log_slope)


class SplineCoupling(ChannelCoupling):
    """z₁ = x₁, z₂ = f(x₂), f a rational-quadratic spline whose numbers come from x₁; log-determinant Σ log f′(x₂).

    Each value of x₂ has a spline of its own, the identity outside [−B, B]. Durkan et al., "Neural Spline Flows", 2019,
    section 3.2.

    Args:
        channels: C ≥ 2 of the images.
        hidden: width of the default conditioner, a :class:`ConvNet`.
        bins: K of the splines, at least 2.
        bound: B.
        kept: how many of the channels, the first ones, are x₁; ⌈C/2⌉ unless given.
        context_channels: channels of the context that the default conditioner takes.
        dimensions: of the default conditioner: 0 for vectors (B, C), 1 for signals (B, C, L), 2 for images, 3
            for volumes.
        conditioner: a module of your own instead: ``conditioner(x1, context)`` gives the 3K − 1 numbers of every value
            of x₂, those of one value (channel c) in the channels c·(3K − 1) … (c + 1)·(3K − 1) − 1.

    Raises:
        ValueError: fewer than 2 channels or bins, a bound that is not above 0; as the conditioner when called.
    """

    parameters_per_value = 3 * DEFAULT_BINS - 1

    def __init__(
        self,
        channels: int,
        hidden: int = 64,
        *,
        bins: int = DEFAULT_BINS,
        bound: float = DEFAULT_BOUND,
        kept: int | None = None,
        context_channels: int = 0,
        dimensions: int = 2,
        conditioner: nn.Module | None = None,
    ) -> None:
        _check_spline(bins, bound)
        self.parameters_per_value = 3 * bins - 1
        super().__init__(
            channels,
            hidden,
            kept=kept,
            context_channels=context_channels,
            dimensions=dimensions,
            conditioner=conditioner,
        )
        self.bins, self.bound = bins, bound

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_spline(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_spline(z, context, inverse=True)

    def extra_repr(self) -> str:
        return f"{self.channels}, bins={self.bins}, bound={self.bound}"

    def _apply_spline(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        x1, x2 = self._halves(x)
        raw = self._condition(x1, context).unflatten(1, (self.changed, -1)).movedim(2, -1)
        values = x2.to(raw.dtype)[..., None]
        z2, log_slope = rational_quadratic_spline(values, raw, self.bound, inverse=inverse)
        return torch.cat((x1, z2[..., 0].to(x.dtype)), dim=1), sum_example(log_slope)


def _check_spline(bins: int, bound: float) -> None:
    check_integer("bins", bins)
    if not 2 <= bins < 1 / MIN_SHARE:
        raise ValueError(f"a spline needs 2 to {round(1 / MIN_SHARE) - 1} bins, got {bins}")
    check_number("bound", bound)
    if not (bound > 0 and math.isfinite(bound)):
        raise ValueError(f"the bound of a spline must be a finite number above 0, got {bound}")


def _knots(raw: Tensor, bound: float) -> Tensor:
    """K + 1 knots from −B to B, whose distances are in proportion to softmax(raw) but for the least share."""
    shares = MIN_SHARE + (1 - MIN_SHARE * raw.shape[-1]) * torch.softmax(raw, dim=-1)
    inner = bound * (2 * shares[..., :-1].cumsum(-1) - 1)
    ends = torch.full_like(raw[..., :1], bound)
    return torch.cat((-ends, inner, ends), dim=-1)


def _locate(
    x: Tensor, x_knots: Tensor, y_knots: Tensor, slopes: Tensor | None, bound: float, inverse: bool
) -> tuple[Tensor, Tensor, _Bin]:
    """Which values lie within ±B; the values, those outside moved to the nearer end; and the bin of each.

    What lies outside goes through the formulas as ±B and is dropped afterwards, so that its gradient is exactly zero
    and never the product of zero and infinity.
    """
    inside = x.abs() <= bound
    values = x.clamp(-bound, bound)
    knots = y_knots if inverse else x_knots
    index = torch.searchsorted(knots[..., 1:-1].detach().contiguous(), values.detach().contiguous(), right=True)

    def of_bin(table: Tensor, offset: int) -> Tensor:
        return table.gather(-1, index + offset)

    left, bottom = of_bin(x_knots, 0), of_bin(y_knots, 0)
    flat = torch.ones_like(left)
    return (
        inside,
        values,
        _Bin(
            left=left,
            width=of_bin(x_knots, 1) - left,
            bottom=bottom,
            height=of_bin(y_knots, 1) - bottom,
            slope_left=flat if slopes is None else of_bin(slopes, 0),
            slope_right=flat if slopes is None else of_bin(slopes, 1),
        ),
    )
