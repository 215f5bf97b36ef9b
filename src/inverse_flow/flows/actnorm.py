"""Activation normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import (
    FlowLayer,
    check_images,
    count_pixels,
    expand_logdet,
    logdet_dtype,
    per_channel,
    sum_channels,
)
from inverse_flow.reversible import backpropagate

# A channel whose spread is below this fraction of its largest magnitude is constant up to rounding: dividing by such
# a spread would only blow noise up.
CONSTANT_SPREAD = 1e-5


class ActNorm(FlowLayer):
    """z = (x + bias) · exp(log_scale), per channel; log-determinant H·W·Σ log_scale.

    The first batch in training mode sets bias and log_scale so that z has mean 0 and variance 1 in each channel
    (Kingma & Dhariwal, "Glow", 2018, section 3.1). The buffer ``initialized`` remembers this and travels with
    ``state_dict``. A batch with fewer than two values a channel has no spread and initialises nothing: the layer
    stays as it is and waits for the next one. A constant channel is centred and keeps scale 1. Until it is
    initialised the layer is the identity.

    Args:
        channels: C of the images (B, C, H, W), or volumes (B, C, D, H, W).

    Raises:
        FloatingPointError: the initialising batch holds a NaN or an infinity.
    """

    initialized: Tensor

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.channels = channels
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        # Reading the buffer would make every step wait for the device, so it is read once and remembered.
        self._known_initialized = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, self.channels)
        if self.training and not self._known_initialized:
            self._initialize(x)
        compute = logdet_dtype(x.dtype)
        bias, log_scale = self._per_channel(x, compute)
        z = (x.to(compute) + bias) * log_scale.exp()
        return z.to(x.dtype), expand_logdet(self._logdet(x), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, self.channels)
        compute = logdet_dtype(z.dtype)
        bias, log_scale = self._per_channel(z, compute)
        x = z.to(compute) * (-log_scale).exp() - bias
        return x.to(z.dtype), expand_logdet(-self._logdet(z), z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """∂x = ∂z · exp(s), ∂b = Σ ∂x and ∂s = Σ z · ∂z + H·W·Σ ∂logdet, with the sums over all but the channels."""
        compute = logdet_dtype(z.dtype)
        grad_x = grad_z.to(compute) * self._per_channel(z, compute)[1].exp()
        grad_log_scale = sum_channels(z.to(compute) * grad_z) + count_pixels(z) * grad_logdet.sum()
        grads = [g.to(self.bias.dtype) for g in (sum_channels(grad_x), grad_log_scale)]
        backpropagate([self.bias, self.log_scale], grads)
        return self.inverse(z)[0], grad_x.to(z.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def _per_channel(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return per_channel(self.bias.to(dtype), x), per_channel(self.log_scale.to(dtype), x)

    def _logdet(self, x: Tensor) -> Tensor:
        return self.log_scale.to(logdet_dtype(x.dtype)).sum() * count_pixels(x)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        self._known_initialized = bool(self.initialized)
        if self._known_initialized or x.numel() < 2 * self.channels:
            return
        values = x.to(logdet_dtype(x.dtype))
        all_but_channels = (0, *range(2, x.dim()))
        variance, mean = torch.var_mean(values, dim=all_but_channels, correction=0)
        if not bool(torch.isfinite(variance).all()):
            bad = (~torch.isfinite(variance)).nonzero().flatten().tolist()
            raise FloatingPointError(f"ActNorm cannot initialise: NaN or infinite values in channels {bad}")
        spread = variance.sqrt()
        constant = spread <= CONSTANT_SPREAD * values.abs().amax(dim=all_but_channels)
        self.bias.copy_(-mean)
        self.log_scale.copy_(torch.where(constant, torch.ones_like(spread), spread).log().neg())
        self.initialized.fill_(True)
        self._known_initialized = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_initialized = False  # the buffer may have changed: read it again when next needed
