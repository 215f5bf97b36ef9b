import math

import pytest
import torch

from inverse_flow.training import IndependentPixels


def test_add_one_smoothing_by_hand() -> None:
    """Two pixels of one bit, three images: counts (2, 1) and (0, 3)."""
    images = torch.tensor([[0, 255], [0, 200], [128, 128]], dtype=torch.uint8).view(3, 1, 1, 2)
    baseline = IndependentPixels.fit(images, bit_depth=1)
    expected = torch.tensor([[3 / 5, 2 / 5], [1 / 5, 4 / 5]], dtype=torch.float64).log2()
    torch.testing.assert_close(baseline.log_probabilities, expected)
    bits = -(2 * math.log2(3 / 5) + math.log2(2 / 5) + 3 * math.log2(4 / 5)) / 6
    assert baseline.bits_per_dim(images) == pytest.approx(bits)


def test_every_pixels_histogram_is_a_distribution() -> None:
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    probabilities = IndependentPixels.fit(images).log_probabilities.exp2()
    assert probabilities.shape == (48, 256)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(48, dtype=torch.float64))


def test_uniform_pixels_need_about_the_bit_depth() -> None:
    images = torch.randint(0, 256, (20000, 1, 1, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert IndependentPixels.fit(images[:10000], 4).bits_per_dim(images[10000:]) == pytest.approx(4, abs=0.01)
