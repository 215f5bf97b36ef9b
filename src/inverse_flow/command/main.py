"""The command ``inverse-flow``. ``info`` works without the extra that training needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from inverse_flow.command.spinning import spin_moderately

# What the extra [train] brings. Some other missing module is a fault of its own and is not explained away.
TRAIN_EXTRA = ("click", "rich", "matplotlib", "PIL", "tensorboard")


def main() -> None:
    """Entry point of the console script."""
    if sys.argv[1:2] == ["train"]:
        spin_moderately()
    try:
        from inverse_flow.command.commands import cli
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in TRAIN_EXTRA:
            raise
        if sys.argv[1:] == ["info"]:
            print(format_info())
            return
        sys.exit(missing_extra(error))
    cli(prog_name="inverse-flow")


def missing_extra(error: ModuleNotFoundError) -> str:
    """What to install when a module of the extra is missing."""
    return f"inverse-flow needs {error.name} for this: pip install 'inverse-flow[train]'"


def format_info(info: Mapping[str, Any] | None = None) -> str:
    """``inverse_flow.build_info()`` as aligned lines."""
    if info is None:
        import inverse_flow

        info = inverse_flow.build_info()
    width = max(map(len, info))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {_text(value)}" for name, value in info.items())


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "–" if value in ("", None) else str(value)


if __name__ == "__main__":
    main()
