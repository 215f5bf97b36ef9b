"""Rebuilding instead of storing: the gradients are those of the layers run one after the other, which store."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.flows import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Compose,
    Conv1x1,
    Permute,
    Reverse,
    Split,
    Squeeze,
)
from inverse_flow.reversible import ReconstructionError, ReversibleSequential, reconstruction_errors

CONTEXT_CHANNELS = 2

# Relative error allowed to a gradient, against the stored path in the same dtype: rebuilding loses a few roundings a
# layer, and at 256 layers 3e-6 and 5e-15 were seen.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 5e-14}


class Scale(nn.Module):
    """A layer of a user's own, without a base class or a closed form: z = x · exp(a) + b."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.0))
        self.shift = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp() + self.shift, (self.log_scale * x.shape[1:].numel()).expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (z - self.shift) * (-self.log_scale).exp(), (-self.log_scale * z.shape[1:].numel()).expand(len(z))


def layers_in_turn(depth: int, *, channels: int = 2, spread: float = 0.1, dtype: torch.dtype = torch.float64) -> Any:
    """``depth`` layers of every kind, their parameters moved away from where they start."""
    torch.manual_seed(0)
    kinds: list[Callable[[], nn.Module]] = [
        lambda: InverseConv2d(channels),
        lambda: ActNorm(channels),
        lambda: Conv1x1(channels),
        lambda: AffineCoupling(channels, 3, context_channels=CONTEXT_CHANNELS),
        lambda: Permute(range(channels - 1, -1, -1)),
        Scale,
        lambda: Reverse(ActNorm(channels)),
        lambda: InverseConv2d(channels, (2, 3), corner="plu"),
        lambda: Compose(AdditiveCoupling(channels, 3)),
    ]
    layers = [kinds[i % len(kinds)]().to(dtype) for i in range(depth)]
    with torch.no_grad():
        for parameter in nn.ModuleList(layers).parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return nn.ModuleList(layers).eval()


def images(*, channels: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Data and context, both of which require gradients."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, channels, 3, 2), (2, CONTEXT_CHANNELS))
    x, context = (torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    return x, context


def loss_of(results: tuple[Tensor, Tensor]) -> Tensor:
    """Depends on every output, and on none of them in the same way."""
    z, logdet = results
    weights = torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype).view(z.shape)
    return (weights * z.square()).sum() + (torch.arange(1.0, 1 + len(logdet)) * logdet).sum()


def gradients(run: Callable[..., tuple[Tensor, Tensor]], leaves: Sequence[Tensor], *inputs: Any) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss_of(run(*inputs)), list(leaves), allow_unused=True))


