"""What the folders and files within a folder of pictures are taken for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inverse_flow.data import ImageData, load
from inverse_flow.data.holdout import held_out


def fill(folder: Path, values: Sequence[int] = range(10)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        Image.fromarray(np.full((2, 2), value, np.uint8)).save(folder / f"{value}.png")


def labelled(data: ImageData) -> list[tuple[int, int]]:
    """Value and label of every image of the data."""
    sets = data.sets.values()
    return sorted((int(i[0, 0, 0]), int(label)) for s in sets for i, label in zip(s.images, s.labels, strict=True))


@pytest.mark.parametrize(
    "litter",
    ["._0.png", ".hidden.png", ".ipynb_checkpoints/0.png", "__MACOSX/cats/._0.png", "@eaDir/0.png", "Thumbs.db"],
)
@pytest.mark.parametrize("within", ["", "cats"])
def test_hidden_files_and_thumbnails_are_left_out(tmp_path: Path, litter: str, within: str) -> None:
    fill(tmp_path / "cats", range(10))
    fill(tmp_path / "dogs", range(10, 20))
    path = tmp_path / within / litter
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0\5\x16\7")
    data = load(tmp_path)
    assert data.class_names == ("cats", "dogs")
    assert labelled(data) == [(value, value // 10) for value in range(20)]


def test_a_hidden_folder_that_is_asked_for_is_read(tmp_path: Path) -> None:
    fill(tmp_path / ".cache" / "cats")
    assert len(load(tmp_path / ".cache").train) == 9


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["cat", "dog/cat"], ("cat", "dog")),
        (["cat/indoor", "dog/indoor"], ("cat", "dog")),
        (["cat", "train"], ("cat", "train")),
        (["10", "9"], ("9", "10")),
        (["b", "A"], ("A", "b")),
    ],
)
def test_the_first_folders_are_the_classes(tmp_path: Path, folders: list[str], names: tuple[str, ...]) -> None:
    for number, name in enumerate(folders):
        fill(tmp_path / name, range(10 * number, 10 * number + 10))
    data = load(tmp_path)
    assert data.class_names == names
    assert data.classes == len(names)
    tops = [names.index(name.split("/")[0]) for name in folders]
    assert labelled(data) == [(value, tops[value // 10]) for value in range(20)]


@pytest.mark.parametrize("sets", [("train", "val", "test"), ("training", "valid", "testing")])
def test_folders_of_sets(tmp_path: Path, sets: tuple[str, ...]) -> None:
    for number, name in enumerate(sets):
        fill(tmp_path / name / "cat", [number])
        fill(tmp_path / name / "dog", [10 + number])
    data = load(tmp_path)
    found = {name: part.images[:, 0, 0, 0].tolist() for name, part in data.sets.items()}
    assert found == {"train": [0, 10], "validation": [1, 11], "test": [2, 12]}
    assert data.class_names == ("cat", "dog")


def test_val_alone_is_the_test_set_and_train_alone_is_held_out_from(tmp_path: Path) -> None:
    fill(tmp_path / "train" / "cat", range(10))
    alone = load(tmp_path)
    assert (len(alone.train), len(alone.test), alone.class_names) == (9, 1, ("cat",))
    fill(tmp_path / "val" / "cat", [3])
    data = load(tmp_path)
    assert (len(data.train), len(data.test), data.validation) == (10, 1, None)
    assert "val as the test set" in data.name


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "test", "extra"], "holds test, train, extra"),
        (["train", "test", "."], "holds test, train, 0.png"),
        (["train", "test", "testing"], "holds test, testing, train"),
        (["test", "val"], "holds test, val"),
        (["test", "cat"], "holds test, cat"),
        (["train/cat", "test/dog"], "test images have classes that no training image has: dog"),
    ],
)
def test_folders_that_may_mean_several_things_are_refused(tmp_path: Path, folders: list[str], message: str) -> None:
    for name in folders:
        fill(tmp_path / name, [0])
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_links_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", range(10, 20))
    fill(tmp_path / "here" / "cats", range(9))
    (tmp_path / "here" / "dogs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "cats" / "9.png").symlink_to(tmp_path / "elsewhere" / "10.png")
    assert labelled(load(tmp_path / "here")) == sorted(
        [*((value, 0) for value in [*range(9), 10]), *((value, 1) for value in range(10, 20))]
    )


@pytest.mark.parametrize("target", [".", "..", "nowhere", "loop"])
def test_links_that_lead_nowhere_are_named(tmp_path: Path, target: str) -> None:
    fill(tmp_path / "cats")
    (tmp_path / "cats" / "loop").symlink_to(target)
    with pytest.raises(ValueError, match="loop is a link to"):
        load(tmp_path)
    assert len(load(tmp_path, skip_bad_images=True).train) == 9


def test_all_bad_files_are_named_at_once_and_can_be_left_out(tmp_path: Path) -> None:
    fill(tmp_path, range(20))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"3 of the images in .* cannot be read") as refusal:
        load(tmp_path)
    assert all(f"{number}.png: it is damaged" in str(refusal.value) for number in range(3))
    data = load(tmp_path, skip_bad_images=True)
    assert len(data.train) + len(data.test) == 17
    assert len(data.left_out) == 3
    assert "3 that cannot be read left out" in data.name
    for number in range(3, 20):
        (tmp_path / f"{number}.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="and 10 more"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no images"):
        load(tmp_path, skip_bad_images=True)


def test_images_are_held_out_at_random_and_of_each_class_alike(tmp_path: Path) -> None:
    for name, start in (("cats", 0), ("dogs", 100)):
        fill(tmp_path / name, range(start, start + 50))
    data = load(tmp_path)
    assert data.test.labels.bincount().tolist() == [5, 5]
    assert labelled(data) == [(value, value // 100) for value in [*range(50), *range(100, 150)]]
    chosen = data.test.images[:, 0, 0, 0].tolist()
    assert load(tmp_path).test.images[:, 0, 0, 0].tolist() == chosen
    assert load(tmp_path, seed=1).test.images[:, 0, 0, 0].tolist() != chosen
    assert "10 of 100 held out at random, seed 0" in data.name


def test_the_hold_out_of_any_sizes() -> None:
    """Of classes of any size: exactly as many as are asked for, and of each class its share, rounded up or down."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        counts = torch.randint(1, 40, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator)
        labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
        total = len(labels)
        count = int(torch.randint(total + 1, (), generator=generator))
        chosen = held_out(labels, count, generator)
        assert chosen.sum() == count
        by_class = labels[chosen].bincount(minlength=len(counts))
        assert bool(((by_class == counts * count // total) | (by_class == -(-counts * count // total))).all())
    often = sum(held_out(torch.tensor([0, 0, 1]), 1, generator).long() for _ in range(600))
    assert bool(((often > 150) & (often < 250)).all())  # each of them as often as another


def test_files_that_are_no_pictures_are_left_alone(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "labels.csv").write_text("no picture")
    assert len(load(tmp_path).train) == 9


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    fill(tmp_path, [0])
    with pytest.raises(ValueError, match="one image; a test image must be held out of two or more"):
        load(tmp_path)


def test_a_folder_of_faces_is_a_folder_of_images(tmp_path: Path) -> None:
    """CelebA's aligned pictures lie in one folder, 178 × 218, with their attributes in text files beside it."""
    for number in range(1, 21):
        path = tmp_path / "img_align_celeba" / f"{number:06}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((218, 178, 3), number, np.uint8)).save(path)
    (tmp_path / "list_attr_celeba.txt").write_text("20\nMale Smiling\n")
    data = load(tmp_path / "img_align_celeba", size=64, crop=True)
    assert data.train.image_shape == (3, 64, 64)
    assert (len(data.train), len(data.test)) == (18, 2)
    assert data.classes == 0
