"""Kernels without a causal form: ``solve_conv2d`` against the dense float64 solve."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inverse_flow.functional import solve_conv2d
from inverse_flow.ops import centred

CHANNELS, HEIGHT, WIDTH = 4, 7, 6


def make_weight(
    kernel: tuple[int, int] = (3, 3), spread: float = 0.5, groups: int = 1, channels: int = CHANNELS
) -> Tensor:
    """Random taps about the identity: with more spread, worse conditioned."""
    generator = torch.Generator().manual_seed(0)
    inputs = channels // groups
    taps = torch.randn(channels, inputs, *kernel, dtype=torch.float64, generator=generator)
    taps *= spread / (inputs * kernel[0] * kernel[1]) ** 0.5
    index = torch.arange(channels)
    taps[index, index % inputs, kernel[0] // 2, kernel[1] // 2] += 1
    return taps


def make_images(batch: int = 3, channels: int = CHANNELS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)


def blur(size: int, deviation: float) -> Tensor:
    """A Gaussian; the wider, the closer to singular."""
    row = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * deviation**2))
    return (row[:, None] * row / row.sum() ** 2)[None, None]


def box(size: int) -> Tensor:
    """Out of focus: singular on some images, and never far from it."""
    return torch.full((1, 1, size, size), 1 / size**2, dtype=torch.float64)


def matrix_of(weight: Tensor, groups: int = 1) -> Tensor:
    """A, column by column, by PyTorch's convolution."""
    size = len(weight) * HEIGHT * WIDTH
    units = torch.eye(size, dtype=torch.float64).view(size, len(weight), HEIGHT, WIDTH)
    return F.conv2d(units, weight.double(), padding="same", groups=groups).flatten(1).mT


def dense(images: Tensor, weight: Tensor, groups: int = 1, tikhonov: float = 0.0) -> Tensor:
    matrix, right = matrix_of(weight, groups), images.double().flatten(1).mT
    if tikhonov:
        matrix, right = matrix.mT @ matrix + tikhonov * torch.eye(len(matrix), dtype=torch.float64), matrix.mT @ right
    return torch.linalg.solve(matrix, right).mT.view(images.shape)


def check(images: Tensor, weight: Tensor, groups: int = 1, tikhonov: float = 0.0, **options: Any) -> Any:
    """The residual is as small as it is said to be, and the error no larger than that and the condition allow."""
    found = solve_conv2d(images, weight, groups=groups, tikhonov=tikhonov, **options)
    assert found.x.dtype == images.dtype
    assert (found.residual <= found.tolerance).all()
    matrix, exact = matrix_of(weight, groups), dense(images, weight, groups, tikhonov)
    if tikhonov:
        matrix = matrix.mT @ matrix + tikhonov * torch.eye(len(matrix), dtype=torch.float64)
    condition = float(torch.linalg.cond(matrix))
    rounding = 32 * torch.finfo(images.dtype).eps
    error = ((found.x.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max()
    assert error <= condition * (found.tolerance + rounding), (float(error), condition)
    return found


@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (1, 3), (3, 1), (1, 1), (9, 9)], ids=str)
def test_any_odd_kernel(kernel: tuple[int, int], dtype: torch.dtype, preconditioned: bool) -> None:
    """Also one that is larger than the image."""
    check(make_images().to(dtype), make_weight(kernel).to(dtype), preconditioned=preconditioned)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("tikhonov", [0.0, 1e-2])
def test_groups(groups: int, tikhonov: float) -> None:
    check(make_images(), make_weight(groups=groups), groups, tikhonov)


@pytest.mark.parametrize("deviation", [0.4, 0.6, 0.8, 1.0])
def test_from_well_to_ill_conditioned(deviation: float) -> None:
    check(make_images(channels=1), blur(5, deviation))


def test_the_preconditioner_saves_iterations() -> None:
    images, weight = torch.randn(2, 1, 20, 20, dtype=torch.float64), blur(5, 1.0)
    with_it = solve_conv2d(images, weight, restart=100)
    without = solve_conv2d(images, weight, restart=100, preconditioned=False)
    assert 2 * with_it.iterations.max() < without.iterations.min()