def largest_difference(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """The largest relative difference of a gradient; of a tiny one, relative to the typical one."""
    assert [g is None for g in found] == [g is None for g in wanted]
    pairs = [(f.detach(), w.detach()) for f, w in zip(found, wanted, strict=True) if f is not None and w is not None]
    typical = torch.stack([w.double().norm() for _, w in pairs]).median()
    return max(float((f - w).double().norm() / torch.maximum(w.double().norm(), typical)) for f, w in pairs)


def difference(layers: Sequence[nn.Module], leaves: Sequence[Tensor], *inputs: Any, **options: Any) -> float:
    """That of the gradients of a chain that rebuilds from those of one that stores."""
    found = gradients(ReversibleSequential(*layers, **options), leaves, *inputs)
    return largest_difference(found, gradients(Compose(*layers), leaves, *inputs))


# Exactness.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [4, 16, 64, 256])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_are_those_of_the_stored_path(depth: int, dtype: torch.dtype, inverse: bool) -> None:
    layers = layers_in_turn(depth, spread=0.05, dtype=dtype)
    stored, rebuilt = Compose(*layers), ReversibleSequential(*layers)
    x, context = images(dtype=dtype)
    leaves = [x, context, *layers.parameters()]
    runs = [(chain.inverse if inverse else chain) for chain in (stored, rebuilt)]
    for found, wanted in zip(runs[1](x, context), runs[0](x, context), strict=True):
        assert torch.equal(found, wanted)
    difference = largest_difference(gradients(runs[1], leaves, x, context), gradients(runs[0], leaves, x, context))
    assert difference <= TOLERANCE[dtype]


def test_gradients_under_autocast() -> None:
    """The networks run in bfloat16 both times, on the very same input: what couplings condition on is not rebuilt."""
    layers = layers_in_turn(9, channels=4, dtype=torch.float32)
    x, context = images(channels=4, dtype=torch.float32)
    leaves = [x, context, *layers.parameters()]
    found = []
    for chain in (ReversibleSequential(*layers), Compose(*layers)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(chain(x, context))
        found.append(torch.autograd.grad(loss, leaves))
    # bfloat16 keeps 8 bits.
    assert largest_difference(*found) <= 2e-2
    # And the networks did run in bfloat16: float32 is something else.
    assert largest_difference(found[0], gradients(Compose(*layers), leaves, x, context)) > 1e-4


def test_bfloat16_images() -> None:
    layers = [Compose(ActNorm(4), AffineCoupling(4, 6)).bfloat16().eval() for _ in range(2)]
    x = torch.randn(2, 4, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *nn.ModuleList(layers).parameters()]
    assert difference(layers, leaves, x) <= 3e-2


def test_first_and_second_derivatives_against_finite_differences() -> None:
    layers = layers_in_turn(4)
    chain = ReversibleSequential(*layers)
    x, context = images()

    def run(x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return chain(x, context)

    assert torch.autograd.gradcheck(run, (x, context), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, context), fast_mode=True)


def test_a_gradient_penalty_reaches_the_parameters() -> None:
    layers = layers_in_turn(9)
    x, context = images()
    found = []
    for chain in (ReversibleSequential(*layers), Compose(*layers)):
        (grad,) = torch.autograd.grad(loss_of(chain(x, context)), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), list(layers.parameters()), allow_unused=True))
    used = [i for i, grad in enumerate(found[1]) if grad is not None]
    assert largest_difference(*([grads[i] for i in used] for grads in found)) <= 1e-9


def test_no_context_and_no_gradient_of_the_input() -> None:
    layers = [Scale().double(), AffineCoupling(2, 3).double()]
    x = images()[0].detach()
    leaves = list(nn.ModuleList(layers).parameters())
    assert difference(layers, leaves, x) <= 1e-12


def test_an_empty_batch_and_an_empty_chain() -> None:
    layers = layers_in_turn(9)
    x, context = images()
    z, logdet = ReversibleSequential(*layers)(x[:0], context[:0])
    (z.sum() + logdet.sum()).backward()
    assert z.shape == x[:0].shape
    assert torch.equal(ReversibleSequential()(x)[0], x)


# Memory.


def bytes_saved(run: Callable[[], Any], known: Sequence[Tensor]) -> int:
    """Bytes of the storages that autograd keeps, without those of ``known``, each counted once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    known_storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    del kept
    return sum(size for pointer, size in sizes.items() if pointer not in known_storages)


def saved_by(kind: type[nn.Module], depth: int, **options: Any) -> int:
    layers = layers_in_turn(depth)
    x, context = images()
    return bytes_saved(lambda: kind(*layers, **options)(x, context), [*layers.parameters(), *layers.buffers()])


def test_what_is_saved_does_not_grow_with_depth() -> None:
    assert saved_by(ReversibleSequential, 9) == saved_by(ReversibleSequential, 90) > 0
    assert saved_by(Compose, 90) > 5 * saved_by(Compose, 9)


def test_anchors_are_what_is_saved_besides() -> None:
    one_activation = images()[0].numel() * 8
    without = saved_by(ReversibleSequential, 36)
    assert saved_by(ReversibleSequential, 36, anchors=12) == without + 2 * one_activation


def test_a_conditioner_runs_once_in_each_pass() -> None:
    coupling = AffineCoupling(4, 3)
    calls = []
    coupling.conditioner.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    loss_of(ReversibleSequential(coupling)(torch.randn(2, 4, 2, 2))).backward()
    assert calls == [False, True]


# Trust.


class NotQuiteItsInverse(Scale):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = super().inverse(z)
        return x + 1e-3, logdet


class Squash(nn.Module):
    """z = x + 10⁵: every such layer costs five digits."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + 1e5, x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z - 1e5, z.new_zeros(len(z))


