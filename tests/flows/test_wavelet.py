import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse_flow.flows import HaarSqueeze, Squeeze, WaveletSqueeze
from inverse_flow.models import Glow

from .test_battery import DB2

LAYERS = {"haar": HaarSqueeze, "db2": lambda order="band": WaveletSqueeze(DB2, order)}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def test_the_bands_of_an_image() -> None:
    block = torch.tensor([[1.0, 2.0], [4.0, 9.0]]).view(1, 1, 2, 2)
    z, _ = HaarSqueeze()(block)
    assert z.flatten().tolist() == [
        (1 + 2 + 4 + 9) / 2,
        (1 - 2 + 4 - 9) / 2,  # left − right
        (1 + 2 - 4 - 9) / 2,  # top − bottom
        (1 - 2 - 4 + 9) / 2,
    ]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_each_band_is_one_pattern_of_signs(dimensions: int) -> None:
    """Bit j of the band, W lowest, is high-pass along that axis: sign −1 at odd positions."""
    x = torch.randn(1, 1, *(2,) * dimensions, dtype=torch.float64)
    z, _ = HaarSqueeze()(x)
    for band, value in enumerate(z.flatten()):
        total = torch.zeros(())
        for position in itertools.product((0, 1), repeat=dimensions):
            high = [(band >> (dimensions - 1 - axis)) & 1 for axis in range(dimensions)]
            sign = (-1) ** sum(a * b for a, b in zip(high, position, strict=True))
            total = total + sign * x[0, 0][position]
        torch.testing.assert_close(value, total / 2 ** (dimensions / 2))


@layers
def test_order_of_the_channels(make) -> None:
    x = torch.randn(2, 3, 4, 6)
    by_band, _ = make()(x)
    by_channel, _ = make("channel")(x)
    for channel in range(3):
        alone, _ = make()(x[:, channel : channel + 1])
        assert torch.equal(by_band[:, channel::3], alone)
        assert torch.equal(by_channel[:, 4 * channel : 4 * channel + 4], alone)


def test_the_coarse_picture_comes_first() -> None:
    x = torch.randn(1, 3, 4, 4)
    coarse = HaarSqueeze()(x)[0][:, :3]
    torch.testing.assert_close(coarse, 2 * torch.nn.functional.avg_pool2d(x, 2))


