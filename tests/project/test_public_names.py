"""What users import, and the arguments they call it with, stay: a name may come, none may go."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("public_names.txt")
# A line a name: inverse_flow.room.Name(argument, argument, …); modules and constants have no brackets.
ENTRIES = [
    (module, name, arguments.split(", ") if arguments else [])
    for module, name, arguments in re.findall(r"^([\w.]+)\.(\w+)(?:\((.*)\))?$", LIST.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("module", "name", "arguments"), ENTRIES, ids=[entry[1] for entry in ENTRIES])
def test_name_and_arguments_stay(module: str, name: str, arguments: list[str]) -> None:
    place = importlib.import_module(module)
    assert name in place.__all__, f"{module} no longer offers {name}"
    thing = getattr(place, name)
    if not arguments:
        return
    parameters = inspect.signature(thing).parameters
    assert [argument for argument in parameters if argument in arguments] == arguments
    new = [p for key, p in parameters.items() if key not in arguments]
    required = [p.name for p in new if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert not required, f"{module}.{name} asks for arguments it did not ask for: {', '.join(required)}"


def test_every_line_of_the_list_is_read() -> None:
    assert len(ENTRIES) == len(LIST.read_text().splitlines())


LAYER = {"forward": ["x", "context"], "inverse": ["z", "context"]}
FLOW = LAYER | {
    "log_prob": ["x", "context"],
    "sample": ["n", "context", "temperature"],
    "sample_and_log_prob": ["n", "context", "temperature"],
}
METHODS = {
    ("inverse_flow", "InverseConv2d"): LAYER,
    ("inverse_flow.flows", "Compose"): LAYER,
    ("inverse_flow.flows", "Flow"): FLOW,
    ("inverse_flow.models", "Glow"): FLOW,
    ("inverse_flow.reversible", "ReversibleSequential"): LAYER,
}


@pytest.mark.parametrize("where", METHODS, ids=lambda where: where[1])
def test_methods_take_what_they_took(where: tuple[str, str]) -> None:
    kind = getattr(importlib.import_module(where[0]), where[1])
    for name, arguments in METHODS[where].items():
        taken = list(inspect.signature(getattr(kind, name)).parameters)[1:]
        assert len(taken) >= len(arguments), f"{where[1]}.{name}"
        assert "context" in taken
        if "temperature" in arguments:
            assert "temperature" in taken
