"""Flow layers and their composition. See docs/flows.md."""

from inverse_flow.flows.actnorm import ActNorm
from inverse_flow.flows.base import FlowLayer, Shape
from inverse_flow.flows.compose import Compose, Flow, Reverse
from inverse_flow.flows.conditioner import ConvNet
from inverse_flow.flows.conv1x1 import Conv1x1
from inverse_flow.flows.coupling import AdditiveCoupling, AffineCoupling
from inverse_flow.flows.finite import NonFiniteError, detect_nonfinite
from inverse_flow.flows.logit import Logit
from inverse_flow.flows.permute import Permute
from inverse_flow.flows.prior import StandardNormal
from inverse_flow.flows.split import Split
from inverse_flow.flows.squeeze import Squeeze

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Compose",
    "Conv1x1",
    "ConvNet",
    "Flow",
    "FlowLayer",
    "Logit",
    "NonFiniteError",
    "Permute",
    "Reverse",
    "Shape",
    "Split",
    "Squeeze",
    "StandardNormal",
    "detect_nonfinite",
]
