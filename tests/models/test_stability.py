"""The inverse convolutions of whole models, and a training run that drifts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow import InverseConv1d, InverseConv2d, InverseConv3d, limit_gain_, stability, stability_report
from inverse_flow.data import load
from inverse_flow.flows import ActNorm, prepare_sampling
from inverse_flow.models import ConditionalFlow, FInCFlow, Glow, InverseConvClassifier, InverseFlow, LabelContext

SMALL = {"levels": 2, "steps": 2, "hidden": 4}


def seen(model: nn.Module, shape: Any, **options: Any) -> dict[str, tuple[int, ...]]:
    return {layer.path: layer.image_size for layer in stability_report(model, shape, **options).layers}


@pytest.mark.parametrize("kind", [InverseFlow, FInCFlow])
def test_the_layers_of_a_flow_are_found_with_their_sizes(kind: type[InverseFlow]) -> None:
    """In FInCFlow they run the other way round, and within a layer that turns them."""
    model = kind((1, 8, 12), **SMALL)
    found = seen(model, (1, 8, 12))
    wanted = [path for path, layer in model.named_modules() if isinstance(layer, InverseConv2d)]
    assert list(found) == wanted
    assert sorted(found.values()) == [(2, 3), (2, 3), (4, 6), (4, 6)]
    assert found == seen(model, (8, 12))
    for path, gain in stability.gains(model, (8, 12)).items():
        assert gain == stability_report(model.get_submodule(path), found[path]).largest.gain


def test_an_integer_is_a_square() -> None:
    model = InverseFlow((1, 8, 8), **SMALL)
    assert seen(model, 8) == seen(model, (1, 8, 8))
    with pytest.raises(ValueError, match="image_size must be the shape of an example, such as"):
        seen(nn.Sequential(InverseConv2d(1)), 8)


def test_models_of_other_kinds() -> None:
    classifier = InverseConvClassifier((1, 8, 8), 3)
    assert len(seen(classifier, (1, 8, 8))) == sum(isinstance(m, InverseConv2d) for m in classifier.modules()) > 0
    assert seen(torch.compile(classifier), (1, 8, 8)) == seen(classifier, (1, 8, 8))
    assert seen(Glow((1, 8, 8), **SMALL), (1, 8, 8)) == {}
    flow = InverseFlow((1, 8, 8), **SMALL, context_channels=3)
    context = torch.zeros(2, 3)
    assert len(seen(flow, (1, 8, 8), context=context)) == 4
    conditional = ConditionalFlow(flow, LabelContext(5, 3))
    assert [path.removeprefix("flow.") for path in seen(conditional, (1, 8, 8), context=torch.tensor([1]))] == list(
        seen(flow, (1, 8, 8), context=context)
    )
    prepared = prepare_sampling(InverseFlow((1, 8, 8), **SMALL))
    assert len(seen(prepared, (1, 8, 8))) == 4
    assert seen(InverseFlow((1, 8, 8), **SMALL, memory_efficient=True), 8) == seen(InverseFlow((1, 8, 8), **SMALL), 8)


class Mixed(nn.Sequential):
    """Layers of other kinds than images', in a model that turns one into the other."""

    def __init__(self) -> None:
        super().__init__(InverseConv1d(2), InverseConv3d(1, 2, dilation=2))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x)[0].view(-1, 1, 2, 3, 4))[0]


def test_signals_and_volumes() -> None:
    assert seen(Mixed(), (2, 12)) == {"0": (12,), "1": (2, 3, 4)}


