"""`palu inspect`: what a run would do to each token."""

from __future__ import annotations

from typing import Annotated

import typer

from palu.cli.options import (
    ChatTemplateKwargs,
    DateString,
    ForceTemplate,
    MaxLength,
    ModelFolder,
    PrefixLength,
    Repair,
    RepairSpans,
    SystemPrompt,
    bars,
    out,
    plain_warnings,
)
from palu.errors import user_errors


def inspect(
    file: Annotated[
        str, typer.Argument(help="JSON lines or a datasets folder; PATH[-40:] takes a slice.")
    ],
    model: ModelFolder,
    limit: Annotated[int, typer.Option(help="How many examples; 0: all.")] = 5,
    prefix_length: PrefixLength = 3,
    max_length: MaxLength = 512,
    system_prompt: SystemPrompt = None,
    date_string: DateString = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    force_template: ForceTemplate = False,
    repair: RepairSpans = Repair.none,
) -> None:
    """Print examples with their tokens coloured by what a run would do to them."""
    with user_errors(), plain_warnings():
        with bars.status("Loading the tokenizer"):
            from palu.cli.inspect_examples import inspect_file
            from palu.models.loading import folder_with, load_tokenizer
            from palu.run_record import RECORD, choose_template

            if limit < 0:
                raise ValueError(f"--limit must be at least 0, not {limit}")
            tokenizer = load_tokenizer(model)
            home = folder_with(RECORD, model)
            template = choose_template(
                home,
                system_prompt=system_prompt,
                date_string=date_string,
                chat_template_kwargs=chat_template_kwargs,
                force=force_template,
            )
        inspect_file(
            file,
            tokenizer,
            limit=limit or None,
            prefix_length=prefix_length,
            max_length=max_length,
            template=template,
            repair=repair.value,
            console=out,
        )
