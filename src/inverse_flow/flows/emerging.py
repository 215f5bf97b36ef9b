"""Two ways to a convolution that sees the pixels on all sides: two causal ones, and a periodic one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from inverse_flow.conv import INITIAL_GAIN, InverseConv1d, InverseConv2d, InverseConv3d, InverseConvNd
from inverse_flow.flows.base import FlowLayer, check_images, expand_logdet, logdet_dtype
from inverse_flow.flows.compose import Compose, Reverse
from inverse_flow.flows.conditioner import check_dimensions
from inverse_flow.ops.causal import CONVOLUTIONS, tap, without_autocast
from inverse_flow.ops.spec import ORDERS, PerAxis, check_integer, each_axis

INVERSE_CONVS: dict[int, type[InverseConvNd]] = {1: InverseConv1d, 2: InverseConv2d, 3: InverseConv3d}


class EmergingConv(Compose):
    """z = A₂(A₁ x + b₁) + b₂, two causal convolutions of opposite orders; log-determinant H·W·Σᵢ log|det Mᵢ|.

    Together they see the pixels on all sides, through a window of (2k − 1) × (2k − 1) for kernels of k × k. From data
    to latent both are plain convolutions, and from latent to data both are solves: each is an
    :class:`~inverse_flow.InverseConv2d` turned round by :class:`Reverse`. Hoogeboom, van den Berg & Welling, "Emerging
    Convolutions for Generative Normalizing Flows", 2019.

    Args:
        channels: C of the images.
        kernel_size: of both, as that of :class:`~inverse_flow.InverseConv2d`.
        corner: the kind of M, as there; ``"plu"`` mixes the channels and scales them.
        bias: learn b₁ and b₂.
        max_row_sum: a bound on both solves, as there.
        dimensions: 1 for signals (B, C, L), 2 for images, 3 for volumes.

    Raises:
        ValueError: as :class:`~inverse_flow.InverseConv2d`; other dimensions.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: PerAxis = 3,
        *,
        corner: str = "plu",
        bias: bool = True,
        max_row_sum: float | None = None,
        dimensions: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        make = INVERSE_CONVS[check_dimensions(dimensions, least=1)]
        options: dict[str, Any] = {"corner": corner, "bias": bias, "max_row_sum": max_row_sum}
        orders = ORDERS[dimensions][0], ORDERS[dimensions][-1]
        convs = (make(channels, kernel_size, order=order, **options, device=device, dtype=dtype) for order in orders)
        super().__init__(*map(Reverse, convs))


