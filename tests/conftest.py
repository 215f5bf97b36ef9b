"""What every test shares: a seed, one thread per worker, memory that is not zero by luck, the devices, benchmarks."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Read by cuBLAS when it starts: deterministic algorithms need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from inverse_flow.ops import native

HAS_CUDA = not native.cuda_absent_reason and torch.cuda.is_available()
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if HAS_CUDA else [])]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# The first PyTorch that these tests have not been run with.
NEXT_TORCH = (2, 14)

# The convolutions that a solve is compared with compute in TF32 on a GPU unless told not to.
if HAS_CUDA:
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]

# Workers of pytest-xdist share the processor; tests of threading set their own number.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take very long or very much memory")
    parser.addoption("--thorough", action="store_true", help="also run cases that are much like others, and builds")


def few(items: list[pytest.Item]) -> set[pytest.Item]:
    """A few of one test's items, in which each value of each of its parameters is met, as evenly as may be."""
    values = {item: {f"{name}={value}" for name, value in item.callspec.params.items()} for item in items}
    met: Counter[str] = Counter()
    chosen = set()
    while missing := set().union(*values.values()) - set(met):
        best = min(items, key=lambda item: (-len(missing & values[item]), sum(met[value] for value in values[item])))
        chosen.add(best)
        met.update(values[best])
    return chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what was not asked for."""
    left_out: set[pytest.Item] = set()
    if not config.getoption("--slow"):
        left_out.update(item for item in items if item.get_closest_marker("slow"))
    if not config.getoption("--thorough"):
        left_out.update(item for item in items if item.get_closest_marker("thorough"))
        alike: dict[str, list[pytest.Item]] = {}
        for item in items:
            if item.get_closest_marker("alike") and hasattr(item, "callspec"):
                alike.setdefault(item.nodeid.partition("[")[0], []).append(item)
        left_out.update(item for same in alike.values() for item in set(same) - few(same))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes very long or very much memory; run with --slow")
    config.addinivalue_line("markers", "thorough: takes long, or is much like others; run with --thorough")
    config.addinivalue_line("markers", "alike: without --thorough, each value of each parameter is met once")
    # Most tests evaluate models that were never trained.
    config.addinivalue_line("filterwarnings", "ignore:ActNorm is not initialised:UserWarning")
    # What a PyTorch newer than the tests know has deprecated is shown, and no error.
    if torch.__version__ >= NEXT_TORCH:
        for category in ("DeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", f"default::{category}")
    # A program that was started in the background may ignore Ctrl-C, and so would all that the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one and the library was built for it."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """A seed of its own for each test, the same in every run and whichever tests run beside it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """``torch.empty`` is filled with NaN, so that a result nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


class Scripts:
    """Each script by its name, imported when it is first asked for."""

    folder = BENCHMARKS

    def __getattr__(self, name: str) -> Any:
        module: ModuleType = importlib.import_module(name)
        return module


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    """They find one another as they do when they are run, and the kinds of models that they add go with them."""
    from inverse_flow.models import KINDS

    kinds = dict(KINDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that threads would only wait for one another
    names = [path.stem for path in BENCHMARKS.iterdir() if path.suffix == ".py" or path.is_dir()]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield Scripts()
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        KINDS.clear()
        KINDS.update(kinds)
        torch.set_num_threads(threads)
