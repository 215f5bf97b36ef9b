"""From the unit interval to the whole line."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow.flows.base import FlowLayer, check_images, logdet_dtype, per_example, sum_example
from inverse_flow.ops.spec import check_number

# Fraction of the unit interval that is left free at each end, so that 0 and 1 have a finite logit. A dark pixel is
# spread out by about 1 / margin.
DEFAULT_MARGIN = 1e-3


class Logit(FlowLayer):
    """z = log(p / (1 − p)) with p = a + (1 − 2a)·x, elementwise; log-determinant Σ log(1 − 2a) − log p − log(1 − p).

    For images in [0, 1]. It spreads out the many values close to black and white, which an affine flow would need
    huge scales for, and samples never leave [−a, 1 + a] by more than rounding. What lies outside that interval
    becomes NaN. Source: Dinh et al., "Real NVP", 2016, section 4.1; Papamakarios et al., "MAF", 2017.

    Args:
        margin: a, above 0 and below ½.
    """

    uses_context = False

    def __init__(self, margin: float = DEFAULT_MARGIN) -> None:
        super().__init__()
        check_number("margin", margin)
        if not 0 < margin < 0.5:
            raise ValueError(f"the margin of a logit must be above 0 and below 0.5, got {margin}")
        self.margin = margin

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x)
        p = self.margin + (1 - 2 * self.margin) * x.to(logdet_dtype(x.dtype))
        z = torch.log(p) - torch.log1p(-p)
        return z.to(x.dtype), -self._log_slope(z)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z)
        values = z.to(logdet_dtype(z.dtype))
        x = (torch.sigmoid(values) - self.margin) / (1 - 2 * self.margin)
        return x.to(z.dtype), self._log_slope(values)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """p = σ(z) and ∂x = (∂z + (2p − 1) · ∂logdet) · (1 − 2a) / (p · (1 − p))."""
        values = z.to(logdet_dtype(z.dtype))
        p, rest = torch.sigmoid(values), torch.sigmoid(-values)  # 1 − p would lose the digits of a bright pixel
        grad_x = (grad_z + (p - rest) * per_example(grad_logdet, z)) * (1 - 2 * self.margin) / (p * rest)
        return ((p - self.margin) / (1 - 2 * self.margin)).to(z.dtype), grad_x.to(z.dtype)

    def extra_repr(self) -> str:
        return f"margin={self.margin}"

    def _log_slope(self, z: Tensor) -> Tensor:
        """log|det dx/dz|: log σ(z) + log σ(−z) − log(1 − 2a), summed."""
        return sum_example(F.logsigmoid(z) + F.logsigmoid(-z) - math.log(1 - 2 * self.margin))
