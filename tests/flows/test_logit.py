import math

import pytest
import torch

from inverse_flow.flows import Logit


def test_the_formula_at_three_values() -> None:
    z, _ = Logit(0.1)(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1))
    end = math.log(0.9 / 0.1)
    assert z.flatten().tolist() == pytest.approx([-end, 0.0, end], abs=1e-6)


def test_any_latent_is_an_image() -> None:
    z = torch.tensor([-1e4, -20.0, 0.0, 20.0, 1e4]).view(1, 5, 1, 1)
    x, logdet = Logit(0.01).inverse(z)
    assert x.min() >= -0.0103
    assert x.max() <= 1.0103
    assert torch.isfinite(logdet).all()


def test_what_lies_outside_is_nan() -> None:
    assert Logit(0.01)(torch.full((1, 1, 1, 1), 1.1))[0].isnan().all()


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"got torch.uint8"):
        Logit()(torch.zeros(1, 1, 1, 1, dtype=torch.uint8))


@pytest.mark.parametrize("margin", [0.0, 0.5, -1.0, float("nan")])
def test_margins_without_a_meaning_are_refused(margin: float) -> None:
    with pytest.raises(ValueError, match=f"above 0 and below 0.5, got {margin}"):
        Logit(margin)
