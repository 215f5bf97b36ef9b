import math

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import ActNorm, AffineCoupling, Compose, Conv1x1, Flow, Reverse, Split, Squeeze


def two_scale_flow(context_channels: int = 0) -> Flow:
    torch.manual_seed(0)
    layers = [
        Squeeze(),
        Compose(ActNorm(4), Conv1x1(4), AffineCoupling(4, 6, context_channels=context_channels)),
        Split(4, context_channels=context_channels),
        Squeeze(),
        Compose(ActNorm(8), Conv1x1(8), AffineCoupling(8, 6, context_channels=context_channels)),
    ]
    flow = Flow(layers, (1, 4, 4)).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


def test_latents_of_every_scale() -> None:
    flow = two_scale_flow()
    latents, logdet = flow(torch.randn(3, 1, 4, 4, dtype=torch.float64))
    assert [tuple(z.shape) for z in latents] == [(3, 2, 2, 2), (3, 8, 1, 1)]
    assert flow.latent_shapes == ((2, 2, 2), (8, 1, 1))
    assert logdet.shape == (3,)


def test_log_prob_is_that_of_a_gaussian_for_a_linear_flow() -> None:
    """z = D x with one factor a channel is the density of N(0, D⁻²)."""
    flow = Flow([ActNorm(2)], (2, 1, 1)).double().eval()
    with torch.no_grad():
        flow.layers[0].log_scale.copy_(torch.tensor([0.5, -1.0]))
        flow.layers[0].bias.copy_(torch.tensor([1.0, 2.0]))
    x = torch.randn(5, 2, 1, 1, dtype=torch.float64)
    std = torch.tensor([math.exp(-0.5), math.exp(1.0)], dtype=torch.float64)
    mean = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std).log_prob(x.flatten(1)).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_sample_and_log_prob_agrees_with_log_prob() -> None:
    flow = two_scale_flow()
    for temperature in (1.0, 0.5):
        x, log_prob = flow.sample_and_log_prob(4, temperature=temperature)
        torch.testing.assert_close(log_prob, flow.log_prob(x))


def test_sample_and_log_prob_has_gradients_and_sample_has_none() -> None:
    flow = two_scale_flow()
    x, log_prob = flow.sample_and_log_prob(2)
    (x.sum() + log_prob.sum()).backward()
    assert all(p.grad is not None for p in flow.layers[1].layers[2].parameters())
    assert not flow.sample(2).requires_grad


def test_samples_have_the_models_density() -> None:
    """The mean of −log p over samples is the entropy, known here in closed form."""
    flow = Flow([ActNorm(1)], (1, 1, 1)).eval()
    with torch.no_grad():
        flow.layers[0].log_scale.fill_(-1.0)
    x = flow.sample(20000, generator=torch.Generator().manual_seed(0))
    entropy = 0.5 * math.log(2 * math.pi * math.e) + 1.0
    assert abs(-flow.log_prob(x).mean().item() - entropy) < 0.02


def test_temperature_scales_every_latent() -> None:
    flow = two_scale_flow()
    cold = flow.sample(2, temperature=0.0)
    torch.testing.assert_close(cold[0], cold[1])
    for latent in flow(cold)[0]:
        torch.testing.assert_close(latent, torch.zeros_like(latent), atol=1e-12, rtol=0)
    hot = flow.sample(500, temperature=2.0, generator=torch.Generator().manual_seed(0))
    for latent in flow(hot)[0]:
        assert abs(latent.std().item() - 2.0) < 0.1


def test_context_reaches_every_scale() -> None:
    flow = two_scale_flow(context_channels=3)
    context = torch.randn(2, 3, dtype=torch.float64)
    x, log_prob = flow.sample_and_log_prob(2, context)
    torch.testing.assert_close(log_prob, flow.log_prob(x, context))
    assert not torch.allclose(log_prob, flow.log_prob(x, context + 1))
    torch.testing.assert_close(flow.inverse(flow(x, context)[0], context)[0], x)


