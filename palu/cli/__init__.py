"""The command line."""

import sys

from palu.errors import exit_status


def main() -> None:
    """Run `palu` (the console script, and `python -m palu`)."""
    try:
        from palu.cli.app import main as run
    except ModuleNotFoundError as error:  # without the extra "train" there is no command line
        status, text = exit_status(error)
        if not status:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(status)
    run()
