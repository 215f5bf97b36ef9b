"""Random streams that depend on their names alone, not on what was drawn before."""

from __future__ import annotations

import numpy as np
import torch

# The streams of a run; their numbers are part of what makes a run repeatable.
ORDER, NOISE, FLIP, EVALUATION, SAMPLES, VALIDATION = range(6)


def generator(seed: int, stream: int, index: int = 0) -> torch.Generator:
    """A CPU generator for element ``index`` of a stream. A run resumed at any step draws what it would have drawn."""
    words = np.random.SeedSequence([seed, stream, index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
