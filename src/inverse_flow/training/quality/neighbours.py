"""What nearest neighbours say: how far samples lie among real images and cover them, and whether they are copies."""

from __future__ import annotations

import torch
from torch import Tensor

from inverse_flow.training.quality.value import Value, mean_of

# k: the ball of an image reaches to its k-th neighbour.
NEIGHBOURS = 5
# Rows of a matrix of distances at a time.
ROWS = 1000


def neighbour_measures(real: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, Value]:
    """Precision, recall, density and coverage of features (N, D) and (M, D).

    Every image has a ball that reaches to its k-th neighbour in its own set. Precision is the share of samples in the
    ball of a real image, recall the share of real images in that of a sample (Kynkäänniemi et al., 2019). Density is
    the number of real images' balls that a sample lies in, over k, and coverage the share of real images with a sample
    in their ball (Naeem et al., 2020): less moved by a single image far out. Errors are those of means over images,
    with the balls as they are.

    Raises:
        ValueError: no more images than neighbours.
    """
    if min(len(real), len(samples)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more images than {min(len(real), len(samples))}")
    real_radii, sample_radii = _radii(real, neighbours), _radii(samples, neighbours)
    density, covered, recalled = [], torch.zeros(len(real), dtype=torch.bool), torch.zeros(len(real), dtype=torch.bool)
    for rows in torch.arange(len(samples)).split(ROWS):
        distances = torch.cdist(samples[rows], real)
        within = distances <= real_radii
        density.append(within.sum(1))
        covered |= within.any(0)
        recalled |= (distances <= sample_radii[rows, None]).any(0)
    balls = torch.cat(density)
    return {
        "precision": mean_of(balls > 0),
        "recall": mean_of(recalled),
        "density": mean_of(balls / neighbours),
        "coverage": mean_of(covered),
    }


def nearest_training_share(samples: Tensor, train: Tensor, test: Tensor) -> Value:
    """The share of samples whose nearest real image is one of training, among as many of training and of test.

    One half where nothing is remembered, more where samples are near copies (the idea is that of Meehan, Chaudhuri &
    Dasgupta, 2020).

    Raises:
        ValueError: other numbers of training than of test images.
    """
    if len(train) != len(test):
        raise ValueError(f"as many training as test images are needed, got {len(train)} and {len(test)}")
    nearest = [
        torch.stack([torch.cdist(rows, other).amin(1) for other in (train, test)]) for rows in samples.split(ROWS)
    ]
    train_distance, test_distance = torch.cat(nearest, 1)
    # A tie says nothing.
    return mean_of((train_distance < test_distance).double() + 0.5 * (train_distance == test_distance))


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance of each to its k-th neighbour; the nearest is itself."""
    found = [torch.cdist(rows, features).topk(neighbours + 1, largest=False) for rows in features.split(ROWS)]
    return torch.cat([values.values[:, -1] for values in found])