def test_empty_batches() -> None:
    flow = two_scale_flow()
    assert flow.log_prob(torch.zeros(0, 1, 4, 4, dtype=torch.float64)).shape == (0,)
    assert flow.sample(0).shape == (0, 1, 4, 4)


def test_a_base_of_your_own() -> None:
    class Uniform(nn.Module):
        def log_prob(self, latents: tuple[Tensor, ...], context: Tensor | None = None) -> Tensor:
            return latents[0].new_zeros(latents[0].shape[0])

        def sample(self, n: int, shapes: tuple, *_: object) -> tuple[Tensor, ...]:
            return tuple(torch.rand(n, *shape) for shape in shapes)

    flow = Flow([Squeeze()], (1, 2, 2), base=Uniform())
    assert torch.equal(flow.log_prob(torch.rand(3, 1, 2, 2)), torch.zeros(3))
    assert flow.sample(5).shape == (5, 1, 2, 2)


def test_reverse_exchanges_the_directions() -> None:
    layer = Conv1x1(3).double()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    for a, b in zip(Reverse(layer)(x), layer.inverse(x), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(Reverse(layer).inverse(x), layer(x), strict=True):
        assert torch.equal(a, b)


def test_latents_are_a_tuple_of_tensors_of_one_dtype() -> None:
    flow = Flow([ActNorm(4), Split(4, prior="standard"), ActNorm(2)], (4, 2)).eval()
    latents, _ = flow(torch.randn(2, 4, 2))
    torch.testing.assert_close(flow.inverse(list(latents))[0], flow.inverse(latents)[0])
    for wrong in (None, 3, latents[0], (latents[0], None), iter(latents)):
        with pytest.raises(TypeError, match=r"must be a tuple of tensors, \(B, 2, 2\), \(B, 2, 2\), got"):
            flow.inverse(wrong)
    for i in range(2):
        wrong = tuple(z.double() if i == j else z for j, z in enumerate(latents))
        with pytest.raises(TypeError, match=r"the latents must have one dtype, got \[torch\.float"):
            flow.inverse(wrong)


def test_errors_say_what_was_given() -> None:
    flow = two_scale_flow()
    double = {"dtype": torch.float64}
    with pytest.raises(ValueError, match=r"takes \(B, 1, 4, 4\), got \(2, 1, 4, 6\)"):
        flow(torch.zeros(2, 1, 4, 6, **double))
    with pytest.raises(ValueError, match=r"latents must be \(B, 2, 2, 2\), \(B, 8, 1, 1\), got \[\(1, 2, 2, 2\)\]"):
        flow.inverse([torch.zeros(1, 2, 2, 2, **double)])
    with pytest.raises(ValueError, match="latents must be"):
        flow.inverse([torch.zeros(1, 2, 2, 2, **double), torch.zeros(2, 8, 1, 1, **double)])
    with pytest.raises(ValueError, match="one row per example: 2, got 3"):
        flow(torch.zeros(2, 1, 4, 4, **double), torch.zeros(3, 1, **double))
    with pytest.raises(ValueError, match=r"temperature must be .* got -1"):
        flow.sample(1, temperature=-1.0)
    with pytest.raises(ValueError, match="at least 0, got -3"):
        flow.sample(-3)
    with pytest.raises(TypeError, match=r"Flow expects floating-point images, got torch.uint8"):
        flow(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="Flow expects a tensor, got list"):
        flow([[0.0]])
    with pytest.raises(TypeError, match="got ReLU"):
        Flow([nn.ReLU()], (1, 4, 4))
    with pytest.raises(TypeError, match="put it into a Flow"):
        Compose(Split(4))
    with pytest.raises(ValueError, match="divisible by 2, got 3 × 3"):
        Flow([Squeeze()], (1, 3, 3))
