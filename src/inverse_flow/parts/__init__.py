"""Training by parts, on the public interface of :mod:`inverse_flow.training`. See docs/parts.md."""

from inverse_flow.parts.config import PartsConfig, parse_parts
from inverse_flow.parts.method import ByParts
from inverse_flow.parts.parallel import fit_parts
from inverse_flow.parts.split import Carried, Part, part_shares, run_frozen, split_flow, truncated_log_prob

__all__ = [
    "ByParts",
    "Carried",
    "Part",
    "PartsConfig",
    "fit_parts",
    "parse_parts",
    "part_shares",
    "run_frozen",
    "split_flow",
    "truncated_log_prob",
]
