"""Invertible 1×1 convolution in PLU form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, check_images, expand_logdet, logdet_dtype


class Conv1x1(FlowLayer):
    """z_p = W x_p at every pixel p, with W = P·L·(U + diag(s)); log-determinant H·W·Σ log|s|.

    P is a fixed permutation, L unit lower triangular, U strictly upper triangular; the signs of s are fixed and
    log|s| is learned (Kingma & Dhariwal, "Glow", 2018, section 3.2). W starts as a random rotation. W and its inverse
    are formed in float64 and rounded once; the convolution runs in at least float32, under autocast too, because
    the flow has to be inverted through it.

    Args:
        channels: C of the images (B, C, H, W).
    """

    permutation: Tensor
    sign: Tensor

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
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
        return self._convolve(x, self.permutation.double() @ lower @ upper), expand_logdet(self._logdet(x), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, self.channels)
        lower, upper = self._factors()
        weight = torch.linalg.solve_triangular(lower, self.permutation.double().T, upper=False, unitriangular=True)
        weight = torch.linalg.solve_triangular(upper, weight, upper=True)
        return self._convolve(z, weight), expand_logdet(-self._logdet(z), z)

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def _factors(self) -> tuple[Tensor, Tensor]:
        identity = torch.eye(self.channels, dtype=torch.float64, device=self.lower.device)
        scale = self.sign.double() * self.log_scale.double().exp()
        return self.lower.double().tril(-1) + identity, self.upper.double().triu(1) + torch.diag(scale)

    def _logdet(self, x: Tensor) -> Tensor:
        return self.log_scale.to(logdet_dtype(x.dtype)).sum() * (x.shape[2] * x.shape[3])

    @staticmethod
    def _convolve(x: Tensor, weight: Tensor) -> Tensor:
        compute = logdet_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.to(compute), weight.to(compute)[:, :, None, None]).to(x.dtype)
