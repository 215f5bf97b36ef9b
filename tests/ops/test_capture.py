"""Programs made of the operators: functionalized, traced, compiled whole, exported with sizes left open, and trained
after."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inverse_flow import InverseConv1d, InverseConv2d, InverseConv3d
from inverse_flow.conv import InverseConvNd
from inverse_flow.flows import ActNorm
from inverse_flow.functional import causal_conv2d, inverse_conv2d

from ..cases import CORNERS, Case

OPERATORS = torch.ops.inverse_flow
FUNCTIONS = pytest.mark.parametrize("function", [inverse_conv2d, causal_conv2d])
ORDERS = ["top_right", ("bottom_left", "top_left")]
LAYERS = list(itertools.product(["identity", "unit_triangular", "plu"], ["forward", "inverse"]))


class Direction(nn.Module):
    """One direction of a layer as a module, which is what is exported."""

    def __init__(self, corner: str, direction: str, layer: InverseConvNd | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer or InverseConv2d(4, 3, groups=2, order=("bottom_right", "top_left"), corner=corner)
        self.inverse = direction == "inverse"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(x) if self.inverse else self.layer(x)


def case_of(corner: str, order: Any) -> Case:
    return Case(2, 4, 4, 5, groups=1 if isinstance(order, str) else len(order), order=order, corner=corner)


def tensors_of(case: Case) -> list[Tensor]:
    tensors = [t for t in case.tensors(torch.float32) if t is not None]
    tensors[1] = tensors[1].masked_fill(tensors[1].isnan(), 0)
    return [t.requires_grad_() for t in tensors]


def results(call: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """What a call gives, and the gradients of the tensors."""
    found = call(*tensors)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    loss = sum((output.square().sum() for output in outputs if output.requires_grad), torch.zeros(()))
    return [*outputs, *torch.autograd.grad(loss, tensors, allow_unused=True)]


def assert_same(module: Callable[..., Any], original: nn.Module, parameters: list[Tensor], x: Tensor) -> None:
    """Values, and gradients of the images and of the parameters that ``module`` has."""
    expected = results(lambda x, *_: original(x), [x, *original.parameters()])
    found = results(lambda x, *_: module(x), [x, *parameters])
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@FUNCTIONS
@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_functionalized(function: Callable[..., Tensor], corner: str, order: Any) -> None:
    case = case_of(corner, order)
    tensors = tensors_of(case)
    found = results(torch.func.functionalize(lambda *t: function(*t, **case.arguments)), tensors)
    torch.testing.assert_close(found, results(lambda *t: function(*t, **case.arguments), tensors))


def test_functionalized_with_another_transform_it_says_so() -> None:
    x, weight = torch.ones(1, 2, 3, 3), torch.eye(2)[..., None, None]
    for both in (lambda f: torch.func.functionalize(torch.func.grad(f)), torch.func.vmap):
        transformed = both(torch.func.functionalize(lambda x: inverse_conv2d(x[None], weight).sum()))
        with pytest.raises(NotImplementedError, match="together with another transform"):
            transformed(x if both is torch.func.vmap else x[0])


@pytest.mark.filterwarnings("ignore")  # that it traces what is a constant, and that scripts are of another time
@pytest.mark.parametrize(("corner", "direction"), LAYERS)
@pytest.mark.parametrize("recording", [False, True])
def test_a_traced_layer_is_trained(corner: str, direction: str, recording: bool) -> None:
    module = Direction(corner, direction)
    with torch.set_grad_enabled(recording):
        traced = torch.jit.trace(copy.deepcopy(module), (torch.randn(2, 4, 6, 5),))
    of_name = dict(traced.named_parameters())
    parameters = [of_name[name] for name, _ in module.named_parameters()]
    for shape in [(2, 4, 6, 5), (5, 4, 3, 7)]:
        assert_same(traced, module, parameters, torch.randn(shape, requires_grad=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "error::torch.jit.TracerWarning")
def test_tracing_looks_at_no_value() -> None:
    torch.jit.trace(InverseConv2d(4), torch.ones(2, 4, 3, 3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(4, 2, 3), torch.ones(4, 2, 3)], layout=layout)
    layer, flow = InverseConv2d(4), ActNorm(4)
    for call in (layer, layer.inverse, flow, flow.inverse):
        with pytest.raises(TypeError, match="one tensor, got a nested one: pass each of its tensors by itself"):
            call(nested)


@FUNCTIONS
@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_compiled(function: Callable[..., Tensor], corner: str, order: Any) -> None:
    case = case_of(corner, order)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = tensors_of(case)
    found = results(lambda *t: compiled(*t, **case.arguments), tensors)
    expected = results(lambda *t: function(*t, **case.arguments), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("corner", "direction"), LAYERS)
def test_a_compiled_layer_with_any_sizes(corner: str, direction: str) -> None:
    module = Direction(corner, direction)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(2, 4, 6, 5), (5, 4, 3, 7)]:
        assert_same(compiled, module, list(module.parameters()), torch.randn(shape, requires_grad=True))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("corner", "direction"),
    [("plu", "forward"), *(pytest.param(*layer, marks=pytest.mark.thorough) for layer in LAYERS[2:5])],
)
def test_a_layer_compiled_by_inductor(corner: str, direction: str) -> None:
    module = Direction(corner, direction)
    compiled = torch.compile(module, fullgraph=True)
    assert_same(compiled, module, list(module.parameters()), torch.randn(2, 4, 6, 5, requires_grad=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.export itself
@pytest.mark.alike
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("corner", "direction"), LAYERS)
def test_an_exported_layer_is_trained(corner: str, direction: str, strict: bool, decomposed: bool) -> None:
    module = Direction(corner, direction)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(
        copy.deepcopy(module), (torch.randn(2, 4, 6, 5),), dynamic_shapes={"x": sizes}, strict=strict
    )
    exported = (program.run_decompositions() if decomposed else program).module()
    of_name = dict(exported.named_parameters())
    parameters = [of_name[name] for name, _ in module.named_parameters()]
    for shape in [(2, 4, 6, 5), (5, 4, 3, 7)]:
        assert_same(exported, module, parameters, torch.randn(shape, requires_grad=True))


OTHERS = {
    "signals": (lambda: InverseConv1d(4, 3, groups=2, order=("right", "left")), (6,)),
    "volumes": (lambda: InverseConv3d(4, 2, corner="plu", order="back_top_right"), (3, 2, 3)),
    "dilated images": (lambda: InverseConv2d(4, 2, corner="plu", dilation=(2, 3)), (6, 5)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.export itself
@pytest.mark.alike
@pytest.mark.parametrize("direction", ["inverse", "forward"])
@pytest.mark.parametrize("other", ["dilated images", "signals", "volumes"])
def test_other_layers_are_compiled_and_exported(other: str, direction: str) -> None:
    make, sizes = OTHERS[other]
    module = Direction("", direction, make())
    x = torch.randn(2, 4, *sizes, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(
        copy.deepcopy(module), (x.detach(),), dynamic_shapes={"x": {0: torch.export.Dim("b")}}
    )
    of_name = dict(exported.module().named_parameters())
    for batch in (x, torch.randn(5, 4, *sizes, requires_grad=True)):
        assert_same(compiled, module, list(module.parameters()), batch)
        parameters = [of_name[name] for name, _ in module.named_parameters()]
        assert_same(exported.module(), module, parameters, batch)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", range(3))
def test_the_operators_have_a_formula_of_their_own(corner: int, transposed: bool) -> None:
    case = Case(2, 2, 2, 3, (2, 2), groups=2, order=("bottom_left", "top_right"), corner=CORNERS[corner])
    y, w, b = case.tensors()
    codes = (list(case.order_codes), corner, transposed)
    w = w.masked_fill(w.isnan(), 0)
    leaves = [t.requires_grad_() for t in (y, w, b)]
    assert torch.autograd.gradcheck(lambda *t: OPERATORS.solve(*t, *codes), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: OPERATORS.solve(*t, *codes), leaves)
    x = torch.randn_like(y, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: OPERATORS.solve_backward(*t, *codes), (y, x, w))


@pytest.mark.parametrize(("corner", "direction"), LAYERS)
def test_made_on_the_meta_device(corner: str, direction: str) -> None:
    module = Direction(corner, direction)
    with torch.device("meta"):
        empty = Direction(corner, direction)
        assert all(t.is_meta for t in empty.state_dict().values())
        z, logdet = empty(torch.randn(2, 4, 6, 5))
        assert z.is_meta
        assert (z.shape, logdet.shape) == ((2, 4, 6, 5), (2,))
    empty.load_state_dict(module.state_dict(), assign=True)
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    assert_same(empty, module, list(empty.parameters()), x)
