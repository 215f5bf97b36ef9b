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


PATTERNS = {  # InvertibleNetworks.jl's, counted from 0
    "checkerboard": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
    "patch": [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]],
    "column": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_says_which_channel_a_pixel_goes_to(pattern: str) -> None:
    x = torch.tensor(PATTERNS[pattern]).float()[None, None]
    z, _ = Squeeze(pattern=pattern)(torch.cat((x, x + 10), dim=1))
    expected = torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13]).view(1, 8, 1, 1).expand(1, 8, 2, 2)
    assert torch.equal(z, expected)


def test_patches_are_parts_of_the_image() -> None:
    x = torch.randn(2, 1, 4, 6, 2)
    z, _ = Squeeze(pattern="patch")(x)
    assert torch.equal(z[:, 0], x[:, 0, :2, :3, :1])
    assert torch.equal(z[:, 5], x[:, 0, 2:, :3, 1:])


def test_columns_are_read_in_order() -> None:
    x = torch.arange(24.0).view(1, 1, 4, 6)
    z, _ = Squeeze(pattern="column")(x)
    assert torch.equal(z.mT.flatten(), x.mT.flatten())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_signals_know_two_patterns(pattern: str) -> None:
    z, _ = Squeeze(pattern=pattern)(torch.arange(6.0).view(1, 1, 6))
    assert z[0].tolist() == ([[0, 2, 4], [1, 3, 5]] if pattern == "checkerboard" else [[0, 1, 2], [3, 4, 5]])


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="divisible by 2, got 5 × 4"):
        Squeeze()(torch.zeros(1, 1, 5, 4))
    with pytest.raises(ValueError, match="channels divisible by 4, got 6"):
        Squeeze().inverse(torch.zeros(1, 6, 2, 2))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Squeeze(0)
    with pytest.raises(ValueError, match='"checkerboard", "patch" or "column", got \'row\''):
        Squeeze(pattern="row")
