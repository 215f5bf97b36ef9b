import pytest
import torch

from inverse_flow.training import Batches, TrainConfig

IMAGES = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 2, 2).clone()


def values(batch: torch.Tensor) -> list[int]:
    return (batch[:, 0, 0, 0] * 256).floor().int().tolist()


def test_an_epoch_visits_every_image_once_in_its_own_order() -> None:
    batches = Batches(IMAGES, TrainConfig(batch_size=5))
    first = values(batches(0)) + values(batches(1))
    second = values(batches(2)) + values(batches(3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [batches.epoch(step) for step in range(4)] == [0, 0, 1, 1]


def test_the_batch_of_a_step_depends_on_seed_and_step_alone() -> None:
    config = TrainConfig(batch_size=4, flip=True, seed=3)
    batches, again = Batches(IMAGES, config), Batches(IMAGES, config)
    for step in (5, 2, 5):
        torch.rand(3)
        assert torch.equal(batches(step), again(step))
    other = Batches(IMAGES, TrainConfig(batch_size=4, flip=True, seed=4))
    assert not torch.equal(batches(0), other(0))
    assert not torch.equal(batches(0), batches(1))


def test_the_noise_of_an_image_changes_from_epoch_to_epoch() -> None:
    batches = Batches(IMAGES[:1], TrainConfig())
    assert not torch.equal(batches(0), batches(1))


def test_flips_mirror_about_half_of_the_images() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(400, 1, 1, 2).clone()
    batch = Batches(images, TrainConfig(batch_size=400, flip=True))(0)
    mirrored = batch[:, 0, 0, 0] > 0.5
    assert 150 < int(mirrored.sum()) < 250
    assert torch.equal(mirrored, batch[:, 0, 0, 1] < 0.5)
    assert not (Batches(images, TrainConfig(batch_size=400))(0)[:, 0, 0, 0] > 0.5).any()


def test_what_does_not_fill_a_batch_waits_for_another_epoch() -> None:
    batches = Batches(IMAGES, TrainConfig(batch_size=4))
    assert batches.per_epoch == 2
    seen = {value for step in range(40) for value in values(batches(step))}
    assert seen == set(range(10))


def test_a_small_set_is_one_batch_and_an_empty_one_an_error() -> None:
    assert len(Batches(IMAGES, TrainConfig(batch_size=64))(0)) == 10
    with pytest.raises(ValueError, match="no images"):
        Batches(IMAGES[:0], TrainConfig())
