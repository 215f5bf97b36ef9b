"""Flow layers and their composition. See docs/flows.md."""

from inverse_flow.flows.activation import LeakyReLU, SmoothLeakyReLU, SmoothTanh
from inverse_flow.flows.actnorm import ActNorm
from inverse_flow.flows.base import FlowLayer, Shape
from inverse_flow.flows.checkerboard import CheckerboardCoupling
from inverse_flow.flows.compose import Compose, Flow, Reverse, reverse
from inverse_flow.flows.conditioner import ConvNet, ResNet
from inverse_flow.flows.conv1x1 import Conv1x1
from inverse_flow.flows.coupling import AdditiveCoupling, AffineCoupling
from inverse_flow.flows.emerging import EmergingConv, PeriodicConv
from inverse_flow.flows.exponential import ExponentialConv
from inverse_flow.flows.hint import HINT
from inverse_flow.flows.householder import Householder
from inverse_flow.flows.hyperbolic import Hyperbolic
from inverse_flow.flows.irim import IRIM
from inverse_flow.flows.jacobian import jvp, vjp
from inverse_flow.flows.joint import JointFlow
from inverse_flow.flows.latents import interpolate, reconstruction_error
from inverse_flow.flows.logit import Logit
from inverse_flow.flows.permute import Permute
from inverse_flow.flows.prepared import prepare_sampling
from inverse_flow.flows.prior import StandardNormal
from inverse_flow.flows.spline import SplineActivation, SplineCoupling
from inverse_flow.flows.split import Split
from inverse_flow.flows.squeeze import Squeeze
from inverse_flow.flows.wavelet import HaarSqueeze, WaveletSqueeze
from inverse_flow.flows.woodbury import Woodbury
from inverse_flow.reversible.finite import NonFiniteError, detect_nonfinite

__all__ = [
    "HINT",
    "IRIM",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "CheckerboardCoupling",
    "Compose",
    "Conv1x1",
    "ConvNet",
    "EmergingConv",
    "ExponentialConv",
    "Flow",
    "FlowLayer",
    "HaarSqueeze",
    "Householder",
    "Hyperbolic",
    "JointFlow",
    "LeakyReLU",
    "Logit",
    "NonFiniteError",
    "PeriodicConv",
    "Permute",
    "ResNet",
    "Reverse",
    "Shape",
    "SmoothLeakyReLU",
    "SmoothTanh",
    "SplineActivation",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "StandardNormal",
    "WaveletSqueeze",
    "Woodbury",
    "detect_nonfinite",
    "interpolate",
    "jvp",
    "prepare_sampling",
    "reconstruction_error",
    "reverse",
    "vjp",
]
