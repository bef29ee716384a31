"""What the commands of `palu` share: options that mean the same everywhere, and how they speak."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

out = Console()
bars = Console(stderr=True)


class Objective(str, Enum):
    """Names of the forget objectives."""

    flatten = "flatten"
    entropy = "entropy"


class Repair(str, Enum):
    """What to do with odd spans."""

    none = "none"
    snap = "snap"


ModelFolder = Annotated[Path, typer.Option("--model", help="Hugging Face model folder.")]
ForgetFile = Annotated[
    str,
    typer.Option(
        "--forget",
        help="What to forget: JSON lines or a datasets folder; PATH[-40:] takes a slice.",
    ),
]
RetainFile = Annotated[str | None, typer.Option("--retain", help="What to keep, same formats.")]
TopK = Annotated[int, typer.Option(help="Largest logits levelled in a forget row.")]
PrefixLength = Annotated[
    int, typer.Option(help="Tokens forgotten at the start of each span; 0: all.")
]
Preserve = Annotated[
    str, typer.Option(help="Holds other answer tokens: reverse_kl, forward_kl, nll or none.")
]
RetainLoss = Annotated[str, typer.Option(help="nll, or kl to the original model.")]
SelectFrom = Annotated[
    str, typer.Option(help="Whose logits choose the top k: reference or current.")
]
Backend = Annotated[str, typer.Option(help="Kernels: auto, triton or torch.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
MaxLength = Annotated[int, typer.Option(help="Tokens an example; longer ones are cut.")]
SystemPrompt = Annotated[str | None, typer.Option(help="System turn of the chat template.")]
DateString = Annotated[str | None, typer.Option(help="Date given to the chat template.")]
ForceTemplate = Annotated[
    bool,
    typer.Option("--force-template", help="Take these template options even if palu.json differs."),
]
RepairSpans = Annotated[
    Repair, typer.Option(help="snap: move span ends to word ends and merge overlaps.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")]


def read_rows(
    path: str,
    tokenizer: Any,
    template: Any,
    *,
    require_spans: bool,
    repair: str,
    max_length: int,
) -> list[dict]:
    """The tokenised examples of a file."""
    from palu.data import load_examples, tokenize_examples

    examples = load_examples(path, require_spans=require_spans, repair=repair)
    return tokenize_examples(examples, tokenizer, max_length=max_length, template=template)


def warn(text: str) -> None:
    bars.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings about the user's data as one line each, without the place in our source."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *args, **kwargs: warn(str(message))
        yield


def quiet() -> None:
    """Our own bars are enough."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
