"""The features that images are compared in: those of a small classifier that the package brings, and, as a control,
those of the same network with random weights.

``benchmarks/features.py`` trains a classifier, on the training images of its set alone, and writes the weights that
lie beside this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

IMAGE_SHAPE = (1, 28, 28)
CLASSES, FEATURES = 10, 128
FOLDER = Path(__file__).parent
# The classifiers that there are.
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.npz")))
# Of the weights of the control.
RANDOM_SEED = 0
BATCH = 250


class FeatureNetwork(nn.Module):
    """Five convolutions of 3 × 3, each with batch normalisation and a ReLU, a mean over the pixels, and a linear layer.

    Shape:
        (B, 1, 28, 28), uint8 → the logits (B, 10); the mean before the linear layer, (B, 128), by :meth:`features`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 32), nn.MaxPool2d(2), *_convolution(32, 64), *_convolution(64, 64), nn.MaxPool2d(2),
            *_convolution(64, FEATURES), *_convolution(FEATURES, FEATURES), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        scaled = images.float() / 255
        return self.body(scaled.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def weights_file(name: str) -> Path:
    """Where the weights of a classifier lie."""
    return FOLDER / f"{name}.npz"


def save_weights(network: FeatureNetwork, path: Path) -> None:
    """Writes the weights in float16."""
    state = network.state_dict().items()
    np.savez_compressed(path, **{name: value.half().numpy() for name, value in state if value.is_floating_point()})


def load_network(path: Path) -> FeatureNetwork:
    """The classifier with the weights of a file, ready for evaluation."""
    network = FeatureNetwork().eval()
    with np.load(path, allow_pickle=False) as arrays:
        state = {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return _laid_out(network)


def random_network() -> FeatureNetwork:
    """The control: the weights that PyTorch begins with, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return _laid_out(FeatureNetwork().eval())


def _laid_out(network: FeatureNetwork) -> FeatureNetwork:
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
