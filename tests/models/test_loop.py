"""The unrolled loop: its inverse, its gradients, and memory that does not grow with the number of steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.models import LoopNetwork


def blur(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1)


class Learned(nn.Module):
    """An operator with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 1, 3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Solve(nn.Module):
    """An inverse convolution as the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = InverseConv2d(1, corner="plu", bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def linked(x: Tensor) -> Tensor:
    """The blur of an image that a link function keeps between 0 and 1."""
    return blur(x.sigmoid())


OPERATORS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "function": lambda: blur,
    "linked": lambda: linked,
    "learned": Learned,
    "solve": Solve,
}
operators = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)


def network(steps: int = 3, **options: object) -> LoopNetwork:
    """In float64 with nothing left at its initial value."""
    loop = LoopNetwork(1, 3, 4, steps, **options).double()
    with torch.no_grad():
        for parameter in loop.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return loop.eval()


def inputs(operator: Callable[[Tensor], Tensor], side: int = 6) -> list[Tensor]:
    eta, state = (torch.randn(2, channels, side, side, dtype=torch.float64) for channels in (1, 3))
    with torch.no_grad():
        return [eta, state, operator(torch.randn_like(eta))]


@pytest.mark.parametrize("operator", [blur, linked])
def test_a_step_is_that_of_the_paper(operator: Callable[[Tensor], Tensor]) -> None:
    """s gets the gradient Aᵀ(A η − d) in its first channel, then the coupling runs."""
    loop = network(steps=1)
    eta, state, data = inputs(operator)
    leaf = eta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * (operator(leaf) - data).square().sum(), leaf)
    stepped = state.clone()
    stepped[:, :1] += loop.norms[0](gradient)[0]
    expected, _ = loop.layers[0](torch.cat((eta, stepped), dim=1))
    found = loop(eta, state, data, operator)
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


@operators
@pytest.mark.parametrize("memory_efficient", [True, False])
def test_the_inverse_finds_the_start(make: Callable, memory_efficient: bool) -> None:
    loop, operator = network(memory_efficient=memory_efficient), make()
    eta, state, data = inputs(operator)
    last = loop(eta, state, data, operator)
    torch.testing.assert_close(loop.inverse(*last, data, operator), (eta, state))


@operators
@pytest.mark.parametrize("inverse", [False, True])
def test_rebuilding_gives_the_same_gradients(make: Callable, inverse: bool) -> None:
    """In η, s, d, the network's parameters and the operator's."""
    loop, operator = network(), make()
    given = inputs(operator)
    of_operator = list(operator.parameters()) if isinstance(operator, nn.Module) else []
    found = []
    for loop.memory_efficient in (True, False):
        leaves = [value.clone().requires_grad_() for value in given] + [*loop.parameters(), *of_operator]
        eta, state = (loop.inverse if inverse else loop)(*leaves[:3], operator)
        found.append(torch.autograd.grad(eta.square().sum() + state.sin().sum(), leaves))
    torch.testing.assert_close(*found)


def test_the_gradients_are_those_of_differences() -> None:
    """Where Aᵀ depends on η too."""
    loop = network(steps=2)
    given = [value[:1].requires_grad_() for value in inputs(linked, side=4)]
    assert torch.autograd.gradcheck(lambda *given: loop(*given, linked), given)


@operators
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(make: Callable, mode: Callable) -> None:
    loop, operator = network(), make()
    given = inputs(operator)
    expected = loop(*given, operator)
    with mode():
        found = loop(*(value.clone() for value in given), operator)
    assert not any(value.requires_grad for value in found)
    torch.testing.assert_close(found, expected)


class Box:
    """What a graph holds in place of a tensor that it keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept(steps: int, memory_efficient: bool) -> int:
    """How many values the graph of the result keeps in tensors as large as an image or larger."""
    loop = network(steps, memory_efficient=memory_efficient)
    given = [value.requires_grad_() for value in inputs(blur, side=16)]
    boxes: weakref.WeakSet[Box] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Box:
        box = Box(tensor)
        boxes.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        result = loop(*given, blur)
    assert result[0].requires_grad
    # Graphs on the way to a gradient are gone again, and their boxes with them.
    alive = {box.tensor.untyped_storage().data_ptr(): box.tensor.numel() for box in boxes}
    return sum(size for size in alive.values() if size >= 2 * 16 * 16)


def test_memory_does_not_grow_with_the_steps() -> None:
    assert kept(8, True) == kept(2, True)
    assert kept(8, False) > 3 * kept(2, False)


