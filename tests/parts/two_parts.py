"""Run by torchrun in two processes: each trains one part. Also holds what the tests compare them with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from inverse_flow.models import InverseFlow
from inverse_flow.parts import PartsConfig, fit_parts
from inverse_flow.training import TrainConfig, Trainer, checkpoint
from inverse_flow.training.workers import connect

# 12 steps by parts, in two meetings and a half, and 4 of the finish.
CONFIG = TrainConfig(
    steps=16, batch_size=5, learning_rate=3e-3, warmup_steps=3, flip=True, evaluate_every=5, decay_at=(0.5,),
    validation=0, parts=PartsConfig("blocks", 2, "simultaneous", finish=0.25, learning_rates=(3e-3, 2e-3)),
)  # fmt: skip
BY_PARTS = 12
# Everything in torch.distributed that sends a tensor.
SENDING = ("send", "isend", "all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter", "reduce_scatter")


def images() -> Tensor:
    """Smooth gradients, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.rand(20, 2, 1, 1, generator=generator)
    ramp = torch.linspace(0, 1, 8)
    return (127 * (slopes[:, :1] * ramp + slopes[:, 1:] * ramp[:, None])).byte()


def trainer(folder: Path | None) -> Trainer:
    torch.manual_seed(1)
    return Trainer(InverseFlow((1, 8, 8), levels=2, steps=2, hidden=4, logit_margin=1e-3), images(), CONFIG, folder)


def watched(messages: list[tuple[str, int, int]]) -> None:
    """From now on every call that sends a tensor adds its name, its destination and the tensor's size."""

    def spy(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tensor: Any, *arguments: Any, **options: Any) -> Any:
            messages.append((name, options.get("dst", -1), tensor.numel() if isinstance(tensor, Tensor) else -1))
            return call(tensor, *arguments, **options)

        return wrapped

    for name in SENDING:
        setattr(distributed, name, spy(name, getattr(distributed, name)))


def main(folder: Path) -> None:
    with connect("cpu") as (workers, _):
        messages: list[tuple[str, int, int]] = []
        bits: list[tuple[int, float]] = []
        watched(messages)
        run = trainer(folder)
        fit_parts(run, lambda step, value: bits.append((step, value)))
        if workers.first:
            checkpoint.save(folder / "parts.pt", checkpoint.load(folder))
            run.fit()
        seen = {"messages": messages, "bits": bits, "model": run.model.state_dict()}
        torch.save(seen, folder / f"rank{workers.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