@layers
@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 2, 4, 2), (2, 8)])
@pytest.mark.parametrize("order", ["band", "channel"])
def test_is_orthogonal(shape: tuple[int, ...], order: str, make) -> None:
    def norms_and_products(layer: Squeeze, x: Tensor) -> Tensor:
        z = layer(x)[0].flatten(1)
        return z @ z.T

    x = torch.randn(3, *shape, dtype=torch.float64)
    flat = x.flatten(1)
    torch.testing.assert_close(norms_and_products(make(order), x), flat @ flat.T)
    y = make(order)(x)[0]
    torch.testing.assert_close((make(order).inverse(y)[0] * x).sum(), (y * y).sum())


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db3", "db4", "db8", "sym4", "coif1"])
@pytest.mark.parametrize("sizes", [(16,), (8, 12), (4, 8, 2)])
def test_the_bands_are_those_of_pywavelets(wavelet: str, sizes: tuple[int, ...]) -> None:
    """Sizes shorter than the filter too: positions go round more than once."""
    pywt = pytest.importorskip("pywt", reason="PyWavelets is not installed (extra [wavelets])")
    x = torch.randn(2, 1, *sizes, dtype=torch.float64)
    z, _ = WaveletSqueeze(wavelet)(x)
    axes = range(2, x.dim())
    bands = pywt.dwtn(x.numpy(), wavelet, mode="periodization", axes=axes)
    names = ["".join(name) for name in itertools.product("ad", repeat=len(sizes))]
    expected = np.concatenate([bands[name] for name in names], axis=1)
    torch.testing.assert_close(z, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_haar_is_one_case() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(WaveletSqueeze()(x)[0], HaarSqueeze()(x)[0])
    torch.testing.assert_close(WaveletSqueeze([0.5**0.5, 0.5**0.5])(x)[0], HaarSqueeze()(x)[0])


def test_smooth_images_have_smaller_details_than_with_haar() -> None:
    """Two vanishing moments: a slope is all in the low band, but for where the image goes round."""
    slope = torch.arange(16.0).expand(1, 1, 16, 16)
    details = [layer(slope)[0][:, 1, :, 1:-1].abs().max().item() for layer in (WaveletSqueeze(DB2), HaarSqueeze())]
    assert details[0] < 1e-5
    assert details[1] == 1.0


def test_a_model_with_another_wavelet() -> None:
    pytest.importorskip("pywt", reason="PyWavelets is not installed (extra [wavelets])")
    model, x = Glow((1, 8, 8), 2, 1, 4, squeeze="db4"), torch.randn(2, 1, 8, 8)
    assert [layer.wavelet for layer in model.layers if isinstance(layer, WaveletSqueeze)] == ["db4", "db4"]
    torch.testing.assert_close(model.inverse(model(x)[0])[0], x, rtol=1e-4, atol=1e-4)


def test_without_pywavelets_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pywt", None)
    assert WaveletSqueeze("haar").wavelet == "haar"
    with pytest.raises(ModuleNotFoundError, match=r"filters of 'db2' .* pip install 'inverse-flow\[wavelets\]'"):
        WaveletSqueeze("db2")


@pytest.mark.parametrize("taps", [[], [1.0], [0.6, 0.8, 0.1], [0.5, 0.5], [0.6, 0.5, 0.5, 0.374]])
def test_a_filter_that_is_not_orthogonal_is_refused(taps: list[float]) -> None:
    with pytest.raises(ValueError, match=r"even number of taps, .* got"):
        WaveletSqueeze(taps)


def test_names_that_are_no_orthogonal_wavelet_are_refused() -> None:
    pytest.importorskip("pywt", reason="PyWavelets is not installed (extra [wavelets])")
    with pytest.raises(ValueError, match=r"PyWavelets has no discrete wavelet 'mexh'"):
        WaveletSqueeze("mexh")
    with pytest.raises(ValueError, match=r"got 'bior2\.2'"):
        WaveletSqueeze("bior2.2")


def test_bfloat16_is_rounded_once() -> None:
    x = torch.randn(4, 2, 4, 4).bfloat16()
    assert torch.equal(HaarSqueeze()(x)[0], HaarSqueeze()(x.float())[0].bfloat16())


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="divisible by 2, got 4 × 5"):
        HaarSqueeze()(torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="divisible by 2, got 2 × 4 × 5"):
        HaarSqueeze()(torch.zeros(1, 1, 2, 4, 5))
    with pytest.raises(ValueError, match="channels divisible by 8, got 4"):
        HaarSqueeze().inverse(torch.zeros(1, 4, 1, 2, 2))
    with pytest.raises(ValueError, match="got 'wavelet'"):
        HaarSqueeze("wavelet")
    with pytest.raises(TypeError, match="wavelet must be a name or the taps of a filter, got 2"):
        WaveletSqueeze(2)
    with pytest.raises(TypeError, match="each tap of the wavelet must be a number, got '1'"):
        WaveletSqueeze(["1", "1"])


@pytest.mark.parametrize("name", ["bior1.3", "bior1.5", "rbio2.2", "dmey"])
def test_wavelets_with_other_filters_for_the_inverse_are_refused(name: str) -> None:
    pytest.importorskip("pywt", reason="PyWavelets is not installed (extra [wavelets])")
    with pytest.raises(ValueError, match="orthogonal"):
        WaveletSqueeze(name)


def test_taps_that_are_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="orthogonal"):
        WaveletSqueeze([float("nan")] * 2)
