"""The small networks that compute the parameters of couplings and splits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """3×3 convolution → ReLU → 1×1 convolution → ReLU → 3×3 convolution, the last one starting at zero.

    This is the conditioner of Glow. Because the last convolution starts at zero, a coupling or split built on it
    starts as the identity. With ``hidden=0`` the network is that last convolution alone.

    Args:
        in_channels, hidden, out_channels: channels before, within and after the network.
        context_channels: K of the context. The context is (B, K), the same at every pixel, or (B, K, H, W) at the
            resolution of the images. With K = 0 a context is ignored.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int, *, context_channels: int = 0) -> None:
        super().__init__()
        self.context_channels = context_channels
        total = in_channels + context_channels
        last = nn.Conv2d(hidden or total, out_channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        body: list[nn.Module] = []
        if hidden:
            body = [nn.Conv2d(total, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU()]
        self.layers = nn.Sequential(*body, last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.context_channels:
            x = torch.cat((x, self._context_map(x, context)), dim=1)
        result: Tensor = self.layers(x)
        return result

    def _context_map(self, x: Tensor, context: Tensor | None) -> Tensor:
        expected = f"(B, {self.context_channels}) or (B, {self.context_channels}, H, W)"
        if context is None:
            raise ValueError(f"this network was built for a context {expected}, and none was given")
        if context.dim() == 2:
            context = context[:, :, None, None].expand(-1, -1, *x.shape[2:])
        if context.shape != (x.shape[0], self.context_channels, *x.shape[2:]):
            raise ValueError(f"the context must be {expected}, got {tuple(context.shape)} for {tuple(x.shape)}")
        return context.to(x.dtype)
