"""Gains, norms and row sums of a layer against the dense matrix; what damps a gain, and what bounds it in advance."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inverse_flow import (
    InverseConv1d,
    InverseConv2d,
    InverseConv3d,
    limit_gain_,
    reference,
    stability,
    stability_report,
)
from inverse_flow.conv import InverseConvNd
from inverse_flow.ops.spec import ORDERS as ALL_ORDERS

from ..cases import ORDERS
from ..checks import check_log_det

Layer = InverseConvNd
KINDS = {1: InverseConv1d, 2: InverseConv2d, 3: InverseConv3d}
LANDED = 1e-5  # what "on the limit" means

BACK = ("back", "bottom", "right")

# What a layer is made of, and the size of an image.
LAYERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    **{f"{order}-{corner}": ({"channels": 3, "order": order, "corner": corner}, (5, 4))
       for order in ORDERS for corner in ("identity", "unit_triangular", "plu")},
    "four orders": ({"channels": 8, "groups": 4, "order": ORDERS, "corner": "plu"}, (4, 5)),
    "two groups": ({"channels": 6, "groups": 2, "order": "bottom_left"}, (4, 4)),
    "rectangular": ({"channels": 2, "kernel_size": (2, 5), "order": "top_right", "corner": "plu"}, (3, 6)),
    "one tap": ({"channels": 3, "kernel_size": 1, "corner": "plu"}, (3, 2)),
    "window larger than the image": ({"channels": 2, "kernel_size": 5}, (2, 3)),
    "one pixel": ({"channels": 3}, (1, 1)),
    "a row": ({"channels": 2, "order": "bottom_right"}, (1, 9)),
    "dilated": ({"channels": 2, "dilation": (2, 3), "order": "bottom_right", "corner": "plu"}, (5, 8)),
    "dilated beyond the image": ({"channels": 3, "dilation": 4}, (4, 3)),
    "dilated, four orders": ({"channels": 4, "groups": 4, "order": ORDERS, "dilation": 2, "corner": "plu"}, (6, 5)),
    **{f"{order}-{corner}": ({"channels": 2, "order": order, "corner": corner}, (9,))
       for order in ALL_ORDERS[1] for corner in ("identity", "unit_triangular", "plu")},
    "two orders of signals": ({"channels": 4, "groups": 2, "order": ALL_ORDERS[1], "kernel_size": 4}, (8,)),
    "dilated signals": ({"channels": 2, "dilation": 3, "order": "right", "corner": "plu"}, (13,)),
    **{order: ({"channels": 2, "order": order, "corner": "plu", "kernel_size": 2}, (3, 2, 4))
       for order in ALL_ORDERS[3]},
    "eight orders": ({"channels": 8, "groups": 8, "order": ALL_ORDERS[3], "kernel_size": (2, 3, 1)}, (2, 3, 1)),
    "dilated volumes": ({"channels": 2, "dilation": (1, 2, 1), "kernel_size": 2, "order": "back_top_right"}, (2, 4, 3)),
}  # fmt: skip
layers = pytest.mark.parametrize(("arguments", "sizes"), LAYERS.values(), ids=LAYERS)
GROWING = {
    name: layer for name, layer in LAYERS.items() if name not in ("one tap", "one pixel", "dilated beyond the image")
}
can_grow = pytest.mark.parametrize(("arguments", "sizes"), GROWING.values(), ids=GROWING)


def made(
    arguments: dict[str, Any], dtype: torch.dtype = torch.float64, scale: float = 0.3, dimensions: int = 2, **more: Any
) -> Layer:
    """A layer with parameters away from their initial values."""
    layer = KINDS[dimensions](**arguments, **more).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return layer.to(dtype)


def dense(layer: Layer, sizes: tuple[int, ...]) -> Tensor:
    """A(w) in float64."""
    weight = layer.complete_weight().detach().double()
    return reference.dense_matrix(weight, *sizes, order=layer.order, groups=layer.groups, dilation=layer.dilation)


def norm(matrix: Tensor) -> float:
    return float(matrix.abs().sum(1).max())


def gain(layer: Layer, sizes: tuple[int, ...]) -> float:
    return norm(dense(layer, sizes).inverse())


def row_sum_and_corner(layer: Layer) -> tuple[float, float]:
    """s and ‖M⁻¹‖∞: on an image as large as the window some pixel sees all of its taps."""
    sizes = tuple((size - 1) * step + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True))
    blocks = dense(layer, sizes).view(layer.channels, math.prod(sizes), layer.channels, -1)
    corner = blocks[:, 0, :, 0]
    folded = torch.linalg.solve(corner, blocks.flatten(1)).view_as(blocks)
    for pixel in range(math.prod(sizes)):
        folded[:, pixel, :, pixel] = 0
    return float(folded.abs().sum((2, 3)).max()), norm(corner.inverse())


def amplifying(arguments: dict[str, Any], sizes: tuple[int, ...], limit: float, **more: Any) -> Layer:
    """A layer whose gain is well above the limit."""
    layer = made(arguments, dimensions=len(sizes), **more)
    while gain(layer, sizes) < 3 * limit:
        keep_corner(layer, 1.3)
    return layer


@torch.no_grad()
def keep_corner(layer: Layer, factor: float) -> None:
    """Scales all taps but M."""
    corner = stability.corner_taps(layer.weight, layer.spec.orders).clone()
    layer.weight.copy_(stability.with_corner_taps(factor * layer.weight, corner, layer.spec.orders))


# ---- The report ----


@layers
def test_the_report_is_that_of_the_dense_matrix(arguments: dict[str, Any], sizes: tuple[int, ...]) -> None:
    layer = made(arguments, dimensions=len(sizes))
    (found,) = stability_report(layer, sizes).layers
    s, corner = row_sum_and_corner(layer)
    assert found.path == ""
    assert found.image_size == sizes
    assert found.gain == pytest.approx(gain(layer, sizes), rel=1e-10)
    assert found.gain_at_twice == pytest.approx(gain(layer, tuple(2 * size for size in sizes)), rel=1e-10)
    assert found.norm == pytest.approx(norm(dense(layer, sizes)), rel=1e-12)
    assert found.condition == found.gain * found.norm
    assert found.row_sum == pytest.approx(s, rel=1e-10, abs=1e-14)
    assert found.bound == (pytest.approx(corner / (1 - s), rel=1e-10) if s < 1 else math.inf)


def test_the_bound_holds_and_can_be_finite() -> None:
    layer = made({"channels": 3, "corner": "plu"}, scale=0.02)
    found = stability_report(layer, (6, 6)).layers[0]
    assert found.row_sum < 1
    assert found.gain <= found.gain_at_twice <= found.bound < math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_other_types_are_measured_in_float64(dtype: torch.dtype) -> None:
    layer = made({"channels": 3}, dtype)
    assert stability_report(layer, (6, 5)).largest.gain == pytest.approx(gain(layer, (6, 5)), rel=1e-10)


def test_many_channels_are_measured_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made({"channels": 6, "groups": 2})
    whole = stability_report(layer, (4, 4))
    monkeypatch.setattr(stability, "CHUNK_BYTES", 1)
    assert stability_report(layer, (4, 4)).largest.gain == pytest.approx(whole.largest.gain, rel=1e-12)


def with_taps(*taps: float) -> Layer:
    """One channel, and a row of taps: z_j = x_j + Σ taps[k] · z_{j−1−k}."""
    layer = InverseConv2d(1, (1, len(taps) + 1), corner="identity", bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(-torch.tensor([*reversed(taps), -1.0]).view(1, 1, 1, -1))
    return layer


def test_warnings_say_what_is_wrong_and_nothing_follows_from_the_row_sum() -> None:
    # Geometric series: Σ 0.5ᵏ = 2, and 1 − 2^−n of it.
    healthy = stability_report(with_taps(0.5), (1, 20))
    assert healthy.warnings == ()
    assert healthy.layers[0].gain == pytest.approx(2, rel=1e-5)
    # (1 − 0.5 z)² and so 1 − z + 0.25 z²: s = 1.25, and a gain that goes to 4.
    wide = stability_report(with_taps(1.0, -0.25), (1, 40))
    assert wide.layers[0].row_sum == 1.25
    assert wide.layers[0].bound == math.inf
    assert wide.warnings == ()
    # On the unit circle the gain is the number of pixels.
    growing = stability_report(with_taps(1.0), (1, 20))
    assert growing.warnings == ("the layer has a gain 2 times as large on images of twice the size",)
    large = stability_report(with_taps(1.0), (1, 60)).warnings[0]
    assert large.startswith("the layer has a gain of 60, above 50 and a gain 2 times")
    (steep,) = stability_report(with_taps(2.0), (1, 20)).warnings
    assert "a condition of 3.15e+06, above 10000" in steep


def test_a_report_prints_as_a_table() -> None:
    text = str(stability_report(with_taps(1.0), (1, 20)))
    head, row, warning = text.splitlines()
    assert head.split()[:4] == ["inverse", "convolution", "image", "gain"]
    assert row.split() == ["the", "layer", "1", "×", "20", "20", "40", "2", "40", "1", "∞"]
    assert warning == "warning: the layer has a gain 2 times as large on images of twice the size"
    assert len(head) == len(row)
    assert stability_report(nn.ReLU(), (3, 4, 4)).layers == ()
    assert str(stability_report(nn.ReLU(), (3, 4, 4))) == "no inverse convolutions"


def test_a_report_is_plain_for_json() -> None:
    (row,) = stability_report(with_taps(1.0), (1, 20)).to_list()
    assert row["bound"] is None
    assert row["gain"] == pytest.approx(20)
    assert row["image_size"] == (1, 20)


def test_gains_beyond_all_bounds_are_told() -> None:
    exploded = stability_report(with_taps(1e30), (1, 40))
    assert exploded.largest.gain == math.inf
    assert exploded.warnings == ("the layer has a gain of inf, above 50 and a condition of inf, above 10000",)
    assert exploded.to_list()[0]["gain"] is None
    nan = with_taps(0.5)
    with torch.no_grad():
        nan.weight[..., 0] = math.nan
    assert math.isnan(stability_report(nan, (1, 4)).largest.gain)
    assert "a gain of nan" in stability_report(nan, (1, 4)).warnings[0]


@pytest.mark.parametrize("size", [(4,), (4, 4, 4), (0, 4), (2, 4, 4)], ids=str)
def test_an_image_size_that_does_not_fit_is_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image_size must be (2 sizes for InverseConv2d|at least 1, got 0)"):
        stability_report(InverseConv2d(3), size)


def test_the_ways_to_give_the_size_of_a_layer() -> None:
    layer = made({"channels": 3})
    reports = [stability_report(layer, size) for size in (5, (5, 5), [5, 5], (3, 5, 5), torch.Size((5, 5)))]
    assert all(report == reports[0] for report in reports)


# ---- The limit ----


@can_grow
@pytest.mark.parametrize("limit", [20.0, 100.0])
def test_a_gain_above_the_limit_lands_on_it(arguments: dict[str, Any], sizes: tuple[int, ...], limit: float) -> None:
    layer = amplifying(arguments, sizes, limit)
    before, was = copy.deepcopy(layer), gain(layer, sizes)
    (limited,) = limit_gain_(layer, sizes, limit)
    found = gain(layer, sizes)
    assert found == pytest.approx(limit, rel=1e-9)
    assert limited.path == ""
    assert limited.gain == pytest.approx(was, rel=1e-9)
    assert 0 < limited.factor < 1

    # D A D⁻¹: the new response is γ^|p| times the old one, p in steps of the dilation, and nothing of M has moved.
    corners = [stability.corner_taps(each.weight, each.spec.orders) for each in (before, layer)]
    assert torch.equal(*corners)
    x = torch.randn(2, layer.channels, *sizes, dtype=torch.float64)
    assert torch.equal(layer(x)[1], before(x)[1])
    axes = [torch.arange(size, dtype=torch.float64) / step for size, step in zip(sizes, layer.dilation, strict=True)]
    away = sum(torch.meshgrid(*axes, indexing="ij"))
    orders = (layer.order,) * layer.groups if isinstance(layer.order, str) else layer.order
    turned = [
        torch.flip(away, [axis for axis, word in enumerate(order.split("_")) if word in BACK]) for order in orders
    ]
    powers = limited.factor ** torch.stack(turned).repeat_interleave(layer.channels // layer.groups, 0)
    layer.bias, before.bias = None, None
    torch.testing.assert_close(layer(x)[0], before(x / powers)[0] * powers)

    assert limit_gain_(layer, sizes, limit) == ()


@layers
def test_below_the_limit_no_bit_changes(arguments: dict[str, Any], sizes: tuple[int, ...]) -> None:
    layer = made(arguments, torch.float32, dimensions=len(sizes))
    before = copy.deepcopy(layer.state_dict())
    assert limit_gain_(layer, sizes, 1.0001 * gain(layer, sizes)) == ()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("arguments", [{"channels": 1, "corner": "identity"}, {"channels": 4}], ids=str)
def test_float32_lands_on_the_limit_too(arguments: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    layer = amplifying(arguments, (12, 12), 100.0).float()
    limit_gain_(layer, (12, 12))
    assert gain(layer, (12, 12)) == pytest.approx(100, rel=LANDED)
    assert limit_gain_(layer, (12, 12)) == ()


def test_a_response_that_float64_cannot_hold_is_limited() -> None:
    for tap in (1e30, 3.0):
        layer = with_taps(tap)
        sizes = (1, 40 if tap > 100 else 1000)
        (limited,) = limit_gain_(layer, sizes)
        assert limited.gain == math.inf
        assert stability.gains(layer, sizes)[""] == pytest.approx(100, rel=1e-9)


class Pair(nn.Sequential):
    """Two layers side by side."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x)[0] for layer in self]


