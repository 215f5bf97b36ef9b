"""Layers that keep, draw or compute something as they run: rebuilding gives the gradients of storing, and leaves the
same behind."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from inverse_flow import InverseConv2d
from inverse_flow.flows import ActNorm, AffineCoupling, Compose, Conv1x1, FlowLayer, Permute
from inverse_flow.reversible import ReversibleSequential

DRAWS = 60


class Network(nn.Module):
    """A conditioner for four channels with something in the middle."""

    def __init__(self, inner: nn.Module, normalise: Callable[[nn.Module], Any] = lambda layer: layer) -> None:
        super().__init__()
        first, last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        normalise(first)
        self.layers = nn.Sequential(first, inner, last)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.layers(x)


class Noise(nn.Module):
    """Noise from a source that is not PyTorch's own, the program's or one that the module owns."""

    def __init__(self, draw: Callable[..., float], source: Any = None) -> None:
        super().__init__()
        self.draw, self.source = draw, source

    def forward(self, x: Tensor) -> Tensor:
        return x * (0.5 + (self.draw(self.source) if self.source else self.draw()))


class Centre(FlowLayer):
    """Takes off a moving average, which training updates."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4, 1, 1) / 10)
        self.register_buffer("mean", torch.randn(4, 1, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 2, 3))[:, None, None], 0.5)
        return (x - self.mean.clone()) * self.gain.exp(), self.gain.sum() * x[0, 0].numel()

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.gain).exp() + self.mean.clone(), -self.gain.sum() * z[0, 0].numel()


class Counter(FlowLayer):
    """Counts its runs, in a buffer that is replaced or in a plain number, and shifts by the count."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.randn(()))
        self.plain, self.number = plain, 1
        self.register_buffer("count", torch.ones(()))

    def _shift(self) -> Tensor:
        if self.plain:
            self.number += 1
        else:
            self.count = self.count + 1
        return self.step * (self.number + self.count.clone())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, float]:
        return x + self._shift(), 0.0

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, float]:
        return z - self._shift(), 0.0


class Viewing(FlowLayer):
    """Reads its input in the order of memory, so that another layout fails."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, float]:
        return (x.permute(0, 2, 3, 1) * 2).permute(0, 3, 1, 2), x[0].numel() * 0.6931471805599453

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, float]:
        return (z / 2).contiguous(), -z[0].numel() * 0.6931471805599453


def initialised() -> ActNorm:
    layer = ActNorm(4)
    layer.initialized.fill_(True)
    return layer


def coupling(*arguments: Any) -> AffineCoupling:
    return AffineCoupling(4, conditioner=Network(*arguments))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: coupling(nn.BatchNorm2d(4)),
    "instance norm": lambda: coupling(nn.InstanceNorm2d(4, track_running_stats=True)),
    "dropout": lambda: coupling(nn.Dropout(0.5)),
    "dropout of channels": lambda: coupling(nn.Dropout2d(0.5)),
    "alpha dropout": lambda: coupling(nn.AlphaDropout(0.5)),
    "alpha dropout of channels": lambda: coupling(nn.FeatureAlphaDropout(0.5)),
    "dropout of volumes": lambda: coupling(nn.Dropout3d(0.5)),
    "random slopes": lambda: coupling(nn.RReLU()),
    "python's numbers": lambda: coupling(Noise(random.random)),
    "numpy's numbers": lambda: coupling(Noise(np.random.rand)),
    "numbers of its own": lambda: coupling(Noise(lambda source: source.random(), random.Random(3))),
    "numpy's of its own": lambda: coupling(Noise(lambda source: source.random(), np.random.default_rng(3))),
    "old numpy's of its own": lambda: coupling(Noise(lambda source: source.randn(), np.random.RandomState(3))),
    "torch's of its own": lambda: coupling(
        Noise(lambda source: torch.rand((), generator=source).item(), torch.Generator().manual_seed(3))
    ),
    "spectral norm within": lambda: coupling(nn.Tanh(), parametrizations.spectral_norm),
    "weight norm within": lambda: coupling(nn.Tanh(), parametrizations.weight_norm),
    "old spectral norm within": lambda: coupling(nn.Tanh(), spectral_norm),
    "old weight norm within": lambda: coupling(nn.Tanh(), weight_norm),
    "pruned within": lambda: coupling(nn.Tanh(), lambda layer: prune.l1_unstructured(layer, "weight", 0.3)),
    "spectral norm": lambda: parametrizations.spectral_norm(InverseConv2d(4, 2)),
    "old spectral norm": lambda: spectral_norm(InverseConv2d(4, 2)),
    "weight norm": lambda: parametrizations.weight_norm(InverseConv2d(4, 2)),
    "old weight norm": lambda: weight_norm(InverseConv2d(4, 2)),
    "old weight norm of a flow layer": lambda: weight_norm(Conv1x1(4), "lower"),
    "pruned": lambda: prune.l1_unstructured(InverseConv2d(4, 2), "weight", 0.3),
    "moving average": Centre,
    "counter": lambda: Counter(plain=False),
    "plain counter": lambda: Counter(plain=True),
    "views": Viewing,
    "stateless": lambda: Permute([2, 0, 3, 1]),
    "initialised": initialised,
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "slice": lambda x: torch.cat((x, x), dim=1)[:, 2:6],
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
}


def build(names: list[str], seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm is deprecated, and still there
        layers = [KINDS[name]().double() for name in names]
    with torch.no_grad():
        for parameter in nn.ModuleList(layers).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layers


def run(
    chain: nn.Module, x: Tensor, *, inverse: bool, create_graph: bool = False
) -> tuple[list[Tensor], dict[str, Tensor], list[Any]]:
    """Gradients, what the chain holds afterwards, and what the generators give next."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    z, logdet = (chain.inverse if inverse else chain)(x)
    weights = torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype).view(z.shape)
    loss = (weights * z.square()).sum() + (torch.arange(1.0, 1 + len(logdet)) * logdet).sum()
    held = {name: value.clone() for name, value in chain.state_dict().items()}
    leaves = [x, *chain.parameters()]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, create_graph=create_graph)
    after = chain.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in held.items()), "the backward pass changed something"
    drawn = [torch.rand(()).item(), random.random(), np.random.randn()]
    drawn += [module.draw(module.source) for module in chain.modules() if isinstance(module, Noise) and module.source]
    return [torch.zeros(()) if grad is None else grad for grad in grads], held, drawn


def check(names: list[str], layout: str, *, inverse: bool, seed: int, training: bool = True, **options: Any) -> None:
    x = torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = LAYOUTS[layout](x).detach().requires_grad_()
    found = []
    for kind in (Compose, ReversibleSequential):
        chain = kind(*build(names, seed)).train(training)
        found.append(run(chain, x, inverse=inverse, **options))
    (wanted, held, drawn), (grads, held_too, drawn_too) = found
    for name, value in held.items():
        torch.testing.assert_close(held_too[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert drawn == drawn_too
    for grad, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_by_itself(name: str, inverse: bool) -> None:
    check(["stateless", name], "channels last", inverse=inverse, seed=1)


@pytest.mark.parametrize("seed", range(DRAWS))
def test_chains_drawn_at_random(seed: int) -> None:
    draw = random.Random(seed)
    names = draw.choices(list(KINDS), k=draw.randint(2, 5))
    inverse, training, create_graph = (draw.random() < p for p in (0.5, 0.85, 0.15))
    check(names, draw.choice(list(LAYOUTS)), inverse=inverse, seed=seed, training=training, create_graph=create_graph)
