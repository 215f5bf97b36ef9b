"""Both directions of every layer see the same weights, called by themselves or in a chain: what sets them before one
sets them before the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from inverse_flow import InverseConv2d
from inverse_flow.flows import ActNorm, Compose, Conv1x1, Reverse
from inverse_flow.models import ConditionalFlow, Glow, LabelContext
from inverse_flow.reversible import ReversibleSequential

from .test_battery import CASES, Case

WAYS: dict[str, Callable[[nn.Module, str], Any]] = {
    "pruned": lambda layer, name: prune.random_unstructured(layer, name, 0.4),
    "weight norm": weight_norm,
    "weight norm, new": parametrizations.weight_norm,
    "spectral norm": spectral_norm,
    "spectral norm, new": parametrizations.spectral_norm,
}
LOADED = [
    (name, parameter, way)
    for name, case in CASES.items()
    for parameter, value in case.layer().named_parameters(recurse=False)
    for way in WAYS
    if value.numel() > 1 and (value.dim() > 1 or way == "pruned")  # a norm is over the columns of a matrix
]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


class Counting:
    """A forward pre-hook that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(arguments[0], (Tensor, tuple, list))
        self.calls += 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hooks_run_once_before_either_direction(case: Case) -> None:
    layer, hook = case.layer(), Counting()
    layer.register_forward_pre_hook(hook)
    z, _ = layer(case.images(), case.context())
    assert hook.calls == 1
    layer.inverse(z, case.context())
    assert hook.calls == 2
    layer.inverse(z, context=case.context())
    assert hook.calls == 3


@pytest.mark.parametrize(("name", "parameter", "way"), LOADED)
def test_loaded_weights_are_those_of_both_directions(name: str, parameter: str, way: str) -> None:
    """Right after loading, what the hooks of pruning and of the norms compute is still that of the weights before."""
    case = CASES[name]

    def layer(seed: int) -> nn.Module:
        made = case.layer()
        torch.manual_seed(seed)
        with torch.no_grad():
            for value in made.parameters():
                value.add_(0.1 * torch.randn_like(value))
        WAYS[way](made, parameter)
        return made.eval()

    first, other = layer(0), layer(1)
    x = case.images()
    z, _ = first(x)
    other.load_state_dict(first.state_dict())
    torch.testing.assert_close(other.inverse(z)[0], x)
    torch.testing.assert_close(other(x)[0], z)


def test_the_inverse_of_a_subclass_runs_them_once() -> None:
    class Twice(ActNorm):
        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            x, logdet = super().inverse(z / 2, context)
            return x, logdet

    layer, hook = Twice(2).eval(), Counting()
    layer.register_forward_pre_hook(hook)
    layer.inverse(torch.zeros(1, 2, 2, 2))
    assert hook.calls == 1


@pytest.mark.parametrize("kind", [Compose, ReversibleSequential])
def test_in_a_chain_they_run_once(kind: type[nn.Module]) -> None:
    conv, foreign, hook = InverseConv2d(2), Foreign(), Counting()
    for layer in (conv, foreign):
        layer.register_forward_pre_hook(hook)
    chain = kind(conv, Reverse(foreign))
    with torch.no_grad():
        chain(torch.zeros(1, 2, 2, 2))
        chain.inverse(torch.zeros(1, 2, 2, 2))
    assert hook.calls == 4


class Foreign(nn.Module):
    """The two methods and nothing else."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, float]:
        return x + 1, 0.0

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, float]:
        return z - 1, 0.0


def test_a_flow_and_a_conditional_one_run_theirs() -> None:
    flow, hook = Glow((1, 4, 4), levels=1, steps=1, hidden=2, context_channels=3).eval(), Counting()
    model = ConditionalFlow(flow, LabelContext(4, 3))
    flow.register_forward_pre_hook(hook)
    model.register_forward_pre_hook(hook)
    model.sample(2, torch.tensor([1, 3]))
    assert hook.calls == 1  # that of the flow: sampling is another method of the model
    model.inverse([torch.zeros(2, 4, 2, 2)], torch.tensor([1, 3]))
    assert hook.calls == 3


def test_a_hook_that_changes_what_comes_in_is_refused_on_the_way_back() -> None:
    layer = ActNorm(2).eval()
    layer.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0], *arguments[1:]))
    for call, named in ((layer.inverse, "ActNorm"), (Compose(layer).inverse, r"layers\.0 \(ActNorm\)")):
        with pytest.raises(RuntimeError, match=rf"^{named}: a forward pre-hook changes the input"):
            call(torch.zeros(1, 2, 2, 2))


@pytest.mark.filterwarnings("ignore")  # of the compiler about its own code
def test_a_compiled_inverse_runs_them_too() -> None:
    torch.compiler.reset()
    layer = prune.l1_unstructured(Conv1x1(3), "lower", 0.5)
    expected = layer.inverse(torch.ones(1, 3, 2, 2))[0]
    with torch.no_grad():
        layer.lower = torch.full_like(layer.lower, 7.0)  # what a hook has yet to replace
    found = torch.compile(layer.inverse, fullgraph=True, backend="eager")(torch.ones(1, 3, 2, 2))[0]
    torch.testing.assert_close(found, expected)
    # One that stands in the method's place is called as it is.
    layer.inverse = lambda z, context=None: (z, 0.0)
    assert torch.equal(Compose(layer).inverse(torch.ones(1, 3, 2, 2))[0], torch.ones(1, 3, 2, 2))