def test_a_limit_below_what_m_alone_gives_is_refused_and_nothing_changes() -> None:
    layer = made({"channels": 2, "corner": "plu"}, scale=1.0)
    with torch.no_grad():
        layer.log_scale.fill_(-4)
    pair = Pair(amplifying({"channels": 2}, (6, 6), 100.0), layer)
    assert [each > 20 for each in stability.gains(pair, (2, 6, 6)).values()] == [True, True]
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(ValueError, match=r"1: ‖M⁻¹‖∞ of its corner tap is .*, which damping does not change"):
        limit_gain_(pair, (2, 6, 6), 20.0)
    for name, value in pair.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_cannot_be_limited_is_refused() -> None:
    layer = with_taps(2.0)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="limit must be above 0"):
            limit_gain_(layer, (1, 20), limit)
    with torch.no_grad():
        layer.weight[..., 0] = math.nan
    with pytest.raises(FloatingPointError, match="the layer: weights that are not finite"):
        limit_gain_(layer, (1, 20))
    normed = nn.utils.parametrizations.weight_norm(with_taps(2.0))
    with pytest.raises(TypeError, match="the layer: its weight is computed from other parameters"):
        limit_gain_(normed, (1, 20))


def test_a_limit_leaves_no_trace_in_the_graph() -> None:
    layer = amplifying({"channels": 2}, (5, 5), 100.0)
    limit_gain_(layer, (5, 5))
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
    assert layer.weight.grad is None


