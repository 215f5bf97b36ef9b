"""Exceptions of the package reach another process whole: they survive pickling."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil

import pytest

import inverse_flow

VALUES = {"message": "off by 0.5", "path": "layers.3", "what": "2 of 8 values are NaN", "error": 0.5}


def exceptions() -> list[type[Exception]]:
    found: set[type[Exception]] = set()
    for module in pkgutil.walk_packages(inverse_flow.__path__, "inverse_flow."):
        if module.name.endswith(("__main__", "_C_cuda")):
            continue
        try:
            members = vars(importlib.import_module(module.name)).values()
        except ModuleNotFoundError:
            if not module.name.startswith("inverse_flow.adapters."):  # whose libraries may be absent
                raise
            continue
        found |= {m for m in members if inspect.isclass(m) and issubclass(m, Exception)}
    return sorted((e for e in found if e.__module__.startswith("inverse_flow")), key=lambda e: e.__name__)


@pytest.mark.parametrize("kind", exceptions(), ids=lambda kind: kind.__name__)
def test_exceptions_survive_pickling(kind: type[Exception]) -> None:
    error = kind(*(VALUES[name] for name in inspect.signature(kind).parameters))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)
