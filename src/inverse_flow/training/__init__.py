"""Training, evaluation and what is reported of them. See docs/training.md.

Importing this package needs PyTorch alone; the progress bar and the figures need the extra ``[train]``.
"""

from inverse_flow.training.baseline import IndependentPixels
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.engine import Stop, Trainer
from inverse_flow.training.inverses import InverseError
from inverse_flow.training.method import EndToEnd, Method, StepResult
from inverse_flow.training.metrics import bits_per_dim, dequantize, evaluate
from inverse_flow.training.workers import Workers

__all__ = [
    "EndToEnd",
    "IndependentPixels",
    "InverseError",
    "Method",
    "StepResult",
    "Stop",
    "TrainConfig",
    "Trainer",
    "Workers",
    "bits_per_dim",
    "dequantize",
    "evaluate",
]
