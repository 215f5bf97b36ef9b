"""What every loader gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,), int64, from 0 on; −1 for an image without a label.
        indices: (N,), int64: the positions in the complete official set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            shape, dtype = tuple(self.images.shape), self.images.dtype
            raise ValueError(f"images must be (N, C, H, W) and uint8, got {shape} and {dtype}")
        if not len(self.images) == len(self.labels) == len(self.indices):
            counts = len(self.images), len(self.labels), len(self.indices)
            raise ValueError(f"as many images as labels and indices are needed, got {counts}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> ImageSet:
        return ImageSet(self.images[rows], self.labels[rows], self.indices[rows])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width


@dataclass(frozen=True)
class ImageData:
    """A training and a test set of one kind of images."""

    name: str
    train: ImageSet
    test: ImageSet

    @property
    def classes(self) -> int:
        """The number of labels; 0 if there are images without one."""
        labels = torch.cat((self.train.labels, self.test.labels))
        return 0 if not len(labels) or int(labels.min()) < 0 else int(labels.max()) + 1
