"""Models of vectors, signals and volumes: they train, invert, and their log-determinant is that of the Jacobian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inverse_flow import InverseConv1d, InverseConv3d
from inverse_flow.flows import prepare_sampling
from inverse_flow.models import KINDS, ImageFlow, build, describe

VECTORS, SIGNALS, VOLUMES = (6,), (2, 32), (1, 8, 8, 8)
KIND = pytest.mark.parametrize("kind", KINDS)


def model(kind: str, shape: tuple[int, ...], **options: object) -> ImageFlow:
    options = {"levels": 2, "steps": 1, "hidden": 4} | options
    if len(shape) == 1:  # without axes there are no orders and no checkerboards
        options = {"inverse_conv": "none", "masks": "channel"} | options
    return KINDS[kind](shape, **options)


def data(shape: tuple[int, ...], batch: int = 8) -> Tensor:
    """Smooth, or of vectors dependent, so that there is something to learn."""
    x = torch.randn(batch, *shape)
    if len(shape) == 1:
        x[:, 1:] = x[:, :1] * 3 + 0.1 * x[:, 1:]
    for axis in range(2, x.dim()):
        x = x.cumsum(axis) / math.sqrt(shape[axis - 1])
    return x


@KIND
@pytest.mark.parametrize("shape", [VECTORS, SIGNALS, VOLUMES], ids=["vectors", "signals", "volumes"])
def test_a_model_trains(kind: str, shape: tuple[int, ...]) -> None:
    flow = model(kind, shape)
    # A vector has few values, and so little to gain in a step.
    vectors = len(shape) == 1
    optimizer = torch.optim.Adam(flow.parameters(), 2e-2 if vectors else 3e-3)
    x = data(shape, 64 if vectors else 8)
    losses = []
    for _ in range(20 if vectors else 8):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    latents, log_det = flow.eval()(x)
    again, minus_log_det = flow.inverse(latents)
    torch.testing.assert_close(again, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(minus_log_det, -log_det, rtol=1e-4, atol=1e-3)
    assert flow.sample(3).shape == (3, *shape)
    with torch.no_grad():
        prepared = prepare_sampling(flow).inverse(latents)[0]
    torch.testing.assert_close(prepared, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inverse_conv", ["emerging", "periodic", "exponential", "woodbury"])
@pytest.mark.parametrize("shape", [(2, 8), (1, 4, 4, 4)], ids=["signals", "volumes"])
def test_other_convolutions_of_signals_and_volumes(inverse_conv: str, shape: tuple[int, ...]) -> None:
    flow = model("Glow", shape, inverse_conv=inverse_conv).double()
    x = data(shape).double()
    latents, log_det = flow(x)
    again, minus_log_det = flow.inverse(latents)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(minus_log_det, -log_det)


@KIND
@pytest.mark.parametrize("shape", [(5,), (2, 8), (1, 2, 4, 2)], ids=["vectors", "signals", "volumes"])
def test_the_log_determinant_is_that_of_the_jacobian(kind: str, shape: tuple[int, ...]) -> None:
    flow = model(kind, shape, levels=2 if len(shape) == 1 else 1).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    flow.eval()
    x = torch.randn(1, *shape, dtype=torch.float64)

    def latents(x: Tensor) -> Tensor:
        return torch.cat([z.flatten() for z in flow(x[None])[0]])

    jacobian = torch.autograd.functional.jacobian(latents, x[0]).reshape(x.numel(), x.numel())
    torch.testing.assert_close(flow(x)[1][0], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize(("shape", "layer", "orders"), [(SIGNALS, InverseConv1d, 2), (VOLUMES, InverseConv3d, 8)])
def test_the_inverse_convolution_is_of_the_dimension(
    shape: tuple[int, ...], layer: type[torch.nn.Module], orders: int
) -> None:
    flow = model("InverseFlow", shape, kernel_size=(3,) * (len(shape) - 1))
    found = [module for module in flow.modules() if isinstance(module, layer)]
    assert len(found) == 2
    assert all(len(set(module.order)) == module.groups == orders for module in found)
    alternating = model("InverseFlow", shape, orders="alternating", steps=orders, levels=1)
    assert len({module.order for module in alternating.modules() if isinstance(module, layer)}) == orders
    assert build(describe(flow)).config == flow.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inverse_conv": "training"}, 'a vector has no axes .*: inverse_conv must be "none", got "training"'),
        ({"masks": "checkerboard"}, 'masks must be "channel", got "checkerboard"'),
        ({"levels": 4}, "4 levels leave 1 of 6 in the last"),
    ],
)
def test_what_needs_axes_is_refused_for_vectors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model("Glow", VECTORS, **options)


@KIND
def test_a_flow_of_vectors_has_the_options_of_the_others(kind: str) -> None:
    flow = model(kind, VECTORS, coupling="spline", activation="spline", conditioner="resnet", context_channels=3)
    assert build(describe(flow)).config == flow.config
    x, context = data(VECTORS), torch.randn(8, 3)
    flow.log_prob(x, context).sum().backward()
    samples, log_prob = flow.sample_and_log_prob(8, context)
    torch.testing.assert_close(flow.log_prob(samples, context), log_prob, rtol=1e-4, atol=1e-3)


def test_a_bound_on_row_sums_reaches_every_inverse_convolution() -> None:
    flow = model("InverseFlow", SIGNALS, max_row_sum=0.5)
    found = [module for module in flow.modules() if isinstance(module, InverseConv1d)]
    assert [module.max_row_sum for module in found] == [0.5, 0.5]


@pytest.mark.parametrize(("kind", "shape"), [("InverseFlow", SIGNALS), ("Hint", VECTORS)])
def test_memory_efficient_training_gives_the_same_gradients(kind: str, shape: tuple[int, ...]) -> None:
    flow, x = model(kind, shape), data(shape)
    flow.log_prob(x)  # initialises
    found = []
    for memory_efficient in (False, True):
        flow.memory_efficient = memory_efficient
        found.append(torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters())))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
