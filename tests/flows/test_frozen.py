"""What a layer keeps for its backward pass: where its parameters need no gradient, nothing that only they need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.flows import ActNorm, Conv1x1, HaarSqueeze, Householder, Permute, Squeeze, WaveletSqueeze
from inverse_flow.functional import inverse_conv2d

# Their Jacobians depend on no image, so that the gradient of an image needs none.
LINEAR: dict[str, Callable[[], nn.Module]] = {
    "identity": lambda: InverseConv2d(4, corner="identity"),
    "unit_triangular": lambda: InverseConv2d(4),
    "plu": lambda: InverseConv2d(4, corner="plu"),
    "four_orders": lambda: InverseConv2d(4, groups=4, order=("top_left", "top_right", "bottom_left", "bottom_right")),
    "actnorm": lambda: ActNorm(4),
    "conv1x1": lambda: Conv1x1(4),
    "householder": lambda: Householder(4),
    "permute": lambda: Permute([3, 1, 0, 2]),
    "squeeze": Squeeze,
    "haar": HaarSqueeze,
    "wavelet": lambda: WaveletSqueeze([0.6, 0.8, 0.0, 0.0]),
}
SIDE = 16


def saved_images(call: Callable[[], Tensor]) -> int:
    """How many tensors as large as the images the graph of a result keeps."""
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= 2 * 4 * SIDE * SIDE:
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result.requires_grad
    return len(kept)


def of_pytorch(weight_needs_gradient: bool) -> int:
    """What PyTorch's convolution keeps: its input, needed or not."""
    x, weight = torch.randn(2, 4, SIDE, SIDE, requires_grad=True), torch.randn(4, 4, 1, 1)
    return saved_images(lambda: F.conv2d(x, weight.requires_grad_(weight_needs_gradient)))


def is_convolution(name: str, inverse: bool) -> bool:
    return name in ("conv1x1", "householder") or (inverse and isinstance(LINEAR[name](), InverseConv2d))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_a_frozen_linear_layer_keeps_no_image(name: str, inverse: bool) -> None:
    layer = LINEAR[name]().eval().requires_grad_(False)
    x = torch.randn(2, 4, SIDE, SIDE, requires_grad=True)
    found = saved_images(lambda: (layer.inverse if inverse else layer)(x)[0])
    assert found <= (of_pytorch(weight_needs_gradient=False) if is_convolution(name, inverse) else 0)


def test_of_the_solve_each_gradient_keeps_what_it_needs() -> None:
    tensors = torch.randn(2, 4, SIDE, SIDE), torch.eye(4)[..., None, None].clone(), torch.zeros(4)
    for needed, images in (((0,), 0), ((2,), 0), ((0, 2), 0), ((1,), 1), ((0, 1, 2), 1)):
        leaves = [tensor.clone().requires_grad_(i in needed) for i, tensor in enumerate(tensors)]
        assert saved_images(lambda leaves=leaves: inverse_conv2d(*leaves)) == images
        # What was kept is enough.
        inverse_conv2d(*leaves).square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i in needed for i in range(3)]
