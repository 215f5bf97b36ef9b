import pickle

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import ActNorm, Compose, Conv1x1, Flow, FlowLayer, Split, Squeeze
from inverse_flow.flows.base import zero_logdet
from inverse_flow.training.inverses import InverseError, check_inverses, inverse_errors


class Forgetful(FlowLayer):
    """Its inverse is off by ``error``."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return 2 * x, zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z / 2 + self.error, zero_logdet(z)


def flow(layer: nn.Module) -> Flow:
    torch.manual_seed(0)
    return Flow([Squeeze(), Compose(ActNorm(4), layer), Split(4), Conv1x1(2)], (1, 4, 4))


def test_every_layer_is_named_in_the_order_in_which_it_runs() -> None:
    errors = list(inverse_errors(flow(Forgetful(0.0)), torch.rand(3, 1, 4, 4)))
    names = ["layers.0", "layers.1.layers.0", "layers.1.layers.1", "layers.2", "layers.3"]
    assert [path for path, _, _ in errors] == names
    assert all(error < 1e-6 for _, _, error in errors)


def test_the_error_is_relative_to_the_input() -> None:
    x = torch.rand(3, 1, 4, 4)
    x[0, 0, 0, 0] = 10.0
    errors = {path: error for path, _, error in inverse_errors(flow(Forgetful(0.5)), x)}
    assert errors["layers.1.layers.1"] == pytest.approx(0.05, rel=1e-4)
    assert max(error for path, error in errors.items() if path != "layers.1.layers.1") < 1e-6


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")])
def test_a_layer_that_misses_its_input_is_named(error: float) -> None:
    x = torch.rand(3, 1, 4, 4)
    with pytest.raises(InverseError, match=r"^layers.1.layers.1: Forgetful misses its own input by") as caught:
        check_inverses(flow(Forgetful(error)), x, None, 1e-2)
    assert caught.value.path == "layers.1.layers.1"
    check_inverses(flow(Forgetful(0.0)), x, None, 1e-5)


def test_the_mode_is_left_alone_and_nothing_is_initialized() -> None:
    model = flow(Forgetful(0.0)).train()
    check_inverses(model, torch.rand(3, 1, 4, 4), None, 1e-2)
    assert model.training
    assert not model.layers[1].layers[0].initialized


def test_an_input_of_zeros_has_no_error() -> None:
    assert [error for _, _, error in inverse_errors(flow(Forgetful(0.0)), torch.zeros(1, 1, 4, 4))] == [0.0] * 5


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(InverseError("layers.1", "misses its input")))
    assert (error.path, error.what, str(error)) == ("layers.1", "misses its input", "layers.1: misses its input")
