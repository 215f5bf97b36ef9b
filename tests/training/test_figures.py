from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image

from inverse_flow.training.figures import (
    MARGIN,
    PANEL_WIDTH,
    TITLE_HEIGHT,
    save_curve,
    save_rows,
    save_samples,
    tile,
    to_uint8,
)
from inverse_flow.training.log import StepReport


def test_values_map_to_their_level_and_are_cut_at_the_ends() -> None:
    values = torch.tensor([-0.5, 0.0, 0.5, 0.999, 1.7])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255]


def test_images_are_laid_out_row_by_row() -> None:
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 4).clone()
    grid = tile(images, columns=2, gap=1)
    assert grid.shape == (5, 9, 3)
    assert (grid[:2, :4] == 0).all()
    assert (grid[:2, 5:] == 1).all()
    assert (grid[3:, :4] == 2).all()
    assert (grid[2] == 255).all()
    assert (grid[3:, 5:] == 255).all()


def test_colours_keep_their_channels() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    assert tile(image, columns=1).tolist() == [[[10, 20, 30]]]


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channels_that_are_no_colours_are_shown_one_by_one(channels: int) -> None:
    image = torch.arange(channels, dtype=torch.uint8).view(1, channels, 1, 1).expand(2, -1, 3, 4)
    grid = tile(image, columns=2, gap=1)
    assert grid.shape == (3, 2 * 4 * channels + 1, 3)
    for channel in range(channels):
        assert (grid[:, 4 * channel : 4 * channel + 4] == channel).all()


def test_rows_have_as_many_images_as_there_are_columns(tmp_path: Path) -> None:
    images = torch.ones(3, 1, 8, 8) - 1e-6
    shown = {}
    for columns in (1, 3):
        save_rows(tmp_path / "rows.png", {"black": 0 * images, "white": images}, columns)
        shown[columns] = matplotlib.image.imread(tmp_path / "rows.png")[..., 0] < 0.5
    assert shown[3].shape[1] == 3 * shown[1].shape[1]
    # The black row is above the white one, whose only dark dots are those of its name.
    upper, lower = shown[3][: len(shown[3]) // 2], shown[3][len(shown[3]) // 2 :]
    assert upper.mean() > 0.3
    assert lower.mean() < 0.05


@pytest.mark.parametrize("size", [6, 100, 300])
def test_every_pixel_of_a_sample_is_in_the_file(tmp_path: Path, size: int) -> None:
    """A large image is not made smaller, and a small one is larger by a whole number."""
    images = torch.randint(0, 256, (9, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_samples(tmp_path / "samples.png", images, images)
    grid = tile(images)
    times = max(1, round(PANEL_WIDTH / grid.shape[1]))
    picture = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB"))
    for left in (MARGIN, 3 * MARGIN + times * grid.shape[1]):
        found = picture[TITLE_HEIGHT::times, left::times][: grid.shape[0], : grid.shape[1]]
        assert (found == grid).all()


def test_the_pictures_are_written(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (10, 1, 6, 6), dtype=torch.uint8)
    save_samples(tmp_path / "samples.png", images, images)
    save_samples(tmp_path / "alone.png", images)
    reports = [StepReport(i, 0, float(i), 1.0, 5 - i, 1.0, 1e-3, 10.0, 4.0 if i % 2 else None) for i in range(4)]
    save_curve(tmp_path / "curve.png", reports, baseline=4.5)
    for name in ("samples.png", "alone.png", "curve.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 200
        assert np.unique(picture.reshape(-1, picture.shape[2]), axis=0).shape[0] > 5
    pair, alone = (matplotlib.image.imread(tmp_path / name).shape[1] for name in ("samples.png", "alone.png"))
    assert pair == 2 * alone


def test_a_picture_of_few_samples_is_filled_by_them(tmp_path: Path) -> None:
    images = torch.zeros(9, 1, 6, 6, dtype=torch.uint8)
    for count in (1, 3, 8, 9):
        save_samples(tmp_path / "few.png", images[:count])
        picture = matplotlib.image.imread(tmp_path / "few.png")
        last = (picture[TITLE_HEIGHT:, -MARGIN - 9 :, 0] == 0).any()  # dark to the right margin
        assert last, count
    save_samples(tmp_path / "beside.png", images[:1], images[:2])  # both at one scale
    dark = matplotlib.image.imread(tmp_path / "beside.png")[TITLE_HEIGHT:, :, 0].min(0) == 0
    widths = np.diff(np.flatnonzero(np.diff(np.r_[False, dark, False].astype(int))))[::2]
    assert len(set(widths.tolist())) == 1
    assert len(widths) == 3


def test_an_empty_log_still_has_a_curve(tmp_path: Path) -> None:
    save_curve(tmp_path / "curve.png", [], baseline=4.5)
    assert (tmp_path / "curve.png").is_file()
