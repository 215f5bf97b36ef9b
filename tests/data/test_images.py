import pytest
import torch

from inverse_flow.data import ImageData, ImageSet
from inverse_flow.data.images import class_number


def labelled(*labels: int, size: int = 4) -> ImageSet:
    images = torch.zeros(len(labels), 1, size, size, dtype=torch.uint8)
    return ImageSet(images, torch.tensor(labels, dtype=torch.long), torch.arange(len(labels)))


def test_wrong_types_and_lengths_are_refused() -> None:
    images, rows = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(2)
    with pytest.raises(ValueError, match=r"got \(2, 1, 4, 4\) and torch.float32"):
        ImageSet(images.float(), rows, rows)
    with pytest.raises(ValueError, match=r"got \(1, 4, 4\)"):
        ImageSet(images[0], rows, rows)
    with pytest.raises(ValueError, match=r"got \(2, 2, 1\)"):
        ImageSet(images, rows, rows[:1])


def test_sets_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="some has no test images"):
        ImageData("some", labelled(0), labelled())
    with pytest.raises(ValueError, match=r"some: test images are \(1, 5, 5\), train images \(1, 4, 4\)"):
        ImageData("some", labelled(0), labelled(0, size=5))
    with pytest.raises(ValueError, match=r"some: labels must be from 0 to 1 .*, got 2"):
        ImageData("some", labelled(0, 2), labelled(0), class_names=("a", "b"))
    with pytest.raises(ValueError, match="got -2"):
        ImageData("some", labelled(0, 1), labelled(-2))


def test_classes_are_counted_by_their_names_or_their_labels() -> None:
    assert ImageData("some", labelled(0, 1), labelled(4)).classes == 5
    assert ImageData("some", labelled(0, 1), labelled(0), class_names=("a", "b", "c")).classes == 3
    assert ImageData("some", labelled(0, 1), labelled(-1), class_names=("a", "b", "c")).classes == 0


@pytest.mark.parametrize(
    ("text", "names", "number"),
    [
        ("Shirt", ("Coat", "Shirt"), 1),
        ("shirt", ("Coat", "Shirt"), 1),
        ("shirt", ("shirt", "Shirt"), 0),
        ("1", ("Coat", "Shirt"), 1),
        ("1", ("1", "2"), 0),  # a name goes before a number
        ("1", (), 1),
    ],
)
def test_a_class_is_told_by_its_name_or_number(text: str, names: tuple[str, ...], number: int) -> None:
    assert class_number(text, 2, names) == number


def test_unknown_classes_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"knows the classes Coat \(0\), Shirt \(1\); got hat"):
        class_number("hat", 2, ("Coat", "Shirt"))
    with pytest.raises(ValueError, match=r"knows the classes 0 … 2; got 3"):
        class_number("3", 3)
    with pytest.raises(ValueError, match="knows no classes: it was not trained with labels; got 0"):
        class_number("0", 0)
