"""InverseConv2d: both directions, log-determinants, initialisation, and everything a module must survive."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from inverse_flow import InverseConv1d, InverseConv2d, InverseConv3d
from inverse_flow.conv import InverseConvNd
from inverse_flow.functional import causal_conv2d, inverse_conv2d

from ..cases import DTYPES, ORDERS
from ..checks import check_log_det

CORNERS = ("identity", "unit_triangular", "plu")
CORNER = pytest.mark.parametrize("corner", CORNERS)
FOUR = {"groups": 4, "order": ORDERS}


# Layers of more than plain images, and the sizes of what they are shown.
OTHERS = {
    "signals": (InverseConv1d, {"order": "right"}, (6,)),
    "dilated signals": (
        InverseConv1d,
        {"groups": 2, "order": ("left", "right"), "dilation": 2, "kernel_size": 2},
        (5,),
    ),
    "dilated images": (InverseConv2d, {"groups": 4, "order": ORDERS, "dilation": (2, 1)}, (3, 4)),
    "volumes": (
        InverseConv3d,
        {"groups": 2, "order": ("back_top_right", "front_bottom_left"), "kernel_size": 2},
        (2, 1, 2),
    ),
    "images dilated beyond their size": (InverseConv2d, {"dilation": 3, "kernel_size": 2}, (4, 2)),
}
OTHER = pytest.mark.parametrize("other", OTHERS)


def other_layer(other: str, corner: str, **options: object) -> tuple[InverseConvNd, torch.Tensor]:
    """A layer of the list, away from its initial values, and a batch for it."""
    kind, arguments, sizes = OTHERS[other]
    layer = randomised(kind(4, corner=corner, dtype=torch.float64, **{**arguments, **options}))
    return layer, torch.randn(2, 4, *sizes, dtype=torch.float64)


def randomised(layer: InverseConvNd) -> InverseConvNd:
    """Parameters away from their initial values, so that a bias or scale that is ignored shows."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return layer


@CORNER
@pytest.mark.parametrize(
    "arguments",
    [{"groups": 1, "order": order} for order in ORDERS] + [FOUR, {"kernel_size": (2, 3), "bias": False}],
    ids=str,
)
def test_log_det_against_the_jacobian_in_both_directions(corner: str, arguments: dict) -> None:
    layer = randomised(InverseConv2d(4, corner=corner, dtype=torch.float64, **arguments))
    check_log_det(layer, torch.randn(2, 4, 2, 3, dtype=torch.float64))


@CORNER
@OTHER
def test_log_det_of_other_layers(corner: str, other: str) -> None:
    check_log_det(*other_layer(other, corner))


@CORNER
@OTHER
def test_other_layers_keep_types_and_round_trip(corner: str, other: str) -> None:
    layer, x = other_layer(other, corner)
    torch.testing.assert_close(layer(layer.inverse(x)[0])[0], x)
    for dtype in DTYPES:
        z, log_det = layer.to(dtype)(x.to(dtype))
        assert (z.shape, z.dtype, log_det.shape) == (x.shape, dtype, (2,))
    assert layer(x[:0].to(dtype))[0].shape == (0, *x.shape[1:])
    for wrong in (x[0], x[:, 1:]):
        for call in (layer, layer.inverse):
            with pytest.raises(ValueError, match=f"{type(layer).__name__} takes batches of shape"):
                call(wrong)
    assert eval(repr(layer)).weight.shape == layer.weight.shape


@CORNER
@OTHER
def test_other_layers_under_autocast_and_on_the_meta_device(corner: str, other: str) -> None:
    layer, x = other_layer(other, corner)
    expected = layer(x)[0], layer.inverse(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)[0], layer.inverse(x)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    z, log_det = layer.to("meta")(x.to("meta"))
    assert (z.shape, z.device.type, log_det.shape) == (x.shape, "meta", (2,))


@CORNER
@OTHER
def test_the_closed_form_of_the_backward_pass(corner: str, other: str) -> None:
    """backward_from_output against autograd, for what is made of the operator's own."""
    layer, x = other_layer(other, corner)
    z, log_det = layer(x.requires_grad_())
    grad_z, grad_log_det = torch.randn_like(z), torch.randn_like(log_det)
    parameters = list(layer.parameters())
    outputs, grads = [z], [grad_z]
    if log_det.requires_grad:
        outputs, grads = [z, log_det], [grad_z, grad_log_det]
    expected = torch.autograd.grad(outputs, [x, *parameters], grads)
    with torch.no_grad():
        again, grad_x = layer.backward_from_output(z.detach(), grad_z, grad_log_det)
    torch.testing.assert_close((again, grad_x, *(p.grad for p in parameters)), (x.detach(), *expected))


