"""Values, defaults and meaning of a configuration's fields, read from the dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest

from inverse_flow.models import KINDS
from inverse_flow.models.fields import Bounds, check, fields_of


@dataclass(frozen=True)
class Example:
    """Something.

    Attributes:
        count, size: so many ``things``, see :class:`~inverse_flow.Other`;
            one or more.
        share: between 0 and 1.

    Raises:
        ValueError: this is no field: of course.
    """

    count: Annotated[int, Bounds(1)]
    size: Annotated[int, Bounds(1, 8)] | tuple[int, int] = 2
    share: Annotated[float, Bounds(0, below=1)] | None = None
    rates: tuple[Annotated[float, Bounds(above=0)], ...] = ()
    kind: Literal["a", "b"] = "a"
    silent: bool = False

    def __post_init__(self) -> None:
        check(self)


def test_type_default_and_meaning_are_those_of_the_dataclass() -> None:
    fields = fields_of(Example)
    assert fields["size"].help == fields["count"].help == "so many ``things``, see ``Other``; one or more."
    assert fields["share"].help == "between 0 and 1."
    assert fields["silent"].help == ""
    told = {name: (f.kind, f.optional, f.several, f.choices) for name, f in fields.items()}
    assert told == {
        "count": (int, False, False, ()),
        "size": (int, False, False, ()),
        "share": (float, True, False, ()),
        "rates": (float, False, True, ()),
        "kind": (str, False, False, ("a", "b")),
        "silent": (bool, False, False, ()),
    }
    assert fields["size"].default == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"size": 9}, "size must be 1 to 8, got 9"),
        ({"share": 1.0}, "share must be at least 0 and below 1, got 1.0"),
        ({"size": (2, 9)}, "size must be 1 to 8, got 9"),
        ({"share": float("nan")}, "share must be finite, got nan"),
        ({"rates": (float("inf"),)}, "rates must be finite, got inf"),
        ({"rates": (1.0, 0.0)}, "rates must be above 0, got 0.0"),
        ({"kind": "c"}, 'kind must be "a" or "b", got \'c\''),
    ],
)
def test_other_values_are_refused(values: dict, message: str) -> None:
    Example(1, (2, 3), share=0.5, rates=(0.1,), kind="b")
    with pytest.raises(ValueError, match=message):
        Example(**{"count": 1} | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 2.0}, "count must be an integer, got 2.0"),
        ({"count": True}, "count must be an integer, got True"),
        ({"count": "3"}, "count must be an integer, got '3'"),
        ({"count": (2, 3)}, r"count must be an integer, got \(2, 3\)"),
        ({"count": None}, "count must be an integer, got None"),
        ({"rates": 0.1}, "rates must be a tuple, got 0.1"),
        ({"size": (2, "3")}, "size must be an integer, got '3'"),
        ({"share": "0.5"}, "share must be a number, got '0.5'"),
        ({"share": False}, "share must be a number, got False"),
        ({"rates": (0.1, None)}, "rates must be a number, got None"),
        ({"silent": 1}, "silent must be True or False, got 1"),
    ],
)
def test_values_of_another_kind_are_refused(values: dict, message: str) -> None:
    Example(1, share=0, rates=(1,), silent=True)  # an integer is a number, too
    with pytest.raises(TypeError, match=message):
        Example(**{"count": 1} | values)


def test_what_is_kept_is_plain() -> None:
    """So that a checkpoint takes it, and equal ones are equal."""
    example = Example(np.int64(2), [np.int32(3), 4], np.float64(0.5), rates=[1, np.float32(0.5)])
    assert example == Example(2, (3, 4), 0.5, rates=(1, 0.5))
    kept = [example.count, *example.size, example.share, *example.rates]
    assert {type(number) for number in kept} == {int, float}


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
def test_every_field_of_a_flow_says_what_it_means(kind: type) -> None:
    meanings = fields_of(kind.config_type.__mro__[-2])
    assert [name for name, field in meanings.items() if not field.help] == []
