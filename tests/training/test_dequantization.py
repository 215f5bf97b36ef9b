import math

import pytest
import torch
from torch import Tensor

from inverse_flow.flows import ActNorm, Flow
from inverse_flow.models import InverseFlow
from inverse_flow.training import TrainConfig, bits_per_dim, dequantize
from inverse_flow.training.dequantization import VariationalDequantization, attach
from inverse_flow.training.metrics import bound_of, log_probs

from .toy import LogisticBase, UniformBase


def layer(
    bit_depth: int = 3, spread: float = 0.1, shape: tuple[int, int, int] = (1, 4, 4)
) -> VariationalDequantization:
    """With weights that are not those of the start."""
    generator = torch.Generator().manual_seed(0)
    made = VariationalDequantization(shape, bit_depth, hidden=4)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(spread * torch.randn(weight.shape, generator=generator))
    return made


def noisy(count: int, bit_depth: int = 3, shape: tuple[int, int, int] = (1, 4, 4)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return dequantize(images, bit_depth, generator)


@pytest.mark.parametrize("bit_depth", [1, 3, 8])
def test_noise_moves_within_its_cell_and_back(bit_depth: int) -> None:
    x, warp = noisy(20, bit_depth), layer(bit_depth)
    moved, logdet = warp(x)
    levels = 2**bit_depth
    assert torch.equal((moved * levels).floor(), (x * levels).floor())
    assert (moved - x).abs().max() > 0.1 / levels
    back, opposite = warp.inverse(moved)
    assert (back - x).abs().max() * levels < 0.02
    torch.testing.assert_close(opposite, -logdet, rtol=1e-3, atol=1e-2)


def test_the_log_determinant_is_that_of_the_jacobian() -> None:
    x, warp = noisy(1).double(), layer(spread=0.1).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: warp(x)[0].flatten(), x).reshape(16, 16)
    torch.testing.assert_close(warp(x)[1][0], torch.linalg.slogdet(jacobian).logabsdet)
    z = warp(x)[0].detach()
    back = torch.autograd.functional.jacobian(lambda z: warp.inverse(z)[0].flatten(), z).reshape(16, 16)
    torch.testing.assert_close(warp.inverse(z)[1][0], torch.linalg.slogdet(back).logabsdet)


def test_it_starts_as_uniform_noise() -> None:
    moved, logdet = VariationalDequantization((1, 4, 4), 8)(noisy(500, 8))
    assert logdet.abs().max() < 0.01
    noise = (moved * 256).frac()
    assert abs(noise.mean() - 0.5) < 0.02
    assert abs(noise.std() - math.sqrt(1 / 12)) < 0.01


def test_a_uniform_model_needs_the_bit_depth_and_what_the_noise_falls_short_of_it() -> None:
    """Its density is 1 wherever the noise goes. So each draw weighs |∂g/∂u|, whose mean is the volume of the cell, 1:
    the bound is above the bit depth, and falls to it with the number of draws."""
    flow = Flow([layer(spread=0.1, shape=(1, 2, 2)), ActNorm(1)], (1, 2, 2), base=UniformBase()).eval()
    images = torch.randint(0, 256, (200, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = [log_probs(flow, images, 3, draw=draw) for draw in range(200)]
    bits = [bits_per_dim(bound_of(draws[:k]), (1, 2, 2), 3).mean().item() for k in (1, 10, 200)]
    assert bits[0] > bits[1] > bits[2]
    assert bits[0] > 3.01
    assert bits[2] == pytest.approx(3, abs=2e-3)


def test_learned_noise_closes_most_of_the_gap_of_uniform_noise() -> None:
    """A logistic that is narrow against a cell: −log₂ of the cell's mass is known, uniform noise is far above it."""
    torch.manual_seed(0)
    scale, shift, cell, bit_depth = 30.0, 0.55, 2, 2
    flow = Flow([ActNorm(1)], (1, 2, 2), base=LogisticBase()).eval().requires_grad_(False)
    flow.layers[0].log_scale.fill_(math.log(scale))
    flow.layers[0].bias.fill_(-shift)
    images = torch.full((64, 1, 2, 2), cell * 64, dtype=torch.uint8)
    lower, upper = (1 / (1 + math.exp(-(edge / 4 - shift) * scale)) for edge in (cell, cell + 1))
    exact = -math.log2(upper - lower)

    def bits() -> float:
        return float(bits_per_dim(log_probs(flow, images.repeat(20, 1, 1, 1), bit_depth).mean(), (1, 2, 2), bit_depth))

    uniform = bits()
    flow.layers.insert(0, VariationalDequantization((1, 2, 2), bit_depth, hidden=4))
    optimizer = torch.optim.Adam(flow.layers[0].parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        loss = -flow.log_prob(dequantize(images, bit_depth, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = bits()
    assert uniform - exact > 0.5
    assert -0.02 < learned - exact < 0.2 * (uniform - exact)


def test_it_is_put_in_front_once() -> None:
    model, config = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4), TrainConfig(dequantization="variational")
    attach(model, TrainConfig())
    assert not isinstance(model.layers[0], VariationalDequantization)
    attach(model, config)
    attach(model, config)
    assert [type(inner) is VariationalDequantization for inner in model.layers] == [True, False, False]
    assert model.log_prob(noisy(3, 8)).shape == (3,)
    samples = model.eval().sample(5)
    assert samples.shape == (5, 1, 4, 4)
