"""The inverse of a convolution for PyTorch, and the normalizing flows built from it."""

from . import functional, reference
from ._native import build_info
from ._version import __version__
from .conv import InverseConv2d
from .plans import explain

__all__ = ["InverseConv2d", "__version__", "build_info", "explain", "functional", "reference"]
