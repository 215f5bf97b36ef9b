"""What a layer says of itself, and what is made of it where it says nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from inverse_flow import InverseConv2d
from inverse_flow.flows import ActNorm, AffineCoupling, Compose, Conv1x1, Flow, Logit, Reverse, Split, Squeeze
from inverse_flow.reversible import ReconstructionError, ReversibleSequential
from inverse_flow.reversible.layer import shortcut

EITHER_WAY = pytest.mark.parametrize("memory_efficient", [False, True])


class Double(nn.Module):
    """z = 2x, with the log-determinant in a form of its own."""

    def __init__(self, form: Callable[[Tensor, float], Any]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Any]:
        return 2 * x, self.form(x, math.log(2) * x[0].numel())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Any]:
        return z / 2, self.form(z, -math.log(2) * z[0].numel())


WHOLE_BATCH: dict[str, Callable[[Tensor, float], Any]] = {
    "float": lambda x, value: value,
    "int": lambda x, value: round(value),
    "no dimension": lambda x, value: x.new_tensor(value),
}
WRONG: dict[str, tuple[type[Exception], Callable[[Tensor, float], Any]]] = {
    "(B, 1)": (ValueError, lambda x, value: x.new_full((len(x), 1), value)),
    "(1,)": (ValueError, lambda x, value: x.new_full((1,), value)),
    "pixels": (ValueError, torch.full_like),
    "None": (TypeError, lambda x, value: None),
}


@EITHER_WAY
@pytest.mark.parametrize("form", WHOLE_BATCH)
def test_one_log_determinant_is_that_of_every_example(form: str, memory_efficient: bool) -> None:
    shape = (1, 3, 2)
    flow = Flow([Compose(Double(WHOLE_BATCH[form])), ActNorm(1).eval()], shape, memory_efficient=memory_efficient)
    latents, logdet = flow(torch.randn(5, *shape))
    expected = torch.full((5,), WHOLE_BATCH["int" if form == "int" else "float"](latents[0], 6 * math.log(2)))
    torch.testing.assert_close(logdet, expected.to(logdet.dtype))
    torch.testing.assert_close(flow.inverse(latents)[1], -expected.to(logdet.dtype))


@EITHER_WAY
@pytest.mark.parametrize("form", WRONG)
def test_a_log_determinant_of_another_shape_is_named(form: str, memory_efficient: bool) -> None:
    error, function = WRONG[form]
    flow = Flow([ActNorm(1).eval(), Double(function)], (1, 3, 2), memory_efficient=memory_efficient)
    with pytest.raises(error, match=r"layers\.1: the log-determinant of Double must"):
        flow(torch.randn(5, 1, 3, 2))
    with pytest.raises(error, match=r"layers\.1: the log-determinant of Double must"):
        flow.sample(5)


class Unshuffle(nn.Module):
    """The two methods and nothing else. Needs a context, or not."""

    def __init__(self, *, context: bool = False) -> None:
        super().__init__()
        self.context = context

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.context:
            x = x + context.view(-1, 1, 1, 1)
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(z, 2), z.new_zeros(len(z))


def test_the_shape_of_a_layer_that_says_nothing_is_found() -> None:
    state = torch.get_rng_state()
    flow = Flow([Unshuffle(), Compose(Reverse(Unshuffle()), Unshuffle()), ActNorm(4).eval()], (1, 8, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert flow.latent_shapes == ((4, 4, 2),)
    assert flow.sample(3).shape == (3, 1, 8, 4)


def test_a_layer_that_cannot_be_asked_is_told_what_to_define() -> None:
    flow = Flow([Unshuffle(context=True)], (1, 8, 4))
    with pytest.raises(ValueError, match=r"needs the methods output_shape\(shape\) and input_shape\(shape\)"):
        flow(torch.zeros(2, 1, 8, 4), torch.zeros(2, 1))


class Halve(nn.Module):
    """A split of a user's own, by the members that say so."""

    splits_off_latent = True

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], float]:
        first, second = x.chunk(2, dim=1)
        return (first, second), 0.0

    def inverse(self, z: tuple[Tensor, Tensor], context: Tensor | None = None) -> tuple[Tensor, float]:
        return torch.cat(z, dim=1), 0.0

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] // 2, *shape[1:])

    latent_shape = output_shape


@EITHER_WAY
def test_a_split_of_a_users_own(memory_efficient: bool) -> None:
    layers = [Squeeze(), Halve(), AffineCoupling(2, 3)]
    flow = Flow(layers, (1, 4, 4), memory_efficient=memory_efficient).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    latents, _ = flow(x)
    assert [z.shape[1:] for z in latents] == [(2, 2, 2), (2, 2, 2)] == list(flow.latent_shapes)
    torch.testing.assert_close(flow.inverse(latents)[0], x)
    with pytest.raises(TypeError, match="splits_off_latent"):
        Flow([Pair()], (2, 2, 2))(torch.zeros(1, 2, 2, 2))


class Pair(Halve):
    splits_off_latent = False


