"""What this build can do, as lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import inverse_flow


def format_info(info: Mapping[str, Any] | None = None) -> str:
    """``inverse_flow.build_info()`` as aligned lines."""
    info = inverse_flow.build_info() if info is None else info
    width = max(map(len, info))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {_text(value)}" for name, value in info.items())


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "–" if value in ("", None) else str(value)
