"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from inverse_flow.training.log import StepReport

SAMPLE_COLUMNS = 8
DPI = 150
# Small images are enlarged, by a whole number, until a panel is about so wide; none is made smaller. In dots.
PANEL_WIDTH, MARGIN, TITLE_HEIGHT = 640, 20, 60
# The first steps are so far off that they would flatten all the rest of the curve: the axis ends at this quantile.
CURVE_TOP_QUANTILE = 0.97


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1) as 256 levels; what a sample has beyond that range is cut off."""
    return (images * 256).floor().clamp(0, 255).byte()


def tile(images: Tensor, columns: int = SAMPLE_COLUMNS, gap: int = 2) -> NDArray[np.uint8]:
    """uint8 images (N, C, H, W) side by side on white: (height, width, 3).

    One channel is grey and three are colours. Of any other number each channel is a grey picture, from left to right.
    """
    if images.shape[1] not in (1, 3):
        images = torch.cat(images.split(1, dim=1), dim=3)
    count, _, height, width = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def save_samples(path: Path, samples: Tensor, real: Tensor | None = None, title: str = "samples") -> None:
    """A grid of samples, beside a grid of real images if there are any; both uint8 (N, C, H, W).

    Every pixel of an image is a whole number of dots in the file.
    """
    shown = {title: samples} if real is None else {title: samples, "real images": real}
    columns = min(SAMPLE_COLUMNS, max(map(len, shown.values())))
    panels = [(name, _enlarged(tile(images, columns))) for name, images in shown.items()]
    height = max(grid.shape[0] for _, grid in panels) + TITLE_HEIGHT + MARGIN
    width = sum(grid.shape[1] + 2 * MARGIN for _, grid in panels)
    figure, left = Figure(figsize=(width / DPI, height / DPI), dpi=DPI), MARGIN
    for name, grid in panels:
        figure.figimage(grid, left, height - TITLE_HEIGHT - grid.shape[0], origin="upper")
        figure.text((left + grid.shape[1] / 2) / width, 1 - TITLE_HEIGHT / 2 / height, name, ha="center", va="center")
        left += grid.shape[1] + 2 * MARGIN
    figure.savefig(path, dpi=DPI)


def save_rows(path: Path, rows: Mapping[str, Tensor], columns: int = SAMPLE_COLUMNS) -> None:
    """Rows of images (N, C, H, W) in [0, 1) with their names above, the first ``columns`` of each."""
    figure = Figure(figsize=(columns, 1.2 * len(rows)), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        axes.imshow(tile(to_uint8(images[:columns]), columns), interpolation="nearest")
        axes.set_title(name, loc="left")
        axes.set_axis_off()
    figure.savefig(path, dpi=DPI)


def _enlarged(grid: NDArray[np.uint8]) -> NDArray[np.uint8]:
    times = max(1, round(PANEL_WIDTH / grid.shape[1]))
    return grid.repeat(times, axis=0).repeat(times, axis=1)


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
    figure.savefig(path, dpi=DPI)
