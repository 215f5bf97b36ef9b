"""Invertible 1×1 convolution in PLU form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, check_images, count_pixels, expand_logdet, logdet_dtype
from inverse_flow.ops.causal import CONVOLUTIONS, without_autocast
from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible import backpropagate


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight · x_p + bias at every pixel p; the (C, C) ``weight`` is rounded once, to at least float32, under autocast
    too."""
    if x.dim() == 2:
        return mix_channels(x[..., None], weight, bias)[..., 0]
    compute = logdet_dtype(x.dtype)
    convolve = CONVOLUTIONS[x.dim() - 2][0]
    kernel = weight.to(compute)[(...,) + (None,) * (x.dim() - 2)]
    with without_autocast(x.device.type):
        mixed: Tensor = convolve(x.to(compute), kernel, None if bias is None else bias.to(compute))
    return mixed.to(x.dtype)


def mixing_gradient(x: Tensor, grad_z: Tensor) -> Tensor:
    """The gradient of a float64 ``weight`` of :func:`mix_channels`, Σ_p ∂z_p x_pᵀ over the pixels of every image."""
    if x.dim() == 2:
        return mixing_gradient(x[..., None], grad_z[..., None])
    compute = logdet_dtype(x.dtype)
    with without_autocast(x.device.type):
        return (grad_z.to(compute).flatten(2) @ x.to(compute).flatten(2).mT).sum(0).double()


class Conv1x1(FlowLayer):
    """z_p = W x_p at every pixel p, with W = P·L·(U + diag(s)); log-determinant H·W·Σ log|s|.

    P is a fixed permutation, L unit lower triangular, U strictly upper triangular; the signs of s are fixed and
    log|s| is learned (Kingma & Dhariwal, "Glow", 2018, section 3.2). W starts as a random rotation. W and its inverse
    are formed in float64 and rounded once; the convolution runs in at least float32, under autocast too, because
    the flow has to be inverted through it.

    Args:
        channels: C of the images (B, C, H, W), or volumes (B, C, D, H, W).
    """

    uses_context = False
    permutation: Tensor
    sign: Tensor

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_integer("channels", channels)
        self.channels = channels
        dtype = torch.get_default_dtype() if dtype is None else dtype
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, device=device)).Q
        permutation, lower, upper = torch.linalg.lu(rotation)
        scale = upper.diagonal()
        self.register_buffer("permutation", permutation.to(dtype))
        self.register_buffer("sign", scale.sign().to(dtype))
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_scale = nn.Parameter(scale.abs().log().to(dtype))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, self.channels)
        lower, upper = self._factors()
        return mix_channels(x, self.permutation.double() @ lower @ upper), expand_logdet(self._logdet(x), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, self.channels)
        weight = self._inverse_weight(*self._factors())
        return mix_channels(z, weight), expand_logdet(-self._logdet(z), z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_p = W⁻¹ z_p, ∂x_p = Wᵀ ∂z_p and ∂W = Σ_p ∂z_p x_pᵀ, which goes on to the factors of W."""
        with torch.enable_grad():
            lower, upper = self._factors()
            weight = self.permutation.double() @ lower @ upper
            logdet = self._logdet(z)
        x = mix_channels(z, self._inverse_weight(lower, upper))
        backpropagate([weight, logdet], [mixing_gradient(x, grad_z), grad_logdet.sum()])
        return x, mix_channels(grad_z, weight.T)

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def _factors(self) -> tuple[Tensor, Tensor]:
        identity = torch.eye(self.channels, dtype=torch.float64, device=self.lower.device)
        scale = self.sign.double() * self.log_scale.double().exp()
        return self.lower.double().tril(-1) + identity, self.upper.double().triu(1) + torch.diag(scale)

    def _inverse_weight(self, lower: Tensor, upper: Tensor) -> Tensor:
        weight = torch.linalg.solve_triangular(lower, self.permutation.double().T, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, weight, upper=True)

    def _logdet(self, x: Tensor) -> Tensor:
        return self.log_scale.to(logdet_dtype(x.dtype)).sum() * count_pixels(x)
