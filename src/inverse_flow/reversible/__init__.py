"""Training in memory that does not grow with depth. See docs/memory.md."""

from inverse_flow.ops.backpropagate import backpropagate
from inverse_flow.reversible.rebuild import ReconstructionError
from inverse_flow.reversible.sequential import ReversibleSequential, reconstruction_errors

__all__ = ["ReconstructionError", "ReversibleSequential", "backpropagate", "reconstruction_errors"]
