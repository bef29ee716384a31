"""`palu unlearn --config FILE`, `--print-config` and `--set NAME=VALUE`."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import typer

from palu.errors import UserError, one_line, user_errors
from palu.models.hub import looks_like_id
from palu.storage.json_files import NotJSON, parse, parse_yaml, read_text
from palu.training.options import (
    LossOptions,
    MethodOptions,
    TrainingOptions,
    check_read,
    option,
    unread,
)

# Of `TrainingArguments`: those that `palu unlearn` decides, and how.
DECIDED = dict.fromkeys(("do_train", "do_eval", "do_predict", "eval_strategy"), "palu evaluate")
DECIDED |= dict.fromkeys(("output_dir", "use_cpu"), "--output and --device")
DECIDED |= dict.fromkeys(("save_strategy", "save_total_limit"), "--save-steps")
DECIDED |= dict.fromkeys(("logging_strategy", "logging_steps"), "the loss curve, every step")
DECIDED |= dict.fromkeys(
    ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "eval_on_start"),
    "--checks, which keep the best weights",
)
DECIDED["push_to_hub"] = "palu, which writes a folder; upload that"
DECIDED["activation_checkpointing"] = "--gradient-checkpointing"
DECIDED |= {"resume_from_checkpoint": "--resume", "disable_tqdm": "palu's own progress bar"}
DECIDED |= {"label_smoothing_factor": "the loss, whose terms have no smoothed form"}
for _one in fields(TrainingOptions):
    _name = _one.metadata["help"].trainer or _one.name
    DECIDED[_name] = f"--{_one.name.replace('_', '-')}"

# What is of one run and not of its settings: not written into `palu.json`.
_OF_ONE_RUN = ("model", "output", "rescue", "resume", "overwrite")
_NOT_IN_A_FILE = ("config", "print_config", "help")


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options in a file the defaults of a command.

    Raises:
        UserError: the file cannot be read, or has a name or value that is no option's.
    """
    if path is not None:
        with user_errors():
            values = _load(path)
            defaults = {p.name: p.default for p in context.command.params}
            known = [name for name in defaults if name not in _NOT_IN_A_FILE]
            trainer = values.pop("set", None) or {}
            if not isinstance(trainer, dict):
                raise ValueError(f"{path}: set is {trainer!r}; it must hold names and values")
            trainer |= {name: value for name, value in values.items() if name not in known}
            try:
                check_trainer_names(trainer, known)
                words = {n: _word(n, v, defaults[n]) for n, v in values.items() if n in known}
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        context.obj = trainer
        words = {name: word for name, word in words.items() if word is not None}
        context.default_map = {**(context.default_map or {}), **words}
    return path


def changed_data(options: SimpleNamespace, digests: Mapping[str, Any]) -> list[str]:
    """Return the data files that hold something else than in the finished run whose `palu.json` is
    the configuration, where they are still those that it names.

    Args:
        digests: of the data as it is now, by option; see `palu.cli.data.digests_of`.
    """
    run = {} if options.config is None else _read(options.config)
    before, named = run.get("digests", {}).get("data", {}), run.get("options", {})
    return [
        getattr(options, name)
        for name, now in digests.items()
        if getattr(options, name) == named.get(name) and before.get(name, now) != now
    ]


def _read(path: Path) -> dict[str, Any]:
    kind, text = "JSON" if path.suffix == ".json" else "YAML", read_text(path)
    try:
        content = parse(text) if kind == "JSON" else parse_yaml(text)
    except NotJSON as error:
        raise ValueError(f"{path} is not readable {kind}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must hold names and values")
    return content


def _load(path: Path) -> dict[str, Any]:
    """Return the options that a file holds by their names, with `_` for `-`."""
    content = _read(path)
    if "made_by" in content:  # a `palu.json`
        if not isinstance(content.get("options"), dict):
            raise ValueError(
                f"{path} holds no options of a run: it is not of palu unlearn, or of a version "
                "that did not write them"
            )
        model = str(content.get("base_model"))
        beside = os.path.normpath(path.parent / model)
        on_the_hub = looks_like_id(model) and not os.path.isdir(beside)
        model = model if on_the_hub else beside
        content = {"model": model, **content["options"]}
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def _word(name: str, value: Any, default: Any) -> str | None:
    """Return a value as it is written on the command line; None for one that is left out."""
    if value is None:
        if default is None:
            return None
        raise ValueError(f"{name} is null; it must have a value, or be left out")
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def print_config(context: typer.Context, wanted: bool) -> bool:
    """Have `--print-config` need no options: those that are missing are shown as their names."""
    if wanted:
        missing = {p.name: p.name.upper() for p in context.command.params if p.required}
        context.default_map = {**missing, **(context.default_map or {})}
    return wanted