@CORNER
def test_log_det_is_differentiable_where_it_is_learned(corner: str) -> None:
    layer = randomised(InverseConv2d(3, corner=corner))
    _, log_det = layer(torch.randn(4, 3, 5, 6))
    assert log_det.requires_grad == (corner == "plu")
    if corner == "plu":
        log_det.sum().backward()
        # −H W for each image and channel.
        torch.testing.assert_close(layer.log_scale.grad, torch.full((3,), -4.0 * 5 * 6))


@CORNER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_det_shape_dtype_and_device(corner: str, dtype: torch.dtype, device: torch.device) -> None:
    layer = InverseConv2d(4, corner=corner, device=device, dtype=dtype)
    for batch in (0, 1, 3):
        x = torch.randn(batch, 4, 3, 3, device=device, dtype=dtype)
        for images, log_det in (layer(x), layer.inverse(x)):
            assert (images.shape, images.dtype, images.device) == (x.shape, dtype, x.device)
            wanted = torch.float64 if dtype == torch.float64 else torch.float32
            assert (log_det.shape, log_det.dtype, log_det.device) == ((batch,), wanted, x.device)


@CORNER
def test_half_precision_images_with_float32_parameters(corner: str) -> None:
    layer = InverseConv2d(4, corner=corner)
    z, log_det = layer(torch.randn(2, 4, 3, 3, dtype=torch.bfloat16))
    assert (z.dtype, log_det.dtype) == (torch.bfloat16, torch.float32)


@CORNER
def test_autocast_lowers_no_precision(corner: str) -> None:
    layer, x = randomised(InverseConv2d(4, corner=corner)), torch.randn(2, 4, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = layer(x), layer.inverse(x)
    torch.testing.assert_close(lowered, (layer(x), layer.inverse(x)), rtol=0, atol=0)


@CORNER
@pytest.mark.parametrize("arguments", [{}, FOUR, {"kernel_size": (1, 5), "bias": False}, {"kernel_size": 1}], ids=str)
def test_round_trips_in_both_orders(corner: str, arguments: dict, device: torch.device) -> None:
    layer = randomised(InverseConv2d(4, corner=corner, **arguments)).double().to(device)
    x = torch.randn(9, 4, 6, 5, dtype=torch.float64, device=device)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)
    torch.testing.assert_close(layer(layer.inverse(x)[0])[0], x)


def test_forward_is_the_solve_and_inverse_the_convolution() -> None:
    layer = randomised(InverseConv2d(4, 3, groups=2, order=("top_right", "bottom_left")))
    x = torch.randn(3, 4, 5, 6)
    arguments = {"order": ("top_right", "bottom_left"), "groups": 2, "corner": "unit_triangular"}
    assert layer(x)[0].equal(inverse_conv2d(x, layer.weight, layer.bias, **arguments))
    assert layer.inverse(x)[0].equal(causal_conv2d(x, layer.weight, layer.bias, **arguments))


def test_the_plu_corner_is_p_l_u() -> None:
    """The corner tap, read back through the impulse response of the convolution, is P·L·(U + diag(s))."""
    layer = randomised(InverseConv2d(3, 2, corner="plu", bias=False, dtype=torch.float64))
    found = layer.inverse(torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1))[0].view(3, 3).T
    packed = layer.weight.detach()[:, :, -1, -1]
    lower = packed.tril(-1) + torch.eye(3, dtype=torch.float64)
    upper = packed.triu(1) + torch.diag(layer.sign * layer.log_scale.detach().exp())
    permutation = torch.eye(3, dtype=torch.float64)[layer.permutation[0]]
    torch.testing.assert_close(found, permutation @ lower @ upper)


@CORNER
def test_a_call_ignores_the_context(corner: str) -> None:
    layer, x = InverseConv2d(2, corner=corner), torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(layer(x, torch.randn(2, 5)), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.inverse(x, context=torch.randn(2, 5)), layer.inverse(x), rtol=0, atol=0)


