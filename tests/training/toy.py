"""Small images, runs, a faulty layer and bases that the tests of training and of the parts share."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from inverse_flow.flows import FlowLayer
from inverse_flow.flows.base import zero_logdet
from inverse_flow.training import StepReport, Trainer


def images(count: int = 21) -> Tensor:
    """Smooth gradients, so that there is something to learn: (count, 1, 4, 4)."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.rand(count, 2, 1, 1, generator=generator)
    ramp = torch.linspace(0, 1, 4)
    return (127 * (slopes[:, :1] * ramp + slopes[:, 1:] * ramp[:, None])).byte()


def run(trainer: Trainer, interrupt_at: int | None = None) -> list[StepReport]:
    """The reports of a run, in which Ctrl-C is pressed at a step."""
    reports: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        reports.append(report)
        if report.step == interrupt_at:
            signal.raise_signal(signal.SIGINT)

    trainer.fit(on_step)
    return reports


def losses(reports: list[StepReport]) -> list[tuple[int, float, float, float | None, dict[str, float]]]:
    """What two runs have in common if one is the other, resumed."""
    return [(r.step, r.loss, r.grad_norm, r.validation, dict(r.columns)) for r in reports]


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in two processes of one thread each."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


class Fault(FlowLayer):
    """The identity, but for a loss, or a gradient, that is NaN."""

    def __init__(self, in_gradient: bool) -> None:
        super().__init__()
        self.in_gradient = in_gradient
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.in_gradient:  # √w at 0: finite, with an infinite slope
            return x + self.weight.sqrt(), zero_logdet(x)
        return x * torch.nan, zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z, zero_logdet(z)


class UniformBase(nn.Module):
    """The uniform density on [0, 1)^D."""

    def log_prob(self, latents: tuple[Tensor, ...], context: Tensor | None = None) -> Tensor:
        return latents[0].new_zeros(latents[0].shape[0])


class LogisticBase(nn.Module):
    """Independent standard logistic latents."""

    def log_prob(self, latents: tuple[Tensor, ...], context: Tensor | None = None) -> Tensor:
        z = latents[0].flatten(1)
        return (-z - 2 * nn.functional.softplus(-z)).sum(1)
