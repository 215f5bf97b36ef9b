import pytest
import torch

from inverse_flow.data import ImageSet


def test_wrong_types_and_lengths_are_refused() -> None:
    images, rows = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(2)
    with pytest.raises(ValueError, match=r"got \(2, 1, 4, 4\) and torch.float32"):
        ImageSet(images.float(), rows, rows)
    with pytest.raises(ValueError, match=r"got \(1, 4, 4\)"):
        ImageSet(images[0], rows, rows)
    with pytest.raises(ValueError, match=r"got \(2, 2, 1\)"):
        ImageSet(images, rows, rows[:1])
