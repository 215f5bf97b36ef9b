"""Started by ``torchrun`` in test_workers.py: trains a model in several processes and leaves what each one saw."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inverse_flow.models import InverseFlow
from inverse_flow.training import EndToEnd, StepResult, TrainConfig, Trainer, Workers, checkpoint
from inverse_flow.training.workers import connect

# No clipping, so that the gradients of the first step are as they were computed. The rate is low, since Adam makes a
# whole step of a gradient that is nothing but rounding.
CONFIG = TrainConfig(
    steps=5, batch_size=6, learning_rate=1e-4, warmup_steps=2, flip=True, validation=4, evaluate_every=2,
    max_grad_norm=1e6,
)  # fmt: skip


class Watched(EndToEnd):
    """Keeps the gradients and the size of every batch."""

    def step(self, images: Tensor, context: Tensor | None = None, **options: Any) -> StepResult:
        result = super().step(images, context, **options)
        self.gradients = [*getattr(self, "gradients", []), [p.grad.clone() for p in self.model.parameters()]]
        self.batch = len(images)
        return result


def images() -> Tensor:
    return torch.randint(0, 256, (25, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def model(seed: int = 0) -> InverseFlow:
    torch.manual_seed(seed)
    return InverseFlow((1, 4, 4), levels=2, steps=1, hidden=4)


def observe(workers: Workers, folder: Path) -> dict[str, Any]:
    """A whole run, and the same run cut after three steps and resumed."""
    losses: dict[str, list[tuple[float, float | None]]] = {"uncut": [], "cut": []}

    def note(name: str) -> Any:
        return lambda report: losses[name].append((report.loss, report.validation))

    # The seeds differ: the first process decides.
    trainer = Trainer(model(workers.rank), images(), CONFIG, folder / "uncut", method=Watched, workers=workers)
    trainer.fit(note("uncut"))
    cut = Trainer(model(workers.rank), images(), replace(CONFIG, steps=3), folder / "cut", workers=workers)
    cut.fit(note("cut"))
    workers.wait()
    content = checkpoint.load(folder / "cut")
    Trainer.resume(content, images(), workers=workers, steps=5).fit(note("cut"))
    return {
        "gradients": trainer.method.gradients,
        "batch": trainer.method.batch,
        "weights": trainer.model.state_dict(),
        "losses": losses,
        "largest": workers.largest(torch.tensor([workers.rank, -workers.rank])).tolist(),
        "average": workers.average(torch.tensor(float(workers.rank))).item(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with connect("cpu") as (workers, device):
        assert device == "cpu"
        torch.save(observe(workers, folder), folder / f"rank{workers.rank}.pt")
        # A writer among the others would be found by its own folder.
        Trainer(model(), images(), replace(CONFIG, steps=0), folder / f"own{workers.rank}", workers=workers).fit()
