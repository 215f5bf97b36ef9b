import itertools

import pytest
import torch
from torch import Tensor

from inverse_flow.flows import HaarSqueeze, Squeeze


def test_the_bands_of_an_image() -> None:
    block = torch.tensor([[1.0, 2.0], [4.0, 9.0]]).view(1, 1, 2, 2)
    z, _ = HaarSqueeze()(block)
    assert z.flatten().tolist() == [
        (1 + 2 + 4 + 9) / 2,
        (1 - 2 + 4 - 9) / 2,  # left − right
        (1 + 2 - 4 - 9) / 2,  # top − bottom
        (1 - 2 - 4 + 9) / 2,
    ]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_each_band_is_one_pattern_of_signs(dimensions: int) -> None:
    """Bit j of the band, W lowest, is high-pass along that axis: sign −1 at odd positions."""
    x = torch.randn(1, 1, *(2,) * dimensions, dtype=torch.float64)
    z, _ = HaarSqueeze()(x)
    for band, value in enumerate(z.flatten()):
        total = torch.zeros(())
        for position in itertools.product((0, 1), repeat=dimensions):
            high = [(band >> (dimensions - 1 - axis)) & 1 for axis in range(dimensions)]
            sign = (-1) ** sum(a * b for a, b in zip(high, position, strict=True))
            total = total + sign * x[0, 0][position]
        torch.testing.assert_close(value, total / 2 ** (dimensions / 2))


def test_order_of_the_channels() -> None:
    x = torch.randn(2, 3, 4, 6)
    by_band, _ = HaarSqueeze()(x)
    by_channel, _ = HaarSqueeze("channel")(x)
    for channel in range(3):
        alone, _ = HaarSqueeze()(x[:, channel : channel + 1])
        assert torch.equal(by_band[:, channel::3], alone)
        assert torch.equal(by_channel[:, 4 * channel : 4 * channel + 4], alone)


def test_the_coarse_picture_comes_first() -> None:
    x = torch.randn(1, 3, 4, 4)
    coarse = HaarSqueeze()(x)[0][:, :3]
    torch.testing.assert_close(coarse, 2 * torch.nn.functional.avg_pool2d(x, 2))


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 2, 4, 2)])
@pytest.mark.parametrize("order", ["band", "channel"])
def test_is_orthogonal(shape: tuple[int, ...], order: str) -> None:
    def norms_and_products(layer: Squeeze, x: Tensor) -> Tensor:
        z = layer(x)[0].flatten(1)
        return z @ z.T

    x = torch.randn(3, *shape, dtype=torch.float64)
    flat = x.flatten(1)
    torch.testing.assert_close(norms_and_products(HaarSqueeze(order), x), flat @ flat.T)
    y = HaarSqueeze(order)(x)[0]
    torch.testing.assert_close((HaarSqueeze(order).inverse(y)[0] * x).sum(), (y * y).sum())


def test_bfloat16_is_rounded_once() -> None:
    x = torch.randn(4, 2, 4, 4).bfloat16()
    assert torch.equal(HaarSqueeze()(x)[0], HaarSqueeze()(x.float())[0].bfloat16())


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="divisible by 2, got 4 × 5"):
        HaarSqueeze()(torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="divisible by 2, got 2 × 4 × 5"):
        HaarSqueeze()(torch.zeros(1, 1, 2, 4, 5))
    with pytest.raises(ValueError, match="channels divisible by 8, got 4"):
        HaarSqueeze().inverse(torch.zeros(1, 4, 1, 2, 2))
    with pytest.raises(ValueError, match="got 'wavelet'"):
        HaarSqueeze("wavelet")
