"""Training in memory that does not grow with depth. See docs/memory.md."""

from inverse_flow.ops.backpropagate import backpropagate
from inverse_flow.reversible.chain import ReconstructionError
from inverse_flow.reversible.sequential import ReversibleSequential, check_options, reconstruction_errors

__all__ = ["ReconstructionError", "ReversibleSequential", "backpropagate", "check_options", "reconstruction_errors"]
