"""Two inverse convolutions, 16 parameters, in a classifier: how often is it right, and what do the two bring?

    python benchmarks/classifier.py --data MNIST/raw                 with them and without, one seed
    python benchmarks/classifier.py --data MNIST/raw --seeds 3 --json benchmarks/results/classifier.json

Both classifiers have the same head, the same batches and as many steps. Accuracy is that of the last weights on the
test images, which choose nothing; its standard error is that of a share of this number of images. The paper reports
97.6 % on MNIST.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from harness import Report, Table, parser
from torch import Tensor

from inverse_flow.data import ImageSet, load
from inverse_flow.models import InverseConvClassifier

WITH, WITHOUT = "with inverse convs", "without"
PAPER_ACCURACY, TARGET = 0.976, 0.98
EVALUATION_BATCH = 500


def standardize(images: Tensor, mean: float, deviation: float) -> Tensor:
    return (images.float() / 255 - mean) / deviation


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """The images of a batch, moved together by at most ``most`` pixels in each direction; zeros come in."""
    down, right = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    height, width = images.shape[2:]
    padded = F.pad(images, (most,) * 4)
    return padded[:, :, most - down : most - down + height, most - right : most - right + width]


def accuracy(model: InverseConvClassifier, images: Tensor, labels: Tensor) -> float:
    right = 0
    for start in range(0, len(images), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        right += int((model.predict(images[rows]) == labels[rows]).sum())
    return right / len(images)


def train(
    train_set: ImageSet, test_set: ImageSet, seed: int, settings: argparse.Namespace, *, inverse_convs: bool
) -> dict[str, Any]:
    """One classifier, trained and measured."""
    device = settings.device
    torch.manual_seed(seed)
    classes = int(train_set.labels.max()) + 1
    model = InverseConvClassifier(train_set.image_shape, classes, settings.hidden, inverse_convs=inverse_convs)
    model.to(device)
    scaled = train_set.images.float() / 255
    mean, deviation = float(scaled.mean()), float(scaled.std())
    test_images = standardize(test_set.images, mean, deviation).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    steps = settings.epochs * (len(train_set) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
    started, curve = time.perf_counter(), []
    for epoch in range(settings.epochs):
        order = torch.randperm(len(train_set), generator=generator)
        for rows in order[: len(order) // settings.batch_size * settings.batch_size].split(settings.batch_size):
            images = standardize(shifted(train_set.images[rows], settings.shift, generator), mean, deviation)
            loss = F.cross_entropy(model(images.to(device)), train_set.labels[rows].to(device))
            if not torch.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss.item()} in epoch {epoch + 1}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        curve.append(accuracy(model, test_images, test_set.labels.to(device)))
        print(f"  epoch {epoch + 1}: {curve[-1]:.2%}", flush=True)
    return {
        "accuracy": curve[-1],
        "standard_error": math.sqrt(curve[-1] * (1 - curve[-1]) / len(test_set)),
        "accuracy_by_epoch": curve,
        "inverse_conv_parameters": model.num_inverse_conv_parameters,
        "inverse_conv_weights": [layer.weight.flatten().tolist() for layer in model.inverse_convs],
        "parameters": model.num_parameters,
        "seconds": time.perf_counter() - started,
        "seed": seed,
    }


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--data", default="embedded", help="a folder with idx files, or the embedded slice")
    made.add_argument("--epochs", type=int, default=15)
    made.add_argument("--batch-size", type=int, default=100)
    made.add_argument("--learning-rate", type=float, default=3e-3, help="the highest of the one cycle")
    made.add_argument("--hidden", type=int, default=256)
    made.add_argument("--shift", type=int, default=1, help="the most pixels by which training images are moved")
    made.add_argument("--seeds", type=int, default=1)
    settings = made.parse_args(given)
    report, data = Report("classifier", settings), load(settings.data)
    print(f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images")
    report.set(data=data.name, paper=PAPER_ACCURACY, target=TARGET)
    runs: dict[str, list[dict[str, Any]]] = {WITH: [], WITHOUT: []}
    for seed in range(settings.seeds):
        for name, found in runs.items():
            print(f"{name}, seed {seed}")
            found.append(train(data.train, data.test, seed, settings, inverse_convs=name == WITH))
            report.set(runs=runs)
    means = {name: statistics.fmean(run["accuracy"] for run in found) for name, found in runs.items()}
    report.set(mean_accuracy=means)
    columns = {
        "": "{name}", "accuracy": "{mean:.2%}", "standard error": "{standard_error:.2%}",
        "inverse-conv parameters": "{inverse_conv_parameters}", "parameters": "{parameters:,}",
        "seconds": "{seconds:.0f}",
    }  # fmt: skip
    print()
    Table(columns).add(*(found[0] | {"name": name, "mean": means[name]} for name, found in runs.items()))
    print(f"MNIST: the paper reports {PAPER_ACCURACY:.1%}, the target is at least {TARGET:.0%}")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
