"""All figures of a set of samples, in the features of a classifier and of a random network."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inverse_flow.data import ImageData, ImageSet
from inverse_flow.models import ImageFlow
from inverse_flow.training.figures import to_uint8
from inverse_flow.training.metrics import Watch, unwatched
from inverse_flow.training.quality.distances import BLOCKS, frechet_distance, kernel_distance, vendi_score
from inverse_flow.training.quality.features import (
    BATCH,
    IMAGE_SHAPE,
    NAMES,
    FeatureNetwork,
    load_network,
    random_network,
    weights_file,
)
from inverse_flow.training.quality.neighbours import nearest_training_share, neighbour_measures
from inverse_flow.training.quality.value import Value
from inverse_flow.training.samples import draw

# As many images of each kind as there are, up to this.
MOST_IMAGES = 10_000
# The least share of the test images that a classifier must be right about, for its features to be of use.
LEAST_ACCURACY = 0.8
CAVEAT = (
    "Not FID: the features are those of a small classifier of these very images, and of a random network, so figures "
    "compare only with others of the same features and number of images. The floor is that of test images; samples as "
    "good as real images reach it, not 0. A classifier sees what tells classes apart, and little else."
)

Figures = dict[str, Value]


@dataclass(frozen=True)
class Quality:
    """The figures of samples, each beside those of as many test images, both against as many training images.

    Attributes:
        images: of each kind.
        classifier: whose features are used, by the images it knows: "mnist" or "fashion-mnist".
        accuracy: of that classifier, on the test images.
        figures: by the network ("classifier", "random"), by whose they are ("samples", "floor"), by name.
        nearest_training_share: of the samples whose nearest real image, by pixels, is a training image, among as many
            test images; one half where nothing is remembered.
        caveat: what the figures are not.
    """

    images: int
    classifier: str
    accuracy: float
    figures: dict[str, dict[str, Figures]]
    nearest_training_share: Value
    caveat: str = CAVEAT

    def to_dict(self) -> dict[str, Any]:
        """The figures, each as its value and its error."""
        figures = {
            network: {
                whose: {name: value._asdict() for name, value in found.items()} for whose, found in each.items()
            }
            for network, each in self.figures.items()
        }  # fmt: skip
        return asdict(self) | {"figures": figures, "nearest_training_share": self.nearest_training_share._asdict()}

    def rows(self) -> list[tuple[str, ...]]:
        """The name of a figure, and it of the samples and of the floor, by the classifier's features, then by the
        random ones."""
        columns = [each[whose] for each in self.figures.values() for whose in ("samples", "floor")]
        found = [(name, *(_shown(column[name]) for column in columns)) for name in columns[0]]
        return [*found, ("nearest is a training image", _shown(self.nearest_training_share), "0.5", "–", "–")]


def _shown(figure: Value) -> str:
    """A figure to the digit that its error leaves it."""
    value, error = figure
    if not 0 < error < math.inf:
        return f"{value:.4g}"
    place, largest = (math.floor(math.log10(size)) for size in (error, max(abs(value), error)))
    if largest >= -3:
        return f"{value:.{max(0, -place)}f} ± {error:.{max(0, -place)}f}"
    return f"{value:.{largest - place}e} ± {error:.0e}".replace("e-0", "e-").replace("e+00", "")


class Judge:
    """Real images, the features of both networks of them, and the floor, for any number of sets of samples.

    Args:
        data: as for :func:`measure_quality`.
        most: images of each kind, of which there are as many as of the fewest: ``count``.
        seed: of the choice of real images.

    Raises:
        ValueError: as :func:`measure_quality`, of the data.
    """

    def __init__(self, data: ImageData, most: int = MOST_IMAGES, seed: int = 0) -> None:
        self.recognised = recognise(data)
        self.count = _enough(min(most, len(data.train), len(data.test)))
        generator = torch.Generator().manual_seed(seed)
        self.train, self.test = (
            part.images[torch.randperm(len(part), generator=generator)[: self.count]]
            for part in (data.train, data.test)
        )
        self.networks = {"classifier": self.recognised.network, "random": random_network()}
        self.real = {name: features_of(network, self.train) for name, network in self.networks.items()}
        self.floor = {
            name: compare(features_of(network, self.test), self.real[name]) for name, network in self.networks.items()
        }

    def measure(self, samples: Tensor) -> Quality:
        """The quality of the first ``count`` samples, (N, 1, 28, 28) in uint8.

        Raises:
            ValueError: samples of another shape, or fewer.
        """
        _check(samples)
        if len(samples) < self.count:
            raise ValueError(f"as many samples as real images are needed, {self.count}, got {len(samples)}")
        samples = samples[: self.count]
        figures = {
            name: {"samples": compare(features_of(network, samples), self.real[name]), "floor": self.floor[name]}
            for name, network in self.networks.items()
        }
        share = nearest_training_share(*(images.flatten(1).float() for images in (samples, self.train, self.test)))
        return Quality(self.count, self.recognised.name, self.recognised.accuracy, figures, share)


def measure_quality(samples: Tensor, data: ImageData, *, most: int = MOST_IMAGES, seed: int = 0) -> Quality:
    """Measures samples against the training images of ``data``, beside its test images; many sets by a :class:`Judge`.

    Args:
        samples: (N, 1, 28, 28), uint8.
        data: images that a classifier of the package knows, or a part of them, with labels.
        most: images of each kind, of which there are as many as of the fewest.
        seed: of the choice of training images.

    Raises:
        ValueError: samples or data of another shape; images that no classifier knows.
    """
    _check(samples)
    return Judge(data, min(most, len(samples)), seed).measure(samples)


def quality_of(
    model: ImageFlow, data: ImageData, *, classes: int = 0, temperature: float = 1.0, watch: Watch = unwatched
) -> Quality:
    """:func:`measure_quality` of samples of a model, as many as there are test images in ``data``.

    Args:
        model: of images (1, 28, 28).
        data: as for :func:`measure_quality`.
        classes: of a conditional model, sampled in turn; 0 for another.
        temperature: of the samples.
        watch: told how many of them are drawn.

    Raises:
        ValueError: as :func:`measure_quality`.
    """
    if model.event_shape != IMAGE_SHAPE:
        raise ValueError(f"quality is measured on images of shape {IMAGE_SHAPE}, the model has {model.event_shape}")
    judge = Judge(data)  # before anything is drawn for it
    drawn = draw(model, judge.count, 0, classes=classes, temperature=temperature, watch=watch)
    return judge.measure(to_uint8(drawn.images))


def compare(found: Tensor, real: Tensor) -> Figures:
    """All figures of features against those of real images."""
    return {
        "Fréchet distance": frechet_distance(found, real),
        "kernel distance": kernel_distance(found, real),
        **neighbour_measures(real, found),
        "Vendi score": vendi_score(found),
    }


def _check(samples: Tensor) -> None:
    if samples.dtype != torch.uint8 or tuple(samples.shape[1:]) != IMAGE_SHAPE:
        shape, dtype = tuple(samples.shape), samples.dtype
        raise ValueError(f"samples must be (N, {', '.join(map(str, IMAGE_SHAPE))}) in uint8, got {shape} in {dtype}")


class Recognised(NamedTuple):
    """A classifier that knows some images, and the share of them that it is right about."""

    name: str
    network: FeatureNetwork
    accuracy: float


def recognise(data: ImageData) -> Recognised:
    """The classifier that is right about the test images of ``data``.

    Raises:
        ValueError: images of another shape, without labels, too few, or of which no classifier knows the classes.
    """
    if data.test.image_shape != IMAGE_SHAPE:
        raise ValueError(
            f"quality is measured on images of shape {IMAGE_SHAPE}, {data.name} has {data.test.image_shape}"
        )
    _enough(min(len(data.train), len(data.test)))
    networks = {name: load_network(weights_file(name)) for name in NAMES}
    found = {name: accuracy_of(network, data.test) for name, network in networks.items()}
    best = max(found, key=lambda name: found[name])
    if found[best] < LEAST_ACCURACY:
        told = ", ".join(f"{name} {share:.0%}".replace("%", " %") for name, share in found.items())
        raise ValueError(
            f"quality is measured on labelled images that a classifier of the package knows; of the test images of "
            f"{data.name} they are right about: {told}"
        )
    return Recognised(best, networks[best], found[best])


def _enough(count: int) -> int:
    """``count``, the number of images of each kind, unless it is too small to measure anything with."""
    if count < 2 * BLOCKS:
        raise ValueError(f"quality needs at least {2 * BLOCKS} images of each kind, got {count}")
    return count


@torch.no_grad()
def accuracy_of(network: FeatureNetwork, images: ImageSet) -> float:
    """The share of images whose label a classifier finds."""
    right = [network(batch).argmax(1) for batch in images.images.split(BATCH)]
    return float((torch.cat(right) == images.labels).double().mean())


@torch.no_grad()
def features_of(network: FeatureNetwork, images: Tensor) -> Tensor:
    """(N, D)."""
    return torch.cat([network.features(batch) for batch in images.split(BATCH)])
