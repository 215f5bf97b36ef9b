"""What a configuration says of its fields: type and default, the values that they take, and what they mean.

All of it stands in the dataclass: the values in the annotation, a ``Literal`` or ``Annotated[int, Bounds(1)]``; the
meaning in the docstring, under "Attributes".
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from inverse_flow.ops.spec import check_integer, check_number

ConfigT = TypeVar("ConfigT")
ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")


class Bounds(NamedTuple):
    """The numbers from ``least`` to ``most``, above ``above`` and below ``below``."""

    least: int | None = None
    most: int | None = None
    above: int | None = None
    below: int | None = None

    def hold(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"{self.least} to {self.most}"
        words = {"at least": self.least, "at most": self.most, "above": self.above, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)


class Field(NamedTuple):
    """A field of a configuration.

    Attributes:
        name: of the field.
        kind: ``int``, ``float``, ``bool`` or ``str``, or a configuration; of the elements, where it holds several.
        choices: the texts that it may be; empty for any other kind.
        bounds: of its numbers; None for any.
        optional: may be None.
        several: holds a tuple.
        or_each: one, or a tuple of them.
        default: its value if none is given; ``dataclasses.MISSING`` if one must be.
        help: what it means, in sentences; code stands between double backticks.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    bounds: Bounds | None
    optional: bool
    several: bool
    or_each: bool
    default: Any
    help: str


@cache
def fields_of(config_type: type) -> dict[str, Field]:
    """The fields of a configuration's type, a dataclass, by name."""
    hints = get_type_hints(config_type, include_extras=True)
    meanings = _meanings(config_type)
    return {field.name: _field(field.name, hints[field.name], field.default, meanings) for field in fields(config_type)}


def check(config: object) -> None:
    """Refuses a configuration of which a field has a value that its annotation excludes.

    What it keeps are plain values, which a checkpoint takes and which are equal where the models and runs are: a
    sequence, read back from JSON as a list, becomes a tuple, and a number of NumPy's one of Python's.

    Raises:
        TypeError: a value of another kind; True is no number.
        ValueError: names the field, its values and what was given.
    """
    kind: type = type(config)
    for field in fields_of(kind).values():
        value = getattr(config, field.name)
        if value is None and field.optional:
            continue
        several = isinstance(value, Sequence) and not isinstance(value, str) and (field.several or field.or_each)
        if field.several and not several:
            raise TypeError(f"{field.name} must be a tuple, got {value!r}")
        plain = tuple(_plain(field, one) for one in value) if several else _plain(field, value)
        object.__setattr__(config, field.name, plain)


def from_values(config_type: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """The configuration with these values; a field that is missing, since they are older, has its default.

    Raises:
        ValueError: a field that does not exist.
    """
    kind: type = config_type
    unknown = sorted(values.keys() - fields_of(kind).keys())
    if unknown:
        raise ValueError(f"{config_type.__name__} has no {either(unknown)}: was it written by a newer version?")
    return config_type(**values)


def _plain(field: Field, value: Any) -> Any:
    if field.choices and value not in field.choices:
        quoted = [f'"{choice}"' for choice in field.choices]
        raise ValueError(f"{field.name} must be {either(quoted)}, got {value!r}")
    if field.kind is bool and not isinstance(value, bool):
        raise TypeError(f"{field.name} must be True or False, got {value!r}")
    if field.kind is int:
        check_integer(field.name, value, least=None)
        value = int(value)
    elif field.kind is float:
        check_number(field.name, value)
        if not math.isfinite(value):
            raise ValueError(f"{field.name} must be finite, got {value}")
        value = value if type(value) is int else float(value)
    if field.bounds and not field.bounds.hold(value):
        raise ValueError(f"{field.name} must be {field.bounds}, got {value}")
    return value


def either(names: list[str]) -> str:
    """``a, b or c``."""
    return ", ".join(names[:-1]) + (" or " if len(names) > 1 else "") + names[-1]


def _field(name: str, hint: Any, default: Any, meanings: dict[str, str]) -> Field:
    bounds = None
    optional = several = or_each = False
    choices: tuple[str, ...] = ()
    while (origin := get_origin(hint)) is not None:
        arguments = get_args(hint)
        if origin is Annotated:
            bounds = next((found for found in arguments[1:] if isinstance(found, Bounds)), None)
        elif origin in (Union, UnionType):
            optional = optional or NoneType in arguments
            or_each = any(get_origin(argument) is tuple for argument in arguments)
        elif origin is tuple:
            several = True
        elif origin is Literal:
            choices, arguments = arguments, (str,)
        hint = arguments[0]
    return Field(name, hint, choices, bounds, optional, several, or_each, default, meanings.get(name, ""))


def _meanings(config_type: type) -> dict[str, str]:
    """The entries under "Attributes" in a docstring, in one line each, with all code between double backticks."""
    text = inspect.getdoc(config_type) or ""
    _, _, section = text.partition("\nAttributes:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    found = re.findall(r"^    ([\w, ]+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    plain = {name: ROLE.sub(r"``\1``", " ".join(meaning.split())) for name, meaning in found}
    return {name: meaning for names, meaning in plain.items() for name in names.split(", ")}
