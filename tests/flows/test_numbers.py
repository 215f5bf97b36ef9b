"""Every number of channels, taps or axes that a layer is built with is an integer of a size that makes sense."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import nn

from inverse_flow import flows, models

# What a layer needs besides the argument that is wrong, by the name.
REQUIRED: dict[str, Any] = {
    "channels": 4, "in_channels": 4, "hidden": 4, "out_channels": 4, "size": (4, 4), "image_shape": (1, 4, 4),
    "classes": 3, "context_channels": 2,
}  # fmt: skip
NUMBERS = ("int", "int | None", "PerAxis")


def cases() -> list[tuple[type[nn.Module], dict[str, Any], str]]:
    found: list[tuple[type[nn.Module], dict[str, Any], str]] = []
    kinds = [getattr(flows, name) for name in flows.__all__]
    kinds += [models.LabelContext, models.SummaryNet, models.InverseConvClassifier]
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            continue
        parameters = inspect.signature(kind).parameters
        needed = {name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
        if needed <= REQUIRED.keys():
            required = {name: REQUIRED[name] for name in needed}
            found += [(kind, required, name) for name, p in parameters.items() if p.annotation in NUMBERS]
    return found


@pytest.mark.parametrize(("kind", "required", "name"), cases(), ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_number_is_named(kind: type[nn.Module], required: dict[str, Any], name: str) -> None:
    kind(**required)
    for wrong in (-1, 2.5, 4.0, True, "4", float("inf"), [2]):
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*got "):
            kind(**required | {name: wrong})


def test_most_layers_are_among_them() -> None:
    assert len({kind for kind, _, _ in cases()}) >= 20
