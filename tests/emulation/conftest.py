"""Which of the emulated cases run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from .build import compiler


def few(items: list[pytest.Item]) -> set[pytest.Item]:
    """So many of one test's items that each value of each of its parameters is met, as evenly as may be."""
    values = {item: {f"{name}={value}" for name, value in item.callspec.params.items()} for item in items}
    met: Counter[str] = Counter()
    chosen = set()
    while missing := set().union(*values.values()) - set(met):
        best = min(items, key=lambda item: (-len(missing & values[item]), sum(met[value] for value in values[item])))
        chosen.add(best)
        met.update(values[best])
    return chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --all-emulation, of each test's parameters every value once; without a compiler, none."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if Path(__file__).parent in item.path.parents:
            if compiler() is None:
                item.add_marker(pytest.mark.skip(reason="the emulator needs a C++ compiler (g++, or CXX)"))
            if hasattr(item, "callspec"):
                tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    if config.getoption("--all-emulation"):
        return
    left_out = {item for same in tests.values() for item in set(same) - few(same)}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
