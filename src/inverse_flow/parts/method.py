"""Training by parts: each part of a flow learns from a density of its own, without gradients from the parts behind it.

Bhatt & Inouye, "Learning Flows By Parts". See docs/parts.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inverse_flow.flows import Flow
from inverse_flow.parts.cache import FrozenOutputs
from inverse_flow.parts.split import Carried, Part, run_frozen, split_flow, truncated_log_prob
from inverse_flow.training import Batches, StepResult, TrainConfig, Workers, bits_per_dim
from inverse_flow.training.method import EndToEnd, autocast, explain_loss, make_optimizer, update

if TYPE_CHECKING:
    from inverse_flow.parts.config import PartsConfig

# The log's column "part" in the steps that train several parts, or all the layers end to end.
ALL_PARTS = 0


@dataclass(frozen=True)
class PartResult:
    """What :meth:`ByParts.train_part` did.

    Attributes:
        carried: the part's output before the step, without history, for the next part.
        log_prob: (): mean log-density of the batch under the truncated flow before the step, nats per image.
        grad_norm: norm of the gradient of its bits per dimension before clipping.
    """

    carried: Carried
    log_prob: Tensor
    grad_norm: float


class PartDensity(nn.Module):
    """``forward`` gives what goes on from a part, and the log-densities of the flow truncated behind it."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part
        self.layers = nn.ModuleList(part.layers.values())

    def forward(self, carried: Carried, context: Tensor | None) -> tuple[Carried, Tensor]:
        """(what goes on, (B,) log-densities in nats)"""
        result = self.part(carried, context)
        return result, truncated_log_prob(self.part.flow, result, context)


class ByParts:
    """A training method: parts by turns, each with the truncated objective, then all layers end to end.

    Part k minimises, over its own weights, the bits per dimension of

        −log p_z(f^(1:k)(x)) − log|det J_{f_k}|,    f^(1:k) = f_k ∘ … ∘ f_1,

    with the latents already factored out in f^(1:k)(x), and what goes on taken for a latent. The parts before it run
    without a graph and those behind it not at all. All parts share one optimizer with a group of weights, a learning
    rate and a number of steps for each; it carries on into the finish. The warm-up of a part counts its own steps.

    Args:
        model: to train.
        config: with ``parts`` set.
        workers: that train together: each computes the gradient of its share of a batch.
        batches: of the run; needed for turns of an epoch and for the cache.

    Raises:
        ValueError: the configuration has no ``parts``, the model cannot be cut so, or ``batches`` are needed.
    """

    def __init__(self, model: Flow, config: TrainConfig, workers: Workers, batches: Batches | None = None) -> None:
        if config.parts is None:
            raise ValueError("training by parts needs TrainConfig.parts")
        settings: Any = config.parts
        self.model = model
        self.config = config
        self.settings: PartsConfig = settings
        self.workers = workers
        self.batches = batches
        self.parts = split_flow(model, self.settings.cut, self.settings.count)
        if batches is None and (self.settings.turn == "epoch" or self.settings.cache_epochs):
            raise ValueError("turns of an epoch and kept outputs need the batches: make ByParts with batches=…")
        rates = self.settings.learning_rates or [config.learning_rate] * len(self.parts)
        self.densities = [workers.parallel(PartDensity(part)) for part in self.parts]
        self._finish: EndToEnd | None = None  # made when it begins
        named = [part.named_parameters() for part in self.parts]
        self.optimizer = make_optimizer([parameter for _, parameter in named[0]], config, rates[0])
        for group, rate in zip(named[1:], rates[1:], strict=True):
            parameters = [parameter for _, parameter in group]
            self.optimizer.add_param_group({"params": parameters, "lr": rate, "full_rate": rate})
        self.steps = [0] * len(self.parts)
        # In a sequential schedule: the part whose round it is, and the epoch in which that began.
        self.round = (0, 0)
        self._outputs: FrozenOutputs | None = None

    def step(
        self, images: Tensor, context: Tensor | None = None, *, step: int, progress: float, rate_factor: float
    ) -> StepResult:
        self.model.train()
        epoch = self.batches.epoch(step) if self.batches else 0
        turn = self.settings.turn_of(step, epoch, progress)
        if turn is None:
            self._outputs = None
            if self._finish is None:
                self._finish = EndToEnd(self.model, self.config, self.workers, self.optimizer)
            result = self._finish.step(images, context, step=step, progress=progress, rate_factor=rate_factor)
            return replace(result, columns={"part": ALL_PARTS})
        carried = self._input_of(turn[0], images, context, step, epoch)
        norms = []
        for k in turn:
            of_part = self.train_part(k, carried, context, step=step, rate_factor=rate_factor)
            carried = of_part.carried
            norms.append(of_part.grad_norm)
        return self.report(of_part.log_prob, math.hypot(*norms), ALL_PARTS if len(turn) > 1 else k + 1)

    def train_part(
        self, k: int, carried: Carried, context: Tensor | None = None, *, step: int, rate_factor: float
    ) -> PartResult:
        """One step of part k, counted from 0, on what came out of the part before it.

        Raises:
            NonFiniteError: the loss is NaN or infinite; names the layer in which that arose.
            FloatingPointError: a gradient is; names the parameters.
        """
        part, carried = self.parts[k], carried.detach()
        with autocast(self.config, carried.x.device):
            result, log_probs = self.densities[k](carried, context)
        log_prob = log_probs.mean()
        bits = self._bits(log_prob)
        if not torch.isfinite(bits):
            explain_loss(lambda: part(carried, context), step, bits.item())
        warmth = min(1.0, (self.steps[k] + 1) / max(1, self.config.warmup_steps))
        rate_factor = min(rate_factor, warmth)
        norm = update(self.optimizer, bits, part.named_parameters(), self.config, step=step, rate_factor=rate_factor)
        self.steps[k] += 1
        return PartResult(result.detach(), log_prob.detach(), norm)

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "steps": list(self.steps), "round": list(self.round)}

    def load_state(self, content: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(content["optimizer"])
        self.steps = list(content["steps"])
        part, epoch = content["round"]
        self.round = (part, epoch)
        self._outputs = None  # a function of the weights, the seed and the round: computed again when needed

    def _input_of(self, k: int, images: Tensor, context: Tensor | None, step: int, epoch: int) -> Carried:
        """What the parts before part k make of the batch, or kept of its images."""
        if not (self.settings.cache_epochs and k):
            with autocast(self.config, images.device):
                return run_frozen(self.parts[:k], images, context)
        assert self.batches is not None  # checked when made
        if self.round[0] != k:
            self.round, self._outputs = (k, epoch), None
        draw = epoch - (epoch - self.round[1]) % self.settings.cache_epochs  # the epoch that it was made in
        if self._outputs is None or self._outputs.draw != draw:
            self._outputs = FrozenOutputs(self.parts[:k], self.batches, self.config, draw)
        rows = self.workers.share(self.batches.rows(step))
        return self._outputs(rows).map(lambda values: values.to(images.device))

    def _bits(self, log_prob: Tensor) -> Tensor:
        return bits_per_dim(log_prob, self.model.event_shape, self.config.bit_depth)

    def report(self, log_prob: Tensor, norm: float, part: int) -> StepResult:
        """What the log is told of a step; ``part`` is counted from 1, or ``ALL_PARTS``."""
        mean = self.workers.average(log_prob)
        return StepResult(mean.item(), self._bits(mean).item(), norm, {"part": part})
