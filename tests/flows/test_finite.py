import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import AffineCoupling, Compose, Conv1x1, Flow, FlowLayer, NonFiniteError, detect_nonfinite
from inverse_flow.flows.base import zero_logdet


class Fault(FlowLayer):
    """The identity, but for what it is told to spoil."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def _run(self, x: Tensor, direction: str) -> tuple[Tensor, Tensor]:
        logdet = zero_logdet(x)
        if self.where == direction:
            x = x.clone()
            x[0, 0, 0, 0] = float("nan")
        if self.where == "logdet":
            logdet[0] = float("inf")
        return x, logdet

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, "forward")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, "inverse")


def flow_with(layer: nn.Module) -> Flow:
    return Flow([Conv1x1(2), Compose(Conv1x1(2), layer, Conv1x1(2))], (2, 3, 3))


def test_the_layer_is_named() -> None:
    flow, x = flow_with(Fault("forward")), torch.zeros(2, 2, 3, 3)
    with detect_nonfinite(), pytest.raises(NonFiniteError, match=r"1 of 36 values of the result of Fault.forward") as e:
        flow.log_prob(x)
    assert e.value.path == "layers.1.layers.1"
    assert isinstance(flow.get_submodule(e.value.path), Fault)


def test_it_is_named_within_a_flow_that_is_one_layer() -> None:
    for where in ("forward", "inverse"):
        flat = flow_with(Fault(where)).flatten()
        chain = Compose(flat, Conv1x1(18))
        with detect_nonfinite(), pytest.raises(NonFiniteError) as e:
            chain(torch.zeros(2, 2, 3, 3)) if where == "forward" else chain.inverse(torch.zeros(2, 18))
        assert e.value.path == "layers.0.flow.layers.1.layers.1"
        assert isinstance(chain.get_submodule(e.value.path), Fault)


def test_in_the_inverse_and_in_the_log_determinant() -> None:
    with detect_nonfinite(), pytest.raises(NonFiniteError, match=r"the result of Fault.inverse"):
        flow_with(Fault("inverse")).sample(1)
    with detect_nonfinite(), pytest.raises(NonFiniteError, match=r"the log-determinant of Fault.forward"):
        flow_with(Fault("logdet")).log_prob(torch.zeros(2, 2, 3, 3))


def test_bad_images_are_not_blamed_on_a_layer() -> None:
    with detect_nonfinite(), pytest.raises(NonFiniteError, match=r"the input of Conv1x1.forward"):
        flow_with(Fault("")).log_prob(torch.full((1, 2, 3, 3), float("inf")))


def test_nor_is_a_bad_context() -> None:
    flow, context = Flow([AffineCoupling(2, 3, context_channels=1)], (2, 3, 3)), torch.tensor([[0.0], [float("nan")]])
    with detect_nonfinite(), pytest.raises(NonFiniteError, match=r"1 of 2 values of the context of AffineCoupling"):
        flow.log_prob(torch.zeros(2, 2, 3, 3), context)
    with detect_nonfinite():
        flow.log_prob(torch.zeros(1, 2, 3, 3), context[:1])


def test_off_unless_asked_for_and_off_again_afterwards() -> None:
    flow, x = flow_with(Fault("forward")), torch.zeros(2, 2, 3, 3)
    assert flow.log_prob(x).isnan().any()
    with detect_nonfinite(), pytest.raises(NonFiniteError):
        flow.log_prob(x)
    assert flow.log_prob(x).isnan().any()
