"""What every loader gives."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

UNLABELLED = -1
# Labels are whole numbers that count the classes from 0; larger ones are identifiers of something else.
MOST_CLASSES = 1 << 16


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

    def __getitem__(self, rows: slice | Tensor) -> ImageSet:
        return ImageSet(self.images[rows], self.labels[rows], self.indices[rows])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width


@dataclass(frozen=True)
class ImageData:
    """A training and a test set of one kind of images.

    Attributes:
        name: what the figures on these images are headed with; it says how a test set was held out.
        train: the images to train on.
        test: the images to measure on.
        validation: the images on which the data's maker wants weights to be chosen; None if there are none.
        class_names: the name of label 0, 1, …; empty where the classes have none.
        left_out: what was left out because it cannot be read, one line each.

    Raises:
        ValueError: a set without images, sets of different shape, a label without a name.
    """

    name: str
    train: ImageSet
    test: ImageSet
    _: KW_ONLY
    validation: ImageSet | None = None
    class_names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = self.train.image_shape
        for part, images in self.sets.items():
            if not images.images.numel():
                raise ValueError(f"{self.name} has no {part} images: their shape is {tuple(images.images.shape)}")
            if images.image_shape != shape:
                raise ValueError(f"{self.name}: {part} images are {images.image_shape}, train images {shape}")
            least, most = int(images.labels.min()), int(images.labels.max())
            bound = len(self.class_names) or MOST_CLASSES
            if not UNLABELLED <= least <= most < bound:
                wrong = least if least < UNLABELLED else most
                raise ValueError(f"{self.name}: labels must be from 0 to {bound - 1} (−1 for none), got {wrong}")

    @property
    def sets(self) -> dict[str, ImageSet]:
        """The sets that there are, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: images for name, images in found.items() if images is not None}

    @property
    def classes(self) -> int:
        """The number of labels; 0 if there are images without one."""
        labels = torch.cat([images.labels for images in self.sets.values()])
        if int(labels.min()) < 0:
            return 0
        return len(self.class_names) or int(labels.max()) + 1


def class_number(text: str, classes: int, class_names: tuple[str, ...] = ()) -> int:
    """The label that a user means: a name of ``class_names`` in any case, or else a number.

    Raises:
        ValueError: neither of them; the message lists what there is.
    """
    exact = [number for number, name in enumerate(class_names) if name == text]
    folded = [number for number, name in enumerate(class_names) if name.casefold() == text.casefold()]
    if len(exact or folded) == 1:
        return (exact or folded)[0]
    if text.isdecimal() and int(text) < classes:
        return int(text)
    if not classes:
        raise ValueError(f"the model knows no classes: it was not trained with labels; got {text}")
    known = ", ".join(f"{name} ({number})" for number, name in enumerate(class_names)) or f"0 … {classes - 1}"
    raise ValueError(f"the model knows the classes {known}; got {text}")