@EITHER_WAY
def test_both_directions_see_the_same_weights(memory_efficient: bool) -> None:
    """Right after loading: the weights that pruning sets are those of other masks till a hook has run."""

    def pruned(seed: int) -> Flow:
        torch.manual_seed(seed)
        layers = [InverseConv2d(4, 2), Reverse(Conv1x1(4)), Conv1x1(4)]
        for layer, name in zip((layers[0], layers[1].layer, layers[2]), ("weight", "lower", "upper"), strict=True):
            prune.l1_unstructured(layer, name, 0.4)
        return Flow(layers, (4, 2, 3), memory_efficient=memory_efficient)

    first, other = pruned(0), pruned(1)
    with torch.no_grad():
        for layer in (first.layers[1].layer, first.layers[2]):
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    other.load_state_dict(first.state_dict())
    z = (torch.randn(2, 4, 2, 3),)
    x, _ = other.inverse(z)
    torch.testing.assert_close(x, first.inverse(z)[0])
    torch.testing.assert_close(other(x)[0], z)
    x.sum().backward()
    assert other.layers[0].weight_orig.grad is not None


def test_weights_computed_within_a_cache_get_their_gradients() -> None:
    found = []
    for kind in (Compose, ReversibleSequential):
        torch.manual_seed(0)
        chain = kind(parametrizations.weight_norm(InverseConv2d(4, 2)), Conv1x1(4))
        with parametrize.cached():
            z, _ = chain(torch.ones(2, 4, 3, 3))
            penalty = chain.layers[0].weight.square().sum()
            found.append(torch.autograd.grad(z.square().sum() + penalty, list(chain.parameters()), allow_unused=True))
    for stored, rebuilt in zip(*found, strict=True):
        torch.testing.assert_close(rebuilt, stored)


class OfAnotherSign(ActNorm):
    """Overrides one direction by way of a mixin, a class between, or in place."""

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = super().inverse(-z)
        return x, logdet


class Mixin:
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x, context)  # type: ignore[misc]
        return -z, logdet


class Mixed(Mixin, ActNorm):
    pass


class Renamed(ActNorm):
    def extra_repr(self) -> str:
        return "renamed"


def test_who_overrides_a_direction_loses_the_shortcuts() -> None:
    in_place = ActNorm(2)
    in_place.forward = lambda x, context=None: (x, 0.0)
    hooked = ActNorm(2)
    hooked.register_forward_hook(lambda *_: None)
    for layer in (OfAnotherSign(2), Mixed(2), in_place, hooked, Double(WHOLE_BATCH["float"])):
        assert shortcut(layer, "backward_from_output") is None
    for layer in (ActNorm(2), Renamed(2), Logit(), Split(2), parametrizations.weight_norm(InverseConv2d(2))):
        assert shortcut(layer, "backward_from_output") is not None


class InPlace(Double):
    """Keeps a tensor that is no buffer, and changes it as it runs."""

    def __init__(self) -> None:
        super().__init__(WHOLE_BATCH["float"])
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = torch.zeros(())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Any]:
        self.seen.add_(1)
        return super().forward(x + self.scale)


def test_what_cannot_be_taken_back_is_refused_in_the_forward_pass() -> None:
    with pytest.raises(RuntimeError, match=r"layers\.1\.layers\.0: InPlace changed its tensor 'seen' in place"):
        ReversibleSequential(ActNorm(1).eval(), Compose(InPlace()))(torch.zeros(2, 1, 2, 2))


class InADictionary(Double):
    """Counts its runs where nobody looks, and shifts by the count."""

    def __init__(self) -> None:
        super().__init__(WHOLE_BATCH["float"])
        self.step = nn.Parameter(torch.ones(()))
        self.held = {"runs": 0}

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Any]:
        self.held["runs"] += 1
        z, logdet = super().forward(x)
        return z + self.held["runs"] * self.step, logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Any]:
        self.held["runs"] += 1
        return super().inverse(z - self.held["runs"] * self.step)


def test_what_is_not_seen_is_found_out_by_its_effect() -> None:
    z, _ = ReversibleSequential(ActNorm(1).eval(), InADictionary())(torch.ones(2, 1, 2, 2))
    with pytest.raises(ReconstructionError, match=r"the worst layer is layers\.1 \(InADictionary\)"):
        z.sum().backward()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # PyTorch's own, as it traces on
def test_a_chain_compiled_with_any_shapes_is_rebuilt() -> None:
    layers = [ActNorm(2).eval(), AffineCoupling(2, 3)]
    flow = Flow(layers, (2, 3, 3), memory_efficient=True)
    torch._dynamo.reset()
    log_prob = torch.compile(flow.log_prob, backend="eager", dynamic=True)
    for batch in (4, 3):
        x = torch.rand(batch, 2, 3, 3)
        torch.testing.assert_close(log_prob(x), flow.log_prob(x))
    log_prob(x).sum().backward()
    assert flow.layers[1].conditioner.layers[0].weight.grad is not None
