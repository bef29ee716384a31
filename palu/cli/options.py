"""Options of the command line: dataclass fields become options of a command."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from palu.errors import user_errors
from palu.training.options import Help, check_choice, choices, option

# The order in which `--help` shows the panels; others come first.
PANELS = (
    "Model",
    "Data",
    "Compared with",
    "Attacks",
    "Output",
    "Method",
    "PALU's loss",
    "Other methods",
)
PANELS += ("Reference model", "LoRA", "Training", "Machine", "Chat template", "Configuration")

Body = Callable[[typer.Context, SimpleNamespace], None]


FILES = "JSON lines, JSON, CSV, TSV, Parquet, .txt, or those as .gz"

_data = functools.partial(option, panel="Data")
_template = functools.partial(option, panel="Chat template")
_machine = functools.partial(option, panel="Machine")


@dataclass(kw_only=True)
class DataOptions:
    """The files of a run."""

    forget: str = _data(
        MISSING,
        f"What to forget: a file ({FILES}), a datasets folder, or a data set on the hub "
        "(org/name:split). PATH[-40:] takes a slice.",
    )
    retain: str | None = _data(None, "What to keep, same formats.")
    retain_columns: str | None = _data(
        None, "Of --retain, where they are others.", shown="those of --columns"
    )
    drop_overlap: bool = _data(False, "Leave out retain examples that are forget examples too.")


@dataclass(kw_only=True)
class TextOptions:
    """How a model folder's tokenizer and template turn data into tokens."""

    model: Path = option(MISSING, "Model folder, or a model on the hub (org/name).", panel="Model")
    max_length: int = _data(512, "Tokens in an example; longer ones are cut.", least=2)
    columns: str | None = _data(
        None,
        "Columns of other names: question=..,answer=.. (or text=.., messages=..; spans=.., id=..).",
    )
    repair: Literal["none", "snap"] = _data(
        "none", "snap: move span ends to word ends and merge overlaps."
    )
    system_prompt: str | None = _template(
        None, "System turn of the chat template, where a conversation has none of its own."
    )
    date_string: str | None = _template(None, "Date given to the chat template.")
    chat_template_kwargs: str | None = _template(
        None, "More variables of the chat template, a JSON object: '{\"enable_thinking\": false}'."
    )
    force_template: bool = _template(
        False, "Take these template options even if palu.json differs."
    )


@dataclass(kw_only=True)
class WeightOptions:
    """How weights are loaded."""

    dtype: str = _machine("auto", "Of the weights: auto, float32, bfloat16 or float16.")
    device: str = _machine("auto", "auto, cpu, cuda, cuda:1, ...")
    allow_missing: str | None = _machine(
        None,
        "A regular expression: tensors it matches may be missing in the weights, be too many or of "
        "another shape. Missing ones are random.",
    )


@dataclass(kw_only=True)
class OutputOptions:
    """Whether an output folder may be replaced."""

    overwrite: bool = option(False, "Replace a folder that palu wrote.", panel="Output")


def with_options(*sources: type | tuple[Any, ...]) -> Callable[[Body], Callable[..., None]]:
    """Make `body(context, options)` a command whose options are the fields of dataclasses.

    `options` has a value by each name, and `given`: the names that the command line or a
    configuration file gave.

    Args:
        *sources: dataclasses, each alone or with the names of those of its fields that are wanted.
    """
    chosen: dict[str, tuple[type, Field]] = {}
    for source in sources:
        kind, *names = source if isinstance(source, tuple) else (source,)
        chosen |= {f.name: (kind, f) for f in fields(kind) if not names or f.name in names}

    def panel(one: Field) -> int:
        return PANELS.index(help.panel) if (help := one.metadata["help"]).panel in PANELS else -1

    ordered = sorted(chosen.values(), key=lambda pair: panel(pair[1]))

    def decorate(body: Body) -> Callable[..., None]:
        @functools.wraps(body)
        def command(context: typer.Context, **values: Any) -> None:
            options = SimpleNamespace(**values)
            options.given = {n for n in values if context.get_parameter_source(n).name != "DEFAULT"}
            with user_errors():
                for name, (kind, one) in chosen.items():
                    _check_bounds(name, values[name], one.metadata["help"])
                    if choices(kind, name) and values[name] is not None:
                        check_choice(options, kind, name)
            body(context, options)

        first = inspect.Parameter(
            "context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
        )
        parameters = [first, *(_parameter(kind, one) for kind, one in ordered)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {}
        paragraphs = (body.__doc__ or "").split("\n\n")  # typer keeps the lines of each
        command.__doc__ = "\n\n".join(" ".join(lines.split()) for lines in paragraphs)
        return command

    return decorate


_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: ""}


def _parameter(kind: type, one: Field) -> inspect.Parameter:
    """Return a field as a parameter that typer reads."""
    hint, text, named = (
        get_type_hints(kind)[one.name],
        one.metadata["help"],
        choices(kind, one.name),
    )
    known: dict[str, Any] = {"help": str(text), "rich_help_panel": text.panel}
    known["show_default"] = (
        text.shown if one.default is not None else text.shown is not True and text.shown
    )
    if named:  # checked with our own words, which are those of `PALUConfig`
        hint = str | None if one.default is None else str
        known["autocompletion"] = lambda: list(named)
        if not all(name in text for name in named):
            known["help"] += f" One of {', '.join(named)}."
    plain = next((t for t in get_args(hint) if t is not type(None)), hint)
    known["metavar"] = text.metavar or ("NAME" if named else _METAVARS.get(plain))
    if text.callback is not None:
        known |= {"callback": text.callback, "is_eager": True}
    if text.argument:
        known |= {"metavar": one.name.upper(), "rich_help_panel": None}  # "Arguments"
        declared: Any = typer.Argument(**known)
    else:  # a flag that is on has a `--no-` as well, which typer adds to a name of its own
        names = [] if one.default is True else [f"--{one.name.replace('_', '-')}"]
        declared = typer.Option(*names, **known)
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if one.default is MISSING else one.default,
        annotation=Annotated[hint, declared],
    )


def _check_bounds(name: str, value: Any, known: Help) -> None:
    option = f"--{name.replace('_', '-')}"
    if value is None:
        return
    if known.above is not None and not known.above < value < math.inf:
        raise ValueError(f"{option} is {value}; it must be a finite number above {known.above}")
    if known.least is not None and value < known.least:
        raise ValueError(f"{option} is {value}; it must be at least {known.least}")
