"""Increasing functions of one number, the same at every pixel."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, check_images, logdet_dtype, per_channel, sum_example
from inverse_flow.ops.spec import check_integer, check_number

# Newton steps of an inverse: enough for float64, for any z and slopes from the least on.
NEWTON_STEPS = 16
LEAST_SLOPE = 1e-3


class LeakyReLU(FlowLayer):
    """z = x where x > 0, and s_c·x elsewhere, with a slope that each channel learns; log-determinant Σ_{x ≤ 0} log s_c.

    The slopes begin at 1, where the layer is the identity. Keller et al., "Self Normalizing Flows", 2021, whose release
    has one slope for all channels.

    Args:
        channels: C of the images (B, C, H, W), signals, volumes or vectors.

    Parameters:
        log_slope: (C,), log s.
    """

    uses_context = False

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_integer("channels", channels)
        self.channels = channels
        self.log_slope = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._bend(x, 1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._bend(z, -1)

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def _bend(self, x: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        check_images(self, x, self.channels)
        values = x.to(logdet_dtype(x.dtype))
        log_slope = torch.where(values > 0, 0, sign * per_channel(self.log_slope.to(values.dtype), values))
        return (values * log_slope.exp()).to(x.dtype), sum_example(log_slope)


class _Smooth(FlowLayer):
    """z = f(x) for every value, f increasing and known in closed form; its inverse by Newton's iteration.

    The iteration keeps a bracket, an interval in which x is sure to lie, and halves it where a Newton step would leave
    it. It takes a fixed number of steps, without asking any value whether it has arrived, so that it can be captured.
    """

    uses_context = False

    def __init__(self, slope: float) -> None:
        super().__init__()
        check_number("slope", slope)
        if not LEAST_SLOPE <= slope < 1:
            raise ValueError(f"the least slope must be at least {LEAST_SLOPE} and below 1, got {slope}")
        self.slope = slope

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x)
        z, slope = self._evaluate(x.to(logdet_dtype(x.dtype)))
        return z.to(x.dtype), sum_example(slope.log())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z)
        wanted = z.to(logdet_dtype(z.dtype))
        x = self._solve(wanted.detach())
        # Steps that gradients follow: of one the first derivative is right, of two the first three.
        for _ in range(2):
            value, slope = self._evaluate(x)
            x = x - (value - wanted) / slope
        return x.to(z.dtype), -sum_example(self._evaluate(x)[1].log())

    def extra_repr(self) -> str:
        return f"slope={self.slope}"

    def _solve(self, z: Tensor) -> Tensor:
        low, high = self._bracket(z)
        x = low / 2 + high / 2  # their sum may overflow
        for _ in range(NEWTON_STEPS):
            value, slope = self._evaluate(x)
            low, high = torch.where(value < z, x, low), torch.where(value > z, x, high)
            step = x - (value - z) / slope
            x = torch.where((step >= low) & (step <= high), step, low / 2 + high / 2)
        return x

    @abstractmethod
    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and f′(x)."""

    @abstractmethod
    def _bracket(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers below and above f⁻¹(z)."""


class SmoothLeakyReLU(_Smooth):
    """z = a·x + (1 − a)·log(1 + eˣ), whose slope rises from a to 1; log-determinant Σ log(a + (1 − a) σ(x)).

    Keller et al., "Self Normalizing Flows", 2021.

    Args:
        slope: a, at least 0.001 and below 1.
    """

    def __init__(self, slope: float = 0.3) -> None:
        super().__init__(slope)

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rest = 1 - self.slope
        return self.slope * x - rest * F.logsigmoid(-x), self.slope + rest * torch.sigmoid(x)

    def _bracket(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # f lies above the leaky ReLU with its two slopes, by no more than (1 − a) log 2.
        lower = z - (1 - self.slope) * math.log(2)
        return torch.minimum(lower, lower / self.slope), torch.minimum(z, z / self.slope)


class SmoothTanh(_Smooth):
    """z = tanh x + a·x, whose slope falls from 1 + a in the middle to a; log-determinant Σ log(1 − tanh² x + a).

    Keller et al., "Self Normalizing Flows", 2021.

    Args:
        slope: a, at least 0.001 and below 1.
    """

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__(slope)

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tanh = torch.tanh(x)
        return tanh + self.slope * x, 1 + self.slope - tanh.square()

    def _bracket(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # |f| is at most (1 + a)·|x| and 1 + a·|x|, and at least a·|x|.
        least = torch.maximum(z.abs() / (1 + self.slope), (z.abs() - 1) / self.slope)
        most = z.abs() / self.slope
        return torch.where(z < 0, -most, least), torch.where(z < 0, -least, most)
