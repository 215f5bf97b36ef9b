"""The problems the operator layer is tested on, and the memory layouts they come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ORDERS = ("top_left", "top_right", "bottom_left", "bottom_right")
CORNERS = ("identity", "unit_triangular", "general")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Well conditioned: the recurrence neither grows nor fades much.
GAIN = 0.4


def corner_tap(order: str, kernel: tuple[int, int]) -> tuple[int, int]:
    """Where in the window the tap lies that meets the output pixel itself."""
    return (0 if order.startswith("bottom") else kernel[0] - 1, 0 if order.endswith("right") else kernel[1] - 1)


@dataclass(frozen=True)
class Case:
    """One problem: A(w) x + b = y with ``channels`` in all."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)
    groups: int = 1
    order: str | tuple[str, ...] = "top_left"
    corner: str = "general"
    bias: bool = True

    def __str__(self) -> str:
        order = self.order if isinstance(self.order, str) else "+".join(self.order)
        shape = f"{self.batch}x{self.channels}x{self.height}x{self.width}-k{self.kernel[0]}x{self.kernel[1]}"
        return f"{shape}-g{self.groups}-{order}-{self.corner}" + ("" if self.bias else "-nobias")

    @property
    def orders(self) -> tuple[str, ...]:
        return (self.order,) * self.groups if isinstance(self.order, str) else self.order

    @property
    def order_codes(self) -> tuple[int, ...]:
        return tuple(ORDERS.index(order) for order in self.orders)

    @property
    def corner_code(self) -> int:
        return CORNERS.index(self.corner)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the public functions."""
        return {"order": self.order, "groups": self.groups, "corner": self.corner}

    def with_batch(self, batch: int) -> Case:
        return replace(self, batch=batch)

    def unread(self, weight: Tensor) -> Tensor:
        """Which entries of the weight this corner kind must never read."""
        members = self.channels // self.groups
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        lower = torch.ones(members, members, dtype=torch.bool).tril(-1)
        for group, order in enumerate(self.orders):
            i, j = corner_tap(order, self.kernel)
            part = slice(group * members, (group + 1) * members)
            if self.corner == "identity":
                mask[part, :, i, j] = True
            elif self.corner == "unit_triangular":
                mask[part, :, i, j] = ~lower.to(weight.device)
        return mask

    def tensors(
        self,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        weight_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Random (input, weight, bias). Entries of the weight that must not be read are NaN."""
        members = self.channels // self.groups
        weight = torch.randn(self.channels, members, *self.kernel, dtype=torch.float64)
        weight *= GAIN / weight[0].numel() ** 0.5
        for group, order in enumerate(self.orders):
            i, j = corner_tap(order, self.kernel)
            part = slice(group * members, (group + 1) * members)
            if self.corner == "general":
                # A rotation with rows scaled by 0.7 to 1.4: no symmetry, no diagonal dominance, well conditioned.
                rotation = torch.linalg.qr(torch.randn(members, members, dtype=torch.float64)).Q
                weight[part, :, i, j] = rotation * (0.7 + 0.7 * torch.rand(members, 1, dtype=torch.float64))
        weight[self.unread(weight)] = float("nan")
        images = torch.randn(self.batch, self.channels, self.height, self.width, dtype=torch.float64)
        bias = torch.randn(self.channels, dtype=torch.float64) if self.bias else None
        weight_dtype = weight_dtype or dtype
        return (
            images.to(device, dtype),
            weight.to(device, weight_dtype),
            None if bias is None else bias.to(device, weight_dtype),
        )


# Batches on both sides of every number of lanes a vector has, and of the switch between the regimes.
BATCHES = (0, 1, 2, 7, 8, 9, 16, 17, 33, 100)

