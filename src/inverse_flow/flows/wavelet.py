"""Space to channels by an orthogonal wavelet transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from inverse_flow.flows.base import check_images, logdet_dtype, zero_logdet
from inverse_flow.flows.squeeze import Squeeze
from inverse_flow.ops.spec import check_number

BandOrder: TypeAlias = Literal["band", "channel"]

# The published filters are rounded; what differs by more loses digits in a float64 round trip.
ORTHOGONAL = 1e-9


class WaveletSqueeze(Squeeze):
    """(B, C, H, W) → (B, 4·C, H/2, W/2) by one step of an orthogonal wavelet transform; log-determinant 0.

    Along every axis in turn, with the low-pass filter h of 2m taps, its mirror gₙ = (−1)ⁿ h₂ₘ₋₁₋ₙ, and positions
    taken modulo the size,

        low(k) = Σₙ hₙ x(2k + n − m + 1),  high(k) = Σₙ gₙ x(2k + n − m + 1).

    That gives two sub-bands of a signal (B, C, L), four of an image, and eight of a volume. They are
    numbered in binary, a digit for each of D, H and W with W the lowest, and 1 for high-pass.

    The transform is orthogonal for every even size, and its inverse is its transpose. It is that of ``pywt.dwtn`` with
    ``mode="periodization"``. Source: Daubechies, "Orthonormal bases of compactly supported wavelets", 1988.

    Args:
        wavelet: ``"haar"``, two taps; the name of an orthogonal wavelet of PyWavelets, such as ``"db2"``, ``"sym4"`` or
            ``"coif1"``, which that library (extra ``[wavelets]``) is asked for; or the taps of h.
        order: ``"band"``: output channel ``band · C + c``, so that a :class:`~inverse_flow.flows.Split` sends the
            coarse picture on. ``"channel"``: output channel ``c · bands + band``, as :class:`Squeeze` counts, so that
            what came from the first half of the channels stays the first half.

    Raises:
        ValueError: a wavelet or an order that does not exist; a wavelet that is not orthogonal; an odd size; channels
            that are no multiple of the number of bands.
        ModuleNotFoundError: a name, without PyWavelets.
    """

    def __init__(self, wavelet: str | Sequence[float] = "haar", order: BandOrder = "band") -> None:
        super().__init__(2)
        if order not in ("band", "channel"):
            raise ValueError(f'order must be "band" or "channel", got {order!r}')
        if not isinstance(wavelet, (str, Sequence)):
            raise TypeError(f"wavelet must be a name or the taps of a filter, got {wavelet!r}")
        self.wavelet = wavelet if isinstance(wavelet, str) else tuple(wavelet)
        for tap in () if isinstance(self.wavelet, str) else self.wavelet:
            check_number("each tap of the wavelet", tap)
        self.order = order
        # The taps are kept times √2, so that Haar's are 1 and −1; what is left is one factor.
        self.low = _low_pass(self.wavelet)
        self.high = tuple((-1) ** n * tap for n, tap in enumerate(reversed(self.low)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, spatial=True)
        self.output_shape(tuple(x.shape[1:]))
        channels, axes, shift = x.shape[1], range(2, x.dim()), len(self.low) // 2 - 1
        z = x.to(logdet_dtype(x.dtype))
        for axis in reversed(axes):
            pairs = _roll(z, shift, axis).unflatten(axis, (-1, 2)).unbind(axis + 1)
            parts = [_roll(part, -k, axis) for k in range(shift + 1) for part in pairs]
            # The band of the axis that comes last is the slowest index.
            z = torch.cat((_mix(self.low, parts), _mix(self.high, parts)), dim=1)
        if self.order == "channel":
            z = z.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1, 2)
        return (z * _scale(x)).to(x.dtype), zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, spatial=True)
        channels, shift = self.input_shape(tuple(z.shape[1:]))[0], len(self.low) // 2 - 1
        x = z.to(logdet_dtype(z.dtype))
        if self.order == "channel":
            x = x.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1, 2)
        for axis in range(2, z.dim()):
            bands = x.chunk(2, dim=1)
            parts = [_roll(band, k, axis) for k in range(shift + 1) for band in bands]
            # Of both filters in turn, the taps that met the first and those that met the second of a pair.
            taps = list(zip(self.low, self.high, strict=True))
            pair = [_mix([tap for both in taps[offset::2] for tap in both], parts) for offset in (0, 1)]
            x = _roll(torch.stack(pair, dim=axis + 1).flatten(axis, axis + 1), -shift, axis)
        return (x * _scale(z)).to(z.dtype), zero_logdet(z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The transform is orthogonal: both go back through its inverse."""
        return self.inverse(z)[0], self.inverse(grad_z)[0]

    def extra_repr(self) -> str:
        return f"{self.wavelet!r}, order={self.order!r}"


