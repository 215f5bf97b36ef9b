"""What a layer needs so that its second run in a backward pass equals its first one, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

Around: TypeAlias = Callable[[int], AbstractContextManager[None]]
"""``with around(i):`` is the place for layer i to run."""


class Replay:
    """The conditions under which ``layers`` run now, to run them so again later.

    These are: the values of the parameters (a tensor that stands in a parameter's place, as
    ``torch.func.functional_call`` puts it there, counts as the parameter), training or evaluation mode, autocast, and
    the state of the random number generators before each layer that draws. A generator's state takes 5 kB on the
    CPU, so it is kept for no other layer.

    Args:
        layers: in the order in which they run; a layer may come twice.
        device: of the tensors they run on.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._modules = [_modules_of(layer) for layer in layers]
        unique = dict.fromkeys(module for modules in self._modules for module in modules)
        self._training = {module: module.training for module in unique}
        slots = [
            (module, name, parameter)
            for module in unique
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.parameters: list[Tensor] = list({id(parameter): parameter for _, _, parameter in slots}.values())
        position = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        self._positions = [(module, name, position[id(parameter)]) for module, name, parameter in slots]
        self._device = device
        self._autocast_enabled = torch.is_autocast_enabled(device.type)
        self._autocast_dtype = torch.get_autocast_dtype(device.type)
        self._states_before: dict[int, list[Tensor]] = {}

    @contextmanager
    def first(self) -> Iterator[Around]:
        """For the first run. Layer i is to run within ``with around(i):`` of what this yields."""
        last = _get_states(self._device)

        @contextmanager
        def around(i: int) -> Iterator[None]:
            nonlocal last
            yield
            states = _get_states(self._device)
            if not all(torch.equal(now, before) for now, before in zip(states, last, strict=True)):
                self._states_before[i] = last
                last = states

        with self._autocast():
            yield around

    @contextmanager
    def again(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """For all of the later runs: ``parameters`` stand in for those of the first run, the modes are the same, and
        the generators go on afterwards as if nothing had been drawn.
        """
        before = [module._parameters[name] for module, name, _ in self._positions]
        modes = {module: module.training for module in self._training}
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            for module, name, i in self._positions:
                module._parameters[name] = parameters[i]  # type: ignore[assignment]
            _set_modes(self._training)
            with torch.random.fork_rng(devices, enabled=bool(self._states_before)), self._autocast():
                yield
        finally:
            _set_modes(modes)
            for (module, name, _), parameter in zip(self._positions, before, strict=True):
                module._parameters[name] = parameter

    @contextmanager
    def layer(self, i: int) -> Iterator[None]:
        """For a later run of layer ``i``, within :meth:`again`. Buffers that a module in training mode would update,
        such as running means, are copies meanwhile: they have been updated once.
        """
        buffers = [
            (module, name, buffer)
            for module in self._modules[i]
            if module.training
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.rewind(i)
        try:
            for module, name, buffer in buffers:
                module._buffers[name] = buffer.clone()
            yield
        finally:
            for module, name, buffer in buffers:
                module._buffers[name] = buffer

    def rewind(self, i: int) -> None:
        """Sets the generators to where layer ``i`` found them."""
        if i in self._states_before:
            _set_states(self._states_before[i], self._device)

    def _autocast(self) -> torch.autocast:
        # No cache: a weight cast without a graph would be found there by a later use that needs one.
        return torch.autocast(
            self._device.type, dtype=self._autocast_dtype, enabled=self._autocast_enabled, cache_enabled=False
        )


def _get_states(device: torch.device) -> list[Tensor]:
    """The CPU's generator and, outside of graph capture, which forbids it, the device's own."""
    states = [torch.get_rng_state()]
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _modules_of(layer: nn.Module) -> list[nn.Module]:
    """``layer.modules()`` without its nested generators: this happens in every forward pass."""
    found = {layer: None}
    waiting = [layer]
    while waiting:
        inner = [module for module in waiting.pop()._modules.values() if module is not None and module not in found]
        found.update(dict.fromkeys(inner))
        waiting += inner
    return list(found)


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        if module.training != training:
            module.training = training


def leaves(tensors: Iterable[Tensor], needed: Iterable[bool]) -> list[Tensor]:
    """Leaves with the same values: the gradients they collect reach neither the originals nor their hooks."""
    return [nn.Parameter(tensor.detach(), grad) for tensor, grad in zip(tensors, needed, strict=False)]
