"""The training loop, in one process or several."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from inverse_flow import models
from inverse_flow.data.holdout import held_out
from inverse_flow.flows import ActNorm
from inverse_flow.flows.conditioner import arrange_for
from inverse_flow.models import ImageFlow
from inverse_flow.stability import limit_gain_
from inverse_flow.training import checkpoint, dequantization
from inverse_flow.training import log as logs
from inverse_flow.training.batches import EVALUATION, VALIDATION, Batches, generator
from inverse_flow.training.checkpoint import Best, Checkpoint, DataSource, Fingerprint, ModelState, Progress
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.dequantization import dequantize
from inverse_flow.training.files import locked
from inverse_flow.training.gains import largest_gain, naming_largest_gain
from inverse_flow.training.interrupt import deferred_interrupt
from inverse_flow.training.inverses import check_inverses
from inverse_flow.training.log import CsvLog, StepReport
from inverse_flow.training.method import EndToEnd, Method, MethodFactory
from inverse_flow.training.metrics import evaluate
from inverse_flow.training.workers import Workers

Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]

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
        images: (N, C, H, W), uint8.
        config: see :class:`TrainConfig`.
        folder: of the run; None to write nothing.
        extra: plain values of your own to keep in the checkpoint.
        context: one row per image, for a conditional model; None for no context.
        method: how a batch becomes an update, see :mod:`inverse_flow.training.method`; None for the one that the
            configuration asks for.
        workers: the processes that train together, see :class:`Workers`. Each is given all the images.
        data: where the images come from, to keep in the checkpoint.
        validation: (N,), bool: which of the images are not trained on but kept for validation; None for as many as
            ``config.validation`` says, drawn by the seed.

    Raises:
        TypeError: another kind of model, or one in another precision; images that are no bytes.
        ValueError: images or a context that the model does not take; no image is left to train on; a batch that the
            processes cannot share evenly.
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
        data: DataSource | None = None,
        validation: Tensor | None = None,
    ) -> None:
        _check(model, images, context)
        if validation is None:
            validation = draw_validation(torch.zeros(len(images), dtype=torch.long), config)
        if bool(validation.all()):
            raise ValueError(
                f"of {len(images)} images none is left to train on: validation must be smaller, got {config.validation}"
            )
        if config.patience is not None and not bool(validation.any()):
            raise ValueError(f"patience needs images for validation, of {len(images)} none are kept: give validation")
        self.model = model
        self.config = config
        self.folder = folder
        self.extra = dict(extra or {})
        self.workers = workers
        self.data = data
        self.fingerprint = Fingerprint.of(images, context)
        self.validation = validation
        self.batches = Batches(images[~validation], config, None if context is None else context[~validation])
        self.validation_images = images[validation]
        self.validation_context = None if context is None else context[validation]
        workers.share(self.batches.rows(0))  # complains now of what it would complain of in the first step
        dequantization.attach(model, config)
        arrange_for(next(model.parameters()).device, model)
        workers.copy_from_first(model)
        self.average = average_of(model, config.average_decay)
        self.method = method(model, config, workers) if method else _method_of(model, config, workers, self.batches)
        self.step = 0
        self.seconds = 0.0
        self.best: Best | None = None
        self.stop: Stop | None = None

    @classmethod
    def resume(
        cls,
        content: Checkpoint,
        images: Tensor,
        folder: Path | None = None,
        *,
        context: Tensor | None = None,
        method: MethodFactory | None = None,
        workers: Workers = ALONE,
        device: torch.device | str = "cpu",
        data: DataSource | None = None,
        **changes: Any,
    ) -> Trainer:
        """The trainer of a checkpoint, as it was when that was written.

        ``images`` and ``context`` are those that the run began with, all of them and in the same order; ``data`` says
        where they lie now, if that has changed. ``changes`` replaces values of its :class:`TrainConfig`, such as
        ``minutes`` to train for longer.

        Raises:
            ValueError: other images or contexts than the run began with; a method whose package is not imported.
        """
        checkpoint.check_images(content, images, context)
        config = TrainConfig.from_dict({**content.training.to_dict(), **changes})
        model = checkpoint.build(content).to(device)
        validation = content.validation
        if validation is None:
            validation = _drawn_before(len(images), content.training)
        trainer = cls(
            model, images, config, folder, content.extra,
            context=context, method=method, workers=workers, data=data or content.data, validation=validation,
        )  # fmt: skip
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
                the layer. All of them say which inverse convolution has the largest gain.
        """
        folder = self.folder if self.workers.first else None
        with locked(folder) if folder else nullcontext():
            log = CsvLog(folder / logs.FILE, self.step) if folder else None
            try:
                return self._fit((log.append, *observers) if log else observers)
            finally:
                if log:
                    log.close()

    def result(self) -> ImageFlow:
        """A copy of the model with the best weights: those of the best validation, else the averaged ones.

        It is in evaluation mode, and learns what the trained model learns, should it be trained on.
        """
        model = copy.deepcopy(self.averaged_model)
        if self.best is not None:
            model.load_state_dict(self.best.weights)
        for parameter, trained in zip(model.parameters(), self.model.parameters(), strict=True):
            parameter.requires_grad_(trained.requires_grad)
        return model

    def state(self) -> Checkpoint:
        """What a checkpoint holds."""
        return Checkpoint(
            ModelState(models.describe(self.model), self.model.state_dict(), self.averaged_model.state_dict()),
            self.config,
            Progress(self.step, self.seconds, self.method.state(), torch.get_rng_state(), self.best),
            self.fingerprint,
            self.validation,
            self.data,
            self.extra,
        )

    def load_state(self, content: Checkpoint) -> None:
        """Takes up where :meth:`state` left off."""
        self.model.load_state_dict(content.model.weights)
        self.averaged_model.load_state_dict(content.model.averaged)
        progress = content.progress
        self.average.n_averaged.fill_(1 + progress.step)
        self.method.load_state(progress.method)
        self.step, self.seconds, self.best = progress.step, progress.seconds, progress.best
        torch.set_rng_state(progress.random)  # for layers that draw random numbers themselves

    def save(self) -> None:
        """Writes the checkpoint, if there is a folder and this is the process that writes.

        Raises:
            OSError: it cannot be written; the former checkpoint is kept.
        """
        if self.folder and self.workers.first:
            checkpoint.save(self.folder / checkpoint.FILE, self.state())

    def _fit(self, observers: Iterable[Callable[[StepReport], None]]) -> Stop:
        if self.step == 0:
            self._initialize()
        with deferred_interrupt() as interrupted, naming_largest_gain(self.model, self.batches.all_context):
            while (stop := self._stop(interrupted)) is None:
                report = self._advance()
                for observe in observers:
                    observe(report)
            if stop is not Stop.INTERRUPTED and self.step % self.config.evaluate_every:
                self._evaluate()  # the last weights have had no chance yet
            self.stop = stop
            self.save()
        return stop

    @property
    def averaged_model(self) -> ImageFlow:
        """The model with the averaged weights of now, in evaluation mode."""
        model: ImageFlow = self.average.module  # type: ignore[assignment]
        return model

    @property
    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: the weights, their average, the best ones, and two numbers each of Adam."""
        return 5 * sum(parameter.nbytes for parameter in self.model.parameters())

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
        patience, since = self.config.patience, self.best.step if self.best else 0
        return patience is not None and self.step - since >= patience * self.config.evaluate_every

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
        factor = self.config.rate_factor(self.step, progress)
        images, context = self._batch()
        result = self.method.step(images, context, step=self.step, progress=progress, rate_factor=factor)
        self.follow()
        self.step += 1
        step_seconds = time.perf_counter() - started

        due = self.step % self.config.evaluate_every == 0
        validation = self._evaluate() if due else None
        found = largest_gain(self.model, self.batches.all_context) if due else None
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
            largest_gain=found[1] if found else None,
            columns=dict(result.columns),
        )

    def follow(self) -> None:
        """What follows every change of the weights: the limit on the gains, and the moving average."""
        if self.config.max_gain is not None:
            limit_gain_(self.model, self.model.event_shape, self.config.max_gain, self.batches.all_context)
        self.average.update_parameters(self.model)

    def _evaluate(self) -> float | None:
        """Checks that the layers invert themselves, and validates; keeps the weights if they are the best so far."""
        model, config = self.averaged_model, self.config
        if config.max_inverse_error is not None:
            check_inverses(model, *self._checked_batch(), config.max_inverse_error)
        if not len(self.validation_images):
            return None
        here = evaluate(model, self.validation_images, config.bit_depth, context=self.validation_context)
        # The processes have equal weights and yet need not round alike; they must agree on what is best.
        value = self.workers.average(torch.tensor(here, dtype=torch.float64, device=self._device)).item()
        if math.isfinite(value) and (self.best is None or value < self.best.bits_per_dim):
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.best = Best(value, self.step, weights)
        return value

    def _checked_batch(self) -> tuple[Tensor, Tensor | None]:
        """A few training images, the same at every evaluation."""
        noise = generator(0, EVALUATION)
        images = dequantize(self.batches.images[:CHECKED_IMAGES], self.config.bit_depth, noise).to(self._device)
        context = self.batches.all_context
        return images, None if context is None else context[:CHECKED_IMAGES].to(self._device)


def draw_validation(labels: Tensor, config: TrainConfig) -> Tensor:
    """Which images with these labels are kept for validation, of each class alike: (N,), bool."""
    count = min(len(labels), config.validation_images(len(labels)))
    return held_out(labels, count, generator(config.seed, VALIDATION))


def _drawn_before(total: int, config: TrainConfig) -> Tensor:
    """As :func:`draw_validation`, by the version whose checkpoints do not say which images those are."""
    order = torch.randperm(total, generator=generator(config.seed, VALIDATION))
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[total - config.validation_images(total) :]] = True
    return chosen


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """A twin of a model with the weights w̄ ← d·w̄ + (1 − d)·w after each ``update_parameters``, in evaluation mode.

    d is min(decay, (1 + t) / (10 + t)) at step t, counted from 0, so that the average forgets the untrained weights
    quickly. Buffers are copied. Where no step has trained a layer yet, it is nothing to warn of.
    """

    @torch.no_grad()
    def update(means: Tensors, weights: Tensors, averaged: Tensor | int) -> None:
        count = int(averaged)
        torch._foreach_lerp_(means, weights, 1 - min(decay, count / (9 + count)))

    averaged = AveragedModel(model, multi_avg_fn=update).eval().requires_grad_(False)
    averaged.n_averaged.fill_(1)  # the untrained weights are the first
    for layer in averaged.modules():
        if isinstance(layer, ActNorm):
            layer.expect_initialization()
    return averaged


def _method_of(model: ImageFlow, config: TrainConfig, workers: Workers, batches: Batches) -> Method:
    if config.parts is None:
        return EndToEnd(model, config, workers)
    if isinstance(config.parts, Mapping):
        raise ValueError("this run is trained by parts: import inverse_flow.parts to go on with it")
    return config.parts.make(model, config, workers, batches)


def _check(model: ImageFlow, images: Tensor, context: Tensor | None) -> None:
    """Refuses what could not be trained, before anything is computed."""
    if not isinstance(model, ImageFlow):
        raise TypeError(f"the trainer trains flows on images, of inverse_flow.models, not {type(model).__name__}")
    dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if dtypes:
        raise TypeError(f"the trainer trains models in float32, got {dtypes.pop()}: call model.float() first")
    if images.dtype != torch.uint8:
        raise TypeError(f"images to train on are uint8, got {images.dtype}")
    if tuple(images.shape[1:]) != model.event_shape:
        expected = ", ".join(map(str, model.event_shape))
        raise ValueError(f"the model takes images (N, {expected}), got {tuple(images.shape)}")
    channels, given = model.config.context_channels, 0 if context is None else context.shape[1]
    if channels != given:
        raise ValueError(f"the model takes a context of {channels} channels, got {given}")
    if context is not None and len(context) != len(images):
        raise ValueError(f"the context must have one row per image: {len(images)}, got {len(context)}")
