"""The values of the demo, which the images in the package come with."""

from __future__ import annotations

from typing import Any

from inverse_flow.flows.logit import DEFAULT_MARGIN
from inverse_flow.training import TrainConfig

# A few minutes on two cores; clothes may be mirrored.
TRAINING = TrainConfig(minutes=3.5, learning_rate=1e-2, flip=True)
MODEL: dict[str, Any] = {"logit_margin": DEFAULT_MARGIN}
