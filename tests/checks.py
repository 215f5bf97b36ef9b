"""What the solve must satisfy, as plain functions: the tests call them on the library, and test_teeth.py on broken
copies of it, to show that each of them can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from inverse_flow import reference
from inverse_flow.ops import views
from inverse_flow.ops.spec import Spec

from .cases import Case, corner_tap, mirrored
from .tolerance import assert_accurate, assert_solves, plain_solve, state_dtype

Device = torch.device | str
Solver = Callable[..., Tensor]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch's pool with ``count`` threads, for as little as possible: on a busy machine every other operator of
    PyTorch becomes a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clean(case: Case, weight: Tensor) -> Tensor:
    """The weight without the NaN in entries that are not read: for arithmetic that reads them."""
    return weight.masked_fill(case.unread(weight), 0)


def adjoint(case: Case, weight: Tensor) -> tuple[Case, Tensor]:
    """(case, weight) whose A is the transpose of this one's: from the opposite corner, taps and channels swapped.

    An independent derivation for the plain recurrence; the dense oracle transposes the matrix itself.
    """
    members = case.channels // case.groups
    effective = clean(case, weight)
    if case.corner != "general":
        # The transpose of a lower triangular M is upper triangular, which only a general corner can hold.
        for group, order in enumerate(case.orders):
            corner = (slice(group * members, (group + 1) * members), slice(None), *corner_tap(order, case.kernel))
            effective[corner].diagonal().fill_(1)
    swapped = effective.unflatten(0, (case.groups, members)).transpose(1, 2).flatten(0, 1)
    swapped = swapped.flip(list(range(2, swapped.dim())))
    pairs = [("front", "back"), ("top", "bottom"), ("left", "right")]
    opposite = {one: other for pair in pairs for one, other in (pair, pair[::-1])}
    orders = tuple("_".join(opposite[word] for word in order.split("_")) for order in case.orders)
    fields = {**case.__dict__, "order": orders, "corner": "general"}
    return Case(**fields), swapped.contiguous()


def solve(case: Case, input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """The operator itself, or what is made of it for signals and dilated problems."""
    return views.solve(input, weight, bias, Spec(case.order_codes, case.corner_code, transposed), case.dilation)


def check_value(
    case: Case,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool = False,
    found: Tensor | None = None,
) -> None:
    """The solve agrees with the dense float64 one, has a small residual, and leaves its arguments alone."""
    arguments = [tensor for tensor in (input, weight, bias) if tensor is not None]
    before = [tensor.clone() for tensor in arguments]
    actual = solve(case, input, weight, bias, transposed) if found is None else found
    for tensor, old in zip(arguments, before, strict=True):
        torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)

    # The operator alone runs on a GPU: what judges it is many small steps.
    input, weight, actual, bias = input.cpu(), weight.cpu(), actual.cpu(), None if bias is None else bias.cpu()
    matrix = reference.dense_matrix(weight.double(), *input.shape[2:], **case.arguments)
    matrix = matrix.mT if transposed else matrix
    right = input.double() if bias is None else input.double() - bias.double().view(-1, *(1,) * case.dimensions)
    exact = torch.linalg.solve(matrix, right.flatten(1).mT).mT.reshape(input.shape)
    plain_case, plain_weight = adjoint(case, weight) if transposed else (case, weight)
    plain = plain_solve(plain_case, input, plain_weight, bias)
    assert_accurate(actual, plain, exact, input.dtype)
    assert_solves(actual, plain, matrix, right)


def check_gradients(
    case: Case,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor | None = None,
    dense: Solver | None = None,
    recurrence: Solver | None = None,
) -> None:
    """The gradients agree with autograd through the dense float64 solve, and are zero for entries that are not read."""
    if grad is None:
        grad = torch.randn_like(input, memory_format=torch.contiguous_format)
    names = ["input", "weight"] + ["bias"] * (bias is not None)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
        leaves = [t if dtype is None else t.to(dtype) for t in given]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        output = function(*leaves, **case.arguments)
        return output.detach(), list(torch.autograd.grad(output, leaves, grad.to(output.dtype)))

    given = [tensor for tensor in (input, weight, bias) if tensor is not None]
    actual = [gradient.cpu() for gradient in gradients(case.inverse_conv, None)[1]]
    given, weight, grad = [tensor.cpu() for tensor in given], weight.cpu(), grad.cpu()
    x, exact = gradients(dense or case.dense, torch.float64)
    _, plain = gradients(recurrence or case.recurrence, state_dtype(input.dtype))
    u = exact[0]
    # The gradient of the weight is a sum of products of x and u over all images and pixels, that of the bias of u.
    ones = torch.ones_like(weight, dtype=torch.float64).requires_grad_()
    products = case.causal_conv(x.abs(), ones, **{**case.arguments, "corner": "general"})
    magnitudes = [u, torch.autograd.grad(products, ones, u.abs())[0], u.abs().transpose(0, 1).flatten(1).sum(1)]
    for name, a, p, e, size, tensor in zip(names, actual, plain, exact, magnitudes, given, strict=False):
        assert a.isfinite().all(), f"the gradient of {name} is not finite"
        assert_accurate(a, p.to(tensor.dtype), e, input.dtype, f"the gradient of {name}", size)
    assert not actual[1][case.unread(weight)].any(), "a weight that is not read has a gradient"


def check_layout(
    case: Case, layout: Callable[[Tensor], Tensor], transposed: bool = False, device: Device = "cpu"
) -> None:
    """The values do not depend on how the input lies in memory, and the output lies as PyTorch lays it."""
    input, weight, bias = case.tensors(torch.float32, device)
    laid_out = layout(input)
    expected = solve(case, laid_out.contiguous(), weight, bias, transposed)
    actual = solve(case, laid_out, weight, bias, transposed)
    check_value(case, laid_out, weight, bias, transposed, found=actual)
    if case.dilation == 1:
        assert actual.stride() == torch.empty_like(laid_out).stride()
    else:
        # Put together from its residue classes: channels last where the input's are, else contiguous.
        channels_last = laid_out.stride(1) < laid_out.stride(-1)
        assert (actual.movedim(1, -1) if channels_last else actual).is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_containment(
    case: Case, image: int, channel: int, pixel: tuple[int, ...], value: float, device: Device = "cpu"
) -> None:
    """A NaN or infinity in one pixel reaches the pixels behind it, in its own image and group, and no others."""
    input, weight, bias = case.tensors(torch.float32, device)
    expected = solve(case, input, weight, bias)
    spoiled = input.clone()
    spoiled[(image, channel, *pixel)] = value
    actual = solve(case, spoiled, weight, bias)
    members = case.channels // case.groups
    group = channel // members
    behind = [
        slice(None, place + 1) if backwards else slice(place, None)
        for place, backwards in zip(pixel, mirrored(case.orders[group]), strict=True)
    ]
    reached = torch.zeros_like(input, dtype=torch.bool)
    reached[(image, slice(group * members, (group + 1) * members), *behind)] = True
    torch.testing.assert_close(actual[~reached], expected[~reached], rtol=0, atol=0)
    assert not actual[(image, channel, *pixel)].isfinite(), "the solution at the spoiled pixel is finite"


def check_repeatable(case: Case, device: Device = "cpu") -> None:
    """The same call gives the same bits, forward and backward."""

    def once(tensors: tuple[Tensor, Tensor, Tensor | None], grad: Tensor) -> list[Tensor]:
        x = solve(case, *tensors)
        spec = Spec(case.order_codes, case.corner_code)
        return [x, *views.solve_backward(grad, x, tensors[1], spec, case.dilation)]

    tensors, grad = case.tensors(torch.float32, device), case.tensors(torch.float32, device)[0]
    first = once(tensors, grad)
    for _ in range(3):
        for a, b in zip(once(tensors, grad), first, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def check_consistent(case: Case, device: Device = "cpu") -> None:
    """⟨A⁻¹ y, g⟩ = ⟨y, A⁻ᵀ g⟩, and A(A⁻¹ y) = y = A⁻¹(A y), in float64."""
    y, weight, bias = case.tensors(torch.float64, device)
    g = torch.randn_like(y)
    x = solve(case, y, weight, None)
    torch.testing.assert_close((x * g).sum(), (y * solve(case, g, weight, None, True)).sum(), rtol=1e-9, atol=1e-9)
    there = case.causal_conv(case.inverse_conv(y, weight, bias, **case.arguments), weight, bias, **case.arguments)
    back = case.inverse_conv(case.causal_conv(y, weight, bias, **case.arguments), weight, bias, **case.arguments)
    torch.testing.assert_close(there, y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back, y, rtol=1e-9, atol=1e-9)


def check_vmap(case: Case, mapped: tuple[bool, bool, bool], device: Device = "cpu", size: int = 3) -> None:
    """``vmap`` over a subset of (input, weight, bias) agrees with a loop."""
    samples = [case.tensors(torch.float64, device) for _ in range(size)]
    in_dims = tuple(0 if is_mapped else None for is_mapped in mapped)
    stacked = [
        torch.stack([sample[i] for sample in samples]) if mapped[i] else samples[0][i]  # type: ignore[misc]
        for i in range(3)
    ]

    def function(*tensors: Any) -> Tensor:
        return case.inverse_conv(*tensors, **case.arguments)

    actual = torch.func.vmap(function, in_dims)(*stacked)
    loop = [function(*(tensor[k] if mapped[i] else tensor for i, tensor in enumerate(stacked))) for k in range(size)]
    torch.testing.assert_close(actual, torch.stack(loop))


def jacobian_log_det(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """log|det| of the autograd Jacobian of ``function`` at one image."""
    jacobian = torch.autograd.functional.jacobian(lambda one: function(one[None])[0], x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet


def check_log_det(layer: Any, x: Tensor) -> None:
    """Both directions' log-determinants against their Jacobians, of every image; and they cancel."""
    z, forward = layer(x)
    again, inverse = layer.inverse(z)
    torch.testing.assert_close(again, x)
    assert forward.shape == inverse.shape == (x.shape[0],)
    for image in range(x.shape[0]):
        torch.testing.assert_close(forward[image], jacobian_log_det(lambda t: layer(t)[0], x[image]))
        torch.testing.assert_close(inverse[image], jacobian_log_det(lambda t: layer.inverse(t)[0], z[image]))