# ---- A bound in advance ----

BOUNDED = [layer for name, layer in LAYERS.items() if name != "one pixel"]


@pytest.mark.parametrize(("arguments", "sizes"), BOUNDED, ids=str)
@pytest.mark.parametrize("most", [0.5, 0.95])
def test_row_sums_bound_the_gain_at_every_size(arguments: dict[str, Any], sizes: tuple[int, ...], most: float) -> None:
    layer = made(arguments, scale=1.0, dimensions=len(sizes), max_row_sum=most)
    s, corner = row_sum_and_corner(layer)
    free = copy.deepcopy(layer)
    free.max_row_sum = None
    assert s == pytest.approx(min(most, row_sum_and_corner(free)[0]), rel=1e-10)
    assert row_sum_and_corner(free)[1] == pytest.approx(corner, rel=1e-12)
    for scale in (1, 2):
        assert gain(layer, tuple(scale * size for size in sizes)) <= corner / (1 - most) * (1 + 1e-10)


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_sums_within_the_bound_change_no_bit(
    arguments: dict[str, Any], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = made(arguments, dtype, scale=0.01, dimensions=len(sizes), max_row_sum=0.9)
    free = copy.deepcopy(layer)
    free.max_row_sum = None
    assert row_sum_and_corner(free)[0] < 0.9
    assert torch.equal(layer.complete_weight(), free.complete_weight())


def test_only_the_rows_above_the_bound_are_scaled() -> None:
    layer = made({"channels": 3, "corner": "identity"}, scale=1.0, max_row_sum=0.5)
    with torch.no_grad():
        layer.weight[1] *= 1e-3
    weight, limited = layer.weight, layer.complete_weight()
    assert torch.equal(limited[1, :, :-1], weight[1, :, :-1])
    ratio = limited[0, :, :-1] / weight[0, :, :-1]
    torch.testing.assert_close(ratio, ratio[0, 0, 0].expand_as(ratio))


@pytest.mark.parametrize("corner", ["identity", "unit_triangular", "plu"])
def test_the_log_det_under_a_bound_is_that_of_the_jacobian(corner: str) -> None:
    layer = made({"channels": 3, "corner": corner, "order": "bottom_left"}, scale=1.0, max_row_sum=0.8)
    check_log_det(layer, torch.randn(2, 3, 3, 2, dtype=torch.float64))


def test_derivatives_of_a_bound() -> None:
    layer = made({"channels": 2, "corner": "plu"}, scale=0.6, max_row_sum=0.8)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))[0]

    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    torch.autograd.gradcheck(run, values)
    empty = InverseConv2d(2, 1, max_row_sum=0.5)  # no taps to sum, and no 0 / 0 in the gradient
    empty(x.float())[0].sum().backward()
    assert empty.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.export itself
