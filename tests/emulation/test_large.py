"""Paths that only problems too large for a dense matrix take on a GPU with 227 KiB of shared memory, held against the
operators of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inverse_flow.ops import library as ops

from .checks import assert_close, state_error
from .emulator import (
    ANY_REGIME,
    BLOCK,
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    LANES,
    TENSOR,
    TOP_LEFT,
    TOP_RIGHT,
    Case,
    make_data,
    round_to,
    run,
)


def large(*problem: object, **options: object) -> Case:
    gpu = {"shared_bytes": 227 * 1024, "multiprocessors": 132, "forced_regime": ANY_REGIME, "seeds": (1,)}
    return Case(*problem, **gpu, **options)  # type: ignore[arg-type]


# The case, and what shows that it takes the path.
PATHS = {
    "tiles of doubles": (
        large(1, (TOP_LEFT,), 3, 200, 120, 3, 3, GENERAL, image_type="double", weight_type="double"),
        {"regime": [BLOCK], "tiles": [3, 2], "weights_in_shared": [1]},
    ),
    "tiles of floats": (large(1, (BOTTOM_RIGHT,), 4, 300, 90, 3, 2), {"regime": [BLOCK], "tiles": [2, 1]}),
    "a ring of diagonals": (
        large(1, (TOP_RIGHT,), 24, 64, 64, 3, 3),
        {"regime": [TENSOR], "tensor_whole_images": [0], "weights_in_shared": [1]},
    ),
    "weights from global memory": (
        large(1, (BOTTOM_LEFT,), 200, 5, 4, 3, 3, GENERAL),
        {"regime": [TENSOR], "weights_in_shared": [0], "fold_launches": [2]},
    ),
    "gradients in parts": (
        large(300, (TOP_LEFT,), 16, 4, 4, 3, 3),
        {"gradient_tensor_cores": [1], "gradient_splits": [3]},
    ),
    "tiles with margins": (
        large(1, (TOP_LEFT,), 3, 300, 200, 3, 3, image_type="bfloat16"),
        {"regime": [LANES], "tiles": [5, 4], "bands": [4]},
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("operation", ["solve", "backward"])
def test_paths_of_large_problems(path: str, operation: str) -> None:
    case, facts = PATHS[path]
    data = make_data(case)
    y, weight, bias = (torch.tensor(np.nan_to_num(array)) for array in (data.y, data.weight, data.bias))
    codes = (case.orders, case.corner, False)
    kinds = (case.image_type, case.weight_type, case.weight_type)
    if operation == "solve":
        expected = [ops.solve(y, weight, bias, *codes)]
    else:
        data.x = round_to(ops.solve(y, weight, None, *codes).numpy(), case.image_type)
        data.y = make_data(case, 1).y
        expected = ops.solve_backward(torch.tensor(data.y), torch.tensor(data.x), weight, *codes)
    done = run(case, data, operation)
    for actual, exact, kind in zip(done.outputs[0], expected, kinds, strict=False):
        assert_close(actual, exact.numpy(), kind, state_error(case))
    assert {name: done.facts[name] for name in facts} == facts
