"""The helpers of benchmarks/memory.py: what they count is what autograd keeps, and a wrong gradient stops them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inverse_flow.flows import AffineCoupling


@pytest.fixture(scope="module")
def memory(scripts: Any) -> Any:
    scripts.memory.normflows = None  # optional, and slow to build
    return scripts.memory


@pytest.fixture
def tiny(memory: Any) -> Any:
    return memory.Setting(2, 8, 4)


def test_bytes_saved_counts_a_storage_once(memory: Any) -> None:
    x, y = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)

    def saved(run: Any, known: tuple[Tensor, ...] = ()) -> int:
        with memory.counting_bytes(known) as count:
            run()
            return int(count())

    assert saved(lambda: x * y) == 2 * 40
    assert saved(lambda: x * x) == 40
    assert saved(lambda: x[:5] * x[5:]) == 40
    assert saved(lambda: x * y, (y,)) == 40
    assert saved(lambda: x + y) == 0


def test_bytes_of_fake_tensors_are_those_of_real_ones(memory: Any, tiny: Any) -> None:
    counted = {row["method"]: row["bytes"] for row in memory.count_bytes(tiny, 2)}
    x = memory.images(tiny, torch.device("cpu"))
    for name, (model, loss) in memory.losses(tiny, 2, torch.device("cpu")).items():
        with memory.counting_bytes([*model.parameters(), *model.buffers()]) as count:
            loss(x)
            assert count() == counted[name] > 0


def test_only_rebuilding_keeps_the_same_at_every_depth(memory: Any, tiny: Any) -> None:
    rows = [*memory.count_bytes(tiny, 1), *memory.count_bytes(tiny, 3)]
    kept = {(row["method"], row["steps"]): row["bytes"] for row in rows}
    assert kept[memory.OURS, 1] == kept[memory.OURS, 3]
    for name in (memory.STORED, memory.COUPLING, memory.BLOCK):
        assert kept[name, 3] > kept[name, 1]
    assert kept[memory.STORED, 3] > kept[memory.COUPLING, 3] > kept[memory.BLOCK, 3] > kept[memory.OURS, 3]
    assert memory.print_bytes(rows, "bytes")[memory.OURS] == 0


def test_gradients_are_checked_before_timing(memory: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = memory.check_gradients(tiny, 1, torch.device("cpu"))
    assert set(found) == {memory.COUPLING, memory.BLOCK, memory.OURS}
    right = AffineCoupling.backward_from_output

    def wrong(self: AffineCoupling, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Tensor | None) -> object:
        return right(self, z, grad_z, 0.9 * grad_logdet, context)

    monkeypatch.setattr(AffineCoupling, "backward_from_output", wrong)
    with pytest.raises(ArithmeticError, match="rebuilt"):
        memory.check_gradients(tiny, 1, torch.device("cpu"))
