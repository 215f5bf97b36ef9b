import pytest
import torch

from inverse_flow.flows import ActNorm


def images(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 5


def test_the_first_training_batch_is_normalised() -> None:
    layer = ActNorm(3)
    x = images(8, 3, 5, 4) * torch.tensor([1.0, 100.0, 0.01]).view(-1, 1, 1)
    z, _ = layer(x)
    assert bool(layer.initialized)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_only_the_first_batch_counts() -> None:
    layer = ActNorm(2)
    layer(images(4, 2, 3, 3))
    before = layer.bias.detach().clone()
    layer(images(4, 2, 3, 3) + 10)
    assert torch.equal(layer.bias, before)


def test_evaluation_and_the_inverse_do_not_initialise() -> None:
    layer = ActNorm(2).eval()
    x = images(4, 2, 3, 3)
    assert torch.equal(layer(x)[0], x)
    assert torch.equal(layer.train().inverse(x)[0], x)
    assert not bool(layer.initialized)


def test_the_state_dict_carries_the_initialisation() -> None:
    layer, other = ActNorm(2), ActNorm(2)
    layer(images(4, 2, 3, 3))
    other.load_state_dict(layer.state_dict())
    x = images(4, 2, 3, 3) + 10
    assert torch.equal(other(x)[0], layer(x)[0])


def test_an_uninitialised_state_dict_makes_it_uninitialised_again() -> None:
    layer = ActNorm(2)
    layer(images(4, 2, 3, 3))
    layer.load_state_dict(ActNorm(2).state_dict())
    z, _ = layer(images(4, 2, 3, 3) + 10)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 2, 1, 1)])
def test_a_batch_without_spread_initialises_nothing(shape: tuple[int, ...]) -> None:
    layer = ActNorm(2)
    x = images(*shape)
    z, logdet = layer(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(shape[0]))
    assert not bool(layer.initialized)
    layer(images(4, 2, 3, 3))
    assert bool(layer.initialized)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_constant_channel_is_centred_and_keeps_its_scale(value: float) -> None:
    layer = ActNorm(2)
    x = images(4, 2, 3, 3)
    x[:, 1] = value
    z, _ = layer(x)
    assert torch.isfinite(z).all()
    assert layer.log_scale[1].item() == 0
    torch.testing.assert_close(z[:, 1], torch.zeros(4, 3, 3), atol=1e-5 * max(value, 1), rtol=0)


def test_a_batch_with_nan_is_refused_and_changes_nothing() -> None:
    layer = ActNorm(2)
    x = images(4, 2, 3, 3)
    x[0, 1, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"channels \[1\]"):
        layer(x)
    assert not bool(layer.initialized)
    assert torch.equal(layer.bias, torch.zeros(2))


def test_half_precision_images_are_measured_in_float32() -> None:
    layer = ActNorm(1)
    x = torch.full((4, 1, 64, 64), 300.0, dtype=torch.float16)
    x[:2] = 200.0
    z, _ = layer(x)
    torch.testing.assert_close(z.unique(), torch.tensor([-1.0, 1.0], dtype=torch.float16))


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"2 channels.*\(1, 3, 4, 4\)"):
        ActNorm(2)(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\).*\(2, 3\)"):
        ActNorm(2)(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"torch.uint8"):
        ActNorm(2)(torch.zeros(1, 2, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="ndarray"):
        ActNorm(2)(torch.zeros(1, 2, 4, 4).numpy())
