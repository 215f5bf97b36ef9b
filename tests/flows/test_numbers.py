"""Every number that a layer, a model or a configuration is built with is one, of a size that makes sense: no text, and
no truth value."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import inverse_flow
from inverse_flow import flows, models, parts, training
from inverse_flow.models.fields import fields_of

# What a layer needs besides the argument that is wrong, by the name.
REQUIRED: dict[str, Any] = {
    "channels": 4, "in_channels": 4, "hidden": 4, "out_channels": 4, "size": (4, 4), "image_shape": (1, 4, 4),
    "classes": 3, "context_channels": 2, "state_channels": 5,
    "observed": flows.Flow([flows.ActNorm(2)], (2, 4, 4)), "own": flows.Flow([flows.ActNorm(2)], (2, 4, 4)),
}  # fmt: skip
WRONG: dict[str, tuple[Any, ...]] = {
    "int": (-1, 2.5, 4.0, True, "4", float("inf"), [2]),
    "PerAxis": (-1, 2.5, 4.0, True, "4", float("inf"), [2], (2, "2", 2)),
    "float": (-1.0, True, "0.4", float("nan"), [0.4]),
    "tuple": (4, "44", (4, True), (4, 0), (4.0, 4)),
}
CONFIGS: list[type] = [*(kind.config_type for kind in models.KINDS.values()), training.TrainConfig, parts.PartsConfig]
# Fields that may be below 0.
SIGNED = ("logit_margin",)


def cases() -> list[tuple[type[nn.Module], dict[str, Any], str, str]]:
    found: list[tuple[type[nn.Module], dict[str, Any], str, str]] = []
    kinds = [getattr(flows, name) for name in flows.__all__]
    kinds += [models.LabelContext, models.SummaryNet, models.InverseConvClassifier, models.LoopNetwork]
    kinds += [inverse_flow.InverseConv2d]
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            continue
        parameters = inspect.signature(kind).parameters
        needed = {name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
        if needed <= REQUIRED.keys():
            required = {name: REQUIRED[name] for name in needed}
            told = {name: str(p.annotation).removesuffix(" | None") for name, p in parameters.items()}
            told = {name: "tuple" if text.startswith("tuple[int") else text for name, text in told.items()}
            found += [(kind, required, name, text) for name, text in told.items() if text in WRONG]
    return found


@pytest.mark.parametrize(
    ("kind", "required", "name", "annotation"), cases(), ids=lambda value: getattr(value, "__name__", None)
)
def test_a_wrong_number_is_named(kind: type[nn.Module], required: dict[str, Any], name: str, annotation: str) -> None:
    kind(**required)
    for wrong in WRONG[annotation]:
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*got "):
            kind(**required | {name: wrong})


def test_most_layers_are_among_them() -> None:
    assert len({kind for kind, *_ in cases()}) >= 24


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_wrong_number_in_a_configuration_is_named(kind: type) -> None:
    required = {"image_shape": (4, 4, 4)} if "image_shape" in fields_of(kind) else {}
    kind(**required)
    wrong = {int: (-1, 2.5, True, "3"), float: (-1.0, True, "0.4", float("inf")), bool: (1, "no")}
    for name, field in fields_of(kind).items():
        for value in wrong.get(field.kind, ()):
            if name in SIGNED and value == -1.0:
                continue
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*got "):
                kind(**required | {name: (value, value) if field.several else value})


@pytest.mark.parametrize("coupling", [0, "affine", 2.5])
def test_a_coupling_is_a_function(coupling: Any) -> None:
    for kind, arguments in ((flows.HINT, (4,)), (flows.JointFlow, (REQUIRED["observed"], REQUIRED["own"]))):
        with pytest.raises(TypeError, match=f"coupling must be a function, got {coupling!r}"):
            kind(*arguments, coupling=coupling)


@pytest.mark.parametrize("order", [[True, False], [1.0, 0.0], ["1", "0"], [0, 2], [0, 0], {1, 0}, {0: 1}, 2, None])
def test_a_permutation_is_a_sequence_of_integers(order: Any) -> None:
    """A set has no order of its own."""
    with pytest.raises(ValueError, match=rf"names each of the channels 0 … C-1 once, got {re.escape(repr(order))}"):
        flows.Permute(order)


@pytest.mark.parametrize("order", [(1, 0), range(2), np.array([1, 0]), torch.tensor([1, 0])], ids=type)
def test_any_sequence_is_a_permutation(order: Any) -> None:
    x = torch.randn(3, 2)
    assert torch.equal(flows.Permute(order)(x)[0], x[:, list(order)])


@pytest.mark.parametrize("shape", [2, None, "ab", (), {2, 4}, (2, 0), (2, 4.0), (True,)])
def test_an_event_shape_is_a_sequence_of_integers(shape: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"event_shape must be .*got {re.escape(repr(shape))}"):
        flows.Flow([flows.ActNorm(2)], shape)


def test_layers_are_several() -> None:
    for wrong in (None, 3, flows.ActNorm(2)):
        with pytest.raises(TypeError, match=rf"a sequence of modules .*got {type(wrong).__name__}"):
            flows.Flow(wrong, (2,))


@pytest.mark.parametrize(
    ("kind", "arguments", "name"),
    [
        (flows.AffineCoupling, (4,), "scale"),
        (flows.CheckerboardCoupling, (4,), "scale"),
        (flows.CheckerboardCoupling, (4,), "kind"),
        (flows.SplineActivation, (4,), "kind"),
        (flows.Split, (4,), "prior"),
        (flows.Squeeze, (), "pattern"),
        (flows.WaveletSqueeze, (), "order"),
        (flows.HaarSqueeze, (), "order"),
        (models.SummaryNet, (1, 2), "form"),
        (inverse_flow.InverseConv2d, (4,), "corner"),
        (inverse_flow.InverseConv2d, (4,), "order"),
        (parts.split_flow, (REQUIRED["own"],), "cut"),
    ],
)
def test_a_choice_that_does_not_exist_is_named(kind: Any, arguments: tuple[Any, ...], name: str) -> None:
    """Whatever it is: a list, which no table of names can be asked for, too."""
    more = {"count": 1} if kind is parts.split_flow else {}
    for wrong in ("none such", 3, {"a"}, {"a": 1}):
        with pytest.raises((TypeError, ValueError), match=rf"must be .*got .*{re.escape(repr(wrong))}"):
            kind(*arguments, **{name: wrong}, **more)
