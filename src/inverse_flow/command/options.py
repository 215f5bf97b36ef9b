"""Options of the command line, made from the fields of configurations.

Type, default, bounds and help of an option stand in the configuration and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click

from inverse_flow.models.fields import Field, fields_of

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
# Code in a docstring, and what that says of None, which is what an option is that was not given.
CODE = re.compile(r"``(.+?)``")
NONE = re.compile(r"(?:^|[.;]? )None for ([^.;]*)[.;]?")


class ConfigOptions:
    """The fields of a configuration as options, each None (or empty) where it was not given.

    Args:
        config_type: the configuration, a dataclass.
        leave_out: fields that are no options.
        spelled: the options of fields that have another name.
        alike: what configurations with the same fields are for, the usual one first; where their defaults differ, the
            help says so.
        demo: the fields that have another default in the demo.
    """

    def __init__(
        self,
        config_type: type,
        *,
        leave_out: Iterable[str] = (),
        spelled: Mapping[str, str] | None = None,
        alike: Mapping[str, type] | None = None,
        demo: Mapping[str, Any] | None = None,
    ) -> None:
        self.fields = {name: field for name, field in fields_of(config_type).items() if name not in leave_out}
        self.names = {name: (spelled or {}).get(name, name) for name in self.fields}
        self.alike = alike or {"": config_type}
        self.demo = demo or {}

    def __call__(self, command: CommandT) -> CommandT:
        """Adds the options to a command; a decorator."""
        for field in reversed(self.fields.values()):
            command = self._option(field)(command)
        return command

    def given(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that were given on the command line, with their values."""
        return {name: options[key] for name, key in self.names.items() if options[key] not in (None, ())}

    def told(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The options that would give the fields of ``config``, with their values."""
        return {key: config[name] for name, key in self.names.items()}

    def _option(self, field: Field) -> Callable[[CommandT], CommandT]:
        flag = self._flag(field.name)
        if field.kind is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        return click.option(
            flag,
            type=_type(field),
            default=None,
            multiple=field.several,
            help=self._help(field) + self._default(field),
        )

    def _help(self, field: Field) -> str:
        """The meaning of a field in the words of the command line: options for fields, and nothing about None."""
        text = NONE.sub("", field.help).strip()
        text = CODE.sub(lambda code: self._flag(code[1]) if code[1] in self.names else code[1], text)
        return text[:1].upper() + text[1:] + ("" if text.endswith((".", "…")) else ".")

    def _flag(self, name: str) -> str:
        return "--" + self.names[name].replace("_", "-")

    def _default(self, field: Field) -> str:
        usual, *others = [fields_of(kind)[field.name].default for kind in self.alike.values()]
        first = _text(usual, field)
        if any(other != usual for other in others):
            first = f"{first} for {next(iter(self.alike))}, else the model's"
        in_demo = f"; {_text(self.demo[field.name], field)} in the demo" if field.name in self.demo else ""
        return f"  [default: {first}{in_demo}]" if first else ""


def _type(field: Field) -> click.ParamType[Any] | type:
    if field.choices:
        return click.Choice(field.choices)
    if field.kind not in (int, float) or field.bounds is None:
        return field.kind
    low, high = _end(field.bounds.least, field.bounds.above), _end(field.bounds.most, field.bounds.below)
    open_ends = {"min_open": field.bounds.above is not None, "max_open": field.bounds.below is not None}
    if field.kind is int:
        return click.IntRange(low, high, **open_ends)
    return click.FloatRange(low, high, **open_ends)


def _end(closed: int | None, opened: int | None) -> int | None:
    return opened if closed is None else closed


def _text(value: Any, field: Field) -> str:
    """A default as the command line has it; nothing for one that goes without saying."""
    if value is None:
        found = NONE.search(field.help)
        return found[1] if found else ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
