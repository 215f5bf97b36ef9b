"""The module: a convolution whose inverse runs in the training direction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from inverse_flow.functional import causal_conv2d, inverse_conv2d
from inverse_flow.ops.autograd import solve_backward
from inverse_flow.ops.backpropagate import backpropagate
from inverse_flow.ops.bijection import Bijection
from inverse_flow.ops.causal import corner_taps, effective_weight, with_corner_taps
from inverse_flow.ops.checks import FLOAT_DTYPES
from inverse_flow.ops.library import allows_tf32
from inverse_flow.ops.spec import OrderNames, make_spec

__all__ = ["InverseConv2d"]

# Standard deviation of the initial taps, times the square root of the fan-in. The spectrum of the random part of
# A(w) then has radius about 2 × this at every frequency, so A starts within a few tenths of the identity and a deep
# stack stays well conditioned (docs/mathematics.md gives the figure for 32 layers).
INITIAL_GAIN = 0.1


class InverseConv2d(Bijection):
    r"""A flow layer z = A(w)⁻¹(x − b): the solve from data to latent, a plain convolution from latent to data.

    .. math:: \log\left|\det \frac{\partial z}{\partial x}\right| = -H W \sum_{\text{groups}} \log|\det M|

    where M is the corner tap of each group. Nagar & Varma, AISTATS 2025 (arXiv 2410.14634).

    Args:
        channels: C, of the input and of the output.
        kernel_size: one integer or (kH, kW); each at least 1.
        groups: number of channel groups; divides ``channels``.
        order: the corner the recurrence starts from, ``"top_left"``, ``"top_right"``, ``"bottom_left"``,
            ``"bottom_right"``, or a sequence of one name for each group. Four groups with the four orders are the
            layer of the paper's experiments.
        corner: the kind of M. ``"unit_triangular"``: unit lower triangular, log-det 0; ``"identity"``: M = I,
            log-det 0; ``"plu"``: M = P·L·(U + diag(s)) with P fixed, L, U and log|s| learnt, the sign of s fixed,
            and log-det −H·W·Σ log|s|.
        bias: learn b, of shape (C,), initialised to 0.
        device, dtype: of the parameters.

    Parameters and buffers:
        weight: (C, C / groups, kH, kW). For ``"plu"`` its corner tap packs L (strictly lower part) and U (strictly
            upper part); entries that a corner kind does not read stay as they are and get a zero gradient.
        bias: (C,), or None.
        log_scale: (C,), log|s|; ``"plu"`` only. With it the buffers ``sign`` (C,) and ``permutation``
            (groups, C / groups): row i of P·X is row ``permutation[g, i]`` of X.

    Shape:
        (B, C, H, W) → ((B, C, H, W), (B,)), in both directions. The log-det is float32 at least.

    Raises:
        ValueError: a size, order or corner kind that does not exist, or ``channels`` not divisible by ``groups``.
        TypeError: ``dtype`` is not floating.
        As :func:`inverse_flow.functional.inverse_conv2d` when called.
    """

    uses_context = False
    sign: Tensor
    permutation: Tensor

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        groups: int = 1,
        order: OrderNames = "top_left",
        corner: str = "unit_triangular",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        pair = isinstance(kernel, tuple | list) and len(kernel) == 2
        if not pair or any(not isinstance(size, int) or size < 1 for size in kernel):
            raise ValueError(f"kernel_size must be one integer or a pair, each at least 1, got {kernel_size!r}")
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels must be an integer of at least 1, got {channels!r}")
        make_spec(order, groups, "general")
        if channels % groups:
            raise ValueError(f"channels ({channels}) must be divisible by groups ({groups})")
        if corner not in ("identity", "unit_triangular", "plu"):
            raise ValueError(f"corner must be identity, unit_triangular or plu, got {corner!r}")
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")

        self.channels = channels
        self.kernel_size = (kernel[0], kernel[1])
        self.groups = groups
        self.order = order if isinstance(order, str) else tuple(order)
        self.corner = corner
        # A "plu" corner is multiplied out first, and all of the product is read.
        self._arguments: dict[str, Any] = {
            "order": self.order, "groups": groups, "corner": "general" if corner == "plu" else corner,
        }  # fmt: skip
        self.spec = make_spec(**self._arguments)
        self.weight = nn.Parameter(
            torch.empty(channels, channels // groups, *self.kernel_size, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        if corner == "plu":
            self.log_scale = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
            self.register_buffer("sign", torch.empty(channels, device=device, dtype=dtype))
            permutation = torch.empty(groups, channels // groups, device=device, dtype=torch.long)
            self.register_buffer("permutation", permutation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws small random taps (see ``INITIAL_GAIN``), so that the layer starts near the identity; for ``"plu"``
        P and the signs are those of a random rotation, and |s| = 1."""
        fan_in = self.weight[0].numel()
        with torch.no_grad():
            nn.init.normal_(self.weight, std=INITIAL_GAIN / math.sqrt(fan_in))
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            if self.corner == "plu":
                nn.init.zeros_(self.log_scale)
                for group in range(self.groups):
                    part = slice(group * self.permutation.shape[1], (group + 1) * self.permutation.shape[1])
                    self.permutation[group] = torch.randperm(self.permutation.shape[1], device=self.weight.device)
                    self.sign[part] = torch.randint(0, 2, self.sign[part].shape, device=self.weight.device) * 2 - 1

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent: (z, log|det ∂z/∂x|), the solve. ``context`` is not used."""
        z = inverse_conv2d(x, self._weight(), self.bias, **self._arguments)
        return z, self.log_det(x, inverse=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: (x, log|det ∂x/∂z|), a plain convolution. ``context`` is not used."""
        x = causal_conv2d(z, self._weight(), self.bias, **self._arguments)
        return x, self.log_det(z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x = A(w) z + b, a plain convolution, and the backward pass of the solve, which asks for nothing but z:
        ∂x = A(w)⁻ᵀ ∂z. For :mod:`inverse_flow.reversible`."""
        with torch.enable_grad():
            weight, log_det = self._weight(), self.log_det(z, inverse=True)
        x = causal_conv2d(z, weight, self.bias, **self._arguments)
        spec = self.spec._replace(allow_tf32=allows_tf32(z))
        grad_x, grad_weight, grad_bias = solve_backward(grad_z, z, weight, spec)
        backpropagate([weight, self.bias, log_det], [grad_weight, grad_bias, grad_logdet])
        return x, grad_x

    def complete_weight(self) -> Tensor:
        """:attr:`weight` with all of M in its place: that of A(w) for the corner kind ``"general"``."""
        return effective_weight(self._weight(), self.spec)

    def _weight(self) -> Tensor:
        """The weight to hand to the functional layer."""
        if self.corner != "plu":
            return self.weight
        return with_corner_taps(self.weight, self._plu(), self.spec.orders)

    def _plu(self) -> Tensor:
        """M = P·L·(U + diag(s)) of every group: (groups, C / groups, C / groups)."""
        packed = corner_taps(self.weight, self.spec.orders)
        lower = packed.tril(-1) + torch.eye(packed.shape[-1], dtype=packed.dtype, device=packed.device)
        scale = (self.sign * self.log_scale.exp()).unflatten(0, (self.groups, -1))
        product = lower @ (packed.triu(1) + torch.diag_embed(scale))
        return product.gather(1, self.permutation[..., None].expand_as(product))

    def log_det(self, images: Tensor, inverse: bool = False) -> Tensor:
        """log|det A(w)|, or that of the inverse, for images of this size, one entry per image."""
        batch, _, height, width = images.shape
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        if self.corner != "plu":
            return images.new_zeros(batch, dtype=dtype)
        pixels = -height * width if inverse else height * width
        return (pixels * self.log_scale.to(dtype).sum()).expand(batch)

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, groups={self.groups}, order={self.order!r}"
        return f"{text}, corner={self.corner!r}, bias={self.bias is not None}"
