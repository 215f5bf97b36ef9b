"""The emulated cases: what they need, and that many of them are alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from .build import compiler


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.alike)
            if compiler() is None:
                item.add_marker(pytest.mark.skip(reason="the emulator needs a C++ compiler (g++, or CXX)"))
