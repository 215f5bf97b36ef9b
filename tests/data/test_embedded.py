from importlib import resources

import torch

from inverse_flow.data import embedded, load, load_embedded
from inverse_flow.data.files import md5_of

# Of the raw pixels, so that the slice cannot change unnoticed.
TRAIN_MD5 = "4c8f91169f51129ac852235c03b853c5"
TEST_MD5 = "56a6154b228d23082154f9021934fd7e"


def test_sizes_types_and_classes() -> None:
    data = load_embedded()
    assert data.name == "fashion-mnist-slice"
    assert data.class_names[6] == "Shirt"
    assert data.classes == 10
    for part, count in ((data.train, 1000), (data.test, 200)):
        assert part.images.shape == (count, 1, 28, 28)
        assert part.images.dtype == torch.uint8
        assert part.image_shape == (1, 28, 28)
        assert part.labels.bincount().tolist() == [count // 10] * 10
        assert part.indices.unique().numel() == count
        assert torch.equal(part.indices, part.indices.sort().values)


def test_the_pixels_are_the_official_ones() -> None:
    data = load_embedded()
    assert md5_of(data.train.images.numpy().tobytes()) == TRAIN_MD5
    assert md5_of(data.test.images.numpy().tobytes()) == TEST_MD5
    assert data.train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]


def test_the_licence_ships_beside_the_images() -> None:
    licence = resources.files(embedded).joinpath("LICENSE.txt").read_text()
    assert "Zalando" in licence
    assert "Permission is hereby granted" in licence


def test_load_knows_it_by_name() -> None:
    assert torch.equal(load("embedded").test.images, load_embedded().test.images)