@CORNER
@pytest.mark.parametrize("arguments", [{}, FOUR], ids=str)
def test_entries_that_are_not_read_change_nothing_and_get_no_gradient(corner: str, arguments: dict) -> None:
    layer = randomised(InverseConv2d(4, corner=corner, **arguments)).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    z, log_det = layer(x)
    (z.square().sum() + log_det.sum()).backward()
    unread = layer.weight.grad == 0
    members = 4 // layer.groups
    # identity: all of each corner tap; unit_triangular: all but the strictly lower part; plu: only the diagonal.
    per_group = {"identity": members**2, "unit_triangular": members * (members + 1) // 2, "plu": members}[corner]
    assert unread.sum() == layer.groups * per_group
    with torch.no_grad():
        layer.weight[unread] = float("nan")
    torch.testing.assert_close(layer(x), (z, log_det), rtol=0, atol=0)
    assert layer.inverse(z)[0].isfinite().all()


@CORNER
def test_state_dict(corner: str) -> None:
    layer, other = randomised(InverseConv2d(4, corner=corner, **FOUR)), InverseConv2d(4, corner=corner, **FOUR)
    x = torch.randn(2, 4, 3, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    names = {"weight", "bias"} | ({"log_scale", "sign", "permutation"} if corner == "plu" else set())
    assert set(layer.state_dict()) == names


@CORNER
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(corner: str, duplicate: object) -> None:
    layer = randomised(InverseConv2d(4, 2, corner=corner, **FOUR))
    twin = duplicate(layer)  # type: ignore[operator]
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    with torch.no_grad():
        twin.weight.zero_()
    assert layer.weight.any()


@CORNER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to(corner: str, dtype: torch.dtype) -> None:
    layer = InverseConv2d(4, corner=corner).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    if corner == "plu":
        assert layer.permutation.dtype == torch.long
    z, _ = layer(torch.randn(2, 4, 3, 3, dtype=dtype))
    assert z.dtype == dtype
    assert z.isfinite().all()


@CORNER
def test_meta_device(corner: str) -> None:
    layer = InverseConv2d(4, corner=corner, device="meta", **FOUR)
    z, log_det = layer(torch.empty(3, 4, 5, 6, device="meta"))
    assert (z.shape, z.device.type, log_det.shape) == ((3, 4, 5, 6), "meta", (3,))
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert real(torch.randn(3, 4, 5, 6))[0].isfinite().all()


def test_repr() -> None:
    assert repr(InverseConv2d(3)) == (
        "InverseConv2d(3, kernel_size=(3, 3), groups=1, order='top_left', corner='unit_triangular', bias=True)"
    )
    layer = InverseConv2d(8, (2, 5), groups=2, order=["top_left", "bottom_right"], corner="plu", bias=False)
    assert repr(layer) == (
        "InverseConv2d(8, kernel_size=(2, 5), groups=2, order=('top_left', 'bottom_right'), corner='plu', bias=False)"
    )
    twin = eval(repr(layer))
    assert {name: p.shape for name, p in twin.named_parameters()} == {n: p.shape for n, p in layer.named_parameters()}


@CORNER
def test_reset_parameters_is_reproducible(corner: str) -> None:
    layer = InverseConv2d(5, corner=corner)

    def draw(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        layer.reset_parameters()
        return {name: value.clone() for name, value in layer.state_dict().items()}

    first, second, other = draw(1), draw(1), draw(2)
    for name, value in first.items():
        assert value.equal(second[name])
    assert not first["weight"].equal(other["weight"])
    assert not first["bias"].any()


def test_a_subclass_and_a_sequence_of_layers_train() -> None:
    """Eight layers fitted by maximum likelihood: the loss falls, and everything stays finite."""
    torch.manual_seed(0)
    layers = nn.ModuleList(InverseConv2d(4, order=ORDERS[i % 4], corner=CORNERS[i % 3]) for i in range(8))
    optimizer = torch.optim.Adam(layers.parameters(), 5e-3)
    mixing = 0.7 * torch.eye(4) + 0.3 * torch.ones(4, 4)
    losses = []
    for _ in range(60):
        x = torch.einsum("oc,bchw->bohw", mixing, torch.randn(16, 4, 6, 6)) * 2
        total = torch.zeros(16)
        for layer in layers:
            x, log_det = layer(x)
            total = total + log_det
        loss = (x.square().sum((1, 2, 3)) / 2 - total).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The best log-likelihood a linear flow can reach, up to the Gaussian's constant.
    ideal = 144 / 2 + 36 * (torch.linalg.slogdet(2 * mixing).logabsdet)
    assert losses[0] > 1.3 * ideal
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5 * (losses[0] - ideal)


# ‖z‖ after 32 fresh layers over ‖x‖. Each layer starts within a few tenths of the identity.
DEEP_GROWTH = 1.5


@CORNER
def test_a_deep_stack_starts_well_conditioned(corner: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    z = x
    layers = [InverseConv2d(3, order=ORDERS[i % 4], corner=corner) for i in range(32)]
    with torch.no_grad():
        for layer in layers:
            z, _ = layer(z)
        growth = float(z.norm() / x.norm())
        assert 1 / DEEP_GROWTH < growth < DEEP_GROWTH, f"‖z‖ grew {growth:.2f}-fold"
        back = z
        for layer in reversed(layers):
            back, _ = layer.inverse(back)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)
