"""The small networks that compute the parameters of couplings and splits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow.flows.base import check_dtype
from inverse_flow.ops.checks import check_context, shape_of_images
from inverse_flow.ops.spec import check_integer

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
EVENTS = {0: "vectors", 1: "signals", 2: "images", 3: "volumes"}


def check_dimensions(dimensions: int, least: int = 0) -> int:
    """Returns ``dimensions``, refusing a number of axes that no layer knows."""
    check_integer("dimensions", dimensions, least=0)
    if dimensions not in EVENTS or dimensions < least:
        known = [f"{number} ({events})" for number, events in EVENTS.items() if number >= least]
        raise ValueError(f"dimensions must be {', '.join(known[:-1])} or {known[-1]}, got {dimensions!r}")
    return dimensions


def convolution(dimensions: int, in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Module:
    """A convolution over ``dimensions`` axes that keeps their sizes; a linear layer for vectors, which have none."""
    if dimensions == 0:
        return nn.Linear(in_channels, out_channels)
    layer: nn.Module = CONVOLUTIONS[dimensions](in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return layer


def zero_convolution(in_channels: int, out_channels: int, dimensions: int) -> nn.Module:
    """A 3×3 convolution whose weight and bias are 0, so that what is built on it starts as the identity."""
    layer = convolution(dimensions, in_channels, out_channels)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def arrange_for(device: torch.device, module: nn.Module) -> None:
    """Lays the weights of all networks of this file within ``module`` out as they are fastest on the device, in place.

    On a CPU that is channels last: PyTorch's convolutions then read and write the images so, and need not reorder
    them, as they do for the usual layout (steps of training and sampling take 0.7 to 0.9 of the time, measured with
    AVX2). Values, names and checkpoints stay as they are. On other devices nothing is changed.
    """
    if device.type != "cpu":
        return
    for network in module.modules():
        if isinstance(network, _Conditioner) and network.dimensions == 2:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class _Conditioner(nn.Module, ABC):
    """Joins the context to the images and checks both; a subclass has the network."""

    def __init__(self, context_channels: int, dimensions: int) -> None:
        super().__init__()
        check_integer("context_channels", context_channels, least=0)
        self.context_channels = context_channels
        self.dimensions = check_dimensions(dimensions)

    @property
    def uses_context(self) -> bool:
        """Whether it was built for one."""
        return self.context_channels > 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_dtype(self, x)
        if x.dim() != self.dimensions + 2:
            raise ValueError(
                f"this network was built with dimensions={self.dimensions}, for {shape_of_images(self.dimensions)}, "
                f"and got shape {tuple(x.shape)}"
            )
        if self.context_channels:
            x = torch.cat((x, self._context_map(x, context)), dim=1)
        return self._network(x)

    @abstractmethod
    def _network(self, x: Tensor) -> Tensor:
        """The network, on the images and the context stacked along the channels."""

    def _context_map(self, x: Tensor, context: Tensor | None) -> Tensor:
        shapes = [shape_of_images(dimensions, self.context_channels) for dimensions in (0, self.dimensions)]
        expected = " or ".join(dict.fromkeys(shapes))
        check_context(context)
        if context is None:
            raise ValueError(f"this network was built for a context {expected}, and none was given")
        if context.dim() == 2:
            context = context[(...,) + (None,) * self.dimensions].expand(-1, -1, *x.shape[2:])
        elif context.dim() == x.dim() and context.shape[2:] != x.shape[2:]:
            context = self._average_down(context, x)
        if context.shape != (x.shape[0], self.context_channels, *x.shape[2:]):
            raise ValueError(
                f"the context must be {expected}, at the resolution of the images or an integer multiple of it, "
                f"got {tuple(context.shape)} for {tuple(x.shape)}"
            )
        return context.to(x.dtype)

    def _average_down(self, context: Tensor, x: Tensor) -> Tensor:
        """The context at the resolution of ``x``, or as it is where that is no multiple of the images'."""
        pairs = list(zip(context.shape[2:], x.shape[2:], strict=True))
        if any(given < size or given % size for given, size in pairs):
            return context
        averaged: Tensor = AVERAGE_POOLS[self.dimensions](context, [given // size for given, size in pairs])
        return averaged


class ConvNet(_Conditioner):
    """3×3 convolution → ReLU → 1×1 convolution → ReLU → 3×3 convolution, the last one starting at zero.

    This is the conditioner of Glow. Because the last convolution starts at zero, a coupling or split built on it
    starts as the identity. With ``hidden=0`` the network is that last convolution alone.

    Args:
        in_channels, hidden, out_channels: channels before, within and after the network.
        context_channels: K of the context. The context is (B, K), the same at every pixel, or a map (B, K, H', W').
            H' is H or an integer multiple of it, and so is W': a map of a higher resolution than the images is
            averaged down to it, so that one map serves every level of a multi-scale flow. Real numbers of any dtype are
            converted to that of the images. With K = 0 a context is ignored.
        dimensions: 2 for images (B, C, H, W), 3 for volumes (B, C, D, H, W), whose convolutions are 3×3×3 and whose
            context maps are (B, K, D', H', W'), 1 for signals (B, C, L), and 0 for vectors (B, C), with linear layers
            in place of convolutions.

    Raises:
        ValueError: images or a context of another shape; no context where one is needed.
    """

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, *, context_channels: int = 0, dimensions: int = 2
    ) -> None:
        super().__init__(context_channels, dimensions)
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("hidden", hidden, 0),
            ("out_channels", out_channels, 1),
        ):
            check_integer(name, value, least)
        total = in_channels + context_channels
        last = zero_convolution(hidden or total, out_channels, dimensions)
        body: list[nn.Module] = []
        if hidden:
            # In place: a convolution does not need its output again.
            first, second = convolution(dimensions, total, hidden), convolution(dimensions, hidden, hidden, 1)
            body = [first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*body, last)

    def _network(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def own_or_conv_net(own: nn.Module | None, *sizes: int, **options: Any) -> nn.Module:
    """The conditioner that a layer was given, or a :class:`ConvNet` of these sizes and options if it was given none.

    Raises:
        TypeError: what was given is no module.
    """
    if own is None:
        return ConvNet(*sizes, **options)
    if not isinstance(own, nn.Module):
        raise TypeError(f"a conditioner is a module, got {type(own).__name__}")
    return own


class ResNet(_Conditioner):
    """3×3 convolution → n × (h + conv(ReLU(conv(ReLU(h))))) → ReLU → 3×3 convolution, the last one starting at zero.

    Pre-activation residual blocks (He et al., "Identity Mappings in Deep Residual Networks", 2016, figure 1b) without
    normalisation: their statistics would tie the examples of a batch together. Real NVP couples with residual
    networks. To put one into a coupling::

        AffineCoupling(8, conditioner=ResNet(4, 32, 2 * 4))

    Args:
        in_channels, hidden, out_channels: channels before, within and after the network.
        blocks: n, the number of residual blocks, each of two 3×3 convolutions.
        context_channels, dimensions: as in :class:`ConvNet`.

    Raises:
        ValueError: as :class:`ConvNet`; ``hidden`` or ``blocks`` below 1.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        *,
        blocks: int = 2,
        context_channels: int = 0,
        dimensions: int = 2,
    ) -> None:
        super().__init__(context_channels, dimensions)
        numbers = {"in_channels": in_channels, "hidden": hidden, "out_channels": out_channels, "blocks": blocks}
        for name, value in numbers.items():
            check_integer(name, value)
        self.first = convolution(dimensions, in_channels + context_channels, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                convolution(dimensions, hidden, hidden),
                nn.ReLU(inplace=True),
                convolution(dimensions, hidden, hidden),
            )
            for _ in range(blocks)
        )
        self.last = nn.Sequential(nn.ReLU(), zero_convolution(hidden, out_channels, dimensions))

    def _network(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        result: Tensor = self.last(h)
        return result