@pytest.mark.parametrize("mirrored", [False, True])
def test_of_two_diagonals_the_larger_is_solved(mirrored: bool) -> None:
    """A kernel and its mirror image are as easy as each other; all taps on one diagonal are exact from its two ends."""
    weight = torch.diag(torch.tensor([0.2, 1.0, 0.0], dtype=torch.float64))[None, None]
    images = make_images(channels=1)
    weight, images = (tensor.flip(3) if mirrored else tensor for tensor in (weight, images))
    assert solve_conv2d(images, weight).iterations.tolist() == [1, 1, 1]


def test_the_preconditioner_of_the_system_of_least_squares_is_symmetric() -> None:
    """(D + L) D⁻¹ (D + Lᵀ), for an autocorrelation."""
    weight = make_weight()
    system = centred.System(1, 1e-2, True, 1e-10, 10, 10)
    precondition = centred.gauss_seidel(centred.kernel(weight, system), 1)
    a, b = make_images()[:1], make_images()[1:2]
    torch.testing.assert_close((a * precondition(b)).sum(), (precondition(a) * b).sum())


def test_the_kernel_of_the_system_is_that_of_its_matrix() -> None:
    """Away from the borders, for groups too."""
    weight = make_weight(groups=2)
    for system in (centred.System(2, 0.1, True, 0, 1, 1), centred.System(2, 0.0, True, 0, 1, 1, transposed=True)):
        impulse = torch.zeros(CHANNELS, CHANNELS, 9, 9, dtype=torch.float64)
        impulse[range(CHANNELS), range(CHANNELS), 4, 4] = 1
        direct = F.conv2d(impulse, centred.kernel(weight, system), padding="same", groups=2)
        torch.testing.assert_close(direct, centred.apply(impulse, weight, system))


def test_bias_one_image_and_strides() -> None:
    images, weight, bias = make_images(), make_weight(), torch.arange(4, dtype=torch.float64)
    expected = dense(images - bias.view(-1, 1, 1), weight)
    for given in (images, images.to(memory_format=torch.channels_last), images.mT.contiguous().mT):
        torch.testing.assert_close(solve_conv2d(given, weight, bias).x, expected, rtol=1e-8, atol=1e-8)
    alone = solve_conv2d(images[0], weight, bias)
    assert alone.iterations.shape == (1,)
    torch.testing.assert_close(alone.x, expected[0], rtol=1e-8, atol=1e-8)
    assert solve_conv2d(images[:0], weight, bias).x.shape == (0, *images.shape[1:])


def test_a_singular_kernel_needs_tikhonovs_term() -> None:
    images = make_images(channels=1)
    weight = torch.tensor([[1.0, 0, 1]], dtype=torch.float64).view(1, 1, 1, 3)
    weight[..., 1] = 2 * torch.cos(torch.tensor(torch.pi / 7, dtype=torch.float64))  # an eigenvalue 0 for width 6
    assert torch.linalg.matrix_rank(matrix_of(weight)) < HEIGHT * WIDTH
    with pytest.raises(torch.linalg.LinAlgError, match="tikhonov > 0"):
        solve_conv2d(images, weight)
    check(images, weight, tikhonov=1e-3)


