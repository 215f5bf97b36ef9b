from unittest import mock

import pytest
import torch

from inverse_flow.data import ImageData, ImageSet
from inverse_flow.models import InverseFlow
from inverse_flow.training import IndependentPixels, TrainConfig, bits_per_dim, evaluate
from inverse_flow.training.metrics import bound_of, log_probs
from inverse_flow.training.summary import TIMED_IMAGES, summarize


def data(side: int = 4) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 1, side, side), generator=generator, dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(30, dtype=torch.long), torch.arange(30))
    return ImageData("noise", images[:20], images[20:])


def test_the_figures_are_those_of_their_definitions() -> None:
    torch.manual_seed(0)
    model, images = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4).eval(), data()
    summary = summarize(model, images, TrainConfig(bit_depth=6), importance_samples=3)
    assert summary.train_bits_per_dim == evaluate(model, images.train.images, 6)
    assert summary.test_bits_per_dim == evaluate(model, images.test.images, 6)
    baseline = IndependentPixels.fit(images.train.images, 6)
    assert summary.baseline_test_bits_per_dim == baseline.bits_per_dim(images.test.images)
    assert 0 < summary.reconstruction_error < 1e-5
    assert 0 < summary.seconds_per_100_samples < 5
    assert 0 < summary.seconds_per_100_densities < 5
    assert summary.parameters == model.num_parameters
    assert len(summary.rows()) == 10
    bits = bits_per_dim(log_probs(model, images.test.images, 6), (1, 4, 4), 6)
    assert summary.test_standard_error == pytest.approx(float(bits.std() / 10**0.5))
    assert summary.importance_weighted_test_bits_per_dim < summary.test_bits_per_dim
    assert 2**20 < summary.peak_memory_bytes < 2**40
    assert summary.protocol == (
        "n − log p(x̃) / (D ln 2) at n = 6 bits, uniform dequantization, one draw of noise per image, 10 test and 20 "
        "training images, averaged weights"
    )
    assert summarize(model, images, TrainConfig()).importance_weighted_test_bits_per_dim is None


def test_of_many_training_images_some_are_measured() -> None:
    torch.manual_seed(0)
    model, images = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4).eval(), data()
    told: list[tuple[str, int, int]] = []
    with mock.patch.object(model, "log_prob", wraps=model.log_prob) as run:
        summary = summarize(
            model, images, TrainConfig(), importance_samples=2, train_images=7, watch=lambda *step: told.append(step)
        )
    rows = [0, 2, 5, 8, 11, 14, 17]
    assert summary.train_bits_per_dim == evaluate(model, images.train.images[rows])
    assert summary.train_images == 7
    assert told == [("training images", 7, 7), *((f"test images, draw {draw} of 2", 10, 10) for draw in (1, 2))]
    measured = [call.args[0].shape[0] for call in run.call_args_list if call.args[0].shape[0] != TIMED_IMAGES]
    assert sum(measured) == 7 + 2 * 10  # nothing is measured twice
    assert summary.test_bits_per_dim == evaluate(model, images.test.images)
    bound = bound_of(log_probs(model, images.test.images, draw=draw) for draw in range(2)).mean()
    assert summary.importance_weighted_test_bits_per_dim == float(bits_per_dim(bound, (1, 4, 4)))
    for wrong in (True, "7", 0):
        with pytest.raises((TypeError, ValueError), match="train_images must be"):
            summarize(model, images, TrainConfig(), train_images=wrong)


def test_the_reconstruction_error_sees_a_wrong_inverse() -> None:
    model = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4).eval()
    inverse = model.inverse

    def shifted(latents: object, context: object = None) -> tuple[torch.Tensor, torch.Tensor]:
        x, logdet = inverse(latents)
        return x + 0.25, logdet

    model.inverse = shifted
    assert summarize(model, data(), TrainConfig()).reconstruction_error == pytest.approx(0.25, abs=1e-3)


def test_images_of_another_shape_are_refused() -> None:
    model = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\), the test images of noise have \(1, 8, 8\)"):
        summarize(model, data(8), TrainConfig())


def test_a_conditional_model_is_measured_with_its_labels() -> None:
    torch.manual_seed(0)
    model = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4, context_channels=2).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    plain = data()
    labelled = ImageData(
        "labelled",
        *(ImageSet(part.images, torch.arange(len(part)) % 2, part.indices) for part in (plain.train, plain.test)),
    )
    summary = summarize(model, labelled, TrainConfig(), classes=2)
    context = torch.eye(2)[torch.arange(10) % 2]
    assert summary.test_bits_per_dim == evaluate(model, plain.test.images, context=context)
    assert summary.test_bits_per_dim != evaluate(model, plain.test.images, context=context.flip(1))
    assert "log p(x̃ | label)" in summary.protocol
    strange = ImageData("strange", labelled.train, ImageSet(plain.test.images, torch.arange(10), plain.test.indices))
    with pytest.raises(ValueError, match=r"knows the labels 0 … 1, the images have 0 … 9"):
        summarize(model, strange, TrainConfig(), classes=2)
