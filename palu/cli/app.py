"""The `palu` command: registers its commands, and turns errors into exit statuses."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import Annotated

import typer

from palu import __version__, distributed
from palu.cli.annotate import annotate
from palu.cli.attack import attack
from palu.cli.cache import cache
from palu.cli.compare import compare
from palu.cli.demo import demo
from palu.cli.erase import erase
from palu.cli.evaluate import evaluate
from palu.cli.inspect import inspect
from palu.cli.merge import merge
from palu.cli.plan import plan
from palu.cli.report import report
from palu.cli.unlearn import unlearn
from palu.errors import UserError, exit_status
from palu.terminal import WarningLines, bars, out, say, warn

# Read when torch loads its OpenMP runtime, which none of the imports above does. Threads that spin
# while they wait make a machine that does anything else many times slower (`palu demo` beside one
# busy process: over 10 minutes instead of one).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What several processes would each do as a whole, and write to one place.
_ALONE = ("demo", "erase", "annotate", "attack", "merge", "cache")
INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(
    help="Make a language model forget chosen spans and keep the rest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands = (demo, erase, annotate, unlearn, inspect, evaluate, attack, compare, merge, plan, report)
for command in commands:
    app.command()(command)
app.add_typer(cache, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"palu {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Make a language model forget chosen spans and keep the rest."""
    name, count = context.invoked_subcommand, distributed.count()
    if count > 1 and name in _ALONE:
        raise UserError(
            f"palu {name} runs in one process, and this is one of {count} (WORLD_SIZE): start it "
            "without torchrun or accelerate launch"
        )


def main() -> None:
    """Run the command line: a user's mistake is one line and status 2, a diverged run one line and
    status 1, what cannot be written one line and status 3, Ctrl-C one line and status 130."""
    # Forked workers after the tokenizer was used would make it print a warning of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A run that is told to stop leaves through its cleanup: no half-written folder stays behind.
    for name in ("SIGTERM", "SIGHUP"):  # a closed terminal; Windows has none
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    out.quiet = bars.quiet = distributed.rank() > 0
    lines = WarningLines()
    logging.getLogger("palu").addHandler(lines)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *args, **kwargs: warn(str(message))
            status = app(standalone_mode=False, prog_name="palu")
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        status, text = exit_status(error)
        if not status:
            raise
        bars.quiet = False  # another process may not come to say anything
        who = f" in process {distributed.rank()}" if distributed.count() > 1 else ""
        if text:
            say(f"error{who}", "red", text)
    finally:
        logging.getLogger("palu").removeHandler(lines)
    if status == INTERRUPTED:
        say("interrupted", "red", "stopped by Ctrl-C")
    if status:
        sys.exit(status)