@pytest.mark.parametrize("anchors", [None, 2, 3])
def test_a_layer_that_rebuilds_badly_is_named(anchors: int | None) -> None:
    chain = ReversibleSequential(Scale(), Compose(Scale(), NotQuiteItsInverse()), Scale(), Scale(), anchors=anchors)
    loss = loss_of(chain(torch.randn(2, 1, 2, 2)))
    with pytest.raises(
        ReconstructionError, match=r"the worst layer is layers\.1\.layers\.1 \(NotQuiteItsInverse\)"
    ) as e:
        loss.backward()
    assert e.value.path == "layers.1.layers.1"
    assert isinstance(chain.get_submodule(e.value.path), NotQuiteItsInverse)
    assert 1e-4 < e.value.error < 1e-2
    assert all(parameter.grad is None for parameter in chain.parameters())


def test_the_worst_layer_in_the_inverse_direction_is_named() -> None:
    class Bad(NotQuiteItsInverse):
        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return Scale.inverse(self, z)

        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            z, logdet = Scale.forward(self, x)
            return z + 1e-3, logdet

    loss = loss_of(ReversibleSequential(Scale(), Bad(), Scale()).inverse(torch.randn(2, 1, 2, 2)))
    with pytest.raises(ReconstructionError, match=r"layers\.1 \(Bad\)"):
        loss.backward()


def test_a_higher_tolerance_accepts_and_infinity_does_not_look() -> None:
    for tolerance in (0.1, math.inf):
        chain = ReversibleSequential(Scale(), NotQuiteItsInverse(), tolerance=tolerance)
        loss_of(chain(torch.randn(2, 1, 2, 2))).backward()
        assert all(parameter.grad is not None for parameter in chain.parameters())


def test_lost_digits_are_noticed_and_a_wider_dtype_cures() -> None:
    for dtype in (torch.float32, torch.float64):
        loss = loss_of(ReversibleSequential(Scale().to(dtype), Squash())(torch.randn(2, 1, 2, 2, dtype=dtype)))
        if dtype == torch.float32:
            with pytest.raises(ReconstructionError, match=r"layers\.1 \(Squash\)"):
                loss.backward()
        else:
            loss.backward()


def test_anchors_stop_errors_from_piling_up() -> None:
    """Two dozen layers, each of which triples the error of the one before."""
    layers = [Scale() for _ in range(24)]
    with torch.no_grad():
        for layer in layers:
            layer.log_scale.fill_(-math.log(3.0))
    x = torch.randn(2, 1, 2, 2)
    with pytest.raises(ReconstructionError):
        loss_of(ReversibleSequential(*layers)(x)).backward()
    leaves = list(nn.ModuleList(layers).parameters())
    assert difference(layers, leaves, x, anchors=4) <= 1e-4


def test_values_that_are_nan_already_are_not_the_fault_of_rebuilding() -> None:
    x = torch.full((1, 1, 2, 2), math.nan)
    layer = Scale()
    loss_of(ReversibleSequential(layer)(x)).backward()
    assert layer.log_scale.grad.isnan()


def test_a_batch_of_zeros_has_no_scale_and_is_trusted() -> None:
    loss_of(ReversibleSequential(*layers_in_turn(9, dtype=torch.float32))(torch.zeros(2, 2, 3, 3), torch.ones(2, 2)))