@pytest.mark.parametrize("tikhonov", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_least_squares(tikhonov: float, dtype: torch.dtype) -> None:
    for weight in (box(3), make_weight(spread=1.5, channels=1)):
        check(make_images(channels=1).to(dtype), weight.to(dtype), tikhonov=tikhonov, tolerance=1e-5)


@pytest.mark.parametrize("tikhonov", [0.0, 0.1])
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_gradients_of_two_orders(tikhonov: float, needed: tuple[bool, ...]) -> None:
    images, weight = make_images(2, channels=1)[..., :2, :3], make_weight((1, 3), channels=1)
    tensors = [images, weight, torch.tensor([0.5], dtype=torch.float64)]
    tensors = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]

    def x(*given: Tensor) -> Tensor:
        return solve_conv2d(*given, tikhonov=tikhonov, tolerance=1e-13).x

    # The sums of small batched products are not the same bits at every call.
    assert torch.autograd.gradcheck(x, tensors, nondet_tol=1e-10)
    assert torch.autograd.gradgradcheck(x, tensors, nondet_tol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tikhonov", [0.0, 1e-2])
def test_gradients_are_those_of_the_dense_solve(groups: int, tikhonov: float) -> None:
    images, weight = make_images().requires_grad_(), make_weight((3, 5), groups=groups).requires_grad_()
    grad = make_images(6)[3:]
    size = CHANNELS * HEIGHT * WIDTH
    units = torch.eye(size, dtype=torch.float64).view(size, CHANNELS, HEIGHT, WIDTH)
    matrix = F.conv2d(units, weight, padding="same", groups=groups).flatten(1).mT
    system, right = matrix, images.flatten(1).mT
    if tikhonov:
        system = matrix.mT @ matrix + tikhonov * torch.eye(size, dtype=torch.float64)
        right = matrix.mT @ right
    exact = torch.autograd.grad(torch.linalg.solve(system, right).mT.view(images.shape), (images, weight), grad)
    x = solve_conv2d(images, weight, groups=groups, tikhonov=tikhonov, tolerance=1e-12).x
    for found, wanted in zip(torch.autograd.grad(x, (images, weight), grad), exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_no_graph_is_kept_where_none_is_asked_for() -> None:
    weight = make_weight().requires_grad_()
    solve_conv2d(make_images(), weight).x.sum().backward()
    assert weight.grad is not None
    assert weight.grad.grad_fn is None


def test_each_image_stops_on_its_own_residual() -> None:
    images = make_images()
    images[1] = 0
    together = solve_conv2d(images, make_weight())
    assert together.iterations[1] == 0
    assert together.iterations.tolist() == [int(solve_conv2d(one, make_weight()).iterations) for one in images]


def test_what_does_not_converge_says_so() -> None:
    images, weight = make_images(), make_weight()
    with pytest.raises(torch.linalg.LinAlgError, match=r"1\.0e-10 for 3 of 3 images, after 2 iterations"):
        solve_conv2d(images, weight, max_iterations=2)
    # Zeros are solved in no step, the system of their gradient is not.
    x = solve_conv2d(0 * images, weight.requires_grad_(), max_iterations=2).x
    with pytest.raises(torch.linalg.LinAlgError, match="the system with the gradient on the right"):
        x.backward(images)


@pytest.mark.parametrize("tikhonov", [0.0, 0.1])
def test_a_gradient_that_is_not_finite_is_named(tikhonov: float) -> None:
    x = solve_conv2d(make_images(), make_weight().requires_grad_(), tikhonov=tikhonov).x
    with pytest.raises(ValueError, match="the gradient must be finite, got nan"):
        x.backward(torch.full_like(x, torch.nan))


def test_solves_that_grow_without_bound() -> None:
    """The two quadrants by themselves may be unstable where the whole is not."""
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    weight[..., 0, 0], weight[..., 1, 1], weight[..., 2, 2] = 300.0, 1.0, 1.0
    images = torch.randn(1, 1, 300, 300, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError, match=r"residual is nan.*preconditioned=False"):
        solve_conv2d(images, weight, max_iterations=5)


def error_cases() -> list[tuple[dict[str, Any], type[Exception], str]]:
    images, weight = make_images(), make_weight()
    without_centre = weight.clone()
    without_centre[:, :, 1, 1] = 0
    return [
        ({"weight": weight[:, :, :2]}, ValueError, r"odd sizes.*\(2, 3\)"),
        ({"weight": weight[:2]}, ValueError, "weight must have shape"),
        ({"input": images[0, 0]}, ValueError, "input must have shape"),
        ({"input": images.half(), "weight": weight.half()}, TypeError, "float32 or float64, got torch.float16"),
        ({"weight": weight.float()}, ValueError, "weight must be torch.float64"),
        ({"weight": without_centre}, ValueError, "centre tap is singular.*tikhonov > 0"),
        ({"tikhonov": -1.0}, ValueError, "tikhonov must be at least 0"),
        ({"tikhonov": float("nan")}, ValueError, "tikhonov must be at least 0"),
        ({"tolerance": 1.0}, ValueError, "tolerance must be"),
        ({"tikhonov": torch.tensor(0.1, requires_grad=True)}, TypeError, "tikhonov must be a number, got tensor"),
        ({"tolerance": "1e-3"}, TypeError, "tolerance must be a number, got '1e-3'"),
        ({"tikhonov": True}, TypeError, "tikhonov must be a number, got True"),
        ({"restart": True}, TypeError, "restart must be an integer, got True"),
        ({"input": images.masked_fill(images > 2, torch.nan)}, ValueError, "input must be finite, got nan"),
        ({"weight": weight / 0}, ValueError, "weight must be finite, got (inf|-inf|nan)"),
        ({"bias": torch.full((4,), torch.inf).double()}, ValueError, "input − bias must be finite, got -inf"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1, got 0"),
        ({"max_iterations": 2.5}, TypeError, "max_iterations must be an integer, got 2.5"),
        ({"restart": 0}, ValueError, "restart must be at least 1, got 0"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"groups": True}, TypeError, "groups must be an integer, got True"),
        ({"input": images.to("meta"), "weight": weight.to("meta")}, RuntimeError, "on the meta device have none"),
        ({"groups": 3}, ValueError, "divisible by groups"),
    ]


@pytest.mark.parametrize("case", range(len(error_cases())))
def test_errors_say_what_is_right(case: int) -> None:
    changes, kind, text = error_cases()[case]
    with pytest.raises(kind, match=text):
        solve_conv2d(**({"input": make_images(), "weight": make_weight()} | changes))


def test_without_the_preconditioner_the_centre_may_be_singular() -> None:
    weight = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    weight[..., 0], weight[..., 2] = 1.0, 0.3
    for preconditioned, tikhonov in itertools.product([True, False], [1e-3]):
        check(make_images(channels=1), weight, tikhonov=tikhonov, preconditioned=preconditioned)
    check(make_images(channels=1), weight, preconditioned=False)


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_small_and_large_values_are_solved_like_others(scale: float) -> None:
    y, weight = torch.randn(2, 1, 8, 8), 0.1 * torch.randn(1, 1, 3, 3)
    weight[..., 1, 1] += 1
    leaves = [(scale * y).requires_grad_(), weight.requires_grad_()]
    found = solve_conv2d(*leaves)
    torch.testing.assert_close(found.x / scale, solve_conv2d(y, weight).x, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad((found.x * (0.1 / scale)).sum(), leaves)
    assert all(bool((grad != 0).any()) for grad in grads)


@pytest.mark.parametrize("options", [{}, {"tikhonov": 0.1}, {"preconditioned": False}], ids=str)
def test_autocast_changes_nothing(options: dict[str, Any]) -> None:
    y, weight = torch.randn(2, 2, 6, 6), 0.1 * torch.randn(2, 2, 3, 3)
    weight[..., 1, 1] += torch.eye(2)
    plain = solve_conv2d(y, weight, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = solve_conv2d(y, weight, **options)
    assert torch.equal(found.iterations, plain.iterations)
    assert torch.equal(found.x, plain.x)


def test_the_vectors_kept_are_no_more_than_can_be_of_use() -> None:
    images, weight = make_images(channels=1), make_weight(channels=1)
    plain = solve_conv2d(images, weight)
    found = solve_conv2d(images, weight, restart=10**12, max_iterations=10**12)
    assert torch.equal(found.x, plain.x)


def x_of(images: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return solve_conv2d(images, weight, tolerance=1e-13, **options).x


OPTIONS = [{}, {"groups": 2}, {"tikhonov": 0.1}, {"tikhonov": 0.1, "groups": 2}, {"preconditioned": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_mode_is_that_of_the_dense_solve(options: dict[str, Any]) -> None:
    groups, tikhonov = options.get("groups", 1), options.get("tikhonov", 0.0)
    point = make_images(), make_weight((3, 5), groups=groups)
    size = CHANNELS * HEIGHT * WIDTH
    units = torch.eye(size, dtype=torch.float64).view(size, CHANNELS, HEIGHT, WIDTH)

    def exact(images: Tensor, weight: Tensor) -> Tensor:
        matrix = F.conv2d(units, weight, padding="same", groups=groups).flatten(1).mT
        right = images.flatten(1).mT
        if tikhonov:
            right = matrix.mT @ right
            matrix = matrix.mT @ matrix + tikhonov * torch.eye(size, dtype=torch.float64)
        return torch.linalg.solve(matrix, right).mT.view(images.shape)

    tangents = tuple(torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(3)) for t in point)
    for change in (tangents, (tangents[0], 0 * tangents[1]), (0 * tangents[0], tangents[1])):
        found = torch.func.jvp(lambda *both: x_of(*both, **options), point, change)
        for mine, wanted in zip(found, torch.func.jvp(exact, point, change), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-8)
    (images, weight), (image_change, weight_change) = point, tangents
    only_one = torch.func.jvp(lambda w: x_of(images, w, **options), (weight,), (weight_change,))[1]
    torch.testing.assert_close(only_one, torch.func.jvp(lambda w: exact(images, w), (weight,), (weight_change,))[1])
    only_one = torch.func.jvp(lambda y: x_of(y, weight, **options), (images,), (image_change,))[1]
    torch.testing.assert_close(only_one, torch.func.jvp(lambda y: exact(y, weight), (images,), (image_change,))[1])


@pytest.mark.parametrize("tikhonov", [0.0, 0.1])
def test_second_derivatives_by_forward_mode(tikhonov: float) -> None:
    """Forward over reverse, as ``torch.func.hessian``, against reverse over reverse."""
    images, weight = make_images(2, channels=1)[..., :2, :3], make_weight((1, 3), channels=1)

    def loss(w: Tensor) -> Tensor:
        return x_of(images, w, tikhonov=tikhonov).pow(3).sum()

    found = torch.func.hessian(loss)(weight)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(loss, weight), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found, torch.func.jacrev(torch.func.jacrev(loss))(weight), rtol=1e-8, atol=1e-8)
    with pytest.raises(NotImplementedError, match="cannot be differentiated in forward mode twice"):
        torch.func.jacfwd(torch.func.jacfwd(loss))(weight)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 0), (0, 4)], ids=str)
def test_vmap_is_one_after_the_other(in_dims: tuple[int | None, int | None], options: dict[str, Any]) -> None:
    groups = options.get("groups", 1)
    stacks = [
        make_images(6).unflatten(0, (2, 3)),
        torch.stack([make_weight(groups=groups, spread=s) for s in (0.3, 0.6)]),
    ]
    tensors = [stack[0] if dim is None else stack.movedim(0, dim) for stack, dim in zip(stacks, in_dims, strict=True)]
    one_by_one = [
        solve_conv2d(*(s[0] if dim is None else s[i] for s, dim in zip(stacks, in_dims, strict=True)), **options)
        for i in range(2)
    ]
    found = torch.vmap(lambda *both: solve_conv2d(*both, **options)[:3], in_dims)(*tensors)
    for i, single in enumerate(one_by_one):
        torch.testing.assert_close(found[0][i], single.x, rtol=1e-8, atol=1e-8)
        assert torch.equal(found[1][i], single.iterations)


def test_gradients_of_each_example() -> None:
    images, weight = make_images(), make_weight()

    def loss(y: Tensor, w: Tensor) -> Tensor:
        return x_of(y, w).pow(2).sum()

    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), (0, None))(images, weight)
    for i, one in enumerate(images):
        for mine, wanted in zip(found, torch.func.grad(loss, argnums=(0, 1))(one, weight), strict=True):
            torch.testing.assert_close(mine[i], wanted, rtol=1e-8, atol=1e-8)
    jacobians = (torch.func.jacrev(x_of, 1)(images[:1], weight), torch.func.jacfwd(x_of, 1)(images[:1], weight))
    torch.testing.assert_close(*jacobians, rtol=1e-8, atol=1e-8)


class Convolutions(TorchDispatchMode):
    """The convolutions that are run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(function):
            self.seen.append((str(function), (kwargs or {}).get("allow_tf32", args[-1])))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tikhonov", [0.0, 0.1])
def test_every_convolution_is_in_full_precision_whatever_the_flags(tikhonov: float) -> None:
    """In the passes behind the first one too. Process-wide flags are neither read for it nor written."""
    images, weight = make_images(2).requires_grad_(), make_weight().requires_grad_()
    with Convolutions() as run, mock.patch("torch._C._set_cudnn_allow_tf32", side_effect=AssertionError):
        x = solve_conv2d(images, weight, tikhonov=tikhonov).x
        grads = torch.autograd.grad(x.pow(2).sum(), (images, weight), create_graph=True)
        torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), (images, weight))
    assert set(run.seen) == {("aten._convolution.default", False)}


def test_an_empty_batch_has_gradients() -> None:
    images, weight = make_images()[:0].requires_grad_(), make_weight().requires_grad_()
    for grad in torch.autograd.grad(solve_conv2d(images, weight).x.sum(), (images, weight)):
        assert not grad.any()
