import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow.flows import AffineCoupling, Compose, ConvNet, ResNet, Squeeze
from inverse_flow.flows.conditioner import arrange_for


def varied(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


NETWORKS = pytest.mark.parametrize("network", [ConvNet, ResNet])


@NETWORKS
@pytest.mark.parametrize("dimensions", [2, 3])
def test_starts_at_zero(network: type, dimensions: int) -> None:
    out = network(2, 3, 5, dimensions=dimensions)(torch.randn(2, 2, *(3,) * dimensions))
    assert torch.equal(out, torch.zeros(2, 5, *(3,) * dimensions))


def test_residual_blocks() -> None:
    net = varied(ResNet(2, 3, 4, blocks=2))
    x = torch.randn(2, 2, 4, 4)
    h = net.first(x)
    for block in net.blocks:
        _, first, _, second = block
        h = h + second(first(h.relu()).relu())
    torch.testing.assert_close(net(x), net.last[1](h.relu()))


@NETWORKS
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_finer_context_map_is_averaged_down(network: type, dimensions: int) -> None:
    net = varied(network(1, 3, 2, context_channels=2, dimensions=dimensions))
    x = torch.randn(2, 1, *(2, 3, 1)[:dimensions])
    fine = torch.randn(2, 2, *(4, 3, 5)[:dimensions])
    blocks = fine.unflatten(2, (2, 2)).mean(3)
    if dimensions == 3:
        blocks = blocks.mean(4, keepdim=True)
    torch.testing.assert_close(net(x, fine), net(x, blocks))
    assert not torch.allclose(net(x, fine), net(x, blocks.flip(2)))
    torch.testing.assert_close(net(x[:0], fine[:0]), net(x, fine)[:0])


def test_one_context_map_serves_every_scale() -> None:
    def step(channels: int) -> AffineCoupling:
        return AffineCoupling(channels, 3, context_channels=2)

    flow = varied(Compose(step(2), Squeeze(), step(8), Squeeze(), step(32)))
    x, context = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    z, logdet = flow(x, context)
    torch.testing.assert_close(flow.inverse(z, context)[0], x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(flow(x, context + 1)[1], logdet)


@NETWORKS
@pytest.mark.parametrize("size", [(3, 4), (4, 6), (9, 4), (2, 4), (4, 0)])
def test_a_context_map_of_no_multiple_is_refused(network: type, size: tuple[int, int]) -> None:
    net = network(1, 3, 2, context_channels=2)
    with pytest.raises(ValueError, match="at the resolution of the images or an integer multiple of it, got"):
        net(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, *size))


@NETWORKS
def test_images_and_volumes_are_told_apart(network: type) -> None:
    image, volume = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, 2)
    with pytest.raises(ValueError, match=r"dimensions=2, for \(B, C, H, W\), and got shape \(1, 1, 2, 2, 2\)"):
        network(1, 3, 2)(volume)
    with pytest.raises(ValueError, match=r"dimensions=3, for \(B, C, D, H, W\), and got shape \(1, 1, 2, 2\)"):
        network(1, 3, 2, dimensions=3)(image)
    with pytest.raises(ValueError, match=r"\(B, 2, D, H, W\), at the .* got \(1, 2, 2, 2\) for \(1, 1, 2, 2, 2\)"):
        network(1, 3, 2, dimensions=3, context_channels=2)(volume, torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"2 \(images\) or 3 \(volumes\), got 4"):
        network(1, 3, 2, dimensions=4)


def test_a_volume_of_one_slice_is_an_image() -> None:
    """The middle slice of a 3×3×3 tap is the tap that meets a volume of one slice."""
    image_net, volume_net = varied(ConvNet(2, 3, 4)), ConvNet(2, 3, 4, dimensions=3)
    for flat, deep in zip(image_net.parameters(), volume_net.parameters(), strict=True):
        deep.data.copy_(flat.data if flat.dim() == 1 else F.pad(flat.data.unsqueeze(2), _around(flat)))
    x = torch.randn(2, 2, 4, 3)
    torch.testing.assert_close(volume_net(x.unsqueeze(2)).squeeze(2), image_net(x))


def _around(weight: Tensor) -> tuple[int, ...]:
    return (0, 0, 0, 0, weight.shape[-1] // 2, weight.shape[-1] // 2)


def test_errors_say_what_was_given() -> None:
    with pytest.raises(TypeError, match=r"ConvNet is in torch\.float32, got torch\.float16: convert one of them"):
        ConvNet(1, 2, 1)(torch.zeros(1, 1, 2, 2, dtype=torch.float16))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which chooses the dtype by itself
        ConvNet(1, 2, 1)(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        ResNet(1, 0, 1)
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        ResNet(1, 4, 1, blocks=0)


def test_networks_are_laid_out_for_a_cpu_and_stay_the_same() -> None:
    flow = varied(nn.Sequential(ConvNet(3, 5, 4), ResNet(3, 5, 4), ConvNet(3, 5, 4, dimensions=3), nn.Conv2d(3, 3, 3)))
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    x = torch.randn(2, 3, 6, 5)
    expected = [flow[0](x), flow[1](x)]
    arrange_for(torch.device("meta"), flow)
    assert all(parameter.is_contiguous() for parameter in flow.parameters())
    arrange_for(torch.device("cpu"), flow)
    for name, tensor in flow.state_dict().items():
        assert torch.equal(tensor, before[name])
        last = name.startswith(("0.", "1.")) and tensor.dim() == 4
        assert tensor.is_contiguous(memory_format=torch.channels_last) or not last
        assert tensor.is_contiguous() or last  # volumes, and networks that are not of this library, are left alone
    for network, wanted in zip(flow, expected, strict=False):
        torch.testing.assert_close(network(x), wanted)


@NETWORKS
def test_what_is_overwritten_is_not_needed_again(network: type) -> None:
    net = varied(network(3, 5, 4))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    given = x.detach().clone()
    net(x).square().sum().backward()
    assert torch.equal(x, given)
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    y = given.requires_grad_()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