@pytest.mark.parametrize("corner", ["unit_triangular", "plu"])
def test_a_bounded_layer_is_captured(corner: str) -> None:
    layer = made({"channels": 4, "groups": 2, "order": ("bottom_right", "top_left"), "corner": corner},
                 torch.float32, scale=1.0, max_row_sum=0.7)  # fmt: skip
    x, other = torch.randn(2, 4, 6, 5), torch.randn(3, 4, 4, 7)
    batch = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    programs = [
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        torch.export.export(copy.deepcopy(layer), (x,), dynamic_shapes={"x": batch}).module(),
    ]
    for program in programs:
        for images in (x, other):
            torch.testing.assert_close(program(images), layer(images))


def test_autocast_does_not_lower_the_precision_of_a_bound() -> None:
    layer = made({"channels": 3}, torch.float32, scale=1.0, max_row_sum=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = layer.complete_weight()
    assert torch.equal(lowered, layer.complete_weight())


@can_grow
def test_a_bounded_layer_is_damped_as_it_is_solved(arguments: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """γ acts on the scaled rows, which are the layer's own after that."""
    layer = made(arguments, scale=1.0, dimensions=len(sizes), max_row_sum=0.98)
    corner = row_sum_and_corner(layer)[1]
    limit = (corner + gain(layer, sizes)) / 2
    (limited,) = limit_gain_(layer, sizes, limit)
    assert limited.factor < 1
    assert gain(layer, sizes) == pytest.approx(limit, rel=LANDED)
    assert limit_gain_(layer, sizes, limit) == ()


@pytest.mark.parametrize("most", [0, 1, 1.0, -0.5, math.nan, math.inf])
def test_bounds_that_bound_nothing_are_refused(most: float) -> None:
    with pytest.raises(ValueError, match="max_row_sum must be between 0 and 1, or None"):
        InverseConv2d(2, max_row_sum=most)


def test_a_bound_is_told() -> None:
    layer = InverseConv2d(2, max_row_sum=0.9)
    assert repr(layer).endswith("bias=True, max_row_sum=0.9)")
    assert eval(repr(layer)).max_row_sum == 0.9
