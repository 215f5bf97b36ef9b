import math

import pytest
import torch
from torch import nn

from inverse_flow.flows import Flow, Split


def test_the_first_half_goes_on() -> None:
    x = torch.arange(5.0).view(1, 5, 1, 1)
    (kept, latent), _ = Split(5)(x)
    assert kept.flatten().tolist() == [0, 1, 2]
    assert latent.flatten().tolist() == [3, 4]


def test_the_learned_prior_is_the_conditional_gaussian() -> None:
    """log p(x₂ | x₁) of the flow is the log-density of N(μ(x₁), σ(x₁)²), computed here by torch.distributions."""
    torch.manual_seed(0)
    split = Split(4).double()
    nn.init.normal_(split.prior_net.layers[-1].weight, std=0.3)
    flow = Flow([split], (4, 3, 3)).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)

    mean, raw = split.prior_net(x[:, :2]).chunk(2, dim=1)
    std = (2 * torch.tanh(raw / 2)).exp()
    expected = torch.distributions.Normal(mean, std).log_prob(x[:, 2:]).sum((1, 2, 3))
    expected += torch.distributions.Normal(0, 1).log_prob(x[:, :2]).sum((1, 2, 3))
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_the_spread_of_the_prior_is_bounded() -> None:
    split = Split(2)
    nn.init.constant_(split.prior_net.layers[-1].bias, 1e30)
    (_, _), logdet = split(torch.zeros(1, 2, 1, 1))
    assert math.isclose(logdet.item(), -2)


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="channels must be at least 2, got 1"):
        Split(1)
    with pytest.raises(ValueError, match="got 'normal'"):
        Split(4, prior="normal")