def test_within_a_graph_capture_distrust_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """There nothing can be raised. The CPU stands in for a capturing GPU."""
    monkeypatch.setattr("inverse_flow.reversible.rebuild.is_capturing", lambda device: True)
    for layer, wanted in ((Scale(), False), (NotQuiteItsInverse(), True)):
        loss_of(ReversibleSequential(layer)(torch.randn(2, 1, 2, 2))).backward()
        assert bool(layer.log_scale.grad.isnan()) is wanted


@pytest.mark.parametrize("accumulated", [False, True])
def test_reconstruction_errors(accumulated: bool) -> None:
    chain = ReversibleSequential(Scale(), Compose(Scale(), NotQuiteItsInverse()), Dropping(), Scale())
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    errors = reconstruction_errors(chain, torch.randn(2, 1, 8, 8), accumulated=accumulated)
    assert list(errors) == ["layers.0", "layers.1.layers.0", "layers.1.layers.1", "layers.2", "layers.3"]
    bad = {"layers.1.layers.1"} | ({"layers.0", "layers.1.layers.0"} if accumulated else set())
    assert {path for path, error in errors.items() if error > 1e-4} == bad
    assert max(error for path, error in errors.items() if path not in bad) < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in chain.state_dict().items())
    assert all(parameter.grad is None for parameter in chain.parameters())


# What else may happen to a layer.


