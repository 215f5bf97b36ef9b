"""When products may be rounded to TF32: only where both of PyTorch's switches say so, and the same in every pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from inverse_flow import InverseConv2d, explain
from inverse_flow.functional import inverse_conv2d
from inverse_flow.ops import library as ops
from inverse_flow.ops.explain import H200

from ..cases import FEW, Case


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    """PyTorch's switches at their defaults, and afterwards as they were."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision, conv.fp32_precision = "none", "tf32"
    yield
    matmul.fp32_precision, conv.fp32_precision = before


def on_gpu(dtype: torch.dtype) -> Tensor:
    with FakeTensorMode():
        return torch.empty(2, 3, 4, 4, dtype=dtype, device="cuda")


def test_off_by_default() -> None:
    """In a process of its own, where nothing has been set; one switch is on."""
    code = "import torch; print(torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tf32", "none"]
    assert not ops.allows_tf32(on_gpu(torch.float32))


@pytest.mark.parametrize("conv", ["tf32", "ieee"])
@pytest.mark.parametrize("matmul", ["tf32", "ieee", "none"])
def test_both_switches_are_needed(matmul: str, conv: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = matmul
    torch.backends.cudnn.conv.fp32_precision = conv
    wanted = (matmul, conv) == ("tf32", "tf32")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ops.allows_tf32(on_gpu(dtype)) == wanted
    assert not ops.allows_tf32(on_gpu(torch.float64))
    assert not ops.allows_tf32(torch.empty(2, 3, 4, 4))


def test_explain_tells_what_holds() -> None:
    def lines(dtype: torch.dtype = torch.float32) -> str:
        return str(explain((100, 24, 16, 16), 3, dtype=dtype, device="cuda", gpu=H200, backward=True))

    assert lines().count("3xTF32") == 2
    torch.set_float32_matmul_precision("high")
    for dtype in (torch.float32, torch.bfloat16):
        assert "3xTF32" not in lines(dtype)
        assert lines(dtype).count("TF32") == 2
    assert "TF32" not in lines(torch.float64)
    assert "TF32" not in str(explain((100, 3, 16, 16), 3, device="cuda", gpu=H200, backward=True))


def test_the_old_names_of_the_switches_count_too() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    assert ops.allows_tf32(on_gpu(torch.float32))
    torch.backends.cudnn.allow_tf32 = False
    assert not ops.allows_tf32(on_gpu(torch.float32))
    torch.backends.cudnn.allow_tf32 = True


def test_set_float32_matmul_precision_is_enough() -> None:
    torch.set_float32_matmul_precision("high")
    assert ops.allows_tf32(on_gpu(torch.float32))
    torch.set_float32_matmul_precision("highest")
    assert not ops.allows_tf32(on_gpu(torch.float32))


def test_the_cpu_computes_the_same_bits() -> None:
    case = FEW[0]
    input, weight, bias = case.tensors(torch.float32)
    codes = (case.order_codes, case.corner_code, False)
    x = ops.solve(input, weight, bias, *codes)
    assert torch.equal(x, ops.solve(input, weight, bias, *codes, True))
    for a, b in zip(
        ops.solve_backward(input, x, weight, *codes), ops.solve_backward(input, x, weight, *codes, True), strict=True
    ):
        assert torch.equal(a, b)


Spy = list[tuple[str, bool]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """What the operators are asked for from here on, with switches that allow TF32 once and then no more."""
    found: Spy = []

    def listen(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            found.append((name, arguments[-1]))
            return operator(*arguments)

        return run

    answers = iter([True])
    monkeypatch.setattr(ops, "solve", listen("solve", ops.solve))
    monkeypatch.setattr(ops, "solve_backward", listen("solve_backward", ops.solve_backward))
    monkeypatch.setattr(ops, "allows_tf32", lambda _: next(answers, False))
    return found


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, True)])
def test_every_derivative_keeps_what_the_forward_pass_was_allowed(asked: Spy, needed: tuple[bool, ...]) -> None:
    leaves = [
        t.requires_grad_(n) for t, n in zip(Case(2, 2, 3, 3, (2, 2)).tensors(), needed, strict=True) if t is not None
    ]
    x = inverse_conv2d(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(x.square().sum(), wanted, create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
    assert len(asked) >= 3
    assert all(allowed for _, allowed in asked)


def test_forward_mode_and_vmap_keep_it_too(asked: Spy) -> None:
    input, weight, _ = Case(2, 2, 3, 3, (2, 2)).tensors()

    def loss(w: Tensor) -> Tensor:
        return inverse_conv2d(input, w).square().sum()

    torch.func.hessian(loss)(weight)
    assert {name for name, _ in asked} == {"solve", "solve_backward"}
    assert all(allowed for _, allowed in asked)


def test_the_reversible_backward_pass_asks_for_itself(asked: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no forward pass of its own to agree with."""
    monkeypatch.setattr("inverse_flow.conv.allows_tf32", lambda _: True)
    layer = InverseConv2d(2, 2)
    z = torch.randn(1, 2, 3, 3)
    layer.backward_from_output(z, torch.randn_like(z), torch.zeros(1))
    assert asked == [("solve_backward", True)]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_keeps_what_held_when_it_was_compiled() -> None:
    """And compiles as a whole, though PyTorch's compiler does not trace the switches."""
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        return x + (1 if ops.switches_allow_tf32() else 0)

    zero = torch.zeros(1)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert compiled(zero) == 1
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert function(zero) == 0
    assert compiled(zero) == 1