class HaarSqueeze(WaveletSqueeze):
    """:class:`WaveletSqueeze` by the shortest wavelet, which pairs of neighbours (a, b) have to themselves.

    Their low-pass is (a + b)/√2 and their high-pass (a − b)/√2. So of an image, band 0 is
    twice the mean of a 2×2 block, band 1 left minus right, band 2 top minus bottom, band 3 the difference of the
    diagonals, each but the first divided by 2. Source: Haar, "Zur Theorie der orthogonalen
    Funktionensysteme", 1910; as the squeeze of a flow: Ardizzone et al., "Guided Image Generation with Conditional
    Invertible Neural Networks", 2019.

    Args:
        order: as for :class:`WaveletSqueeze`.

    Raises:
        ValueError: an order that does not exist; an odd size; channels that are no multiple of the number of bands.
    """

    def __init__(self, order: BandOrder = "band") -> None:
        super().__init__("haar", order)

    def extra_repr(self) -> str:
        return f'order="{self.order}"'


def _low_pass(wavelet: str | tuple[float, ...]) -> tuple[float, ...]:
    """√2·h."""
    if wavelet == "haar":
        return (1.0, 1.0)
    taps = _taps_by_name(wavelet) if isinstance(wavelet, str) else wavelet
    count = len(taps)
    products = [
        sum(a * b for a, b in zip(taps, taps[shift:], strict=False)) - (shift == 0) for shift in range(0, count, 2)
    ]
    if not taps or count % 2 or not max(map(abs, products)) <= ORTHOGONAL:
        raise ValueError(
            "the low-pass filter of an orthogonal wavelet has an even number of taps, of which Σ hₙ² is 1 and "
            f"Σ hₙ hₙ₊₂ₖ is 0, got {wavelet!r}"
        )
    return tuple(math.sqrt(2) * tap for tap in taps)


def _taps_by_name(wavelet: str) -> tuple[float, ...]:
    try:
        import pywt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the filters of {wavelet!r} are those of PyWavelets, which is not installed: "
            "pip install 'inverse-flow[wavelets]', or use \"haar\" or give the taps",
            name="pywt",
        ) from error
    if wavelet not in pywt.wavelist(kind="discrete"):
        raise ValueError(f'PyWavelets has no discrete wavelet {wavelet!r}; "db2", "sym4" and "coif1" are some')
    found = pywt.Wavelet(wavelet)
    if found.dec_lo != found.rec_lo[::-1]:
        raise ValueError(f"the wavelet must be orthogonal, its filters those of its inverse; got {wavelet!r}")
    return tuple(found.rec_lo)


def _roll(x: Tensor, shift: int, axis: int) -> Tensor:
    return x.roll(shift, axis) if shift else x


def _mix(taps: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    """Σ tap · part."""
    total = parts[0] if taps[0] == 1 else taps[0] * parts[0]
    for tap, part in zip(taps[1:], parts[1:], strict=True):
        total = total.add(part, alpha=tap)
    return total


def _scale(x: Tensor) -> float:
    """1/√2 for each axis, in one factor: exactly ½ for images."""
    return math.pow(0.5, (x.dim() - 2) / 2)
