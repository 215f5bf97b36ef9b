"""A leapfrog step of the nonlinear wave equation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, check_dtype, check_images, logdet_dtype, zero_logdet
from inverse_flow.flows.conditioner import check_dimensions
from inverse_flow.ops.causal import CONVOLUTIONS
from inverse_flow.ops.spec import check_integer, check_number
from inverse_flow.reversible import backpropagate


class Hyperbolic(FlowLayer):
    """(x_prev, x_cur) → (x_cur, 2·x_cur − x_prev − α·Kᵀ ReLU(K x_cur + b)); log-determinant 0.

    The state is two halves of the channels, the field at two moments, and the layer is one leapfrog step of
    x'' = −Kᵀ ReLU(K x + b), a wave equation with learned filters: no energy is lost, so nothing is forgotten on the
    way through a deep network. The inverse is the same step with time reversed. Exchanging two halves of n values
    and negating one of them has determinant (−1)ⁿ·(−1)ⁿ = 1, and so has the layer. Lensink, Peters & Haber, "Fully
    hyperbolic convolutional neural networks", 2022; the HyperbolicLayer of Orozco et al.,
    "InvertibleNetworks.jl", 2023. Change resolution with :class:`~inverse_flow.flows.Squeeze` or
    ``HaarSqueeze(order="channel")``, which keep the two halves apart.

    The step is stable while α·‖K‖² < 4. K starts random with ‖K‖ ≈ 1.

    Args:
        channels: C of the images, even; the first half is x_prev.
        hidden: channels of K x; C/2 unless given.
        step_size: α > 0, the square of the time step.
        kernel_size: of the convolution K; odd, so that it is centred.
        dimensions: of the convolution: 1 for signals (B, C, L), 2 for images, 3 for volumes.

    Parameters:
        weight: (hidden, C/2, k, k), or (hidden, C/2, k, k, k): K. Kᵀ is the transposed convolution with it.
        bias: (hidden,), b, starting at 0.

    Raises:
        ValueError: an option that does not fit, naming it; images of another shape.
    """

    uses_context = False

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        *,
        step_size: float = 1.0,
        kernel_size: int = 3,
        dimensions: int = 2,
    ) -> None:
        super().__init__()
        check_integer("channels", channels, least=2)
        hidden = channels // 2 if hidden is None else hidden
        check_integer("hidden", hidden)
        check_integer("kernel_size", kernel_size)
        if channels % 2:
            raise ValueError(f"the two states are halves of an even number of channels, got {channels}")
        check_number("step_size", step_size)
        if not (math.isfinite(step_size) and step_size > 0):
            raise ValueError(f"step_size must be a finite number above 0, got {step_size}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.channels = channels
        self.step_size = step_size
        self.dimensions = check_dimensions(dimensions, least=1)
        taps = (kernel_size,) * dimensions
        self.weight = nn.Parameter(torch.empty(hidden, channels // 2, *taps))
        self.bias = nn.Parameter(torch.zeros(hidden))
        # At each frequency K is a random hidden × C/2 matrix whose entries deviate by √(number of taps) times what one
        # tap does, and whose largest singular value is about that times (√hidden + √(C/2)).
        spread = math.sqrt(math.prod(taps)) * (math.sqrt(hidden) + math.sqrt(channels // 2))
        nn.init.normal_(self.weight, std=1 / spread)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        previous, current = self._states(x)
        return torch.cat((current, self._step(previous, current)), dim=1), zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        current, following = self._states(z)
        return torch.cat((self._step(following, current), current), dim=1), zero_logdet(z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """∂x_prev = −∂x_next and ∂x_cur gains 2·∂x_next − α·∂force, with one run of the two convolutions."""
        (current, following), (grad_current, grad_following) = self._states(z), self._states(grad_z)
        current = current.detach().requires_grad_()
        with torch.enable_grad():
            force = self._force(current)
        backpropagate([force], [-self.step_size * grad_following.to(force.dtype)])
        assert current.grad is not None
        x = torch.cat((self._leap(following, current, force), current.detach()), dim=1)
        return x.detach(), torch.cat((-grad_following, grad_current + 2 * grad_following + current.grad), dim=1)

    def extra_repr(self) -> str:
        return f"{self.channels}, hidden={len(self.bias)}, step_size={self.step_size}, dimensions={self.dimensions}"

    def _states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_images(self, x, self.channels, dimensions=self.dimensions)
        check_dtype(self, x)
        first, second = x.chunk(2, dim=1)
        return first, second

    def _step(self, other: Tensor, current: Tensor) -> Tensor:
        """2·current − other − α·Kᵀ ReLU(K current + b): the state on the other side of ``current`` in time."""
        return self._leap(other, current, self._force(current))

    def _leap(self, other: Tensor, current: Tensor, force: Tensor) -> Tensor:
        result = 2 * current.to(logdet_dtype(current.dtype)) - other - self.step_size * force
        return result.to(current.dtype)

    def _force(self, x: Tensor) -> Tensor:
        convolve, transposed = CONVOLUTIONS[self.dimensions]
        padding = self.weight.shape[-1] // 2
        response = F.relu(convolve(x, self.weight, self.bias, padding=padding))
        result: Tensor = transposed(response, self.weight, padding=padding)
        return result
