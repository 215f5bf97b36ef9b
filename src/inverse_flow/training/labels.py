"""Class labels as the context of a conditional model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow.data import ImageData, ImageSet
from inverse_flow.data.images import UNLABELLED


def classes_of(data: ImageData) -> int:
    """How many classes a conditional model of the data has.

    Raises:
        ValueError: images without a label.
    """
    if not data.classes:
        raise ValueError(f"{data.name} has images without a label; a conditional model needs one for each")
    return data.classes


def context_of(images: ImageSet, classes: int) -> Tensor | None:
    """The context of labelled images, (N, classes): 1 at the label, 0 elsewhere. None for a model without classes.

    Raises:
        ValueError: labels that the model does not know.
    """
    least, most = (int(images.labels.min()), int(images.labels.max())) if len(images) else (0, 0)
    if classes and least == UNLABELLED:
        raise ValueError(f"the model knows the labels 0 … {classes - 1}, some of the images have none")
    if classes and not 0 <= least <= most < classes:
        raise ValueError(f"the model knows the labels 0 … {classes - 1}, the images have {least} … {most}")
    return F.one_hot(images.labels, classes).float() if classes else None


def context_of_samples(classes: int, count: int, label: int | None = None) -> Tensor | None:
    """The context of ``count`` samples: all of one class, or the classes in turn. None for a model without classes.

    Raises:
        ValueError: a label that the model does not know.
    """
    if label is not None and not 0 <= label < classes:
        known = f"the classes 0 … {classes - 1}" if classes else "no classes: it was not trained with labels"
        raise ValueError(f"the model knows {known}; got {label}")
    if not classes:
        return None
    labels = torch.arange(count) % classes if label is None else torch.full((count,), label)
    return F.one_hot(labels, classes).float()
