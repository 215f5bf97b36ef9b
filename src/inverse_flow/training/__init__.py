"""Training, evaluation and what is reported of them. See docs/training.md.

Importing this package needs PyTorch alone; the progress bar and the figures need the extra ``[train]``.
"""

from inverse_flow.training.batches import Batches
from inverse_flow.training.checkpoint import Checkpoint, DataSource
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.dequantization import dequantize
from inverse_flow.training.inverses import InverseError
from inverse_flow.training.log import StepReport
from inverse_flow.training.method import EndToEnd, Method, StepResult
from inverse_flow.training.metrics import IndependentPixels, bits_per_dim, evaluate
from inverse_flow.training.trainer import Stop, Trainer
from inverse_flow.training.workers import Workers

__all__ = [
    "Batches",
    "Checkpoint",
    "DataSource",
    "EndToEnd",
    "IndependentPixels",
    "InverseError",
    "Method",
    "StepReport",
    "StepResult",
    "Stop",
    "TrainConfig",
    "Trainer",
    "Workers",
    "bits_per_dim",
    "dequantize",
    "evaluate",
]
