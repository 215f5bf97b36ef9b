"""The helpers of benchmarks/memory.py: what they count is what autograd keeps, and a wrong gradient stops them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from inverse_flow.flows import AffineCoupling

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script as a module; it finds its neighbour ``common`` as it does when it is run."""
    spec = importlib.util.spec_from_file_location("memory_benchmark", FOLDER / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        module.normflows = None  # optional, and slow to build
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        del sys.modules[spec.name]
        sys.modules.pop("common", None)


@pytest.fixture
def tiny(benchmark: ModuleType) -> object:
    return benchmark.Setting(2, 8, 4)


def test_bytes_saved_counts_a_storage_once(benchmark: ModuleType) -> None:
    x, y = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    assert benchmark.bytes_saved(lambda: x * y) == 2 * 40
    assert benchmark.bytes_saved(lambda: x * x) == 40
    assert benchmark.bytes_saved(lambda: x[:5] * x[5:]) == 40
    assert benchmark.bytes_saved(lambda: x * y, [y]) == 40
    assert benchmark.bytes_saved(lambda: x + y) == 0


def test_bytes_of_fake_tensors_are_those_of_real_ones(benchmark: ModuleType, tiny: object) -> None:
    counted = {row["method"]: row["bytes"] for row in benchmark.count_bytes(tiny, [2])}
    x = benchmark.images(tiny, torch.device("cpu"))
    for name, (model, loss) in benchmark.losses(tiny, 2, torch.device("cpu")).items():
        known = [*model.parameters(), *model.buffers()]
        assert benchmark.bytes_saved(lambda loss=loss: loss(x), known) == counted[name] > 0


def test_only_rebuilding_keeps_the_same_at_every_depth(benchmark: ModuleType, tiny: object) -> None:
    rows = benchmark.count_bytes(tiny, [1, 3])
    kept = {(row["method"], row["steps"]): row["bytes"] for row in rows}
    assert kept[benchmark.OURS, 1] == kept[benchmark.OURS, 3]
    for name in (benchmark.STORED, benchmark.COUPLING, benchmark.BLOCK):
        assert kept[name, 3] > kept[name, 1]
    assert kept[benchmark.STORED, 3] > kept[benchmark.COUPLING, 3] > kept[benchmark.BLOCK, 3] > kept[benchmark.OURS, 3]


def test_slope(benchmark: ModuleType) -> None:
    assert benchmark.slope([(0.0, 5.0), (1.0, 7.0), (2.0, 9.0)]) == pytest.approx(2.0)
    assert benchmark.slope([(1.0, 4.0), (3.0, 4.0)]) == 0


def test_gradients_are_checked_before_timing(
    benchmark: ModuleType, tiny: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = benchmark.check_gradients(tiny, 1, torch.device("cpu"))
    assert set(found) == {benchmark.COUPLING, benchmark.BLOCK, benchmark.OURS}

    right = AffineCoupling.backward_from_output

    def wrong(self: AffineCoupling, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None) -> object:
        return right(self, z, grad_z, 0.9 * grad_logdet, context)

    monkeypatch.setattr(AffineCoupling, "backward_from_output", wrong)
    with pytest.raises(ArithmeticError, match="rebuilt"):
        benchmark.check_gradients(tiny, 1, torch.device("cpu"))


def test_the_plot_is_written_in_both_formats(benchmark: ModuleType, tiny: object, tmp_path: Path) -> None:
    benchmark.plot(benchmark.count_bytes(tiny, [1, 2]), tiny, tmp_path / "memory")
    assert (tmp_path / "memory.png").stat().st_size > 1000
    assert (tmp_path / "memory.svg").read_text().count("checkpoint of each step") >= 1
