"""What a layer needs so that its second run in a backward pass equals its first one, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from inverse_flow.reversible import generators


class Replay:
    """The conditions under which ``layers`` run for the first time, to run them so again later.

    These are: the values of the parameters (a tensor that stands in a parameter's place, as
    ``torch.func.functional_call`` puts it there, counts as the parameter), training or evaluation mode, autocast, and,
    from before each layer, its buffers, its attributes and the states of the random number generators, which are those
    of the program (PyTorch's, Python's and NumPy's) and those that are attributes of its modules. A state takes some
    kB, so it is kept only for a layer that draws.

    What a layer changes within an attribute, as an entry of a list or a dictionary, is not seen.

    A layer that changed its own parameters in the first run has initialised itself from the data. It runs again as
    that left it.

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
        self._caches_weights = parametrize._cache_enabled
        of_torch, of_others = generators.of_torch(device), generators.of_others()
        uses_others = [generators.may_use_others(modules) for modules in self._modules]
        self._shared = of_torch + of_others * any(uses_others)
        self._shared_states = generators.states(self._shared)
        self._watched = [len(self._shared) if others else len(of_torch) for others in uses_others]
        """How many of the shared ones each layer may draw from."""
        self._drawn: dict[int, tuple[list[Any], list[Any]]] = {}
        """The generators of each layer that draws, and their states before it."""
        self._states: dict[int, _State] = {}
        self._changed: dict[int, list[nn.Module]] = {}

    @contextmanager
    def first(self) -> Iterator[None]:
        """For the first run of all layers."""
        with self._autocast(), _weight_cache(self._caches_weights):
            yield

    @contextmanager
    def first_of(self, i: int, path: str) -> Iterator[None]:
        """For the first run of layer ``i``, within :meth:`first`.

        Raises:
            RuntimeError: the layer changed, in place, a tensor that is neither a parameter nor a buffer.
        """
        state = _State(self._modules[i])
        parametrize._cache.clear()
        yield
        state.check(path)
        changed, initialised = state.changes()
        self._states[i] = _State(self._modules[i]) if initialised else state
        if changed and not initialised:
            self._changed[i] = changed
        watched = self._watched[i]
        sources = self._shared[:watched] + state.generators
        before = self._shared_states[:watched] + state.generator_states
        now = generators.states(sources)
        if not generators.are_equal(now, before):
            self._drawn[i] = sources, before
            self._shared_states[:watched] = now[:watched]

    def changed(self, i: int) -> list[nn.Module]:
        """The modules of layer ``i`` that its first run changed, and that did not initialise themselves."""
        return self._changed.get(i, [])

    def draws(self, i: int) -> bool:
        """Whether the first run of layer ``i`` drew random numbers."""
        return i in self._drawn

    @contextmanager
    def again(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """For all of the later runs: ``parameters`` stand in for those of the first run, the modes are the same, and
        the generators go on afterwards as if nothing had been drawn.
        """
        before = [module._parameters[name] for module, name, _ in self._positions]
        modes = {module: module.training for module in self._training}
        sources = list(dict.fromkeys(source for drawing, _ in self._drawn.values() for source in drawing))
        states = generators.states(sources)
        try:
            for module, name, i in self._positions:
                module._parameters[name] = parameters[i]  # type: ignore[assignment]
            _set_modes(self._training)
            with self._autocast(), _weight_cache(self._caches_weights):
                yield
        finally:
            generators.set_states(sources, states)
            _set_modes(modes)
            for (module, name, _), parameter in zip(self._positions, before, strict=True):
                module._parameters[name] = parameter

    @contextmanager
    def layer(self, i: int) -> Iterator[None]:
        """For one later run of layer ``i``, within :meth:`again`: what it held before its first run stands in copies
        where it stood.
        """
        if i in self._drawn:
            generators.set_states(*self._drawn[i])
        parametrize._cache.clear()
        modules = self._modules[i]
        buffers = [dict(module._buffers) for module in modules]
        attributes = [dict(vars(module)) for module in modules]
        try:
            self._states[i].restore()
            yield
        finally:
            for module, held, of_module in zip(modules, buffers, attributes, strict=True):
                module._buffers.clear()
                module._buffers.update(held)
                _set_attributes(module, of_module)

    def watch(self, i: int) -> Callable[[], bool]:
        """A function that tells whether layer ``i`` has changed what it holds since now."""
        now = _State(self._modules[i], copies=False)
        return lambda: bool(now.changes()[0])

    @contextmanager
    def evaluating(self, i: int) -> Iterator[None]:
        """Layer ``i`` in evaluation mode, within :meth:`again`."""
        modules = [module for module in self._modules[i] if module.training]
        _set_modes(dict.fromkeys(modules, False))
        try:
            yield
        finally:
            _set_modes(dict.fromkeys(modules, True))

    def _autocast(self) -> torch.autocast:
        # No cache: a weight cast without a graph would be found there by a later use that needs one.
        return torch.autocast(
            self._device.type, dtype=self._autocast_dtype, enabled=self._autocast_enabled, cache_enabled=False
        )


class _State:
    """What modules hold besides parameters, as it is now."""

    def __init__(self, modules: Sequence[nn.Module], *, copies: bool = True) -> None:
        self._attributes = [(module, dict(vars(module))) for module in modules]
        self._buffers = [
            (module, name, buffer, _mark(buffer), buffer.clone() if copies else buffer)
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._parameters = [(p, _mark(p)) for module in modules for p in module._parameters.values() if p is not None]
        self._plain: list[tuple[nn.Module, str, Tensor, tuple[int, int]]] = []
        self.generators: list[Any] = []
        for module, attributes in self._attributes:
            for name, value in attributes.items():
                if isinstance(value, Tensor):
                    self._plain.append((module, name, value, _mark(value)))
                elif isinstance(value, generators.KINDS):
                    self.generators.append(value)
        self.generator_states = generators.states(self.generators)

    def check(self, path: str) -> None:
        """Refuses a change that cannot be taken back."""
        for module, name, value, mark in self._plain:
            if _mark(value) != mark:
                raise RuntimeError(
                    f"{path}: {type(module).__name__} changed its tensor {name!r} in place, which is neither a "
                    "parameter nor a buffer, so that the layer cannot run again as it did: register it as a buffer"
                )

    def changes(self) -> tuple[list[nn.Module], bool]:
        """The modules that hold something else now; and whether a parameter has another value."""
        changed = [module for module, name, buffer, mark, _ in self._buffers if _is_other(module, name, buffer, mark)]
        changed += [module for module, before in self._attributes if _differ(vars(module), before)]
        return changed, any(_mark(parameter) != mark for parameter, mark in self._parameters)

    def restore(self) -> None:
        """Puts it back; buffers as copies."""
        for module, attributes in self._attributes:
            _set_attributes(module, attributes)
        for module, name, _, _, value in self._buffers:
            module._buffers[name] = value.clone()


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Another one after every change of the values, be it in place or by giving ``.data`` another storage."""
    return tensor._version, tensor.untyped_storage()._cdata


def _is_other(module: nn.Module, name: str, buffer: Tensor, mark: tuple[int, int]) -> bool:
    return module._buffers.get(name) is not buffer or _mark(buffer) != mark


def _differ(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return list(map(id, now.values())) != list(map(id, before.values()))


def _set_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    if _differ(vars(module), attributes):
        vars(module).clear()
        vars(module).update(attributes)


@contextmanager
def _weight_cache(enabled: int) -> Iterator[None]:
    """A cache of parametrized weights apart from that of the caller: what is computed here has no graph, or one of its
    own, and would be found there by a use that needs another.
    """
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = enabled, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


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
