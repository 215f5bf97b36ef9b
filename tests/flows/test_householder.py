import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import Householder


def matrix_of(layer: Householder) -> Tensor:
    """Q, column by column."""
    columns = torch.eye(layer.channels, dtype=layer.vectors.dtype)[:, :, None, None]
    return layer(columns)[0][:, :, 0, 0].T


def reflections_one_by_one(vectors: Tensor) -> Tensor:
    """H₁·H₂ ⋯ H_k as it is defined."""
    product = torch.eye(len(vectors), dtype=vectors.dtype)
    for v in vectors.T:
        product = product @ (torch.eye(len(v), dtype=v.dtype) - 2 * torch.outer(v, v) / (v @ v))
    return product


@pytest.mark.parametrize(("channels", "reflections"), [(1, 1), (5, 1), (5, 3), (5, 5), (3, 7)])
def test_is_the_product_of_its_reflections(channels: int, reflections: int) -> None:
    layer = Householder(channels, reflections).double()
    q = matrix_of(layer)
    torch.testing.assert_close(q, reflections_one_by_one(layer.vectors), rtol=0, atol=1e-12)
    assert torch.linalg.det(q).item() == pytest.approx((-1) ** reflections)
    if reflections > 1:  # the check tells the order of the factors
        backwards = reflections_one_by_one(layer.vectors.flip(1))
        assert channels == 1 or not torch.allclose(q, backwards)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_stays_orthogonal_to_one_rounding_whatever_the_vectors_hold(scale: float) -> None:
    layer = Householder(16)
    nn.init.normal_(layer.vectors, std=scale)
    with torch.no_grad():
        layer.vectors[:, 1] = layer.vectors[:, 0] * (1 + 1e-4 * torch.randn(16))  # nearly parallel
    q = matrix_of(layer).double()
    assert (q @ q.T - torch.eye(16)).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_the_inverse_is_the_transpose() -> None:
    layer = Householder(6, 2)
    x = torch.randn(2, 6, 3, 3)
    q = matrix_of(layer)
    expected = torch.einsum("oc,bohw->bchw", q, x)
    torch.testing.assert_close(layer.inverse(x)[0], expected)
    assert not torch.allclose(layer(x)[0], expected)


def test_float32_runs_in_float32_under_autocast() -> None:
    layer, x = Householder(4), torch.randn(2, 4, 3, 3)
    expected, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = layer(x)
    assert torch.equal(z, expected)


def test_a_vector_of_zeros_shows() -> None:
    layer = Householder(3, 2)
    with torch.no_grad():
        layer.vectors[:, 1] = 0
    assert layer(torch.randn(1, 3, 1, 1))[0].isnan().any()


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        Householder(0, 2)
    with pytest.raises(ValueError, match="reflections must be at least 1, got 0"):
        Householder(4, 0)
    with pytest.raises(ValueError, match=r"built for 4 channels, got images of shape \(1, 3, 2, 2\)"):
        Householder(4)(torch.zeros(1, 3, 2, 2))
