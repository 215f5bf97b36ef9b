import torch

from inverse_flow.flows import StandardNormal


def test_the_density_is_summed_over_all_the_latents() -> None:
    latents = [torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 1)]
    expected = sum(torch.distributions.Normal(0, 1).log_prob(z).flatten(1).sum(1) for z in latents)
    torch.testing.assert_close(StandardNormal().log_prob(latents), expected)


def test_half_precision_latents_are_summed_in_float32() -> None:
    value = StandardNormal().log_prob([torch.ones(1, 5000, dtype=torch.bfloat16)])
    assert value.dtype == torch.float32


def test_samples_follow_shape_dtype_temperature_and_generator() -> None:
    prior = StandardNormal().double()
    a, b = prior.sample(1000, [(2, 2), (3,)], None, 0.5, torch.Generator().manual_seed(0))
    assert a.shape == (1000, 2, 2)
    assert b.shape == (1000, 3)
    assert a.dtype == torch.float64
    assert abs(a.std().item() - 0.5) < 0.02
    again, _ = prior.sample(1000, [(2, 2), (3,)], None, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(a, again)
