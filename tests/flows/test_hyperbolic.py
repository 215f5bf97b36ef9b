import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow.flows import Compose, HaarSqueeze, Hyperbolic, Squeeze


def test_is_the_leapfrog_step() -> None:
    layer = Hyperbolic(4, 3, step_size=0.5)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 5, 5)
    previous, current = x.chunk(2, dim=1)
    force = F.conv_transpose2d(F.conv2d(current, layer.weight, layer.bias, padding=1).relu(), layer.weight, padding=1)
    z, _ = layer(x)
    assert torch.equal(z[:, :2], current)
    torch.testing.assert_close(z[:, 2:], 2 * current - previous - 0.5 * force)


def test_the_force_is_a_filter_and_its_adjoint() -> None:
    """⟨Kᵀ r, x⟩ = ⟨r, K x⟩: with all responses positive the force is K ᵀ(K x + b)."""
    layer = Hyperbolic(2, 3).double()
    nn.init.constant_(layer.bias, 100.0)
    x, y = torch.randn(2, 1, 1, 4, 5, dtype=torch.float64)

    def k(image: Tensor) -> Tensor:
        return F.conv2d(image, layer.weight, padding=1)

    at_zero = layer._force(torch.zeros_like(x))
    product = ((layer._force(x) - at_zero) * y).sum()
    torch.testing.assert_close(product, (k(x) * k(y)).sum())


def test_the_determinant_is_plus_one() -> None:
    for channels in (2, 4, 6):  # an odd and an even number of values in each half
        layer = Hyperbolic(channels).double()
        x = torch.randn(channels * 3, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v.view(1, -1, 1, 3))[0].flatten(), x)  # noqa: B023
        assert torch.linalg.det(jacobian).item() == pytest.approx(1.0)


def test_starts_stable() -> None:
    """The norm of K is about 1, well below the limit of the leapfrog step, and a deep stack does not blow up."""
    for channels, hidden in ((2, 32), (32, 16), (64, 4)):
        layer = Hyperbolic(channels, hidden)
        k = layer.weight.detach()
        spectrum = torch.fft.fft2(k, (8, 8)).permute(2, 3, 0, 1)
        assert 0.5 < torch.linalg.matrix_norm(spectrum, 2).max() < 1.6
    x = torch.randn(1, 8, 8, 8)
    x = torch.cat((x, x), dim=1)  # at rest
    deep = Compose(*(Hyperbolic(16) for _ in range(50)))
    z, _ = deep(x)
    # Without a force a field in motion grows in proportion to the number of steps, and no faster.
    assert z.norm() < 50 * x.norm()
    torch.testing.assert_close(deep.inverse(z)[0], x, rtol=1e-4, atol=1e-3)


def test_squeezes_keep_the_two_states_apart() -> None:
    states = torch.zeros(1, 4, 4, 4)
    states[:, :2] = 1
    for squeeze in (Squeeze(), HaarSqueeze("channel")):
        z, _ = squeeze(states)
        assert z[:, :8].abs().sum() > 0
        assert z[:, 8:].abs().sum() == 0
    assert HaarSqueeze()(states)[0][:, :8].abs().sum() < states.abs().sum()


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="even number of channels, got 3"):
        Hyperbolic(3)
    with pytest.raises(ValueError, match="odd, got 4"):
        Hyperbolic(4, kernel_size=4)
    with pytest.raises(ValueError, match="above 0, got -1"):
        Hyperbolic(4, step_size=-1.0)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        Hyperbolic(4, 0)
    with pytest.raises(ValueError, match=r"be 1 \(signals\), 2 \(images\) or 3 \(volumes\), got 0"):
        Hyperbolic(4, dimensions=0)
    with pytest.raises(ValueError, match=r"dimensions=2, for \(B, 4, H, W\), got shape \(1, 4, 2, 2, 2\)"):
        Hyperbolic(4)(torch.zeros(1, 4, 2, 2, 2))
