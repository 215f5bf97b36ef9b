"""The problems the operator layer is tested on, and the memory layouts they come in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inverse_flow import functional, reference

ORDERS = ("top_left", "top_right", "bottom_left", "bottom_right")
ALL_ORDERS = {
    1: ("left", "right"),
    2: ORDERS,
    3: tuple(f"{side}_{order}" for side in ("front", "back") for order in ORDERS),
}
CORNERS = ("identity", "unit_triangular", "general")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Well conditioned: the recurrence neither grows nor fades much.
GAIN = 0.4


def mirrored(order: str) -> list[bool]:
    """Whether the recurrence runs backwards along each axis."""
    return [word in ("back", "bottom", "right") for word in order.split("_")]


def corner_tap(order: str, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Where in the window the tap lies that meets the output pixel itself."""
    return tuple(0 if backwards else size - 1 for size, backwards in zip(kernel, mirrored(order), strict=True))


@dataclass(frozen=True)
class Case:
    """One problem: A(w) x + b = y with ``channels`` in all. A signal has the height None, a volume a depth."""

    batch: int
    channels: int
    height: int | None
    width: int
    kernel: tuple[int, ...] = (3, 3)
    groups: int = 1
    order: str | tuple[str, ...] | None = None
    corner: str = "general"
    bias: bool = True
    depth: int | None = None
    dilation: int | tuple[int, ...] = 1

    def __str__(self) -> str:
        shape = "x".join(map(str, (self.batch, self.channels, *self.sizes)))
        dilation = "" if self.dilation == 1 else f"-d{self.dilation}"
        orders = "+".join(dict.fromkeys(self.orders))
        text = f"{shape}-k{'x'.join(map(str, self.kernel))}{dilation}-g{self.groups}-{orders}-{self.corner}"
        return text + ("" if self.bias else "-nobias")

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for size in (self.depth, self.height, self.width) if size is not None)

    @property
    def dimensions(self) -> int:
        return len(self.sizes)

    @property
    def orders(self) -> tuple[str, ...]:
        order = self.order or ALL_ORDERS[self.dimensions][0]
        return (order,) * self.groups if isinstance(order, str) else order

    @property
    def order_codes(self) -> tuple[int, ...]:
        return tuple(ALL_ORDERS[self.dimensions].index(order) for order in self.orders)

    @property
    def corner_code(self) -> int:
        return CORNERS.index(self.corner)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the public functions."""
        named = {} if self.order is None else {"order": self.order}
        dilated = {} if self.dilation == 1 else {"dilation": self.dilation}
        return {**named, "groups": self.groups, **dilated, "corner": self.corner}

    @property
    def inverse_conv(self) -> Callable[..., Tensor]:
        """The public function for this number of dimensions; likewise the others."""
        return getattr(functional, f"inverse_conv{self.dimensions}d")

    @property
    def causal_conv(self) -> Callable[..., Tensor]:
        return getattr(functional, f"causal_conv{self.dimensions}d")

    @property
    def recurrence(self) -> Callable[..., Tensor]:
        return getattr(reference, f"inverse_conv{self.dimensions}d")

    @property
    def dense(self) -> Callable[..., Tensor]:
        return getattr(reference, f"inverse_conv{self.dimensions}d_dense")

    def with_batch(self, batch: int) -> Case:
        return replace(self, batch=batch)

    def unread(self, weight: Tensor) -> Tensor:
        """Which entries of the weight this corner kind must never read."""
        members = self.channels // self.groups
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        lower = torch.ones(members, members, dtype=torch.bool).tril(-1)
        for group, order in enumerate(self.orders):
            corner = (slice(group * members, (group + 1) * members), slice(None), *corner_tap(order, self.kernel))
            if self.corner == "identity":
                mask[corner] = True
            elif self.corner == "unit_triangular":
                mask[corner] = ~lower.to(weight.device)
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
            corner = (slice(group * members, (group + 1) * members), slice(None), *corner_tap(order, self.kernel))
            if self.corner == "general":
                # A rotation with rows scaled by 0.7 to 1.4: no symmetry, no diagonal dominance, well conditioned.
                rotation = torch.linalg.qr(torch.randn(members, members, dtype=torch.float64)).Q
                weight[corner] = rotation * (0.7 + 0.7 * torch.rand(members, 1, dtype=torch.float64))
        weight[self.unread(weight)] = float("nan")
        images = torch.randn(self.batch, self.channels, *self.sizes, dtype=torch.float64)
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

FOUR = {"groups": 4, "order": ORDERS}

# What the operators see through a view of it: signals, and dilated problems.
SIGNALS = [
    *(Case(3, 3, None, 9, (3,), order=order, corner=corner) for order in ALL_ORDERS[1] for corner in CORNERS),
    Case(9, 6, None, 11, (4,), 3, ("right", "left", "right")),
    *(Case(b, 2, None, 5, (kernel,), order="right") for b in (0, 1) for kernel in (1, 7)),
    Case(8, 4, None, 1, (2,), corner="unit_triangular"),
    Case(1, 1, None, 300, (3,), bias=False),
    Case(2, 17, None, 20, (9,), order="right", corner="unit_triangular"),
]
DILATED = [
    *(Case(2, 2, 5, 7, order=order, corner=corner, dilation=2) for order in ORDERS for corner in CORNERS),
    Case(3, 4, 6, 8, (2, 3), **FOUR, dilation=(3, 2)),
    Case(9, 8, 7, 5, (3, 2), **FOUR, corner="unit_triangular", dilation=(2, 3)),
    Case(1, 2, 6, 9, order="bottom_left", dilation=(1, 3)),
    Case(2, 2, 2, 3, (2, 2), order="top_right", dilation=(4, 2)),
    Case(0, 2, 4, 5, dilation=2),
    Case(2, 3, 5, 4, bias=False, dilation=(1, 2)),
    Case(1, 2, None, 12, (3,), dilation=4),
    Case(3, 4, None, 13, (3,), 2, ("right", "left"), dilation=(5,)),
]
# The kernels' own tests of volumes are in ops/test_volumes.py: these are of all that is around them.
VOLUMES = [
    Case(2, 3, 3, 4, (2, 2, 2), order="back_top_right", corner="unit_triangular", depth=2),
    Case(9, 4, 2, 3, (2, 1, 3), 2, ("front_bottom_left", "back_top_right"), depth=3),
    Case(1, 2, 3, 2, (3, 2, 2), 1, "back_bottom_left", depth=5, dilation=(2, 1, 2)),
]
SHAPES += [*SIGNALS, *DILATED, *VOLUMES]

# Those whose plain recurrence is quick to differentiate.
DIFFERENTIABLE = [case for case in SHAPES if math.prod(case.sizes + case.kernel) < 1500]

# A few that between them meet both regimes, groups, mirrored orders, and every corner kind: for tests where each
# case costs more.
FEW = [
    Case(2, 3, 5, 6, corner="unit_triangular"),
    Case(9, 4, 4, 5, (2, 3), groups=2, order=("bottom_right", "top_right")),
    Case(1, 2, 11, 13, (3, 2), order="bottom_left", corner="identity"),
    Case(18, 7, 5, 3, order="top_right", corner="unit_triangular", bias=False),
]


# The same for what is more than a plain image.
FEW_MORE = [SIGNALS[6], SIGNALS[-1], DILATED[12], DILATED[14], DILATED[-1], *VOLUMES]


def _surrounded(x: Tensor, pad: int) -> Tensor:
    """``x`` in the middle of a larger tensor of NaN."""
    big = x.new_full([size + 2 * pad for size in x.shape], float("nan"))
    inner = big[tuple(slice(pad, pad + size) for size in x.shape)]
    inner.copy_(x)
    return inner


def _stepped(x: Tensor) -> Tensor:
    """Every second element of a larger tensor, in every dimension, with NaN between them."""
    big = x.new_full([2 * size for size in x.shape], float("nan"))
    inner = big[(slice(None, None, 2),) * x.dim()]
    inner.copy_(x)
    return inner


# Each gives the values of its argument, in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: _surrounded(x, 1),
    "sliced_channels_last": lambda x: _surrounded(x.movedim(1, -1), 3).movedim(-1, 1),
    "stepped": _stepped,
    "columns_first": lambda x: x.mT.contiguous().mT,
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}

# Each gives a tensor whose elements share memory, of the shape of its argument; only for reading.
OVERLAPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_pixels": lambda x: x.flatten(2)[..., 0].view(*x.shape[:2], *(1,) * (x.dim() - 2)).expand_as(x),
    "expanded_everything": lambda x: x.flatten()[:1].view((1,) * x.dim()).expand_as(x),
    "sliding_windows": lambda x: x.flatten()[: sum(x.shape)].as_strided(x.shape, (1,) * x.dim()),
}
