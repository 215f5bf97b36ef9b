"""The training loop, in one process or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inverse_flow import models
from inverse_flow.flows.conditioner import arrange_for
from inverse_flow.models import ImageFlow
from inverse_flow.training import checkpoint, dequantizer, methods, seeding
from inverse_flow.training import log as logs
from inverse_flow.training.average import AveragedModel
from inverse_flow.training.batches import Batches
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.interrupt import deferred_interrupt
from inverse_flow.training.inverses import check_inverses
from inverse_flow.training.log import CsvLog, StepReport
from inverse_flow.training.method import MethodFactory
from inverse_flow.training.metrics import dequantize, evaluate
from inverse_flow.training.schedule import rate_factor
from inverse_flow.training.workers import Workers

ALONE = Workers()
# Images that each layer must give back at an evaluation.
CHECKED_IMAGES = 8


class Stop(Enum):
    """Why a run ended."""

    STEPS = "all its steps are done"
    TIME = "its time is up"
    PATIENCE = "its validation has stopped getting better"
    INTERRUPTED = "it was interrupted"


class Trainer:
    """Trains a flow on uint8 images by maximum likelihood.

    The run's folder gets ``checkpoint.pt`` and ``log.csv``. A run that is cut anywhere, and gone on with from its
    checkpoint by :meth:`resume`, gives the losses of an uncut one: the batches are a function of the step, and all
    other state is in the checkpoint.

    Args:
        model: on the device to train on. Variational dequantization puts its layer in front of the model's own.
        images: (N, C, H, W), uint8. ``config.validation`` of them, drawn by the seed, are kept for validation.
        config: see :class:`TrainConfig`.
        folder: of the run; None to write nothing.
        extra: plain values to keep in the checkpoint, such as the name of the data.
        context: one row an image, for a conditional model; None for no context.
        method: how a batch becomes an update, see :mod:`inverse_flow.training.method`; None for the one that the
            configuration asks for.
        workers: the processes that train together, see :class:`Workers`. Each is given all the images.

    Raises:
        ValueError: no image is left to train on; a batch that the processes cannot share evenly.
    """

    def __init__(
        self,
        model: ImageFlow,
        images: Tensor,
        config: TrainConfig,
        folder: Path | None = None,
        extra: Mapping[str, Any] | None = None,
        *,
        context: Tensor | None = None,
        method: MethodFactory | None = None,
        workers: Workers = ALONE,
    ) -> None:
        count = len(images) - config.validation
        if count < 1:
            raise ValueError(f"{config.validation} of {len(images)} images for validation leave none to train on")
        self.model = model
        self.config = config
        self.folder = folder
        self.extra = dict(extra or {})
        self.workers = workers
        # Drawn, not cut off: files are often sorted by class.
        order = torch.randperm(len(images), generator=seeding.generator(config.seed, seeding.VALIDATION))
        train, validation = order[:count].sort().values, order[count:].sort().values
        self.batches = Batches(images[train], config, None if context is None else context[train])
        self.validation_images = images[validation]
        self.validation_context = None if context is None else context[validation]
        workers.share(self.batches.rows(0))  # complains now of what it would complain of in the first step
        dequantizer.attach(model, config)
        arrange_for(next(model.parameters()).device, model)
        workers.copy_from_first(model)
        self.averaged = AveragedModel(model, config.average_decay)
        self.method = (method or methods.of(config, self.batches))(model, config, workers)
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
        context: Tensor | None = None,
        method: MethodFactory | None = None,
        workers: Workers = ALONE,
        device: torch.device | str = "cpu",
        **changes: Any,
    ) -> Trainer:
        """The trainer of a checkpoint's content, as it was when that was written.

        ``changes`` replaces values of its :class:`TrainConfig`, such as ``minutes`` to train for longer.
        """
        config = TrainConfig.from_dict({**content["train_config"], **changes})
        model = checkpoint.build(content).to(device)
        extra = content["extra"]
        trainer = cls(model, images, config, folder, extra, context=context, method=method, workers=workers)
        trainer.load_state(content)
        return trainer

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self.config.progress(self.step, self.seconds)

    def fit(self, *observers: Callable[[StepReport], None]) -> Stop:
        """Trains until the steps or the time are used up, or Ctrl-C is pressed; then saves the checkpoint.

        Args:
            observers: called with the report of every step, after the evaluation and the checkpoint that fall due.

        Raises:
            NonFiniteError: the loss is NaN or infinite; names the layer in which that arose.
            FloatingPointError: a gradient is; names the parameters. Or a layer does not invert its own output; names
                the layer.
        """
        log = CsvLog(self.folder / logs.FILE, self.step) if self.folder and self.workers.first else None
        if self.step == 0:
            self._initialize()
        try:
            with deferred_interrupt() as interrupted:
                while (stop := self._stop(interrupted)) is None:
                    report = self._advance()
                    for observe in (log.append, *observers) if log else observers:
                        observe(report)
                if stop is not Stop.INTERRUPTED and self.step % self.config.evaluate_every:
                    self._evaluate()  # the last weights have had no chance yet
                self.stop = stop
                self.save()
        finally:
            if log:
                log.close()
        return stop

    def result(self) -> ImageFlow:
        """The model with the best weights: those of the best validation, else the averaged ones."""
        model: ImageFlow = self.averaged.model
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
            "method": self.method.state(),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "rng": torch.get_rng_state(),
        }

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Takes up where :meth:`state` left off."""
        self.model.load_state_dict(content["model"])
        self.averaged.model.load_state_dict(content["averaged"])
        self.method.load_state(content["method"])
        self.step, self.seconds, self.best = content["step"], content["seconds"], content["best"]
        torch.set_rng_state(content["rng"])  # for layers that draw random numbers themselves

    def save(self) -> None:
        if self.folder and self.workers.first:
            checkpoint.save(self.folder / checkpoint.FILE, self.state())

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def _initialize(self) -> None:
        """With several processes, ActNorm takes its statistics of the whole first batch, as one process would."""
        if self.workers.count > 1:
            images, context = self._batch(whole=True)
            self.model.train()
            self.model.log_prob(images, context)
            self.workers.copy_from_first(self.model)

    def _stop(self, interrupted: Callable[[], bool]) -> Stop | None:
        """Whether to go on: the same answer, from the same clock, in all processes."""
        here = torch.tensor([float(interrupted()), self.seconds], dtype=torch.float64, device=self._device)
        any_interrupted, self.seconds = self.workers.largest(here).tolist()
        if any_interrupted:
            return Stop.INTERRUPTED
        if self.step >= self.config.steps:
            return Stop.STEPS
        if self.config.minutes is not None and self.seconds >= 60 * self.config.minutes:
            return Stop.TIME
        if self._without_progress():
            return Stop.PATIENCE
        return None

    def _without_progress(self) -> bool:
        patience = self.config.patience
        if patience is None or self.best is None:
            return False
        return self.step - int(self.best["step"]) >= patience * self.config.evaluate_every

    def _batch(self, *, whole: bool = False) -> tuple[Tensor, Tensor | None]:
        """This process's share of the present step's batch, or all of it, on the device."""
        images, context = self.batches(self.step), self.batches.context(self.step)
        if not whole:
            images = self.workers.share(images)
            context = None if context is None else self.workers.share(context)
        return images.to(self._device), None if context is None else context.to(self._device)

    def _advance(self) -> StepReport:
        """One step, with the evaluation and the checkpoint that fall due after it."""
        started = time.perf_counter()
        epoch = self.batches.epoch(self.step)
        progress = self.progress
        factor = rate_factor(self.config, self.step, progress)
        images, context = self._batch()
        result = self.method.step(images, context, step=self.step, progress=progress, rate_factor=factor)
        self.averaged.update(self.model, self.step)
        self.step += 1
        step_seconds = time.perf_counter() - started

        due = self.step % self.config.evaluate_every == 0
        validation = self._evaluate() if due else None
        self.seconds += time.perf_counter() - started
        if due:
            self.save()
        return StepReport(
            step=self.step,
            epoch=epoch,
            seconds=self.seconds,
            loss=-result.log_prob,
            bits_per_dim=result.bits_per_dim,
            grad_norm=result.grad_norm,
            learning_rate=self.config.learning_rate * factor,
            images_per_second=self.batches.batch_size / step_seconds,
            validation=validation,
            columns=dict(result.columns),
        )

    def _evaluate(self) -> float | None:
        """Checks that the layers invert themselves, and validates; keeps the weights if they are the best so far."""
        model, config = self.averaged.model, self.config
        if config.max_inverse_error is not None:
            check_inverses(model, *self._checked_batch(), config.max_inverse_error)
        if not len(self.validation_images):
            return None
        here = evaluate(model, self.validation_images, config.bit_depth, context=self.validation_context)
        # The processes have equal weights and yet need not round alike; they must agree on what is best.
        value = self.workers.average(torch.tensor(here, dtype=torch.float64, device=self._device)).item()
        if self.best is None or value < self.best["bits_per_dim"]:
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.best = {"bits_per_dim": value, "step": self.step, "weights": weights}
        return value

    def _checked_batch(self) -> tuple[Tensor, Tensor | None]:
        """A few training images, the same at every evaluation."""
        noise = seeding.generator(0, seeding.EVALUATION)
        images = dequantize(self.batches.images[:CHECKED_IMAGES], self.config.bit_depth, noise).to(self._device)
        context = self.batches.all_context
        return images, None if context is None else context[:CHECKED_IMAGES].to(self._device)
