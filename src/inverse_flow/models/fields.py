"""What a configuration says of its fields: type and default, the values that they take, and what they mean.

All of it stands in the dataclass: the values in the annotation, a ``Literal`` or ``Annotated[int, Bounds(1)]``; the
meaning in the docstring, under "Attributes".
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")


class Bounds(NamedTuple):
    """The finite numbers from ``least`` to ``most``, above ``above`` and below ``below``."""

    least: int | None = None
    most: int | None = None
    above: int | None = None
    below: int | None = None

    def hold(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"{self.least} to {self.most}"
        words = {"at least": self.least, "at most": self.most, "a finite number above": self.above, "below": self.below}
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
        default: its value if none is given; ``dataclasses.MISSING`` if one must be.
        help: what it means, in sentences; code stands between double backticks.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    bounds: Bounds | None
    optional: bool
    several: bool
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

    Raises:
        ValueError: names the field, its values and what was given.
    """
    kind: type = type(config)
    for field in fields_of(kind).values():
        value = getattr(config, field.name)
        if value is None and field.optional:
            continue
        for one in value if field.several else [value]:
            if field.choices and one not in field.choices:
                quoted = [f'"{choice}"' for choice in field.choices]
                raise ValueError(f"{field.name} must be {either(quoted)}, got {one!r}")
            if field.bounds and isinstance(one, (int, float)) and not field.bounds.hold(one):
                raise ValueError(f"{field.name} must be {field.bounds}, got {one}")


def either(names: list[str]) -> str:
    """``a, b or c``."""
    return ", ".join(names[:-1]) + (" or " if len(names) > 1 else "") + names[-1]


def _field(name: str, hint: Any, default: Any, meanings: dict[str, str]) -> Field:
    bounds = None
    optional = several = False
    choices: tuple[str, ...] = ()
    while (origin := get_origin(hint)) is not None:
        arguments = get_args(hint)
        if origin is Annotated:
            bounds = next((found for found in arguments[1:] if isinstance(found, Bounds)), None)
        elif origin in (Union, UnionType):
            optional = optional or NoneType in arguments
        elif origin is tuple:
            several = True
        elif origin is Literal:
            choices, arguments = arguments, (str,)
        hint = arguments[0]
    return Field(name, hint, choices, bounds, optional, several, default, meanings.get(name, ""))


def _meanings(config_type: type) -> dict[str, str]:
    """The entries under "Attributes" in a docstring, in one line each, with all code between double backticks."""
    text = inspect.getdoc(config_type) or ""
    _, _, section = text.partition("\nAttributes:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    found = re.findall(r"^    ([\w, ]+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    plain = {name: ROLE.sub(r"``\1``", " ".join(meaning.split())) for name, meaning in found}
    return {name: meaning for names, meaning in plain.items() for name in names.split(", ")}
