"""The exponential of a convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from inverse_flow.conv import INITIAL_GAIN
from inverse_flow.flows.base import FlowLayer, check_images, count_pixels, expand_logdet, logdet_dtype
from inverse_flow.flows.conditioner import check_dimensions
from inverse_flow.ops.causal import CONVOLUTIONS, tap, without_autocast
from inverse_flow.ops.spec import PerAxis, check_integer, check_number, each_axis

# Largest ‖M‖₂. The number of convolutions grows with it: 11 in float32 for each 1.
DEFAULT_NORM = 1.0


class ExponentialConv(FlowLayer):
    r"""z = exp(M) x = Σ_i Mⁱ x / i!, M a convolution with zeros around the image; log-determinant tr M.

    Whatever M is, exp(M) is invertible: x = exp(−M) z, the same series with −M. Its log-determinant is exactly
    tr M = H·W·Σ_c w[c, c, middle]. Hoogeboom, Garcia Satorras, Tomczak & Welling, "The Convolution Exponential and
    Generalized Sylvester Flows", 2020.

    Both directions sum the series, until the rest of it is below one rounding for every x. How many terms that takes is
    known beforehand since ‖M‖₂ is bounded: as M at the frequency ω is w(ω) = Σ_δ w_δ e^{iω·δ} = [w_δ]_δ (e^{iω·δ} I)_δ,

    .. math:: \|M\|_2 \le \max_\omega \|w(\omega)\|_2 \le \sqrt{K}\,\|(w_{\delta_1}, …, w_{\delta_K})\|_2,

    for K taps, the matrix on the right being C × C·K; the weight is scaled down to where this bound is ``norm``, and is
    as it is while the bound is below. For random taps the bound is about twice ‖M‖₂. The terms of a larger ``norm``
    would cancel, so exp(M) is computed as exp(M/n)ⁿ with n = ⌈norm⌉.

    Args:
        channels: C of the images.
        kernel_size: one odd integer or one for each axis.
        norm: the largest ‖M‖₂, a finite number above 0.
        dimensions: 1 for signals (B, C, L), 2 for images, 3 for volumes.

    Parameters:
        weight: (C, C, kH, kW), small at the start, so that exp(M) is near the identity.

    Raises:
        ValueError: an option that does not fit, naming it; images of another shape.
    """

    uses_context = False

    def __init__(
        self,
        channels: int,
        kernel_size: PerAxis = 3,
        *,
        norm: float = DEFAULT_NORM,
        dimensions: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("channels", channels)
        check_number("norm", norm)
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"norm must be a finite number above 0, got {norm}")
        self.channels, self.norm = channels, norm
        self.dimensions = check_dimensions(dimensions, least=1)
        self.kernel_size = each_axis("kernel_size", kernel_size, dimensions)
        if any(taps % 2 == 0 for taps in self.kernel_size):
            raise ValueError(f"kernel_size must be odd, so that a tap is in the middle, got {kernel_size}")
        self.weight = nn.Parameter(torch.empty(channels, channels, *self.kernel_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=INITIAL_GAIN / math.sqrt(self.weight[0].numel()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._exponential(x, 1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._exponential(z, -1)

    def bounded_weight(self) -> Tensor:
        """The taps of M, for which ‖M‖₂ ≤ ``norm``."""
        bound = math.sqrt(math.prod(self.kernel_size)) * norm_bound(self.weight.flatten(1).double())
        return self.weight * (self.norm / bound.clamp_min(self.norm)).to(self.weight.dtype)

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, norm={self.norm}"
        return f"{text}, dimensions={self.dimensions}"

    def _exponential(self, x: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        check_images(self, x, self.channels, dimensions=self.dimensions)
        compute = logdet_dtype(x.dtype)
        with without_autocast(x.device.type):
            weight = sign * self.bounded_weight().to(compute)
            total, parts = x.to(compute), math.ceil(self.norm)
            for _ in range(parts):
                term = total
                for index in range(1, number_of_terms(self.norm / parts, compute) + 1):
                    term = CONVOLUTIONS[self.dimensions][0](term, weight / (parts * index), padding=self._padding())
                    total = total + term
            trace = tap(weight, self._padding()).diagonal().sum() * count_pixels(x)
        return total.to(x.dtype), expand_logdet(trace, x)

    def _padding(self) -> tuple[int, ...]:
        return tuple(taps // 2 for taps in self.kernel_size)


def norm_bound(matrix: Tensor) -> Tensor:
    """‖(W Wᵀ)⁸‖_F^{1/16}, which is at least ‖W‖₂ and, of r rows, at most r^{1/32} times that. Products alone: for a
    decomposition a GPU would be waited for, and of NaN it would be an error without the layer's name."""
    tiny = torch.finfo(matrix.dtype).tiny
    power, log = matrix @ matrix.mT, matrix.new_zeros(())
    for left in (8, 4, 2, 1):
        size = (power.square().sum() + tiny).sqrt()
        log = log + left * size.log()
        power = power / size
        power = power @ power
    return (log / 16).exp()


def number_of_terms(norm: float, dtype: torch.dtype) -> int:
    """The least n for which Σ_{i>n} Mⁱ x / i! is below half a rounding of exp(M) x for all x and all ‖M‖₂ ≤ ``norm``:
    it is at most norm^{n+1} e^{norm} / (n+1)! of ‖x‖, and ‖exp(M) x‖ is at least e^{−norm} ‖x‖."""
    count, rest = 0, norm * math.exp(2 * norm)
    while rest > torch.finfo(dtype).eps / 2:
        count += 1
        rest *= norm / (count + 1)
    return count
