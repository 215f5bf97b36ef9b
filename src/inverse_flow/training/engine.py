"""The training loop, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inverse_flow import models
from inverse_flow.flows import NonFiniteError, detect_nonfinite
from inverse_flow.models import InverseFlow
from inverse_flow.training import checkpoint, seeding
from inverse_flow.training import log as logs
from inverse_flow.training.average import AveragedModel
from inverse_flow.training.batches import Batches
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.interrupt import deferred_interrupt
from inverse_flow.training.log import CsvLog, StepReport
from inverse_flow.training.metrics import bits_per_dim, evaluate


class Stop(Enum):
    """Why a run ended."""

    STEPS = "all its steps are done"
    TIME = "its time is up"
    INTERRUPTED = "it was interrupted"


class Trainer:
    """Trains a flow on uint8 images by maximum likelihood, with Adam.

    The run's folder gets ``checkpoint.pt`` and ``log.csv``. A run that is cut anywhere, and gone on with from its
    checkpoint by :meth:`resume`, gives the losses of an uncut one: the batches are a function of the step, and all
    other state is in the checkpoint.

    Args:
        model: on the device to train on.
        images: (N, C, H, W), uint8. ``config.validation`` of them, drawn by the seed, are kept for validation.
        config: see :class:`TrainConfig`.
        folder: of the run; None to write nothing.
        extra: plain values to keep in the checkpoint, such as the name of the data.

    Raises:
        ValueError: no image is left to train on.
    """

    def __init__(
        self,
        model: InverseFlow,
        images: Tensor,
        config: TrainConfig,
        folder: Path | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        count = len(images) - config.validation
        if count < 1:
            raise ValueError(f"{config.validation} of {len(images)} images for validation leave none to train on")
        self.model = model
        self.config = config
        self.folder = folder
        self.extra = dict(extra or {})
        # Drawn, not cut off: files are often sorted by class.
        order = torch.randperm(len(images), generator=seeding.generator(config.seed, seeding.VALIDATION))
        self.batches = Batches(images[order[:count].sort().values], config)
        self.validation_images = images[order[count:].sort().values]
        self.averaged = AveragedModel(model, config.average_decay)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        self.stop: Stop | None = None

    @classmethod
    def resume(
        cls,
        content: Mapping[str, Any],
        images: Tensor,
        folder: Path | None = None,
        *,
        device: torch.device | str = "cpu",
        **changes: Any,
    ) -> Trainer:
        """The trainer of a checkpoint's content, as it was when that was written.

        ``changes`` replaces values of its :class:`TrainConfig`, such as ``minutes`` to train for longer.
        """
        config = TrainConfig.from_dict({**content["train_config"], **changes})
        model = models.build(content["model_description"]).to(device)
        trainer = cls(model, images, config, folder, content["extra"])
        trainer.load_state(content)
        return trainer

    def fit(self, on_step: Callable[[StepReport], None] | None = None) -> Stop:
        """Trains until the steps or the time are used up, or Ctrl-C is pressed; then saves the checkpoint.

        Raises:
            NonFiniteError: the loss is NaN or infinite; names the layer in which that arose.
            FloatingPointError: a gradient is; names the parameters.
        """
        log = CsvLog(self.folder / logs.FILE, self.step) if self.folder else None
        try:
            with deferred_interrupt() as interrupted:
                while (stop := self._stop(interrupted)) is None:
                    report = self._advance()
                    if log:
                        log.extend([report])
                    if on_step:
                        on_step(report)
                if stop is not Stop.INTERRUPTED and self.step % self.config.evaluate_every:
                    self._validate()  # the last weights have had no chance yet
                self.stop = stop
                self.save()
        finally:
            if log:
                log.close()
        return stop

    def result(self) -> InverseFlow:
        """The model with the best weights: those of the best validation, else the averaged ones."""
        model: InverseFlow = self.averaged.model
        if self.best is not None:
            model.load_state_dict(self.best["weights"])
        return model

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint: tensors and plain values only."""
        return {
            "model_description": models.describe(self.model),
            "train_config": self.config.to_dict(),
            "extra": self.extra,
            "model": self.model.state_dict(),
            "averaged": self.averaged.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "rng": torch.get_rng_state(),
        }

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Takes up where :meth:`state` left off."""
        self.model.load_state_dict(content["model"])
        self.averaged.model.load_state_dict(content["averaged"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.seconds, self.best = content["step"], content["seconds"], content["best"]
        torch.set_rng_state(content["rng"])  # for layers that draw random numbers themselves

    def save(self) -> None:
        if self.folder:
            checkpoint.save(self.folder / checkpoint.FILE, self.state())

    def _stop(self, interrupted: Callable[[], bool]) -> Stop | None:
        if interrupted():
            return Stop.INTERRUPTED
        if self.step >= self.config.steps:
            return Stop.STEPS
        if self.config.minutes is not None and self.seconds >= 60 * self.config.minutes:
            return Stop.TIME
        return None

    def _advance(self) -> StepReport:
        """One step, with the evaluation and the checkpoint that fall due after it."""
        started = time.perf_counter()
        epoch = self.batches.epoch(self.step)
        rate = self._set_learning_rate()
        loss, bits, grad_norm = self._train_step(self.batches(self.step))
        self.step += 1
        step_seconds = time.perf_counter() - started

        due = self.step % self.config.evaluate_every == 0
        validation = self._validate() if due else None
        self.seconds += time.perf_counter() - started
        if due:
            self.save()
        images_per_second = self.batches.batch_size / step_seconds
        return StepReport(self.step, epoch, self.seconds, loss, bits, grad_norm, rate, images_per_second, validation)

    def _set_learning_rate(self) -> float:
        warmth = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        rate = self.config.learning_rate * warmth
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _train_step(self, images: Tensor) -> tuple[float, float, float]:
        self.model.train()
        images = images.to(next(self.model.parameters()).device)
        log_prob = self.model.log_prob(images).mean()
        bits = bits_per_dim(log_prob, self.model.event_shape, self.config.bit_depth)
        if not torch.isfinite(bits):
            self._explain_loss(images, bits.item())
        self.optimizer.zero_grad()
        bits.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if not torch.isfinite(grad_norm):
            self._explain_gradient()
        self.optimizer.step()
        self.averaged.update(self.model, self.step)
        return -log_prob.item(), bits.item(), grad_norm.item()

    def _validate(self) -> float | None:
        if not len(self.validation_images):
            return None
        value = evaluate(self.averaged.model, self.validation_images, self.config.bit_depth)
        if self.best is None or value < self.best["bits_per_dim"]:
            weights = {name: tensor.clone() for name, tensor in self.averaged.model.state_dict().items()}
            self.best = {"bits_per_dim": value, "step": self.step, "weights": weights}
        return value

    @torch.no_grad()
    def _explain_loss(self, images: Tensor, loss: float) -> None:
        """Runs the batch again, layer by layer, to name the layer that gave the first NaN or infinity."""
        where = f"the loss of step {self.step + 1} is {loss}"
        try:
            with detect_nonfinite():
                self.model.log_prob(images)
        except NonFiniteError as error:
            raise NonFiniteError(error.path, f"{error.what}; {where}") from None
        raise FloatingPointError(f"{where}, though every layer gave finite values")

    def _explain_gradient(self) -> None:
        bad = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        raise FloatingPointError(f"the gradients of step {self.step + 1} are not finite: {', '.join(bad)}")
