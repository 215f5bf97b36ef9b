import math

import pytest
import torch

from inverse_flow.flows import Woodbury


def shaken(channels: int, size: tuple[int, ...], rank: int) -> Woodbury:
    layer = Woodbury(channels, size, rank).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize(
    ("channels", "size", "rank"), [(3, (2, 4), 2), (2, (3, 3), 8), (4, (5,), 1), (1, (2, 1, 2), 3)]
)
def test_is_the_product_of_two_matrices(channels: int, size: tuple[int, ...], rank: int) -> None:
    layer = shaken(channels, size, rank)
    left = torch.eye(channels).double() + layer.channel_u @ layer.channel_v
    right = torch.eye(len(layer.pixel_u)).double() + layer.pixel_u @ layer.pixel_v
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0].flatten(2), left @ x.flatten(2) @ right)
    whole = torch.kron(left, right.T.contiguous())
    torch.testing.assert_close(layer(x)[1], torch.linalg.slogdet(whole).logabsdet.expand(2))
    torch.testing.assert_close(layer.inverse(x)[0].flatten(1), torch.linalg.solve(whole, x.flatten(1).T).T)


def test_begins_as_the_identity_and_learns_from_there() -> None:
    layer, x = Woodbury(3, (4, 4)), torch.randn(2, 3, 4, 4)
    z, logdet = layer(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(2))
    (z.square().sum() + logdet.sum()).backward()
    assert layer.channel_u.grad.abs().max() > 0
    assert layer.pixel_u.grad.abs().max() > 0


def test_no_rank_is_above_what_it_is_of() -> None:
    layer = Woodbury(3, (2, 2), rank=100)
    assert layer.channel_u.shape == (3, 3)
    assert layer.pixel_u.shape == (4, 4)


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        Woodbury(3, (2, 2), 0)
    with pytest.raises(ValueError, match=r"size must be .*, got \(2, 0\)"):
        Woodbury(3, (2, 0))
    with pytest.raises(ValueError, match=r"built for images of size \(2, 3\), got \(1, 3, 3, 2\)"):
        Woodbury(3, (2, 3))(torch.zeros(1, 3, 3, 2))


def test_a_singular_one_is_no_error_in_either_direction() -> None:
    layer = Woodbury(2, (3,), 2)
    with torch.no_grad():
        layer.channel_u.copy_(-torch.eye(2))
        layer.channel_v.copy_(torch.eye(2))
    x = torch.ones(1, 2, 3)
    assert layer(x)[1].item() == -math.inf
    assert layer.inverse(x)[1].item() == math.inf


def test_a_size_that_is_a_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"size must be .* got 8"):
        Woodbury(4, 8)  # type: ignore[arg-type]