class Dropping(nn.Module):
    """Draws random numbers: z = x + dropout(w)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + nn.functional.dropout(self.weight), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z - nn.functional.dropout(self.weight), z.new_zeros(len(z))


class DropoutNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("inverse", [False, True])
def test_layers_that_draw_random_numbers(inverse: bool) -> None:
    layers = [
        AffineCoupling(4, conditioner=DropoutNet()),
        Permute([3, 2, 1, 0]),
        Dropping(),
        AffineCoupling(4, conditioner=DropoutNet()),
    ]
    leaves = list(nn.ModuleList(layers).parameters())
    x = torch.randn(2, 4, 8, 8)
    found, states = [], []
    for chain in (ReversibleSequential(*layers), Compose(*layers)):
        torch.manual_seed(3)
        found.append(gradients(chain.inverse if inverse else chain, leaves, x))
        states.append(torch.get_rng_state())
    assert largest_difference(*found) <= 1e-5
    assert torch.equal(*states)


def test_only_layers_that_draw_keep_a_generator_state() -> None:
    chain = ReversibleSequential(Scale(), Dropping(), Scale(), Dropping())
    z, _ = chain(torch.randn(1, 1, 8, 8))
    assert [z.grad_fn.chain.replay.draws(i) for i in range(4)] == [False, True, False, True]


def test_hooks_of_layers_and_containers_see_them_run() -> None:
    inner = AffineCoupling(4, 3)
    outer = Compose(ActNorm(4), Conv1x1(4))
    seen: list[str] = []
    inner.register_forward_hook(lambda *_: seen.append("inner forward"))
    inner.register_full_backward_hook(lambda *_: seen.append("inner backward"))
    outer.register_forward_pre_hook(lambda *_: seen.append("outer forward"))
    layers = nn.ModuleList([inner, outer]).eval()
    x = torch.randn(2, 4, 2, 2, requires_grad=True)
    leaves = [x, *layers.parameters()]
    found = gradients(ReversibleSequential(*layers), leaves, x)
    # The hook before the outer one's forward pass runs before its inverse too, by which its input is rebuilt.
    forward, backward = ["inner forward", "outer forward"], ["outer forward", "outer forward", "inner forward"]
    assert seen == [*forward, *backward, "inner backward"]
    assert largest_difference(found, gradients(Compose(*layers), leaves, x)) <= 1e-5


def test_a_hook_that_changes_a_result_is_noticed() -> None:
    layer = Scale()
    layer.register_forward_hook(lambda module, arguments, result: (2 * result[0], result[1]))
    with pytest.raises(ReconstructionError):
        loss_of(ReversibleSequential(layer)(torch.randn(2, 1, 2, 2))).backward()


def test_hooks_of_parameters_run_once() -> None:
    layers = layers_in_turn(9)
    x, context = images()
    wanted = gradients(Compose(*layers), list(layers.parameters()), x, context)
    calls = []
    for parameter in layers.parameters():
        parameter.register_hook(lambda grad: calls.append(1) or 2 * grad)
    for create_graph in (False, True):
        calls.clear()
        loss = loss_of(ReversibleSequential(*layers)(x, context))
        found = torch.autograd.grad(loss, list(layers.parameters()), create_graph=create_graph)
        assert largest_difference(found, [2 * grad for grad in wanted]) <= 1e-12
        assert len(calls) == len(found)


def test_backward_accumulates_like_grad() -> None:
    layers = layers_in_turn(9)
    x, context = images()
    leaves = [x, context, *layers.parameters()]
    wanted = gradients(Compose(*layers), leaves, x, context)
    for _ in range(2):
        loss_of(ReversibleSequential(*layers)(x, context)).backward()
    assert largest_difference([leaf.grad / 2 for leaf in leaves], wanted) <= 1e-12


def test_frozen_parameters() -> None:
    layers = layers_in_turn(18)
    frozen = [parameter for i, parameter in enumerate(layers.parameters()) if i % 2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    x, context = images()
    leaves = [x, *(parameter for parameter in layers.parameters() if parameter.requires_grad)]
    assert difference(layers, leaves, x, context) <= 1e-12
    loss_of(ReversibleSequential(*layers)(x, context)).backward()
    assert all(parameter.grad is None for parameter in frozen)


def test_nothing_to_train_gives_no_graph() -> None:
    layers = layers_in_turn(9).requires_grad_(False)
    x, context = (tensor.detach() for tensor in images())
    assert not ReversibleSequential(*layers)(x, context)[0].requires_grad
    with torch.no_grad():
        assert not ReversibleSequential(*layers_in_turn(9))(x, context)[0].requires_grad


def test_shared_parameters_and_a_layer_used_twice() -> None:
    coupling, twin, scale = AffineCoupling(4, 3).double(), AdditiveCoupling(4, 3).double(), Scale().double()
    twin.conditioner.layers[0] = coupling.conditioner.layers[0]
    layers = [coupling, scale, twin, coupling, scale]
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    leaves = list(nn.ModuleList(layers).parameters())
    with torch.no_grad():
        for parameter in leaves:
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert difference(layers, leaves, x) <= 1e-12


def test_a_second_backward_pass_needs_retain_graph() -> None:
    layers = layers_in_turn(9)
    x, context = images()
    loss = loss_of(ReversibleSequential(*layers)(x, context))
    leaves = list(layers.parameters())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert largest_difference(torch.autograd.grad(loss, leaves), first) == 0
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_parameters_changed_since_the_forward_pass_are_refused() -> None:
    chain = ReversibleSequential(Scale())
    loss = loss_of(chain(torch.randn(2, 1, 2, 2)))
    with torch.no_grad():
        chain.layers[0].shift.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_first_batch_initialises_actnorm() -> None:
    chains = [kind(ActNorm(3), Conv1x1(3), ActNorm(3)) for kind in (Compose, ReversibleSequential)]
    chains[1].load_state_dict(chains[0].state_dict())
    x = 3 + 2 * torch.randn(8, 3, 4, 4)
    found = []
    for chain in chains:
        found.append(gradients(chain, list(chain.parameters()), x))
        assert bool(chain.layers[2].initialized)
    assert largest_difference(found[1], found[0]) <= 1e-4
    assert all(torch.equal(a, b) for a, b in zip(chains[0].parameters(), chains[1].parameters(), strict=True))


class NormalisingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("training", [False, True])
def test_modes_are_those_of_the_forward_pass_and_statistics_are_updated_once(training: bool) -> None:
    coupling = AffineCoupling(4, conditioner=NormalisingNet())
    twin = copy.deepcopy(coupling)
    x = torch.randn(4, 4, 3, 3)
    found = []
    for layer, kind in ((coupling, ReversibleSequential), (twin, Compose)):
        chain = kind(layer).train(training)
        loss = loss_of(chain(x))
        chain.train(not training)
        found.append(torch.autograd.grad(loss, list(chain.parameters())))
        assert chain.layers[0].conditioner.layers[1].training is not training
    assert largest_difference(*found) <= 1e-5
    for mine, wanted in zip(coupling.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, wanted)


def test_the_callers_tensors_stay_as_they_are() -> None:
    layers = layers_in_turn(18)
    chain = ReversibleSequential(*layers, anchors=4)
    x, context = images()
    kept = [x, context, *chain.parameters(), *chain.buffers()]
    identities = [id(tensor) for tensor in kept]
    before = [tensor.detach().clone() for tensor in kept]
    z, logdet = chain(x, context)
    outputs = [z.detach().clone(), logdet.detach().clone()]
    loss_of((z, logdet)).backward()
    assert all(torch.equal(now, then) for now, then in zip(kept, before, strict=True))
    assert all(torch.equal(now, then) for now, then in zip((z, logdet), outputs, strict=True))
    assert [id(tensor) for tensor in (x, context, *chain.parameters(), *chain.buffers())] == identities


def test_parameters_put_in_place_by_functional_call() -> None:
    layers = layers_in_turn(9)
    chain = ReversibleSequential(*layers)
    x, context = images()
    others = {name: (value + 0.1).detach().requires_grad_() for name, value in chain.named_parameters()}
    found = torch.autograd.grad(loss_of(torch.func.functional_call(chain, others, (x, context))), [*others.values()])
    twin = Compose(*copy.deepcopy(layers))
    twin.load_state_dict(others, strict=False)
    wanted = gradients(twin, list(twin.parameters()), x, context)
    assert largest_difference(found, wanted) <= 1e-12


def test_function_transforms_take_the_stored_path() -> None:
    layers = layers_in_turn(9)
    x, context = (tensor.detach() for tensor in images())
    found = torch.func.grad(lambda x: loss_of(ReversibleSequential(*layers)(x, context)))(x)
    wanted = torch.func.grad(lambda x: loss_of(Compose(*layers)(x, context)))(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_leaf_that_is_no_parameter_gets_its_gradient_by_backward() -> None:
    class Outside(Scale):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return x + outside, x.new_zeros(len(x))

        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return z - outside, z.new_zeros(len(z))

    outside = torch.ones(2, requires_grad=True)
    x = torch.randn(2, 1, 2, 2)
    grads = []
    for kind in (ReversibleSequential, Compose):
        outside.grad = None
        loss_of(kind(Scale(), Outside())(x)).backward()
        grads.append(outside.grad)
    torch.testing.assert_close(*grads)


class OverridesForward(ActNorm):
    """Inherits a closed form that is no longer its own."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x)
        return 2 * z, logdet + x[0].numel() * math.log(2.0)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = super().inverse(z / 2)
        return x, logdet - z[0].numel() * math.log(2.0)