def as_config(options: SimpleNamespace, *, of_one_run: bool = True) -> dict[str, Any]:
    """Return the options that a run reads, as `--config` takes them.

    Args:
        of_one_run: with its places, which are those of one run.
    """
    skipped = {*_NOT_IN_A_FILE, "given", "set", *(() if of_one_run else _OF_ONE_RUN)}
    for one in fields(LossOptions):
        if unread(one.name, method=options.method, objective=options.objective):
            skipped.add(one.name)
    for one in fields(MethodOptions):
        if options.method not in one.metadata["help"].of:
            skipped.add(one.name)
    values = {name: value for name, value in vars(options).items() if name not in skipped}
    if "reference" not in options.given and options.lora_rank is not None:
        values["reference"] = "adapter_off"
    values = {n: str(v) if isinstance(v, Path) else v for n, v in values.items()}
    return values | ({"set": dict(options.set)} if options.set else {})


def config_text(options: SimpleNamespace) -> str:
    """Return the configuration file of a run.

    Raises:
        ValueError: an option was given that the run does not read, or one of the Trainer's that it
            has not.
    """
    import yaml

    check_read(options, options.given)
    if options.set:  # or transformers is imported for nothing
        trainer_options(options.set)
    return yaml.safe_dump(as_config(options), sort_keys=False, allow_unicode=True, width=100)


def given_trainer_options(context: typer.Context, pairs: Iterable[str] | None) -> dict[str, Any]:
    """Return the Trainer's options that were given, as text: the file's, and over them those of
    `--set NAME=VALUE`."""
    given = dict(context.obj or {})
    for pair in pairs or ():
        name, is_pair, value = pair.partition("=")
        if not is_pair:
            raise ValueError(f"--set {pair!r} must be NAME=VALUE")
        given[name.strip().replace("-", "_")] = value
    return given


def check_trainer_names(given: Iterable[str], known: Iterable[str] = ()) -> None:
    """Raise ValueError for a name that is no option of `TrainingArguments`, or one that the command
    decides.

    Args:
        known: other names that a mistyped one may have meant.
    """
    if not (given := list(given)):
        return
    from transformers import TrainingArguments

    trainer = {one.name for one in fields(TrainingArguments)}
    for name in given:
        if name in DECIDED and name not in known:
            raise ValueError(f"{name} is decided by {DECIDED[name]}; it must be left out")
        if name in known and name not in trainer:
            raise ValueError(f"{name} stands under set; it must stand outside of it")
        if name not in trainer:
            near = difflib.get_close_matches(name, [*known, *trainer], n=1, cutoff=0.0)
            raise ValueError(f"unknown option {name!r}; the nearest known one is {near[0]!r}")


def trainer_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of `TrainingArguments` as values of their types.

    Args:
        given: names and values, which may be text.

    Raises:
        ValueError: a name that is none of its options, or a value of another type.
    """
    check_trainer_names(given)
    from transformers import HfArgumentParser, TrainingArguments

    def error(message: str) -> NoReturn:
        raise ValueError(f"--set {name}={value}: {message}")

    parser = HfArgumentParser(TrainingArguments)
    parser.error = error  # type: ignore[method-assign]
    values = {}
    for name, value in given.items():
        word = _word(name, value, None)
        if word is not None:
            several = isinstance(value, list)
            words = [f"--{name}", *map(str, value)] if several else [f"--{name}={word}"]
            values[name] = getattr(parser.parse_args(words), name)
    return values


_configuration = partial(option, panel="Configuration")


@contextmanager
def blamed_on(given: Mapping[str, Any], *kinds: type[Exception]) -> Iterator[None]:
    """Turn what the Trainer raises because of its options into a user's mistake of one line: only
    where some were given, or a bug would lose its traceback."""
    try:
        yield
    except kinds as error:
        if not given:
            raise
        names = ", ".join(given)
        raise UserError(f"with --set {names}: {one_line(error)}") from error


@dataclass(kw_only=True)
class ConfigOptions:
    """Where options come from besides the command line."""

    config: Path | None = _configuration(
        None,
        "A .yaml or .json file of options by their names, or the palu.json of a finished run; the "
        "command line wins.",
        callback=read_config,
    )
    print_config: bool = _configuration(
        False,
        "Print the options of this run as a file for --config, and do nothing else.",
        callback=print_config,
    )
    set: list[str] | None = _configuration(
        None,
        "Another option of transformers.TrainingArguments, such as weight_decay=0.01; may be "
        "repeated.",
        metavar="NAME=VALUE",
    )