SHAPES = [
    # Every order and corner kind.
    *(Case(3, 3, 4, 5, order=order, corner=corner) for order in ORDERS for corner in CORNERS),
    *(Case(10, 2, 5, 4, (2, 3), order=order, corner=corner) for order in ORDERS for corner in CORNERS),
    # Groups, and orders of their own.
    Case(2, 4, 5, 4, groups=2),
    Case(9, 6, 4, 4, groups=3, order="bottom_right", corner="unit_triangular"),
    Case(3, 4, 5, 6, groups=4, order=ORDERS, corner="identity"),
    Case(11, 8, 4, 5, groups=4, order=ORDERS, corner="unit_triangular"),
    Case(2, 8, 5, 5, (2, 2), groups=4, order=ORDERS[::-1]),
    Case(8, 6, 3, 4, groups=3, order=("top_right", "top_right", "bottom_left")),
    Case(17, 5, 4, 4, groups=5, order="top_right"),
    # Kernels.
    *(Case(b, 2, 5, 6, (1, 1), corner=corner) for b in (2, 9) for corner in CORNERS),
    *(
        Case(b, 3, 6, 7, kernel, order="bottom_left")
        for b in (2, 9)
        for kernel in [(1, 2), (2, 1), (1, 5), (4, 1), (5, 3)]
    ),
    *(Case(b, 2, 9, 10, (7, 7), corner="unit_triangular") for b in (1, 9)),
    *(Case(b, 1, 13, 12, (11, 11), order="top_right") for b in (1, 16)),
    *(Case(b, 2, 12, 5, (11, 2), order="bottom_right") for b in (1, 8)),
    # Images of one pixel, one row, one column, smaller than the kernel, odd and large sides.
    *(Case(b, 3, 1, 1, kernel) for b in (1, 5, 8, 19) for kernel in [(3, 3), (1, 1)]),
    *(Case(b, 2, 1, 9, order="top_right") for b in (2, 9)),
    *(Case(b, 2, 9, 1, order="bottom_left") for b in (2, 9)),
    *(Case(b, 2, 2, 3, (5, 7), corner="identity", order="bottom_right") for b in (2, 9)),
    *(Case(b, 1, 19, 33, corner="unit_triangular", order="bottom_right") for b in (1, 3, 10)),
    *(Case(b, 1, 35, 9, (2, 4)) for b in (1, 2, 18)),
    Case(1, 1, 70, 8, order="bottom_left"),
    # Channels on both sides of a register block.
    *(Case(b, c, 3, 4, corner=corner) for b in (2, 9) for c in (1, 5, 6, 7, 11, 12, 13, 18) for corner in CORNERS[1:]),
    Case(1, 24, 4, 4, corner="unit_triangular"),
    Case(8, 24, 4, 5, order="bottom_right"),
    Case(9, 48, 3, 3, corner="unit_triangular", order="top_right"),
    Case(2, 48, 3, 3),
    # No bias.
    *(Case(b, 3, 4, 5, bias=False) for b in (2, 9)),
]

# Those whose plain recurrence is quick to differentiate.
DIFFERENTIABLE = [case for case in SHAPES if case.height * case.width * case.kernel[0] * case.kernel[1] < 1500]

# A few that between them meet both regimes, groups, mirrored orders, and every corner kind: for tests where each
# case costs more.
FEW = [
    Case(2, 3, 5, 6, corner="unit_triangular"),
    Case(9, 4, 4, 5, (2, 3), groups=2, order=("bottom_right", "top_right")),
    Case(1, 2, 11, 13, (3, 2), order="bottom_left", corner="identity"),
    Case(18, 7, 5, 3, order="top_right", corner="unit_triangular", bias=False),
]


def _surrounded(x: Tensor, pad: int) -> Tensor:
    """``x`` in the middle of a larger tensor of NaN."""
    big = x.new_full([size + 2 * pad for size in x.shape], float("nan"))
    inner = big[tuple(slice(pad, pad + size) for size in x.shape)]
    inner.copy_(x)
    return inner


def _stepped(x: Tensor) -> Tensor:
    """Every second element of a larger tensor, in every dimension, with NaN between them."""
    big = x.new_full([2 * size for size in x.shape], float("nan"))
    big[::2, ::2, ::2, ::2] = x
    return big[::2, ::2, ::2, ::2]


# Each gives the values of its argument, in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: _surrounded(x, 1),
    "sliced_channels_last": lambda x: _surrounded(x.permute(0, 2, 3, 1), 3).permute(0, 3, 1, 2),
    "stepped": _stepped,
    "columns_first": lambda x: x.mT.contiguous().mT,
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}

# Each gives a tensor whose elements share memory, of the shape of its argument; only for reading.
OVERLAPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_pixels": lambda x: x[:, :, :1, :1].expand_as(x),
    "expanded_everything": lambda x: x.flatten()[:1].view(1, 1, 1, 1).expand_as(x),
    "sliding_windows": lambda x: x.flatten()[: sum(x.shape)].as_strided(x.shape, (1, 1, 1, 1)),
}
