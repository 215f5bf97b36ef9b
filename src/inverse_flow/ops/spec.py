"""What a solve is, beside its tensors: made once by a public function, and handed down as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# The corner of the image an order pads, and recurs, from. The codes are those of csrc/params.h: bit 0 mirrors the
# columns, bit 1 the rows.
ORDERS = {"top_left": 0, "top_right": 1, "bottom_left": 2, "bottom_right": 3}
MIRROR_COLUMNS = 1
MIRROR_ROWS = 2

# What is read of the corner tap M; the codes are those of csrc/params.h.
CORNERS = {"identity": 0, "unit_triangular": 1, "general": 2}
IDENTITY, UNIT_TRIANGULAR, GENERAL = CORNERS.values()

OrderNames = str | Sequence[str]
"""The name of an order, or one name for each group."""

Orders = tuple[int, ...]
"""One code a group."""


class Spec(NamedTuple):
    """The arguments of the operators after their tensors, in the order of csrc/ops.cpp: ``ops.solve(y, w, b, *spec)``.
    What else may come to describe a convolution, as a dilation would, is one more field here and there."""

    orders: Orders
    corner: int
    transposed: bool = False
    allow_tf32: bool = False

    def adjoint(self) -> Spec:
        """That of the transposed solve."""
        return Spec(self.orders, self.corner, not self.transposed, self.allow_tf32)

    def repeated(self, times: int) -> Spec:
        """That of as many problems side by side, each with groups of its own."""
        return Spec(self.orders * times, self.corner, self.transposed, self.allow_tf32)


# The descriptions of one group, made beforehand: small solves are short.
_ONE_GROUP = {
    (order, corner): Spec((order_code,), corner_code)
    for order, order_code in ORDERS.items()
    for corner, corner_code in CORNERS.items()
}


def make_spec(order: OrderNames, groups: int, corner: str, allow_tf32: bool = False) -> Spec:
    """The description in codes of a plain solve given in names.

    Raises:
        ValueError: a name that does not exist, or names for another number of groups.
    """
    if (
        type(groups) is int
        and groups == 1
        and not allow_tf32
        and isinstance(order, str)
        and (order, corner) in _ONE_GROUP
    ):
        return _ONE_GROUP[order, corner]
    if corner not in CORNERS:
        raise ValueError(f"corner must be one of {', '.join(CORNERS)}, got {corner!r}")
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be an integer of at least 1, got {groups!r}")
    if isinstance(order, str) and order in ORDERS:
        return Spec((ORDERS[order],) * groups, CORNERS[corner], False, allow_tf32)
    names = (order,) * groups if isinstance(order, str) else tuple(order)
    if len(names) != groups:
        raise ValueError(f"order must be one name or one name for each of the {groups} groups, got {len(names)} names")
    for name in names:
        if name not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {name!r}")
    return Spec(tuple(ORDERS[name] for name in names), CORNERS[corner], False, allow_tf32)