@pytest.mark.parametrize("operator", [blur, linked])
def test_under_transforms_of_functions(operator: Callable[[Tensor], Tensor]) -> None:
    loop, (eta, state, data) = network(2), inputs(operator)
    change = torch.randn_like(eta)

    def run(x: Tensor, s: Tensor, d: Tensor) -> Tensor:
        return loop(x, s, d, operator)[1]

    alone = torch.vmap(lambda *given: run(*(one[None] for one in given))[0])(eta, state, data)
    torch.testing.assert_close(alone, run(eta, state, data))
    _, forwards = torch.func.jvp(lambda x: run(x, state, data), (eta,), (change,))
    step = 1e-6
    differences = (run(eta + step * change, state, data) - run(eta - step * change, state, data)) / (2 * step)
    torch.testing.assert_close(forwards, differences, rtol=1e-5, atol=1e-6)
    backwards = torch.func.grad(lambda x: (run(x, state, data) * state).sum())(eta)
    torch.testing.assert_close((backwards * change).sum(), (forwards * state).sum())


@pytest.mark.parametrize("dimensions", [0, 1, 3])
def test_other_dimensions(dimensions: int) -> None:
    loop = LoopNetwork(2, 3, 4, 2, dimensions=dimensions)
    eta, state, data = (torch.randn(2, channels, *(4,) * dimensions) for channels in (2, 3, 2))
    last = loop(eta, state, data, nn.Identity())  # the first call sets the norms
    eta_again, state_again = loop.inverse(*last, data, nn.Identity())
    torch.testing.assert_close((eta_again, state_again), (eta, state), rtol=1e-4, atol=1e-4)


def test_learns_to_deblur() -> None:
    """A small part of the error of zeros, where it starts, on fresh images."""
    loop = LoopNetwork(1, 3, 8, 3)
    optimizer = torch.optim.Adam(loop.parameters(), 1e-2)

    def error(batch: int) -> Tensor:
        truth = torch.randn(batch, 1, 8, 8).cumsum(2).cumsum(3) / 8
        zeros = torch.zeros_like(truth)
        estimate, _ = loop(zeros, zeros.expand(-1, 3, -1, -1), blur(truth), blur)
        return (estimate - truth).square().mean() / truth.square().mean()

    for _ in range(30):
        loss = error(16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert error(64) < 0.3


@pytest.mark.parametrize("rebuilt", [False, True])
def test_under_autocast_the_operator_keeps_its_digits(rebuilt: bool) -> None:
    torch.manual_seed(0)
    loop, weight = LoopNetwork(2, 2, 4, 1, dimensions=0, memory_efficient=rebuilt).eval(), torch.randn(2, 5)
    eta, state = torch.randn(8, 2, requires_grad=True), torch.randn(8, 2)
    data = (eta @ weight).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = loop(eta, state, data, lambda x: x @ weight)
        vmapped = torch.func.vmap(lambda *one: loop(*(part[None] for part in one), lambda x: x @ weight))(
            eta, state, data
        )
    # Where A η = d the gradient is 0, and an untrained layer is the identity.
    for result, per_example, before in zip(found, vmapped, (eta, state), strict=True):
        torch.testing.assert_close(result, before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(per_example[:, 0], before, rtol=1e-5, atol=1e-5)
    found[1].sum().backward()
    expected = torch.autograd.grad(((eta @ weight - data) @ weight.T).sum(), eta)[0]
    torch.testing.assert_close(eta.grad, expected, rtol=1e-5, atol=1e-5)


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="state_channels must be at least 2, got 1"):
        LoopNetwork(2, 1)
    loop = network()
    eta, state, data = inputs(blur)
    with pytest.raises(TypeError, match=r"state must be torch\.float64 as eta is, got torch\.float32"):
        loop(eta, state.float(), data, blur)
    with pytest.raises(TypeError, match=r"LoopNetwork expects floating-point images, got torch\.int64"):
        loop(eta.long(), state, data, blur)
    with pytest.raises(TypeError, match=r"the operator makes torch\.float64 of eta, and the data are torch\.float32"):
        loop(eta, state, data.float(), blur)
    with pytest.raises(ValueError, match=r"state must be \(2, 3, 6, 6\), got \(2, 2, 6, 6\)"):
        loop(eta, state[:, :2], data, blur)
    with pytest.raises(
        ValueError, match=r"makes \(2, 1, 4, 4\) of eta \(2, 1, 6, 6\), and the data are \(2, 1, 6, 6\)"
    ):
        loop(eta, state, eta, blur)
    with pytest.raises(ValueError, match=r"eta must be \(B, 1, …\), got \(\)"):
        loop(eta[0, 0, 0, 0], state, data, blur)
    with pytest.raises(TypeError, match="LoopNetwork expects a tensor, got NoneType"):
        loop(eta, state, None, blur)
    with pytest.raises(TypeError, match="the operator is a function of eta, got NoneType"):
        loop(eta, state, data, None)
    with pytest.raises(TypeError, match="the operator makes a tensor of eta, got list"):
        loop(eta, state, data, lambda x: [x])
    with pytest.raises(ValueError, match="of eta what autograd cannot follow"):
        loop(eta, state, data, lambda x: blur(x.detach()))
    weight = Learned().weight
    with pytest.raises(ValueError, match="the operator is a function with tensors that need gradients"):
        loop(eta, state, data.expand(-1, 2, -1, -1), lambda x: F.conv2d(x, weight))
