"""The inverse of a convolution for PyTorch, and the normalizing flows built from it."""

from inverse_flow import functional, reference
from inverse_flow._version import __version__
from inverse_flow.conv import InverseConv1d, InverseConv2d, InverseConv3d
from inverse_flow.ops.explain import explain
from inverse_flow.ops.native import build_info
from inverse_flow.stability import limit_gain_, stability_report

__all__ = [
    "InverseConv1d",
    "InverseConv2d",
    "InverseConv3d",
    "__version__",
    "build_info",
    "explain",
    "functional",
    "limit_gain_",
    "reference",
    "stability_report",
]
