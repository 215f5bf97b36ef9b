import math

import pytest
import torch
from torch import nn

from inverse_flow.flows import ActNorm, Flow, Squeeze
from inverse_flow.training import bits_per_dim, dequantize, evaluate
from inverse_flow.training.metrics import bound_of, log_probs, standard_error

from .toy import LogisticBase, UniformBase


def scaled_flow(base: nn.Module, scale: float, shift: float) -> Flow:
    """z = (x − shift) · scale, seen by ``base``."""
    flow = Flow([ActNorm(1)], (1, 2, 2), base=base).double()
    with torch.no_grad():
        flow.layers[0].log_scale.fill_(math.log(scale))
        flow.layers[0].bias.fill_(-shift)
        flow.layers[0].initialized.fill_(True)
    return flow


@pytest.mark.parametrize("bit_depth", [1, 5, 8])
def test_a_uniform_model_needs_exactly_the_bit_depth(bit_depth: int) -> None:
    images = torch.randint(0, 256, (7, 1, 4, 4), dtype=torch.uint8)
    flow = Flow([Squeeze(), ActNorm(4)], (1, 4, 4), base=UniformBase()).eval()
    assert evaluate(flow, images, bit_depth) == pytest.approx(bit_depth, abs=1e-12)


def test_a_logistic_model_has_the_bits_of_its_distribution_function() -> None:
    """For a logistic that is wide against a cell, −log₂ of the cell's mass, which is known in closed form."""
    scale, shift, value = 12.0, 0.4, 100
    flow = scaled_flow(LogisticBase(), scale, shift)
    images = torch.full((2000, 1, 2, 2), value, dtype=torch.uint8)
    lower, upper = (1 / (1 + math.exp(-(edge / 256 - shift) * scale)) for edge in (value, value + 1))
    assert evaluate(flow, images) == pytest.approx(-math.log2(upper - lower), abs=1e-4)


def test_the_bits_of_a_gaussian_are_its_entropy_plus_the_bit_depth() -> None:
    std, dims = 0.1, 12
    x = 0.5 + std * torch.randn(5000, dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_prob = torch.distributions.Normal(0.5, std).log_prob(x).sum(1)
    expected = 0.5 * math.log2(2 * math.pi * math.e * std**2) + 8
    assert bits_per_dim(log_prob, (3, 2, 2)).mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("bit_depth", [1, 3, 8])
def test_dequantized_images_stay_in_their_cells(bit_depth: int) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(50).view(50, 1, 16, 16)
    x = dequantize(images, bit_depth, torch.Generator().manual_seed(0))
    levels = 2**bit_depth
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() < 1
    cells = (images.long() * levels) // 256
    assert ((x * levels).floor().long() - cells).abs().max() == 0
    assert abs(((x * levels) - cells).mean().item() - 0.5) < 0.02


def test_the_noise_that_rounds_up_stays_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, generator=None: torch.full(shape, 1 - 2**-24))
    assert dequantize(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item() < 1


def test_floats_are_not_dequantized_twice() -> None:
    with pytest.raises(TypeError, match=r"uint8 images, got torch.float32"):
        dequantize(torch.rand(1, 1, 2, 2))


def test_evaluation_repeats_and_leaves_the_mode_alone() -> None:
    images = torch.randint(0, 256, (30, 1, 2, 2), dtype=torch.uint8)
    flow = scaled_flow(LogisticBase(), 3.0, 0.5)
    flow.train()
    first = evaluate(flow, images)
    assert evaluate(flow, images) == first
    assert evaluate(flow, images, batch_size=30) == pytest.approx(evaluate(flow, images, batch_size=7), abs=0.02)
    assert flow.training


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        evaluate(scaled_flow(LogisticBase(), 1.0, 0.0), torch.zeros(0, 1, 2, 2, dtype=torch.uint8))


def test_many_draws_come_to_the_bits_of_the_distribution_function() -> None:
    """For a logistic that is narrow against a cell one draw is far above them; k draws fall towards them."""
    scale, shift, value, bit_depth = 20.0, 0.45, 1, 2
    flow = scaled_flow(LogisticBase(), scale, shift)
    images = torch.full((300, 1, 2, 2), value * 64, dtype=torch.uint8)
    lower, upper = (1 / (1 + math.exp(-(edge / 4 - shift) * scale)) for edge in (value, value + 1))
    exact = -math.log2(upper - lower)

    def bits(samples: int) -> float:
        found = bound_of(log_probs(flow, images, bit_depth, draw=draw) for draw in range(samples))
        return bits_per_dim(found, (1, 2, 2), bit_depth).mean().item()

    assert bits(1) == pytest.approx(evaluate(flow, images, bit_depth))
    assert bits(1) > bits(5) > bits(200) > exact - 5e-3
    assert bits(1) - exact > 0.2
    assert bits(200) == pytest.approx(exact, abs=0.01)


def test_every_draw_has_its_own_noise_and_repeats() -> None:
    flow, images = scaled_flow(LogisticBase(), 3.0, 0.5), torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    assert torch.equal(log_probs(flow, images, draw=1), log_probs(flow, images, draw=1))
    assert not torch.equal(log_probs(flow, images, draw=1), log_probs(flow, images, draw=2))


def test_the_standard_error_by_hand() -> None:
    assert standard_error(torch.tensor([1.0, 3.0, 5.0, 7.0])) == pytest.approx(math.sqrt(20 / 3) / 2)
    assert math.isnan(standard_error(torch.tensor([1.0])))
