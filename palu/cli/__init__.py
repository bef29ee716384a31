"""The command line."""


def main() -> None:
    """Run `palu` (the console script, and `python -m palu`)."""
    from palu.cli.app import main as run

    run()
