"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from inverse_flow.training.log import StepReport

SAMPLE_COLUMNS = 8
# The first steps are so far off that they would flatten all the rest of the curve: the axis ends at this quantile.
CURVE_TOP_QUANTILE = 0.97


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1) as 256 levels; what a sample has beyond that range is cut off."""
    return (images * 256).floor().clamp(0, 255).byte()


def tile(images: Tensor, columns: int = SAMPLE_COLUMNS, gap: int = 2) -> NDArray[np.uint8]:
    """uint8 images (N, C, H, W) side by side on white: (height, width, 3)."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).expand(-1, -1, -1, max(3, channels)).cpu().numpy()):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def save_samples(path: Path, samples: Tensor, real: Tensor | None = None, title: str = "samples") -> None:
    """A grid of samples, beside a grid of real images if there are any; both uint8 (N, C, H, W)."""
    panels = [(title, samples)] + ([("real images", real)] if real is not None else [])
    figure = Figure(figsize=(4.5 * len(panels), 4.8), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.imshow(tile(images), interpolation="nearest")
        axes.set_title(name)
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def save_curve(path: Path, reports: Sequence[StepReport], baseline: float) -> None:
    """Bits per dimension over the time of training, with the baseline of independent pixels."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    train = [report.bits_per_dim for report in reports]
    axes.plot([r.seconds for r in reports], train, alpha=0.5, linewidth=0.8, label="training batches")
    checked = [r for r in reports if r.validation is not None]
    shown = [*train, baseline]
    if checked:
        validation = [r.validation for r in checked if r.validation is not None]
        axes.plot([r.seconds for r in checked], validation, label="validation, averaged weights")
    axes.axhline(baseline, color="black", linestyle="--", label="independent pixels, test")
    if train:
        axes.set_ylim(min(shown) - 0.2, max(float(np.quantile(train, CURVE_TOP_QUANTILE)), baseline) + 0.2)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("bits per dimension")
    axes.legend()
    figure.savefig(path, dpi=150)
