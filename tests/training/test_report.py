import pytest
import torch

from inverse_flow.data import ImageData, ImageSet
from inverse_flow.models import InverseFlow
from inverse_flow.training import IndependentPixels, evaluate
from inverse_flow.training.report import summarize


def data(side: int = 4) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 1, side, side), generator=generator, dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(30, dtype=torch.long), torch.arange(30))
    return ImageData("noise", images[:20], images[20:])


def test_the_figures_are_those_of_their_definitions() -> None:
    torch.manual_seed(0)
    model, images = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4).eval(), data()
    summary = summarize(model, images, bit_depth=6)
    assert summary.train_bits_per_dim == evaluate(model, images.train.images, 6)
    assert summary.test_bits_per_dim == evaluate(model, images.test.images, 6)
    baseline = IndependentPixels.fit(images.train.images, 6)
    assert summary.baseline_test_bits_per_dim == baseline.bits_per_dim(images.test.images)
    assert 0 < summary.reconstruction_error < 1e-5
    assert 0 < summary.seconds_per_100_samples < 5
    assert 0 < summary.seconds_per_100_densities < 5
    assert summary.parameters == model.num_parameters
    assert len(summary.rows()) == 8


def test_the_reconstruction_error_sees_a_wrong_inverse() -> None:
    model = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4).eval()
    inverse = model.inverse

    def shifted(latents: object, context: object = None) -> tuple[torch.Tensor, torch.Tensor]:
        x, logdet = inverse(latents)
        return x + 0.25, logdet

    model.inverse = shifted
    assert summarize(model, data(), 8).reconstruction_error == pytest.approx(0.25, abs=1e-3)


def test_images_of_another_shape_are_refused() -> None:
    model = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4)
    with pytest.raises(ValueError, match=r"takes images of shape \(1, 4, 4\), noise has \(1, 8, 8\)"):
        summarize(model, data(8), 8)