class TwoScales(nn.Module):
    """One layer on two sizes of image, and one that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused = InverseConv2d(2), InverseConv2d(2)

    def forward(self, x: Tensor) -> Tensor:
        small = self.shared(F.avg_pool2d(x, 2))[0]
        return self.shared(x)[0] + F.interpolate(small, scale_factor=2.0)


def test_a_shared_layer_is_measured_on_the_largest_image() -> None:
    assert seen(TwoScales(), (2, 6, 8)) == {"shared": (6, 8)}


def test_nothing_of_a_model_is_touched() -> None:
    model = InverseFlow((1, 8, 8), **SMALL)
    calls: list[str] = []
    model.layers[1].register_forward_hook(lambda *_: calls.append("hook"))
    model.train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    stability_report(model, (1, 8, 8))
    limit_gain_(model, (1, 8, 8))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert calls == []
    assert not any("forward" in vars(module) for module in model.modules())
    for layer in model.modules():
        if isinstance(layer, ActNorm):
            assert layer._knows == {"initialized": False, "warned": False}
    model(torch.rand(4, 1, 8, 8))  # which it is here that ActNorm is initialised
    assert calls == ["hook"]
    assert all(bool(layer.initialized) for layer in model.modules() if isinstance(layer, ActNorm))


def test_a_model_that_looks_at_values_says_what_to_do() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = InverseConv2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0] if x.sum() > 0 else x

    class Unused(nn.Identity):
        def __init__(self) -> None:
            super().__init__()
            self.layer = InverseConv2d(1)

    with pytest.raises(RuntimeError, match=r"layers of Looks see .* failed: .*; give .* or its layers one by one"):
        stability_report(Looks(), (1, 4, 4))
    with pytest.raises(RuntimeError, match=r"no inverse convolution ran; give its layers one by one"):
        stability_report(Unused(), (1, 4, 4))


def test_a_size_that_the_model_does_not_take_is_the_models_error() -> None:
    with pytest.raises(ValueError, match="this flow takes"):
        stability_report(InverseFlow((1, 8, 8), **SMALL), (1, 16, 16))


def test_sizes_are_found_once_and_again_for_other_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = InverseFlow((1, 8, 8), **SMALL), []
    find = stability._sizes_seen
    monkeypatch.setattr(stability, "_sizes_seen", lambda *arguments: runs.append(arguments) or find(*arguments))
    for _ in range(3):
        limit_gain_(model, (1, 8, 8))
    assert len(runs) == 1
    model.layers[1] = copy.deepcopy(model.layers[1])
    limit_gain_(model, (1, 8, 8))
    assert len(runs) == 2
    limit_gain_(copy.deepcopy(model), (1, 8, 8))
    assert len(runs) == 3


@torch.no_grad()
def test_only_the_layers_above_the_limit_are_damped() -> None:
    model = InverseFlow((1, 8, 8), **SMALL)
    paths = list(seen(model, (1, 8, 8)))
    model.get_submodule(paths[1]).weight.mul_(300)
    before = copy.deepcopy(model.state_dict())
    was = stability.gains(model, (1, 8, 8))
    assert was[paths[1]] > 40
    (limited,) = limit_gain_(model, (1, 8, 8), 10.0)
    assert (limited.path, limited.gain) == (paths[1], was[paths[1]])
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [f"{paths[1]}.weight"]
    assert stability.gains(model, (1, 8, 8))[paths[1]] == pytest.approx(10, rel=1e-5)


# ---- A run that drifts ----

SIDE, RATE, LIMIT = 64, 5e-2, 100.0


def train_one_layer(seed: int, steps: int, limit: float | None) -> tuple[int, float, float]:
    """Maximum likelihood of one layer and one scale with Adam, without clipping, on clothes enlarged until neighbouring
    pixels are nearly equal.

    Returns:
        The steps that it took until the loss was above 20 bits per dimension, which no density of images has, or all;
        the last loss; and the largest gain.
    """
    images = F.interpolate(load("embedded").train.images[:200].float(), size=(SIDE, SIDE), mode="bicubic")
    images = images.round().clamp(0, 255)
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    layer, log_scale = InverseConv2d(1, corner="identity", bias=False), nn.Parameter(torch.tensor(1.2))
    optimizer = torch.optim.Adam([layer.weight, log_scale], lr=RATE)
    largest = 0.0
    for step in range(steps):
        rows = torch.randint(0, len(images), (4,), generator=draw)
        batch = (images[rows] + torch.rand(4, 1, SIDE, SIDE, generator=draw)) / 256 - 0.47
        z = layer(batch)[0] * log_scale.exp()
        loss = 8 + (0.5 * z.square().mean() + 0.5 * math.log(2 * math.pi) - log_scale) / math.log(2)
        if not loss < 20:
            return step, loss.item(), largest
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if limit is not None:
            limit_gain_(layer, (SIDE, SIDE), limit)
        largest = max(largest, stability.gains(layer, (SIDE, SIDE))[""])
    return steps, loss.item(), largest


@pytest.mark.parametrize(
    ("seed", "steps"), [(0, 120), *(pytest.param(seed, 600, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_a_run_that_drifts_is_held_by_a_limit_on_the_gain(seed: int, steps: int) -> None:
    taken, _, largest = train_one_layer(seed, steps, None)
    assert taken < steps
    assert largest > 1000
    taken, loss, largest = train_one_layer(seed, steps, LIMIT)
    assert taken == steps
    assert loss < 8
    # It was at the limit, and rounding carries it no further than this.
    assert largest == pytest.approx(LIMIT, rel=1e-5)
