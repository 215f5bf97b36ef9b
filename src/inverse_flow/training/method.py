"""How a batch becomes an update.

The :class:`~inverse_flow.training.Trainer` owns the batches, the learning-rate schedule, the averaged weights,
validation, logs and checkpoints. What happens between a batch and the changed weights is a :class:`Method`, made by
``method(model, config, workers)`` from the trainer's model, its :class:`TrainConfig` and its :class:`Workers`. A method
owns its optimizers. The default is :class:`EndToEnd`.

What a method can use: :meth:`Workers.parallel` around the module whose output it differentiates,
:func:`autocast` for the precision of the configuration, :func:`make_optimizer` for its optimizer, :func:`update`, which
is everything from gradients to changed weights, and :func:`explain_loss` for a loss that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from inverse_flow.flows import Flow, NonFiniteError, detect_nonfinite
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.metrics import bits_per_dim
from inverse_flow.training.workers import Workers

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
}


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        log_prob: mean log-density of the batch before the step, nats per image, over all processes.
        bits_per_dim: the same in bits per dimension.
        grad_norm: norm of the gradient before clipping.
        columns: further figures for the log, with the same names at every step.
    """

    log_prob: float
    bits_per_dim: float
    grad_norm: float
    columns: Mapping[str, float] = field(default_factory=dict)


class Method(Protocol):
    """Changes a model's weights by one batch at a time."""

    def step(
        self, images: Tensor, context: Tensor | None = None, *, step: int, progress: float, rate_factor: float
    ) -> StepResult:
        """Changes the weights.

        Args:
            images: this process's share of the batch, dequantized, (B, C, H, W), on the model's device.
            context: one row per image, for a conditional model.
            step: of the run, counted from 0.
            progress: how much of the run is done, 0 to 1.
            rate_factor: what the schedule multiplies the learning rates of the method by.

        Raises:
            NonFiniteError: the loss is NaN or infinite; names the layer in which that arose.
            FloatingPointError: a gradient is; names the parameters.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in tensors and plain values."""
        ...

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Takes up where :meth:`state` left off."""
        ...


MethodFactory: TypeAlias = Callable[[Flow, TrainConfig, Workers], Method]


class Density(nn.Module):
    """``forward`` is the flow's ``log_prob``: what PyTorch's wrappers of modules need to see."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, images: Tensor, context: Tensor | None = None) -> Tensor:
        """(B,) log-densities in nats."""
        return self.flow.log_prob(images, context)


class EndToEnd:
    """The gradient of the mean bits per dimension through all the layers at once, one optimizer for all weights.

    Args:
        model: to train.
        config: of the run.
        workers: that train together: each computes the gradient of its share of a batch.
        optimizer: of a method that goes on end to end; None for a new one.
    """

    def __init__(
        self, model: Flow, config: TrainConfig, workers: Workers, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.workers = workers
        self.density = workers.parallel(Density(model))
        self.optimizer = make_optimizer(model.parameters(), config) if optimizer is None else optimizer

    def step(
        self, images: Tensor, context: Tensor | None = None, *, step: int, progress: float, rate_factor: float
    ) -> StepResult:
        self.model.train()
        with autocast(self.config, images.device):
            log_prob = self.density(images, context).mean()
        bits = bits_per_dim(log_prob, self.model.event_shape, self.config.bit_depth)
        if not torch.isfinite(bits):
            explain_loss(lambda: self.model.log_prob(images, context), step, bits.item())
        parameters = self.model.named_parameters()
        grad_norm = update(self.optimizer, bits, parameters, self.config, step=step, rate_factor=rate_factor)
        figures = self.workers.average(torch.stack((log_prob, bits)))
        return StepResult(figures[0].item(), figures[1].item(), grad_norm)

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state(self, content: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(content["optimizer"])


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainConfig, learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, with its learning rate unless another one is given."""
    rate = config.learning_rate if learning_rate is None else learning_rate
    optimizer = OPTIMIZERS[config.optimizer](list(parameters), lr=rate)
    for group in optimizer.param_groups:
        group["full_rate"] = rate  # what the schedule's factor multiplies
    return optimizer


def update(
    optimizer: torch.optim.Optimizer,
    bits: Tensor,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: TrainConfig,
    *,
    step: int,
    rate_factor: float,
) -> float:
    """From the bits per dimension to changed weights: backward pass, clipping, optimizer step.

    Returns:
        The norm of the gradient of ``named_parameters`` before clipping, of the mean over the processes where
        ``bits`` was computed by :meth:`Workers.parallel`.

    Raises:
        FloatingPointError: it is not finite; names the parameters.
    """
    optimizer.zero_grad()  # to None: the optimizer passes over weights that have no part in ``bits``
    bits.backward()
    named = list(named_parameters)
    norm = torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], config.max_grad_norm)
    if not torch.isfinite(norm):
        explain_gradient(named, step)
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * rate_factor
    optimizer.step()
    return norm.item()


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The precision of the configuration: with "bf16" the networks of couplings and priors run in bfloat16.

    The solves, the 1×1 convolutions, the normalisations and every log-determinant stay in float32 within it.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


@torch.no_grad()
def explain_loss(again: Callable[[], object], step: int, loss: float) -> None:
    """Runs ``again`` what gave the loss of a step, layer by layer, to name the layer that gave the first NaN or
    infinity.

    Raises:
        NonFiniteError: always, or
        FloatingPointError: if every layer gave finite values.
    """
    where = f"the loss of step {step + 1} is {loss}"
    try:
        with detect_nonfinite():
            again()
    except NonFiniteError as error:
        raise NonFiniteError(error.path, f"{error.what}; {where}") from None
    raise FloatingPointError(f"{where}, though every layer gave finite values")


def explain_gradient(named_parameters: Sequence[tuple[str, nn.Parameter]], step: int) -> None:
    """Names the parameters whose gradient is not finite."""
    bad = [
        name
        for name, parameter in named_parameters
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    raise FloatingPointError(f"the gradients of step {step + 1} are not finite: {', '.join(bad)}")
