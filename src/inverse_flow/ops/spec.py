"""What a solve is, beside its tensors: made once by a public function, and handed down as it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from numbers import Integral, Real
from typing import Any, NamedTuple

# The axes of an image by their number, outermost first, and the two sides of each.
AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}
SIDES = (("front", "back"), ("top", "bottom"), ("left", "right"))

# The corner an order pads, and recurs, from: (left, right), (top_left, top_right, …), (front_top_left, …). The place of
# a name is its code, that of csrc/params.h: bit 0 mirrors the columns, bit 1 the rows, bit 2 the planes.
ORDERS = {n: tuple("_".join(words) for words in product(*SIDES[-n:])) for n in AXES}

# What is read of the corner tap M; the codes are those of csrc/params.h.
CORNERS = {"identity": 0, "unit_triangular": 1, "general": 2}
IDENTITY, UNIT_TRIANGULAR, GENERAL = CORNERS.values()

OrderNames = str | Sequence[str]
"""The name of an order, or one name for each group."""

Orders = tuple[int, ...]
"""One code for each group."""

PerAxis = int | Sequence[int]
"""One integer for all axes, or one for each."""


SIZE_FORMS = "(L,), (H, W) or (D, H, W)"
"""The sizes of a signal, image or volume, as errors put them."""


class Spec(NamedTuple):
    """The arguments of the operators after their tensors, in the order of csrc/ops.cpp: ``ops.solve(y, w, b, *spec)``.
    The number of dimensions is that of the tensors."""

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
    (dimensions, order, corner, False): Spec((order_code,), corner_code)
    for dimensions, orders in ORDERS.items()
    for order_code, order in enumerate(orders)
    for corner, corner_code in CORNERS.items()
}


def make_spec(order: OrderNames, groups: int, corner: str, dimensions: int = 2, allow_tf32: bool = False) -> Spec:
    """The description in codes of a plain solve given in names.

    Raises:
        TypeError: ``groups`` is no integer, or ``order`` neither a name nor a sequence of names.
        ValueError: a name that does not exist, or names for another number of groups.
    """
    if groups == 1 and type(groups) is int and type(order) is type(corner) is str:
        made = _ONE_GROUP.get((dimensions, order, corner, allow_tf32))
        if made is not None:
            return made
    if corner not in [*CORNERS]:
        raise ValueError(f"corner must be one of {', '.join(CORNERS)}, got {corner!r}")
    check_integer("groups", groups)
    if not isinstance(order, Sequence):  # a set has no order of its own
        raise TypeError(f"order must be one name or a sequence of one name for each group, got {order!r}")
    names = (order,) * int(groups) if isinstance(order, str) else tuple(order)
    if len(names) != groups:
        raise ValueError(f"order must be one name or one name for each of the {groups} groups, got {len(names)} names")
    known = ORDERS[dimensions]
    for name in dict.fromkeys(names):
        if name not in known:
            raise ValueError(f"order must be one of {', '.join(known)}, got {name!r}")
    return Spec(tuple(known.index(name) for name in names), CORNERS[corner], False, allow_tf32)


def check_integer(name: str, value: object, least: int | None = 1) -> None:
    """Refuses an argument called ``name`` that is no integer of at least ``least``; True is none.

    Raises:
        TypeError: no integer.
        ValueError: a smaller one.
    """
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: object) -> None:
    """Refuses an argument called ``name`` that is no real number: True, texts, and tensors, whose gradient would be
    lost.

    Raises:
        TypeError: no number.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_function(name: str, value: object) -> None:
    """Refuses an argument called ``name`` that is neither a function nor None.

    Raises:
        TypeError: it is something else.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}")


def check_sizes(name: str, value: Any, forms: str, counts: range) -> tuple[int, ...]:
    """``value``, the argument called ``name``: one of ``forms``, as errors put them, which have so many integers.

    Raises:
        TypeError: no sequence of integers.
        ValueError: fewer or more of them, or one below 1.
    """
    message = f"{name} must be {forms}, each an integer of at least 1, got {value!r}"
    if not isinstance(value, Sequence) or not all(is_integer(size) for size in value):
        raise TypeError(message)
    if len(value) not in counts or min(value) < 1:
        raise ValueError(message)
    return tuple(map(int, value))


def is_integer(value: object) -> bool:
    """Whether a value is one; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def each_axis(name: str, value: PerAxis, dimensions: int) -> tuple[int, ...]:
    """``value``, the argument called ``name``, for every axis.

    Raises:
        ValueError: it is neither one integer of at least 1 nor one for each axis.
    """
    values: Any = (value,) * dimensions if isinstance(value, Integral) else value
    fits = isinstance(values, Sequence) and not isinstance(values, bytes) and len(values) == dimensions
    if not fits or any(not is_integer(one) or one < 1 for one in values):
        each = f" or a sequence of {dimensions}, each" if dimensions > 1 else ""
        raise ValueError(f"{name} must be one integer{each} at least 1, got {value!r}")
    return tuple(map(int, values))