class PeriodicConv(FlowLayer):
    r"""z_p = Σ_δ w_δ x_{p+δ} with pixels counted modulo the image's sizes; log-determinant Σ_ω log|det ŵ(ω)|.

    A periodic convolution is a C × C matrix ŵ(ω) = Σ_δ w_δ exp(2πi ω·δ) at each of the H·W frequencies ω of an image,
    by itself: x̂(ω) = ŵ(ω)⁻¹ ẑ(ω). So the inverse takes two Fourier transforms, and the log-determinant one small
    determinant a frequency (of a real image's, half of them are enough). From data to latent it is a plain
    convolution. The matrices, their inverses and determinants are formed in float64 and rounded once. Hoogeboom, van
    den Berg & Welling, "Emerging Convolutions for Generative Normalizing Flows", 2019.

    Nothing keeps ŵ(ω) from becoming singular but the log-determinant, which would be −∞ there.

    Args:
        channels: C of the images.
        kernel_size: one integer or one for each axis; the tap in the middle, ⌊k/2⌋, meets the output pixel itself.
        dimensions: 1 for signals (B, C, L), 2 for images, 3 for volumes.

    Parameters:
        weight: (C, C, kH, kW), beginning near the identity.

    Raises:
        ValueError: an option that does not fit, naming it; images of another shape, or that a kernel reaches around
            more than once.
    """

    uses_context = False

    def __init__(
        self,
        channels: int,
        kernel_size: PerAxis = 3,
        *,
        dimensions: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("channels", channels)
        self.channels = channels
        self.dimensions = check_dimensions(dimensions, least=1)
        self.kernel_size = each_axis("kernel_size", kernel_size, dimensions)
        self.weight = nn.Parameter(torch.empty(channels, channels, *self.kernel_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=INITIAL_GAIN / math.sqrt(self.weight[0].numel()))
        with torch.no_grad():
            middle = tap(self.weight, (taps // 2 for taps in self.kernel_size))
            middle.add_(torch.eye(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.convolve(x), self.log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(z)
        spectrum = self._spectrum(z)
        return self._divide(z, spectrum), expand_logdet(-self._log_det(spectrum, z), z)

    def convolve(self, x: Tensor) -> Tensor:
        """z alone."""
        self._check(x)
        compute = logdet_dtype(x.dtype)
        with without_autocast(x.device.type):
            padded = x.to(compute)
            for axis, taps in enumerate(self.kernel_size, start=2):
                size, before = x.shape[axis], taps // 2
                ends = padded.narrow(axis, size - before, before), padded.narrow(axis, 0, taps - 1 - before)
                padded = torch.cat((ends[0], padded, ends[1]), dim=axis)
            z: Tensor = CONVOLUTIONS[self.dimensions][0](padded, self.weight.to(compute))
        return z.to(x.dtype)

    def log_det(self, x: Tensor) -> Tensor:
        """That of :meth:`convolve` for images of this size, (B,)."""
        return expand_logdet(self._log_det(self._spectrum(x), x), x)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, dimensions={self.dimensions}"

    def _spectrum(self, images: Tensor) -> Tensor:
        """ŵ in float64: (H, ⌊W/2⌋ + 1, C, C), the frequencies of ``torch.fft.rfftn``."""
        spectrum = self.weight.to(torch.complex128)
        for axis, (size, taps) in enumerate(zip(images.shape[2:], self.kernel_size, strict=True), start=1):
            count = size if axis < self.dimensions else size // 2 + 1
            offsets = torch.arange(taps, dtype=torch.float64, device=images.device) - taps // 2
            frequencies = torch.arange(count, dtype=torch.float64, device=images.device)
            angles = 2 * math.pi / size * frequencies[:, None] * offsets
            spectrum = torch.tensordot(spectrum, torch.complex(angles.cos(), angles.sin()), dims=([2], [1]))
        return spectrum.movedim((0, 1), (-2, -1))

    def _divide(self, z: Tensor, spectrum: Tensor) -> Tensor:
        """x̂(ω) = ŵ(ω)⁻¹ ẑ(ω), transformed back."""
        if z.numel() == 0:  # of which there is no Fourier transform
            return z.clone()
        axes = tuple(range(2, z.dim()))
        with without_autocast(z.device.type):
            frequencies = torch.fft.rfftn(z.to(logdet_dtype(z.dtype)), dim=axes)
            matrices = torch.linalg.inv_ex(spectrum).inverse.to(frequencies.dtype)
            mixed = matrices @ frequencies.movedim((0, 1), (-1, -2))
            x = torch.fft.irfftn(mixed.movedim((-1, -2), (0, 1)), s=z.shape[2:], dim=axes)
        return x.to(z.dtype).contiguous()

    def _log_det(self, spectrum: Tensor, images: Tensor) -> Tensor:
        size, count = images.shape[-1], spectrum.shape[-3]
        frequency = torch.arange(count, device=images.device)
        # Along the last axis each frequency stands for its negative too, but for 0 and W/2, which are their own.
        times = 1 + ((frequency > 0) & (2 * frequency < size)).double()
        return (torch.linalg.slogdet(spectrum).logabsdet * times).sum()

    def _check(self, images: Tensor) -> None:
        check_images(self, images, self.channels, dimensions=self.dimensions)
        if any(taps // 2 > size for taps, size in zip(self.kernel_size, images.shape[2:], strict=True)):
            raise ValueError(
                f"a kernel of {self.kernel_size} reaches around images of {tuple(images.shape[2:])} more than once"
            )
