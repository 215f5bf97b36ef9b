"""The parts of a flow in as many processes or devices, with nothing but activations sent, and only forward."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed

from inverse_flow.flows.base import Shape
from inverse_flow.parts.method import ByParts
from inverse_flow.parts.split import Carried, Part
from inverse_flow.training import TrainConfig, Trainer
from inverse_flow.training.files import locked
from inverse_flow.training.gains import naming_largest_gain

# Batches that a process may be ahead of the next one: enough to even out their pace, and a bound on the memory.
AHEAD = 4


def fit_parts(trainer: Trainer, on_step: Callable[[int, float], None] | None = None) -> None:
    """Trains each part in a process of its own, up to the finish; then gives the first process the whole run.

    The schedule is ``"simultaneous"``: the process of rank k trains part k on every batch. It receives what part k − 1
    made of the batch, with the weights that this one had before its own step on it, sends on what part k makes of it,
    and makes its step. It waits for nothing from the processes behind it: the only messages are activations, latents
    and log-determinants to the next rank. So the updates are those of the same schedule in one process, part by part
    and without delay: only their time differs, by one batch for every rank.

    Every ``evaluate_every`` steps the processes meet, and the first saves a checkpoint of the whole run, from which all
    can resume. When they are done, the first goes on with ``trainer.fit()``: the end-to-end finish is for one process,
    as it has a backward pass through all the parts. Nothing is validated or logged before it.

    All processes call this with trainers made alike: the same seed, images and configuration, and one process each
    (``workers`` as by default). ``torch.distributed`` must be initialised, with as many processes as there are parts.

    Args:
        trainer: whose method is :class:`ByParts`.
        on_step: called with the step, counted from 1, and the bits per dimension of this process's part.

    Raises:
        TypeError: the trainer's method is another one.
        ValueError: there is one process alone; the schedule or the number of processes is another one; or the run is
            limited by time, which the processes could not agree on without waiting for each other.
    """
    method, config = trainer.method, trainer.config
    if not isinstance(method, ByParts):
        raise TypeError(f"parts in parallel need the method ByParts, got {type(method).__name__}")
    if not distributed.is_initialized():
        raise ValueError("parts in parallel need a process each: start them with torchrun")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    if method.settings.schedule != "simultaneous":
        raise ValueError(f'parts in parallel need the schedule "simultaneous", got "{method.settings.schedule}"')
    if count != len(method.parts):
        raise ValueError(f"{len(method.parts)} parts need as many processes, got {count}")
    if config.minutes is not None:
        raise ValueError("parts in parallel are limited by steps, not by time: give no minutes")
    distributed.barrier()  # all have made their trainers: none still looks whether the folder is free
    context = trainer.batches.all_context
    with (
        locked(trainer.folder) if trainer.folder and rank == 0 else nullcontext(),
        naming_largest_gain(trainer.model, context),
    ):
        _fit(trainer, method, rank, count, on_step)


def _fit(
    trainer: Trainer, method: ByParts, rank: int, count: int, on_step: Callable[[int, float], None] | None
) -> None:
    config = trainer.config
    end = _steps_before_finish(method, config)
    line = _Line(method.parts, rank, count, trainer.model.event_shape)
    trainer.model.train()
    while trainer.step < end:
        meeting = min(end, trainer.step - trainer.step % config.evaluate_every + config.evaluate_every)
        started = time.perf_counter()
        for step in range(trainer.step, meeting):
            bits = _step(trainer, method, line, step)
            if on_step:
                on_step(step + 1, bits)
        line.flush()
        trainer.step = meeting
        _give_everyone_all(trainer, method, rank, count)
        trainer.seconds += time.perf_counter() - started
        if rank == 0:
            trainer.save()
        distributed.barrier()


def _steps_before_finish(method: ByParts, config: TrainConfig) -> int:
    """How many steps of the run train parts."""
    steps = range(config.steps)
    return sum(1 for step in steps if method.settings.turn_of(step, 0, config.progress(step, 0.0)) is not None)


def _step(trainer: Trainer, method: ByParts, line: _Line, step: int) -> float:
    """This process's part of one step of the run; the bits per dimension of the flow up to its part."""
    device = next(trainer.model.parameters()).device
    if line.rank == 0:
        carried = Carried.of(trainer.batches(step).to(device))
    else:
        carried = line.receive(trainer.batches.batch_size, device)
    context = trainer.batches.context(step)
    factor = trainer.config.rate_factor(step, trainer.config.progress(step, 0.0))
    context = None if context is None else context.to(device)
    result = method.train_part(line.rank, carried, context, step=step, rate_factor=factor)
    trainer.follow()
    line.send(result.carried)
    return method.report(result.log_prob, result.grad_norm, line.rank + 1).bits_per_dim


class _Line:
    """The way from each process to the next. A batch is one message: D values and a log-determinant per image."""

    def __init__(self, parts: Sequence[Part], rank: int, count: int, event_shape: Shape) -> None:
        self.rank = rank
        self.count = count
        self.values = math.prod(event_shape)
        self.shapes = parts[rank].input_shapes
        self._sent: deque[tuple[Any, Tensor]] = deque()

    def receive(self, batch: int, device: torch.device) -> Carried:
        """What the process before this one sent next."""
        flat = torch.empty(batch, self.values + 1, device=device)
        distributed.recv(flat, src=self.rank - 1)
        sizes = [math.prod(shape) for shape in self.shapes]
        *latents, x, logdet = flat.split([*sizes, 1], dim=1)
        *latent_shapes, shape = self.shapes
        return Carried(
            x.reshape(batch, *shape),
            tuple(z.reshape(batch, *s) for z, s in zip(latents, latent_shapes, strict=True)),
            logdet[:, 0],
        )

    def send(self, carried: Carried) -> None:
        """Starts to send to the next process, and waits only when that is too far behind."""
        if self.rank == self.count - 1:
            return
        values = [value.flatten(1) for value in (*carried.latents, carried.x)]
        flat = torch.cat([*values, carried.logdet[:, None]], dim=1)
        self._sent.append((distributed.isend(flat, dst=self.rank + 1), flat))  # kept alive until it has arrived
        while len(self._sent) > AHEAD:
            self._sent.popleft()[0].wait()

    def flush(self) -> None:
        """Until all that was sent has arrived."""
        while self._sent:
            self._sent.popleft()[0].wait()


def _give_everyone_all(trainer: Trainer, method: ByParts, rank: int, count: int) -> None:
    """Each process gets the weights, averages and optimizer state of every part from the process that trains it."""
    part, group = method.parts[rank], method.optimizer.state_dict()["param_groups"][rank]
    state = method.optimizer.state_dict()["state"]
    own = {
        "model": part.state(trainer.model),
        "averaged": part.state(trainer.averaged_model),
        "group": group,
        "optimizer": {index: state[index] for index in group["params"] if index in state},
        "steps": method.steps[rank],
    }
    everyone: list[Any] = [None] * count
    distributed.all_gather_object(everyone, _on_cpu(own))

    def union(name: str) -> dict[Any, Any]:
        return {key: value for content in everyone for key, value in content[name].items()}

    trainer.model.load_state_dict(union("model"))
    trainer.averaged_model.load_state_dict(union("averaged"))
    groups = [content["group"] for content in everyone]
    method.optimizer.load_state_dict({"state": union("optimizer"), "param_groups": groups})
    method.steps = [content["steps"] for content in everyone]


def _on_cpu(value: Any) -> Any:
    """The same content without devices, which the other processes need not have."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return {key: _on_cpu(entry) for key, entry in value.items()} if isinstance(value, dict) else value
