"""`palu inspect`: what a run would do to each token, in colour and in plain text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from palu.cli.data import find_models, plain_warnings, template_of
from palu.cli.options import FILES, TextOptions, with_options
from palu.errors import user_errors
from palu.terminal import bars, out, visible
from palu.training.options import LossOptions, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from palu.data.template import Template

__all__ = ["inspect_file", "legend", "render"]

# Kind of token: style, and marks that say the same without colour.
_KINDS = {
    "prompt": ("dim", "", ""),
    "forget": ("bold white on red", "[[", "]]"),
    "past the prefix": ("black on yellow", "((", "))"),
    "preserve": ("green", "", ""),
    "never predicted": ("magenta", "<<", ">>"),
}
# `--model` is its own here: a review takes none.
_TEXT_OPTIONS = (TextOptions, *(f.name for f in fields(TextOptions) if f.name != "model"))


@dataclass(kw_only=True)
class InspectOptions:
    """What is shown."""

    file: str = option(
        MISSING,
        f"A file ({FILES}), a datasets folder, or a data set on the hub (org/name:split). "
        "FILE[-40:] takes a slice.",
        argument=True,
    )
    limit: int = option(5, "How many examples; 0: all.", least=0)
    model: Path | None = option(
        None,
        "Model folder, or a model on the hub (org/name), whose tokens are shown.",
        panel="Model",
    )
    html: Path | None = option(
        None,
        "Write a page that shows all records, switches spans on and off, and downloads the "
        "corrected file. Takes no --model.",
        panel="Review",
    )
    review: bool = option(
        False,
        "Ask in the terminal about each span: keep or drop. Takes no --model.",
        panel="Review",
    )
    output: Path | None = option(
        None,
        "Of --review: file for the corrected records; goes on where it stopped.",
        panel="Review",
    )
    overwrite: bool = option(False, "Replace --html or --output.", panel="Review")


@with_options(InspectOptions, _TEXT_OPTIONS, (LossOptions, "prefix_length"))
def inspect(context: typer.Context, options: SimpleNamespace) -> None:
    """Print examples with their tokens coloured by what a run would do to them.

    Or look at the spans themselves: --html writes a page for a browser, --review asks in the
    terminal.
    """
    with user_errors(), plain_warnings():
        if options.html is not None or options.review:
            _review(options)
            return
        if options.model is None:
            raise ValueError("nothing says what to show: give --model DIR, or --html or --review")
        _refuse({"output", "overwrite"} & options.given, "only a review writes a file")
        find_models(options, "model")
        with bars.status("Loading the tokenizer"):
            from palu.models.loading import folder_with, load_tokenizer
            from palu.run_record import RECORD

            tokenizer = load_tokenizer(options.model)
            template = template_of(options, folder_with(RECORD, options.model))
        inspect_file(
            options.file,
            tokenizer,
            limit=options.limit or None,
            prefix_length=options.prefix_length or 0,
            max_length=options.max_length,
            template=template,
            repair=options.repair,
            columns=options.columns,
            console=out,
        )


def _refuse(names: Collection[str], why: str) -> None:
    if names:
        raise ValueError(f"--{min(names).replace('_', '-')}: {why}; leave it out")


def _review(options: SimpleNamespace) -> None:
    from palu.cli.review import review, write_page

    if options.html is not None and options.review:
        raise ValueError("--html and --review are two ways to look: give one of them")
    way = "html" if options.html is not None else "review"
    of_it = {"file", "columns", "overwrite", way} | ({"output"} if options.review else set())
    _refuse(options.given - of_it, f"--{way} does not read it")
    if options.html is not None:
        write_page(options)
    else:
        review(options)


def legend() -> Text:
    """Return one line that explains the colours and marks."""
    parts = [Text("")]
    words = {
        "prompt": "prompt",
        "forget": "forget, token by token",
        "past the prefix": "sensitive, past the prefix: no loss",
        "preserve": "preserve",
        "never predicted": "first token of a text: never predicted",
    }
    for kind, (style, left, right) in _KINDS.items():
        parts.append(Text(f"{left}{words[kind]}{right}", style=style))
    return Text("  ").join(parts[1:])


def render(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prefix_length: int,
    eos_token_id: int | Iterable[int] | None = None,
) -> Text:
    """Return the tokens of one example, coloured by role, and a line of counts.

    Tokens to forget stand in `[[a|b]]`, sensitive tokens after the prefix in `((a|b))`, both with
    `|` between tokens, an answer's token that is never predicted, since nothing is before it, in
    `<<a>>`; so it can be read without colour. The bytes of one character stay together,
    at the first of its tokens.

    Args:
        example: `input_ids` and `labels`, lists of int, as `label_example` makes them.
        tokenizer: the one that made them.
        prefix_length, eos_token_id: as in `token_roles`.

    Raises:
        ValueError: `input_ids` and `labels` differ in length.
    """
    ids, labels = list(example["input_ids"]), list(example["labels"])
    if len(ids) != len(labels):
        raise ValueError(f"the example has {len(ids)} input_ids but {len(labels)} labels")
    kinds = _kinds(labels, prefix_length, eos_token_id)
    text = Text()
    pieces = zip(kinds, _pieces(tokenizer, ids), strict=True)
    for kind, group in groupby(pieces, key=lambda piece: piece[0]):
        style, left, right = _KINDS[kind]
        text.append(
            left + ("|" if left else "").join(piece for _, piece in group) + right, style=style
        )
    counts = ", ".join(
        f"{kinds.count(kind)} {kind}"
        for kind in ("forget", "past the prefix", "preserve", "prompt", "never predicted")
        if kind != "never predicted" or kind in kinds
    )
    text.append(f"\n{len(ids)} tokens: {counts}", style="bold")
    return text


def inspect_file(
    path: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = 5,
    prefix_length: int = 3,
    max_length: int = 512,
    template: Template | None = None,
    repair: Literal["none", "snap"] = "none",
    columns: Mapping[str, str] | str | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    console: Console | None = None,
) -> None:
    """Print the first `limit` examples of a file, or what else `load_examples` takes, (all when
    None) as `render` shows them, with a legend.

    `eos_token_id` is the tokenizer's when None. Rows need no spans: without any, everything is
    preserved. Raises what `load_examples` and `tokenize_examples` raise.
    """
    from palu.data.examples import tokenize_examples
    from palu.data.files import load_examples, name_of

    console = console or Console()
    how = {"repair": repair, "limit": limit, "columns": columns}
    how |= {"tokenizer": tokenizer, "max_length": max_length}
    examples = load_examples(path, require_spans=False, **how)
    options = {"max_length": max_length, "template": template}
    rows = tokenize_examples(examples, tokenizer, source=name_of(path), **options)
    if eos_token_id is None:
        eos_token_id = tokenizer.eos_token_id
    console.print(legend())
    counts = {example.id: sum(len(some) for _, some in example.texts) for example in examples}
    for name, of_example in groupby(rows, key=lambda row: row["example_id"]):
        parts = list(of_example)  # of a conversation that is longer than max_length, several
        spans = f"{counts[name]} span" + "s" * (counts[name] != 1)
        for number, row in enumerate(parts, 1):
            which = f", row {number} of {len(parts)}" if len(parts) > 1 else ""
            console.print(Text(f"\n--- {name} ({spans}{which}) ---", style="bold"))
            console.print(render(row, tokenizer, prefix_length, eos_token_id))


def _kinds(labels: list[int], prefix_length: int, eos_token_id: Any) -> list[str]:
    import torch

    from palu.data.roles import FORGET, KEEP, PRESERVE, token_roles

    roles = token_roles(torch.tensor([labels], dtype=torch.int64), prefix_length, eos_token_id)[0]
    kinds = []
    for position, (label, role) in enumerate(zip(labels, roles.tolist(), strict=True)):
        if role == FORGET:
            kinds.append("forget")
        elif position == 0 and (label >= 0 or label == KEEP):
            kinds.append("never predicted")
        elif role == PRESERVE:
            kinds.append("preserve")
        elif label >= 0:
            kinds.append("past the prefix")
        else:
            kinds.append("prompt")
    return kinds


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text of each token; joined, they read as the whole does.

    Each token is decoded behind the ones before it, since decoders drop a leading space and hold
    back bytes of an unfinished character.
    """
    pieces = [""] * len(ids)
    context = shown = 0  # the tokens before `shown` are written; decoding starts at `context`
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[context:shown])
        text = _decode(tokenizer, ids[context:end])
        if text.endswith("\ufffd") and end < len(ids) and end - shown < 4:
            continue  # within a character
        pieces[shown] = visible(text[len(before) :] if text.startswith(before) else text)
        context, shown = shown, end
    return pieces


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
