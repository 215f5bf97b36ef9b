"""Quality of samples: each figure against its definition or a closed form, and what it says of good and bad samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from inverse_flow.data import ImageData, ImageSet, load_embedded
from inverse_flow.models import Glow
from inverse_flow.training.quality import Judge, Quality, measure, measure_quality, quality_of
from inverse_flow.training.quality.distances import (
    BLOCKS,
    frechet,
    frechet_distance,
    kernel_distance,
    vendi,
    vendi_score,
)
from inverse_flow.training.quality.features import FeatureNetwork, load_network, random_network, save_weights
from inverse_flow.training.quality.measure import recognise
from inverse_flow.training.quality.neighbours import nearest_training_share, neighbour_measures


def normal(rows: int, columns: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(rows: int, columns: int, seed: int) -> Tensor:
    """Rows with mean 0 and covariance I exactly."""
    values = normal(rows, columns, seed)
    values = values - values.mean(0)
    return values @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(values.mT))).mT


def test_the_frechet_distance_is_that_of_two_gaussians() -> None:
    """Of covariances that commute, it is |μ|² + Σ (√a − √b)²; of others, by the square root of a matrix."""
    a, b = whitened(50, 3, 0), whitened(60, 3, 1)
    shift, scale = torch.tensor([1.0, 2, 0]), torch.tensor([2.0, 1, 0.5])
    wanted = float(shift.square().sum() + (scale - 1).square().sum())
    assert frechet(a, b * scale + shift) == pytest.approx(wanted)
    mix = normal(3, 3, 2)
    first, second = mix @ mix.mT, torch.diag(scale.double() ** 2)
    values, vectors = torch.linalg.eig(first @ second)
    root = (vectors * values.sqrt() @ torch.linalg.inv(vectors)).real
    wanted = float((first + second - 2 * root).trace())
    assert frechet(a @ mix.mT, b * scale) == pytest.approx(wanted)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_knows_its_error() -> None:
    """About the spread of the figure over sets drawn anew."""
    found = [frechet_distance(normal(200, 4, 2 * s) + 0.5, normal(200, 4, 2 * s + 1)) for s in range(40)]
    spread = float(torch.tensor([value.value for value in found]).std())
    assert 0.6 * spread < sum(value.error for value in found) / len(found) < 1.7 * spread


def test_the_kernel_distance_is_that_of_its_definition() -> None:
    a, b = normal(2 * BLOCKS, 2, 0), normal(2 * BLOCKS, 2, 1)

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 2 + 1) ** 3)

    blocks = []
    for i in range(0, 2 * BLOCKS, 2):
        (p, q), (r, s) = a[i : i + 2], b[i : i + 2]
        blocks.append(k(p, q) + k(r, s) - (k(p, r) + k(p, s) + k(q, r) + k(q, s)) / 2)
    found = kernel_distance(a, b)
    assert found.value == pytest.approx(sum(blocks) / BLOCKS)
    assert found.error == pytest.approx(float(torch.tensor(blocks).double().std()) / math.sqrt(BLOCKS))
    with pytest.raises(ValueError, match="at least 20 rows, got 19"):
        kernel_distance(a[:19], b)


def test_the_kernel_distance_is_unbiased() -> None:
    """Of one distribution 0 on average, which no distance with a bias is."""
    found = torch.tensor([kernel_distance(normal(100, 3, 2 * s), normal(100, 3, 2 * s + 1)) for s in range(60)])
    mean, error = found[:, 0].mean(), found[:, 0].std() / math.sqrt(60)
    assert abs(mean) < 3 * error
    assert kernel_distance(normal(100) + 1, normal(100, seed=1)).value > 0.5


@pytest.mark.parametrize("kinds", [1, 2, 5])
def test_the_vendi_score_counts_kinds(kinds: int) -> None:
    """Images of n kinds that have nothing in common count as n, however long the features."""
    features = torch.eye(6)[torch.arange(60) % kinds] * torch.arange(1, 61)[:, None]
    assert vendi(features) == pytest.approx(kinds)
    assert vendi_score(features).error < 0.1 * kinds


def test_neighbour_measures_are_those_of_their_definitions() -> None:
    real, samples, k = normal(30), normal(40, seed=1) * 1.5, 3

    def distance(x: Tensor, y: Tensor) -> float:
        return float((x - y).norm())

    def radius(points: Tensor, i: int) -> float:
        return sorted(distance(points[i], other) for other in points)[k]

    real_radius = [radius(real, i) for i in range(30)]
    sample_radius = [radius(samples, j) for j in range(40)]
    inside = [[distance(r, s) <= real_radius[i] for i, r in enumerate(real)] for s in samples]
    wanted = {
        "precision": sum(any(row) for row in inside) / 40,
        "recall": sum(any(distance(r, s) <= sample_radius[j] for j, s in enumerate(samples)) for r in real) / 30,
        "density": sum(map(sum, inside)) / k / 40,
        "coverage": sum(any(row[i] for row in inside) for i in range(30)) / 30,
    }
    found = neighbour_measures(real, samples, k)
    assert {name: value.value for name, value in found.items()} == pytest.approx(wanted)
    assert 0 < wanted["precision"] < 1
    assert found["precision"].error == pytest.approx(
        math.sqrt(wanted["precision"] * (1 - wanted["precision"]) / 39), rel=1e-6
    )
    with pytest.raises(ValueError, match="3 neighbours need more images than 3"):
        neighbour_measures(real[:3], samples, k)


def test_what_neighbours_say_of_bad_samples() -> None:
    real = normal(300)
    far = neighbour_measures(real, normal(300, seed=1) + 20)
    assert all(value.value == 0 for value in far.values())
    one_kind = neighbour_measures(real, real[:1] + 1e-3 * normal(300, seed=1))
    assert one_kind["precision"].value == 1
    assert one_kind["recall"].value < 0.1
    assert one_kind["coverage"].value < 0.1
    fresh = neighbour_measures(real, normal(300, seed=2))
    assert min(value.value for value in fresh.values()) > 0.85


def test_copies_of_training_images_are_seen() -> None:
    train, test, fresh = (normal(400, 5, seed) for seed in range(3))
    share = nearest_training_share(fresh, train, test)
    assert abs(share.value - 0.5) < 3 * share.error
    assert nearest_training_share(train + 1e-3 * fresh, train, test).value == 1
    assert nearest_training_share(fresh, train, train).value == 0.5
    with pytest.raises(ValueError, match="got 400 and 3"):
        nearest_training_share(fresh, train, test[:3])


def test_weights_come_back_in_half_precision(tmp_path: Any) -> None:
    network = random_network()
    save_weights(network, tmp_path / "weights.npz")
    again = load_network(tmp_path / "weights.npz")
    images = load_embedded().test.images[:4]
    torch.testing.assert_close(again(images), network(images), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(random_network()(images), network(images), rtol=0, atol=0)


@pytest.fixture(scope="module")
def slice_quality() -> dict[str, Quality]:
    """Of test images, of noise, and of training images themselves."""
    data = load_embedded()
    some = ImageData("slice", data.train[:200], data.test[:200])
    noise = torch.randint(0, 256, (200, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    samples = {"test": some.test.images, "noise": noise, "copies": some.train.images}
    return {name: measure_quality(images, some) for name, images in samples.items()}


def test_the_packages_classifier_knows_its_images(slice_quality: dict[str, Quality]) -> None:
    found = slice_quality["test"]
    assert found.classifier == "fashion-mnist"
    assert found.accuracy > 0.85
    assert found.images == 200


def test_figures_tell_good_samples_from_bad(slice_quality: dict[str, Quality]) -> None:
    good, bad, copies = (slice_quality[name] for name in ("test", "noise", "copies"))
    for network in ("classifier", "random"):
        samples, floor = good.figures[network]["samples"], good.figures[network]["floor"]
        for name, value in floor.items():  # the same images in another order
            assert samples[name].value == pytest.approx(value.value, rel=0.5, abs=0.02 if "kernel" in name else 1e-6)
        assert bad.figures[network]["samples"]["Fréchet distance"].value > 3 * floor["Fréchet distance"].value
        assert bad.figures[network]["samples"]["kernel distance"].value > floor["kernel distance"].value
        assert bad.figures[network]["samples"]["coverage"].value < 0.2
    assert copies.nearest_training_share.value == 1
    assert good.nearest_training_share.value == 0
    assert copies.figures["classifier"]["samples"]["Fréchet distance"].value == pytest.approx(0, abs=1e-3)


def test_the_figures_say_what_they_are_not(slice_quality: dict[str, Quality]) -> None:
    told = slice_quality["test"].to_dict()
    assert told["caveat"] == measure.CAVEAT
    assert "Not FID" in told["caveat"]
    assert set(told["figures"]["random"]["floor"]["recall"]) == {"value", "error"}
    assert slice_quality["test"].rows()[0][0] == "Fréchet distance"
    assert {len(row) for row in slice_quality["test"].rows()} == {5}


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (33.617, 2.2, "34 ± 2"),
        (336.17, 22, "336 ± 22"),
        (0.3726, 0.031, "0.37 ± 0.03"),
        (-0.063, 0.096, "-0.06 ± 0.10"),
        (0.0, 0.009, "0.000 ± 0.009"),
        (5.983e-05, 3.1e-06, "6.0e-5 ± 3e-6"),
        (-3.1e-08, 8.2e-08, "-3e-8 ± 8e-8"),
        (0.0, 8.2e-08, "0 ± 8e-8"),
        (1.00342, 4.1e-04, "1.0034 ± 0.0004"),
        (1.0, 0.0, "1"),
        (0.5, math.nan, "0.5"),
    ],
)
def test_a_figure_is_shown_to_the_digit_that_its_error_leaves_it(value: float, error: float, shown: str) -> None:
    share = measure.Value(value, error)
    assert Quality(1, "mnist", 1.0, {"classifier": {"samples": {}, "floor": {}}}, share).rows()[-1][1] == shown


def test_images_that_no_classifier_knows_are_refused() -> None:
    data = load_embedded()
    part = data.test[:100]
    mixed = ImageData("mixed", part, ImageSet(part.images, part.labels.flip(0), part.indices))
    with pytest.raises(ValueError, match=r"test images of mixed they are right about: .*fashion-mnist \d+ %"):
        measure_quality(part.images, mixed)
    small = ImageSet(part.images[:, :, ::2, ::2], part.labels, part.indices)
    with pytest.raises(ValueError, match=r"shape \(1, 28, 28\), small has \(1, 14, 14\)"):
        measure_quality(part.images, ImageData("small", small, small))
    for samples, given in ((part.images.float(), "torch.float32"), (small.images, r"\(100, 1, 14, 14\)")):
        with pytest.raises(ValueError, match=rf"samples must be \(N, 1, 28, 28\) in uint8, got .*{given}"):
            measure_quality(samples, data)


def test_features_are_those_before_the_last_layer() -> None:
    network, images = FeatureNetwork().eval(), load_embedded().test.images[:3]
    torch.testing.assert_close(network.head(network.features(images)), network(images))
    assert network.features(images).shape == (3, 128)


def test_a_judge_measures_many_sets_alike() -> None:
    """Those that are measured later find the same real images, and get the figures they would get alone."""
    data = load_embedded()
    judge, images = Judge(data, 40), data.test.images
    for samples in (images[:40], images[40:100]):
        assert judge.measure(samples) == measure_quality(samples, data, most=40)
    with pytest.raises(ValueError, match="as real images are needed, 40, got 39"):
        judge.measure(images[:39])


def test_too_few_images_are_refused() -> None:
    data = load_embedded()
    for samples, most in ((data.test.images[:1], 100), (data.test.images, -5)):
        with pytest.raises(ValueError, match="at least 20 images of each kind"):
            measure_quality(samples, data, most=most)


def test_what_cannot_be_measured_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for work in ("load_network", "draw"):
        monkeypatch.setattr(measure, work, lambda *args, **options: pytest.fail("work was begun"))
    data = load_embedded()
    few = ImageData("few", data.train, data.test[:19])
    with pytest.raises(ValueError, match="at least 20 images of each kind, got 19"):
        recognise(few)
    with pytest.raises(ValueError, match=r"images of shape \(1, 28, 28\), the model has \(1, 4, 4\)"):
        quality_of(Glow((1, 4, 4), 1, 1, 2), data)
