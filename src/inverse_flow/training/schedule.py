"""The learning rate over a run."""

from __future__ import annotations

from inverse_flow.training.config import TrainConfig


def rate_factor(config: TrainConfig, step: int, progress: float) -> float:
    """What the learning rate is multiplied by at a step, counted from 0: linear warm-up, then a decay in steps.

    min(1, (step + 1) / warmup_steps) · decay_factorᵏ, with k the number of the ``decay_at`` that lie behind: those
    below 1 are compared with ``progress``, the others with the step.
    """
    warmth = min(1.0, (step + 1) / max(1, config.warmup_steps))
    passed = sum((progress if at < 1 else step) >= at for at in config.decay_at)
    return warmth * config.decay_factor**passed
