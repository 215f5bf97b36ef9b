import pytest
import torch

from inverse_flow.data import ImageData, ImageSet
from inverse_flow.training.labels import classes_of, context_of, context_of_samples


def labelled(*labels: int) -> ImageSet:
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    return ImageSet(images, torch.tensor(labels), torch.arange(len(labels)))


def test_a_label_is_a_one_at_its_place() -> None:
    assert context_of(labelled(2, 0), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert context_of(labelled(2, 0), 0) is None
    with pytest.raises(ValueError, match="knows the labels 0 … 1, some of the images have none"):
        context_of(labelled(-1, 1), 2)
    with pytest.raises(ValueError, match="knows the labels 0 … 1, the images have 0 … 2"):
        context_of(labelled(2, 0), 2)


def test_classes_need_labels() -> None:
    assert classes_of(ImageData("some", labelled(0, 1), labelled(3))) == 4
    with pytest.raises(ValueError, match="half has images without a label"):
        classes_of(ImageData("half", labelled(0, 1), labelled(-1)))


def test_samples_are_of_one_class_or_of_the_classes_in_turn() -> None:
    assert context_of_samples(2, 3).argmax(1).tolist() == [0, 1, 0]
    assert context_of_samples(3, 2, label=1).argmax(1).tolist() == [1, 1]
    assert context_of_samples(0, 2) is None
    with pytest.raises(ValueError, match="knows the classes 0 … 2; got 3"):
        context_of_samples(3, 2, label=3)
    with pytest.raises(ValueError, match="knows no classes: it was not trained with labels; got 0"):
        context_of_samples(0, 2, label=0)
