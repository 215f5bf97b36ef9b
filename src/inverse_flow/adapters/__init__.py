"""The layers and flows in other libraries. See docs/interop.md.

nflows needs no adapter: its transforms have the same two methods. Every other library is imported when its adapter is
called, and not before.
"""

from inverse_flow.adapters.transforms import to_torch_transform

__all__ = ["to_torch_transform"]
