"""What a module with two directions shares with others: its forward pre-hooks run before both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class Bijection(nn.Module):
    """A module with ``forward`` and ``inverse``, whose forward pre-hooks run before ``inverse`` too.

    Those of pruning and of weight normalisation set the weights, of which both directions must see the same. A subclass
    writes ``inverse`` as ever.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "inverse" in vars(cls):
            cls.inverse = _after_pre_hooks(vars(cls)["inverse"])  # type: ignore[attr-defined]


def run_pre_hooks(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Runs the forward pre-hooks of a module before its inverse.

    Args:
        name: of the module, for an error.
        module: whose hooks.
        arguments: of its inverse.

    Raises:
        RuntimeError: a hook that changes the input, which an inverse cannot undo.
    """
    for key, hook in module._forward_pre_hooks.items():
        with_keywords = key in module._forward_pre_hooks_with_kwargs
        changed = hook(module, arguments, {}) if with_keywords else hook(module, arguments)
        if changed is not None:
            raise RuntimeError(
                f"{name}: a forward pre-hook changes the input of the layer, which its inverse cannot undo"
            )


def bare(inverse: Callable[..., Any]) -> Callable[..., Any]:
    """A module's bound ``inverse`` without the hooks before it."""
    within = getattr(inverse, "within", None)
    # What is no method, as a compiled inverse put in its place, may have the attributes of one.
    return functools.partial(within, inverse.__self__) if within and isinstance(inverse, MethodType) else inverse


def _after_pre_hooks(inverse: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inverse)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # What a subclass calls by super() has had its hooks.
        if self._forward_pre_hooks and type(self).inverse is run:  # type: ignore[attr-defined]
            run_pre_hooks(type(self).__name__, self, args)
        return inverse(self, *args, **kwargs)

    run.within = inverse  # type: ignore[attr-defined]
    return run
