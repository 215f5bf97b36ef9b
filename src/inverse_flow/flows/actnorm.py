"""Activation normalisation."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inverse_flow.flows.base import (
    FlowLayer,
    check_images,
    count_pixels,
    expand_logdet,
    logdet_dtype,
    may_wait_for,
    per_channel,
    sum_channels,
)
from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible import backpropagate

# A channel whose spread is below this fraction of its mean is constant up to rounding: dividing by such a spread would
# only blow noise up.
CONSTANT_SPREAD = 1e-5

NOT_INITIALIZED = (
    "ActNorm is not initialised: run the model on one batch of data in training mode first, flow.train()(batch), or "
    "load trained weights"
)


class ActNorm(FlowLayer):
    """z = (x + bias) · exp(log_scale), per channel; log-determinant H·W·Σ log_scale.

    The first batch that goes forward in training mode sets bias and log_scale so that z has mean 0 and variance 1 in
    each channel (Kingma & Dhariwal, "Glow", 2018, section 3.1): the whole batch, where ``DistributedDataParallel``
    runs the model on a share of it in every process. Until then the layer is the identity. It happens once in the
    layer's life, and only while both parameters are zero as built: a layer that was trained through its inverse
    counts as initialised. ``inverse`` never initialises, nor does a run of the layer within a backward pass. The
    buffer ``initialized`` remembers it and travels with ``state_dict``.

    A batch with fewer than two values per channel has no spread and initialises nothing: the layer stays as it is and
    waits for the next one. A constant channel is centred and keeps scale 1.

    Args:
        channels: C of the images (B, C, H, W), or volumes (B, C, D, H, W).

    Raises:
        FloatingPointError: the initialising batch holds a NaN or an infinity.
        RuntimeError: the initialising batch meets the layer while it is compiled or exported, under a transform of
            ``torch.func``, or with the parameters of one call (``functional_call``); in a backward pass, when it came
            between ``inverse`` and that.

    Warns:
        UserWarning: once, when a layer that is not initialised runs in evaluation mode.
    """

    uses_context = False
    initialized: Tensor

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_integer("channels", channels)
        self.channels = channels
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        # Reading the buffer would make every step wait for the device, so it is read once and kept; in a dict, as what
        # the layer knows of itself is no state, and a changed attribute would be.
        self._knows = {"initialized": False, "warned": False}

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, self.channels)
        if not self._knows["initialized"]:
            self._see(x, forward=True)
        compute = logdet_dtype(x.dtype)
        bias, log_scale = self._per_channel(x, compute)
        z = (x.to(compute) + bias) * log_scale.exp()
        return z.to(x.dtype), expand_logdet(self._logdet(x), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, self.channels)
        if not self._knows["initialized"]:
            self._see(z, forward=False)
        compute = logdet_dtype(z.dtype)
        bias, log_scale = self._per_channel(z, compute)
        x = (z.to(compute) * (-log_scale).exp() - bias).to(z.dtype)
        if not self._knows["initialized"] and x.requires_grad and may_wait_for(x):
            x.register_hook(partial(self._refuse_changed, self.bias._version))
        return x, expand_logdet(-self._logdet(z), z)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """∂x = ∂z · exp(s), ∂b = Σ ∂x and ∂s = Σ z · ∂z + H·W·Σ ∂logdet, with the sums over all but the channels."""
        compute = logdet_dtype(z.dtype)
        grad_x = grad_z.to(compute) * self._per_channel(z, compute)[1].exp()
        grad_log_scale = sum_channels(z.to(compute) * grad_z) + count_pixels(z) * grad_logdet.sum()
        grads = [g.to(self.bias.dtype) for g in (sum_channels(grad_x), grad_log_scale)]
        backpropagate([self.bias, self.log_scale], grads)
        return self.inverse(z)[0], grad_x.to(z.dtype)

    def expect_initialization(self) -> None:
        """Says that the layer is known not to be initialised yet: it does not warn of it."""
        self._knows["warned"] = True

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def _per_channel(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return per_channel(self.bias.to(dtype), x), per_channel(self.log_scale.to(dtype), x)

    def _logdet(self, x: Tensor) -> Tensor:
        return self.log_scale.to(logdet_dtype(x.dtype)).sum() * count_pixels(x)

    def _see(self, x: Tensor, *, forward: bool) -> None:
        """What a layer does that does not know itself to be initialised, before it runs on ``x``."""
        if self.training and forward:
            if torch.compiler.is_compiling():
                raise RuntimeError(NOT_INITIALIZED)
            # A backward pass may run layers again, forward too; it must not change them.
            if not x.is_meta and torch._C._current_graph_task_id() == -1:
                self._initialize(x)
        elif not self.training and not self._knows["warned"] and may_wait_for(x) and not self._was_initialized():
            self._knows["warned"] = True
            warnings.warn(NOT_INITIALIZED, stacklevel=3)

    def _refuse_changed(self, version: int, grad: Tensor) -> None:
        """Called in the backward pass of ``inverse``, which ran when the bias had this version."""
        if self._knows["initialized"] and self.bias._version != version:
            raise RuntimeError(
                "ActNorm was initialised after its inverse had run in the graph of this backward pass, whose gradients "
                "would be those of other parameters: run the model forward first, on one batch of data"
            )

    def _was_initialized(self) -> bool:
        found = bool(self.initialized) or bool(self.bias.any()) or bool(self.log_scale.any())
        self._knows["initialized"] = found and self._has_its_parameters()
        return found

    def _has_its_parameters(self) -> bool:
        """Not other tensors, which stand in their place for one call: what is found or set there is not the layer's."""
        return isinstance(self.bias, nn.Parameter)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(NOT_INITIALIZED)
        if not self._was_initialized():
            values = x.to(logdet_dtype(x.dtype))
            count = _total(values.new_tensor(x.numel() // self.channels))
            if count < 2:
                return
            mean = _total(sum_channels(values)) / count
            variance = _total(sum_channels((values - per_channel(mean, x)).square())) / count
            if not self._has_its_parameters():
                raise RuntimeError(NOT_INITIALIZED)
            if not bool(torch.isfinite(variance).all()):
                bad = (~torch.isfinite(variance)).nonzero().flatten().tolist()
                raise FloatingPointError(f"ActNorm cannot initialise: NaN or infinite values in channels {bad}")
            spread = variance.sqrt()
            constant = spread <= CONSTANT_SPREAD * mean.abs()
            self.bias.copy_(-mean)
            self.log_scale.copy_(torch.where(constant, torch.ones_like(spread), spread).log().neg())
        if self._has_its_parameters():
            self.initialized.fill_(True)
            self._knows["initialized"] = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # The buffer may have changed. It is read now, so that a loaded model is captured without looking at values.
        known = not self.initialized.is_meta and bool(self.initialized)
        self._knows = {**self._knows, "initialized": known}


def _total(value: Tensor) -> Tensor:
    """The sum over the processes of the ``DistributedDataParallel`` that runs the model now; else the value."""
    parallel = DistributedDataParallel._get_active_ddp_module()
    if parallel is not None:
        torch.distributed.all_reduce(value, group=parallel.process_group)
    return value
