"""Orthogonal 1×1 convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inverse_flow.flows.base import FlowLayer, check_images, zero_logdet
from inverse_flow.flows.conv1x1 import mix_channels, mixing_gradient
from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible import backpropagate


class Householder(FlowLayer):
    """z_p = Q x_p at every pixel p, with Q = H₁·H₂ ⋯ H_k and H_i = I − 2 vᵢ vᵢᵀ / ‖vᵢ‖²; log-determinant 0.

    Q is orthogonal whatever the vectors hold, so the inverse is the transposed matrix and no log-determinant needs to
    be computed. With V = (v₁, …, v_k) the product is Q = I − V T Vᵀ, where T⁻¹ is upper triangular, with VᵀV above the
    diagonal and ‖vᵢ‖²/2 on it: one small triangular solve in place of k dependent steps (Joffrain et al.,
    "Accumulating Householder transformations, revisited", 2006). Q is formed in float64 and rounded once, and the
    convolution runs in at least float32, under autocast too. The vectors start random. A vector of zeros stands for
    no reflection and gives NaN.

    A product of C reflections reaches every orthogonal matrix whose determinant is (−1)^C; fewer cost less and
    reach less. It learns no scale: that is the ActNorm's before it. Source: Tomczak & Welling, "Improving
    Variational Auto-Encoders using Householder Flow", 2016; with three reflections, the 1×1 convolution of Orozco et
    al., "InvertibleNetworks.jl", 2023.

    Args:
        channels: C of the images (B, C, H, W), or volumes (B, C, D, H, W).
        reflections: k; C unless given.

    Raises:
        ValueError: fewer than one channel or reflection.
    """

    uses_context = False

    def __init__(
        self,
        channels: int,
        reflections: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        reflections = channels if reflections is None else reflections
        check_integer("channels", channels)
        check_integer("reflections", reflections)
        self.channels = channels
        self.vectors = nn.Parameter(torch.randn(channels, reflections, device=device, dtype=dtype))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, self.channels)
        return mix_channels(x, self._matrix()), zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, self.channels)
        return mix_channels(z, self._matrix().T), zero_logdet(z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_p = Qᵀ z_p, ∂x_p = Qᵀ ∂z_p and ∂Q = Σ_p ∂z_p x_pᵀ, which goes on to the vectors."""
        with torch.enable_grad():
            matrix = self._matrix()
        x = mix_channels(z, matrix.T)
        backpropagate([matrix], [mixing_gradient(x, grad_z)])
        return x, mix_channels(grad_z, matrix.T)

    def extra_repr(self) -> str:
        return f"{self.channels}, reflections={self.vectors.shape[1]}"

    def _matrix(self) -> Tensor:
        """Q in float64."""
        vectors = self.vectors.double()
        gram = vectors.T @ vectors
        triangle = gram.triu(1) + torch.diag(gram.diagonal() / 2)
        identity = torch.eye(self.channels, dtype=torch.float64, device=vectors.device)
        return identity - vectors @ torch.linalg.solve_triangular(triangle, vectors.T, upper=True)
