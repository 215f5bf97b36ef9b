from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inverse_flow.models import InverseFlow
from inverse_flow.training import TrainConfig, Trainer
from inverse_flow.training import samples as samples_module
from inverse_flow.training.figures import to_uint8
from inverse_flow.training.samples import SampleGrids, draw, save_npz


def model(classes: int = 0) -> InverseFlow:
    torch.manual_seed(0)
    flow = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4, context_channels=classes).eval()
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return flow


def test_the_seed_decides_and_the_density_is_that_of_the_samples() -> None:
    flow = model()
    first, again, other = draw(flow, 5, 1), draw(flow, 5, 1), draw(flow, 5, 2)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert first.labels is None
    torch.testing.assert_close(first.log_probs, flow.log_prob(first.images).detach(), rtol=1e-4, atol=1e-4)
    cold = draw(flow, 5, 1, temperature=0.5)
    assert (cold.log_probs > first.log_probs).all()


def test_many_samples_are_drawn_in_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "BATCH", 4)
    drawn = draw(model(classes=3), 10, 0, classes=3)
    assert drawn.images.shape == (10, 1, 4, 4)
    assert drawn.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    context = torch.eye(3)[drawn.labels]
    expected = model(classes=3).log_prob(drawn.images, context).detach()
    torch.testing.assert_close(drawn.log_probs, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn.log_probs, model(classes=3).log_prob(drawn.images, context.roll(1, 1)).detach())


def test_an_npz_file_holds_pixels_densities_and_labels(tmp_path: Path) -> None:
    drawn = draw(model(classes=2), 4, 0, classes=2, label=1)
    save_npz(tmp_path / "some.npz", drawn)
    arrays = np.load(tmp_path / "some.npz")
    assert (arrays["x"][..., 0] == to_uint8(drawn.images)[:, 0].numpy()).all()
    assert (arrays["log_prob"] == drawn.log_probs.numpy()).all()
    assert arrays["y"].tolist() == [1, 1, 1, 1]


def test_pictures_along_the_way_are_of_the_same_latents(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    config = TrainConfig(steps=5, batch_size=4, learning_rate=1e-30, average_decay=0)  # weights that do not move
    trainer = Trainer(model(), images, config, tmp_path)
    trainer.fit(SampleGrids(trainer, tmp_path, 2))
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [picture.name for picture in pictures] == ["000002.png", "000004.png"]
    below_the_title = [Image.open(picture).crop((0, 100, 600, 600)).tobytes() for picture in pictures]
    assert below_the_title[0] == below_the_title[1]
