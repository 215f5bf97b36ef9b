"""The module: a convolution whose inverse runs in the training direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inverse_flow.functional import (
    causal_conv1d,
    causal_conv2d,
    causal_conv3d,
    inverse_conv1d,
    inverse_conv2d,
    inverse_conv3d,
)
from inverse_flow.ops.backpropagate import backpropagate
from inverse_flow.ops.bijection import Bijection
from inverse_flow.ops.causal import corner_taps, effective_weight, limit_row_sums, with_corner_taps, without_autocast
from inverse_flow.ops.checks import FLOAT_DTYPES, shape_of_images
from inverse_flow.ops.library import allows_tf32
from inverse_flow.ops.spec import ORDERS, OrderNames, PerAxis, check_integer, check_number, each_axis, make_spec
from inverse_flow.ops.views import solve_backward

__all__ = ["InverseConv1d", "InverseConv2d", "InverseConv3d", "InverseConvNd"]

# Standard deviation of the initial taps, times the square root of the fan-in. The spectrum of the random part of
# A(w) then has radius about 2 × this at every frequency, so A starts within a few tenths of the identity and a deep
# stack stays well conditioned (docs/mathematics.md gives the figure for 32 layers).
INITIAL_GAIN = 0.1


class InverseConvNd(Bijection):
    """What :class:`InverseConv1d`, :class:`InverseConv2d` and :class:`InverseConv3d` have in common: all but the number
    of axes of an image, ``dimensions``, and the functions for that number, ``solve`` and ``convolve``, which are called
    with a weight, a bias and the layer's ``arguments``."""

    uses_context = False
    dimensions: int
    solve: Callable[..., Tensor]
    convolve: Callable[..., Tensor]
    sign: Tensor
    permutation: Tensor

    def __init__(
        self,
        channels: int,
        kernel_size: PerAxis = 3,
        *,
        groups: int = 1,
        dilation: PerAxis = 1,
        order: OrderNames | None = None,
        corner: str = "unit_triangular",
        bias: bool = True,
        max_row_sum: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = each_axis("kernel_size", kernel_size, self.dimensions)
        self.dilation = each_axis("dilation", dilation, self.dimensions)
        check_integer("channels", channels)
        if order is None:
            order = ORDERS[self.dimensions][0]
        make_spec(order, groups, "general", self.dimensions)
        if channels % groups:
            raise ValueError(f"channels ({channels}) must be divisible by groups ({groups})")
        if corner not in ("identity", "unit_triangular", "plu"):
            raise ValueError(f"corner must be identity, unit_triangular or plu, got {corner!r}")
        if max_row_sum is not None:
            check_number("max_row_sum", max_row_sum)
            if not 0 < max_row_sum < 1:
                raise ValueError(f"max_row_sum must be between 0 and 1, or None, got {max_row_sum!r}")
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")

        self.channels = channels
        self.groups = groups
        self.order = order if isinstance(order, str) else tuple(order)
        self.corner = corner
        self.max_row_sum = max_row_sum
        # A "plu" corner is multiplied out first, and all of the product is read.
        read = "general" if corner == "plu" else corner
        self.spec = make_spec(order, groups, read, self.dimensions)
        self.arguments: dict[str, Any] = {
            "order": self.order, "groups": groups, "corner": read,
            "dilation": self.dilation if max(self.dilation) > 1 else 1,
        }  # fmt: skip
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
        self._check_batch(x)
        z = self.solve(x, self._weight(), self.bias, **self.arguments)
        return z, self.log_det(x, inverse=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: (x, log|det ∂x/∂z|), a plain convolution. ``context`` is not used."""
        self._check_batch(z)
        x = self.convolve(z, self._weight(), self.bias, **self.arguments)
        return x, self.log_det(z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x = A(w) z + b, a plain convolution, and the backward pass of the solve, which asks for nothing but z:
        ∂x = A(w)⁻ᵀ ∂z. For :mod:`inverse_flow.reversible`."""
        with torch.enable_grad():
            weight, log_det = self._weight(), self.log_det(z, inverse=True)
        x = self.convolve(z, weight, self.bias, **self.arguments)
        spec = self.spec._replace(allow_tf32=allows_tf32(z))
        grad_x, grad_weight, grad_bias = solve_backward(grad_z, z, weight, spec, self.dilation)
        backpropagate([weight, self.bias, log_det], [grad_weight, grad_bias, grad_logdet])
        return x, grad_x

    def complete_weight(self) -> Tensor:
        """:attr:`weight` with all of M in its place: that of A(w) for the corner kind ``"general"``."""
        return effective_weight(self._weight(), self.spec)

    def _weight(self) -> Tensor:
        """The weight to hand to the functional layer."""
        weight: Tensor = self.weight
        if self.corner == "plu":
            weight = with_corner_taps(weight, self._plu(), self.spec.orders)
        return weight if self.max_row_sum is None else limit_row_sums(weight, self.spec, self.max_row_sum)

    def _plu(self) -> Tensor:
        """M = P·L·(U + diag(s)) of every group: (groups, C / groups, C / groups)."""
        packed = corner_taps(self.weight, self.spec.orders)
        lower = packed.tril(-1) + torch.eye(packed.shape[-1], dtype=packed.dtype, device=packed.device)
        scale = (self.sign * self.log_scale.exp()).unflatten(0, (self.groups, -1))
        with without_autocast(packed.device.type):
            product = lower @ (packed.triu(1) + torch.diag_embed(scale))
        return product.gather(1, self.permutation[..., None].expand_as(product))

    def log_det(self, images: Tensor, inverse: bool = False) -> Tensor:
        """log|det A(w)|, or that of the inverse, for images of this size, one entry per image."""
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        if self.corner != "plu":
            return images.new_zeros(images.shape[0], dtype=dtype)
        pixels = math.prod(images.shape[2:])
        return ((-pixels if inverse else pixels) * self.log_scale.to(dtype).sum()).expand(images.shape[0])

    def _check_batch(self, images: Tensor) -> None:
        """A log-determinant belongs to one example of a batch; the functions also take one example alone."""
        if not isinstance(images, Tensor) or images.is_nested:
            return  # the functions refuse what is not one tensor
        fits = images.dim() == self.dimensions + 2
        # A trace's sizes are tensors, and comparing one warns.
        if fits and not torch.jit.is_tracing():  # type: ignore[attr-defined]
            fits = images.shape[1] == self.channels
        if not fits:
            raise ValueError(
                f"{type(self).__name__} takes batches of shape {shape_of_images(self.dimensions, self.channels)}, "
                f"got {tuple(images.shape)}"
            )

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, groups={self.groups}, order={self.order!r}"
        dilation = f", dilation={self.dilation}" if max(self.dilation) > 1 else ""
        text = f"{text}{dilation}, corner={self.corner!r}, bias={self.bias is not None}"
        return text if self.max_row_sum is None else f"{text}, max_row_sum={self.max_row_sum}"


class InverseConv1d(InverseConvNd):
    r"""A flow layer on signals, z = A(w)⁻¹(x − b): an all-pole filter of many channels from data to latent, a plain
    convolution from latent to data.

    .. math:: \log\left|\det \frac{\partial z}{\partial x}\right| = -L \sum_{\text{groups}} \log|\det M|

    As :class:`InverseConv2d`, with signals (B, C, L), a weight (C, C / groups, k), and the orders ``"left"`` (the
    default) and ``"right"``.
    """

    dimensions = 1
    solve = staticmethod(inverse_conv1d)
    convolve = staticmethod(causal_conv1d)


class InverseConv2d(InverseConvNd):
    r"""A flow layer z = A(w)⁻¹(x − b): the solve from data to latent, a plain convolution from latent to data.

    .. math:: \log\left|\det \frac{\partial z}{\partial x}\right| = -H W \sum_{\text{groups}} \log|\det M|

    where M is the corner tap of each group. Nagar & Varma, AISTATS 2025 (arXiv 2410.14634).

    Args:
        channels: C, of the input and of the output.
        kernel_size: one integer or (kH, kW); each at least 1.
        groups: number of channel groups; divides ``channels``.
        dilation: the distance of neighbouring taps, one integer or one for each axis.
        order: the corner the recurrence starts from, ``"top_left"`` (the default), ``"top_right"``, ``"bottom_left"``,
            ``"bottom_right"``, or a sequence of one name for each group. Four groups with the four orders are the
            layer of the paper's experiments.
        corner: the kind of M. ``"unit_triangular"``: unit lower triangular, log-det 0; ``"identity"``: M = I,
            log-det 0; ``"plu"``: M = P·L·(U + diag(s)) with P fixed, L, U and log|s| learned, the sign of s fixed,
            and log-det −H·W·Σ log|s|.
        bias: learn b, of shape (C,), initialised to 0.
        max_row_sum: κ, 0 < κ < 1: each row of the folded taps W′_δ = M⁻¹ W_δ is scaled by min(1, κ / s_o), where s_o is
            the sum of its magnitudes over inputs and taps δ ≠ 0, so that ‖A⁻¹‖∞ ≤ ‖M⁻¹‖∞ / (1 − κ) for images of
            every size. That excludes filters which healthy layers want; docs/stability.md says what it costs. None to
            leave the taps free.
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
        TypeError: ``dtype`` is not floating, or a number no integer.
        As :func:`inverse_flow.functional.inverse_conv2d` when called.
    """

    dimensions = 2
    solve = staticmethod(inverse_conv2d)
    convolve = staticmethod(causal_conv2d)


class InverseConv3d(InverseConvNd):
    r"""A flow layer on volumes, z = A(w)⁻¹(x − b): the solve from data to latent, a plain convolution from latent to
    data.

    .. math:: \log\left|\det \frac{\partial z}{\partial x}\right| = -D H W \sum_{\text{groups}} \log|\det M|

    As :class:`InverseConv2d`, with volumes (B, C, D, H, W), a weight (C, C / groups, kD, kH, kW), and the orders
    ``"front_top_left"`` (the default) to ``"back_bottom_right"``.
    """

    dimensions = 3
    solve = staticmethod(inverse_conv3d)
    convolve = staticmethod(causal_conv3d)
