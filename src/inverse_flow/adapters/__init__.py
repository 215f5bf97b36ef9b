"""The layers and flows in other libraries, and theirs in ours. See docs/interop.md.

nflows needs no adapter: its transforms have the same two methods. zuko and pyro are imported when their adapter is
called, and not before; normflows and FrEIA ask for no class of their own.
"""

from inverse_flow.adapters.freia import from_freia, to_freia
from inverse_flow.adapters.normflows import to_normflows
from inverse_flow.adapters.transforms import to_pyro, to_torch_transform, to_zuko

__all__ = ["from_freia", "to_freia", "to_normflows", "to_pyro", "to_torch_transform", "to_zuko"]
