"""The slice of Fashion-MNIST that ships with the package (LICENSE.txt and README.md beside this file)."""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch

from inverse_flow.data.images import ImageData, ImageSet

FILE = "fashion_mnist_slice.npz"
NAME = "fashion-mnist-slice"
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def load_embedded() -> ImageData:
    """1,000 training and 200 test images of Fashion-MNIST: of each class the first 100 and the first 20.

    They are in the order of the official files; ``indices`` are their positions there.
    """
    with resources.files(__package__).joinpath(FILE).open("rb") as file, np.load(file) as arrays:
        sets = [
            ImageSet(
                torch.from_numpy(arrays[f"{split}_images"])[:, None],
                torch.from_numpy(arrays[f"{split}_labels"]).long(),
                torch.from_numpy(arrays[f"{split}_indices"]).long(),
            )
            for split in ("train", "test")
        ]
    return ImageData(NAME, *sets, class_names=CLASS_NAMES)
