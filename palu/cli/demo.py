"""`palu demo`: the whole of it on a model made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import typer

from palu.cli.data import quiet
from palu.cli.options import OutputOptions, with_options
from palu.errors import user_errors
from palu.terminal import bars, out
from palu.training.options import option


@dataclass(kw_only=True)
class DemoOptions:
    """What the demo makes."""

    output: Path = option(Path("palu-demo"), "Folder to write.")
    seed: int = option(0, "Seed of the people, the weights and the batches.")
    people: int = option(40, "How many people are invented.")
    forget_people: int = option(5, "How many of them are to be forgotten.")
    train_steps: int = option(300, "Steps to learn the answers by heart.")
    unlearn_epochs: int = option(30, "Passes over the forget set.")


@with_options(DemoOptions, OutputOptions)
def demo(context: typer.Context, options: SimpleNamespace) -> None:
    """A model made on the spot learns about invented people, then forgets some of them."""
    with user_errors():
        from palu.storage.output import claim_output, output_folder

        claim = context.with_resource(claim_output(options.output, overwrite=options.overwrite))
    with bars.status("Loading PyTorch and transformers"):
        from palu.demo.run import DemoSettings, run_demo

        quiet()
    with user_errors():
        settings = DemoSettings(
            seed=options.seed,
            people=options.people,
            forget_people=options.forget_people,
            train_steps=options.train_steps,
            unlearn_epochs=options.unlearn_epochs,
        )
    with output_folder(claim) as folder:
        metrics = run_demo(folder, settings, console=out, bars=bars, shown_as=options.output)
    if not all(metrics["checks"].values()):
        raise typer.Exit(1)
