"""The entry point of ``inverse-flow``. ``info`` works without the extra that training needs."""

from __future__ import annotations

import sys

from inverse_flow.command import INTERRUPTED_STATUS
from inverse_flow.command.encoding import print_anywhere
from inverse_flow.command.extra import missing_extra
from inverse_flow.command.spinning import spin_moderately


def main() -> None:
    """Entry point of the console script."""
    try:
        _run()
    except KeyboardInterrupt:  # while modules are loaded, which takes seconds; the commands see to themselves
        sys.exit(INTERRUPTED_STATUS)


def _run() -> None:
    print_anywhere()
    if sys.argv[1:2] == ["train"]:
        spin_moderately()
    try:
        from inverse_flow.command.commands import cli
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        if sys.argv[1:] == ["info"]:
            from inverse_flow.command.info import format_info

            print(format_info())
            return
        sys.exit(message)
    cli(prog_name="inverse-flow")


if __name__ == "__main__":
    main()
