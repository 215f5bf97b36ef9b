"""Distances between two sets of features, and the diversity of one: features are (N, D), figures float64."""

from __future__ import annotations

import torch
from torch import Tensor

from inverse_flow.training.quality.value import Value, mean_of, resampled

# The kernel distance is the mean of as many independent ones, whose spread is its error.
BLOCKS = 10


def frechet(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^{1/2}): the distance of two Gaussians with these means and covariances.

    Its expectation is not 0 for two sets of one distribution: it falls with N, so only figures of the same N compare.
    Dowson & Landau, 1982.
    """
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    first, second = torch.cov(a.mT), torch.cov(b.mT)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float(mean + first.trace() + second.trace() - 2 * cross)


def frechet_distance(a: Tensor, b: Tensor) -> Value:
    """:func:`frechet`, its error from resampled rows of both."""
    return Value(frechet(a, b), resampled(frechet, a, b))


def kernel_distance(a: Tensor, b: Tensor) -> Value:
    """The squared maximum mean discrepancy for the kernel (xᵀy / D + 1)³, unbiased: 0 on average for one distribution.

    Binkowski et al., "Demystifying MMD GANs", 2018, whose subsets are disjoint here: the error is that of their mean.

    Raises:
        ValueError: fewer than two rows for each of the blocks.
    """
    size = min(len(a), len(b)) // BLOCKS
    if size < 2:
        raise ValueError(f"the kernel distance needs at least {2 * BLOCKS} rows, got {min(len(a), len(b))}")
    blocks = [slice(start, start + size) for start in range(0, BLOCKS * size, size)]
    return mean_of(torch.stack([_discrepancy(a[rows].double(), b[rows].double()) for rows in blocks]))


def _discrepancy(a: Tensor, b: Tensor) -> Tensor:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT / x.shape[1] + 1) ** 3

    def apart(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return apart(a) + apart(b) - 2 * kernel(a, b).mean()


def vendi(features: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K / N, K the cosines of the features: an effective number of different
    images, from 1 where all are alike to at most D.

    Friedman & Dieng, "The Vendi Score", 2023.
    """
    units = torch.nn.functional.normalize(features.double(), dim=1)
    # The matrix of the features has the same eigenvalues as that of the images, but for zeros, and is smaller.
    values = torch.linalg.eigvalsh(units.mT @ units / len(units)).clamp(min=0)
    return float(torch.special.entr(values).sum().exp())


def vendi_score(features: Tensor) -> Value:
    """:func:`vendi`, its error from resampled rows."""
    return Value(vendi(features), resampled(vendi, features))
