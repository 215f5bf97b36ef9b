import torch

from inverse_flow.flows import Conv1x1


def weight_of(layer: Conv1x1) -> torch.Tensor:
    """The matrix W, column by column."""
    columns = torch.eye(layer.channels)[:, :, None, None]
    return layer(columns)[0][:, :, 0, 0].T


def test_starts_as_a_rotation() -> None:
    torch.manual_seed(0)
    weight = weight_of(Conv1x1(6))
    torch.testing.assert_close(weight @ weight.T, torch.eye(6), atol=1e-6, rtol=0)
    assert not torch.allclose(weight, torch.eye(6), atol=0.1)


def test_the_factors_stay_triangular_whatever_the_parameters_hold() -> None:
    torch.manual_seed(0)
    layer = Conv1x1(4)
    weight = weight_of(layer)
    with torch.no_grad():
        layer.lower += torch.ones(4, 4).triu()
        layer.upper += torch.ones(4, 4).tril()
    torch.testing.assert_close(weight_of(layer), weight)


def test_the_inverse_is_exact_to_float32_on_an_ill_conditioned_matrix() -> None:
    torch.manual_seed(0)
    layer = Conv1x1(8)
    with torch.no_grad():
        layer.log_scale += torch.linspace(-4, 4, 8)
    x = torch.randn(2, 8, 3, 3)
    z, _ = layer(x)
    back, _ = layer.inverse(z)
    condition = torch.linalg.cond(weight_of(layer)).item()
    assert condition > 1000
    assert (back - x).norm() / x.norm() < 1e-7 * condition


def test_float32_runs_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer, x = Conv1x1(4), torch.randn(2, 4, 3, 3)
    expected, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = layer(x)
    assert torch.equal(z, expected)