def test_a_closed_form_is_not_inherited_past_an_override() -> None:
    replaced = ActNorm(2)
    forward, inverse = replaced.forward, replaced.inverse
    replaced.forward = lambda x, context=None: forward(2 * x)
    replaced.inverse = lambda z, context=None: (inverse(z)[0] / 2, inverse(z)[1])
    for layer in (OverridesForward(2), replaced):
        layer.eval()
        x = torch.randn(2, 2, 3, 3, requires_grad=True)
        leaves = [x, *layer.parameters()]
        assert difference([layer], leaves, x) <= 1e-5


class Doubling(Compose):
    """Inherits the list of its layers, and does something else with them."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(2 * x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = super().inverse(z, context)
        return x / 2, logdet


def test_a_container_that_runs_otherwise_is_not_taken_apart() -> None:
    layer = Doubling(Scale(), Scale())
    x = torch.randn(2, 2, 3, 3, requires_grad=True)
    found = gradients(ReversibleSequential(layer), [x, *layer.parameters()], x)
    assert largest_difference(found, gradients(layer, [x, *layer.parameters()], x)) <= 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_blocks(whole: bool) -> None:
    """A conditioner, or a whole block, through torch.compile; the backend changes nothing but what is traced."""
    traced: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    block = Compose(ActNorm(4), AffineCoupling(4, 3))
    block(torch.randn(2, 4, 3, 3))  # initialised: a layer that learns later that it is not is traced once more
    block.eval()
    wanted_chain = Compose(copy.deepcopy(block), Permute([3, 2, 1, 0]))
    if whole:
        chain = ReversibleSequential(torch.compile(block, backend=backend), Permute([3, 2, 1, 0]))
    else:
        block.layers[1].conditioner = torch.compile(block.layers[1].conditioner, backend=backend)
        chain = ReversibleSequential(block, Permute([3, 2, 1, 0]))
    x = torch.randn(2, 4, 3, 3)
    found = gradients(chain, list(chain.parameters()), x)
    assert traced
    assert largest_difference(found, gradients(wanted_chain, list(wanted_chain.parameters()), x)) <= 1e-5
    graphs = len(traced)
    gradients(chain, list(chain.parameters()), x)
    assert len(traced) == graphs


def train_in_process(rank: int, folder: str) -> None:
    """One of two processes: the gradient of its half of the batch, averaged by DistributedDataParallel."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        chain = ReversibleSequential(*layers_in_turn(9)).double()
        parallel = nn.parallel.DistributedDataParallel(chain)
        x, context = (tensor.detach() for tensor in images())
        z, logdet = parallel(x[rank : rank + 1], context[rank : rank + 1])
        (z.square().sum() + logdet.sum()).backward()
        torch.save([parameter.grad for parameter in chain.parameters()], f"{folder}/{rank}.pt")
        dist.barrier()  # PyTorch may hang when a group ends while its thread still clears up after a reduction
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_in_process, (str(tmp_path),), nprocs=2)
    chain = Compose(*layers_in_turn(9)).double()
    z, logdet = chain(*images())
    wanted = torch.autograd.grad((z.square().sum() + logdet.sum()) / 2, list(chain.parameters()))
    for rank in range(2):
        assert largest_difference(torch.load(tmp_path / f"{rank}.pt"), wanted) <= 1e-9


