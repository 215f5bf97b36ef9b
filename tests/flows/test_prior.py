from collections.abc import Callable

import pytest
import torch
from torch import nn

from inverse_flow.flows import AffineCoupling, Flow, LeakyReLU, StandardNormal


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


class Noted(LeakyReLU):
    """Its state_dict has what is no tensor, first of all."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 2}


def noted_flow() -> Flow:
    return Flow([Noted(2), AffineCoupling(2, 3, dimensions=1)], (2, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("wrap", [lambda flow: flow, nn.Sequential])
def test_samples_follow_weights_that_are_assigned(
    dtype: torch.dtype, device: str, wrap: Callable[[Flow], nn.Module]
) -> None:
    other = noted_flow().to(dtype)
    with torch.device(device):
        flow = noted_flow()
    wrap(flow).load_state_dict(wrap(other).state_dict(), assign=True)
    assert flow.sample(3).dtype == dtype
    copied = noted_flow()
    copied.load_state_dict(other.state_dict())
    assert copied.sample(3).dtype == torch.float32
