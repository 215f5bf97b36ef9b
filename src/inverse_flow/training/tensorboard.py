"""The log of a run for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from inverse_flow.training.log import StepReport

FOLDER = "tensorboard"
SCALARS = ("loss", "bits_per_dim", "grad_norm", "learning_rate", "images_per_second")


class TensorBoardLog:
    """Writes every report, called with it, as scalars in the folder ``tensorboard`` of a run.

    Args:
        folder: of the run.
        steps_done: what a former run wrote of later steps is dropped, since a resumed run does them again.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=steps_done + 1 if steps_done else None)

    def __call__(self, report: StepReport) -> None:
        for name in SCALARS:
            self._writer.add_scalar(f"train/{name}", getattr(report, name), report.step)
        for name, value in report.columns.items():
            self._writer.add_scalar(f"method/{name}", value, report.step)
        if report.validation is not None:
            self._writer.add_scalar("validation/bits_per_dim", report.validation, report.step)
            self._writer.flush()

    def image(self, grid: Tensor, step: int) -> None:
        """A picture (H, W, 3) in uint8."""
        self._writer.add_image("samples", grid, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