# What is refused.


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="modules with an inverse, got ReLU"):
        ReversibleSequential(nn.ReLU())
    with pytest.raises(TypeError, match="put it into a Flow"):
        ReversibleSequential(Split(4))
    with pytest.raises(ValueError, match="anchors must be at least 1, got 0"):
        ReversibleSequential(Scale(), anchors=0)
    with pytest.raises(ValueError, match="must be above 0, got -1"):
        ReversibleSequential(Scale(), tolerance=-1)
    with pytest.raises(TypeError, match="context must be a tensor or None, got list"):
        ReversibleSequential(Scale())(torch.zeros(1, 1, 2, 2), [1.0])
    with pytest.raises(TypeError, match=r"layers\.0: .* Pair gave tuple"):
        ReversibleSequential(Pair())(torch.zeros(1, 2, 2, 2, requires_grad=True))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_layer_without_a_log_determinant_is_named(batch: int) -> None:
    x = torch.randn(batch, 1, 2, 2)
    for chain in (Compose(Scale(), Alone()), ReversibleSequential(Scale(), Alone())):
        for run in (chain, chain.inverse):
            with pytest.raises(TypeError, match=r"layers\.1: a layer gives .* log-determinant, Alone gave Tensor"):
                run(x)


class Alone(nn.Identity):
    """Gives its result alone, in both directions."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x

    inverse = forward


class Pair(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        return x.chunk(2, dim=1), x.new_zeros(len(x))


def test_shapes_go_through() -> None:
    chain = ReversibleSequential(Squeeze(), Scale(), Squeeze())
    assert chain.output_shape((1, 8, 4)) == (16, 2, 1)
    assert chain.input_shape((16, 2, 1)) == (1, 8, 4)
    assert "anchors=None" in repr(chain)
