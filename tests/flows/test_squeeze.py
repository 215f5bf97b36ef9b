import pytest
import torch
import torch.nn.functional as F

from inverse_flow.flows import Squeeze


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_the_order_is_that_of_pixel_unshuffle(factor: int) -> None:
    x = torch.arange(2 * 3 * 6 * 12.0).view(2, 3, 6, 12)
    z, _ = Squeeze(factor)(x)
    assert torch.equal(z, F.pixel_unshuffle(x, factor))
    assert torch.equal(Squeeze(factor).inverse(z)[0], F.pixel_shuffle(z, factor))


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="divisible by 2, got 5 × 4"):
        Squeeze()(torch.zeros(1, 1, 5, 4))
    with pytest.raises(ValueError, match="channels divisible by 4, got 6"):
        Squeeze().inverse(torch.zeros(1, 6, 2, 2))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Squeeze(0)
