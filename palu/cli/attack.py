"""`palu attack`: how hard one must try to get what was forgotten out of a model again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

from palu.cli.data import find_models, plain_warnings, quiet, template_of, without_slices
from palu.cli.options import DataOptions, TextOptions, WeightOptions, with_options
from palu.errors import user_errors
from palu.terminal import bars, out, say
from palu.training.options import option

_data = partial(option, panel="Data")
_compared = partial(option, panel="Compared with")
_output = partial(option, panel="Output")
_attacks = partial(option, panel="Attacks")
_machine = partial(option, panel="Machine")

ATTACK_FILE = "attack.json"


@dataclass(kw_only=True)
class AttackOptions:
    """What is attacked, how, and where the results go."""

    original: Path | None = _compared(None, "Model folder before unlearning.")
    retrained: Path | None = _compared(
        None, "Model folder of a model that never saw the forget set."
    )
    attacks: str | None = _attacks(
        None,
        "greedy, prefix_forcing, sampling, paraphrase, quantization, relearning, weight_noise, "
        "membership_inference, with commas between them; open_unlearning: its stress tests.",
        shown="all but open_unlearning",
    )
    quick: bool = _attacks(False, "A first look: few samples, and at most 20 records.")
    samples: int = _attacks(10, "Answers drawn for each question.", least=1)
    temperatures: str = _attacks("0.5,1", "Of sampling, with commas between them.")
    relearning_steps: int = _attacks(20, "Steps of training in relearning.", least=1)
    relearning_rates: str = _attacks(
        "1e-4,1e-3", "Learning rates of relearning, with commas between them."
    )
    seed: int = _attacks(0, "Of everything that is drawn.", least=0)
    max_leak: float | None = _attacks(
        None,
        "Largest share of secrets that may leak in an attack, of however few it asks for; above it "
        "the exit status is 3.",
    )
    output: Path | None = _output(
        None,
        "File for the results; a run that was stopped goes on from it.",
        shown=f"MODEL/{ATTACK_FILE}",
    )
    overwrite: bool = _output(False, "Begin anew where --output is of another run.")
    show_secrets: bool = _output(False, "Leave secrets in the answers as they are.")
    batch_size: int = _machine(16, "Prompts in a forward pass.", least=1)
    holdout: str | None = _data(
        None, "Examples like those to forget that no model saw: membership inference."
    )
    max_new_tokens: int = _data(200, "Limit of an answer.", least=1)


@with_options(
    AttackOptions,
    (DataOptions, "forget", "retain", "retain_columns"),
    TextOptions,
    WeightOptions,
)
def attack(context: typer.Context, options: SimpleNamespace) -> None:
    """Attack a model that was made to forget: what still comes out, and after which attack.

    A secret counts as leaked when an answer says it, however it is written. The original and a
    retrained model are attacked in the same way, for comparison.
    """
    find_models(options, "model", "original", "retrained")
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        models, settings, names = _checked(options)
        from palu.storage.files import locked

        context.with_resource(locked(options.output))
    with user_errors(), plain_warnings(), bars.status("Reading the data"):
        data = _read(options, models)
    content = _run(options, models, settings, names, data)
    _print(content, options)
    worst = content["worst"]
    if options.max_leak is not None and worst and worst["rate"] > options.max_leak:
        say(
            "leak",
            "red",
            f"{worst['title']}: {worst['leaked']} of {worst['of']} secrets "
            f"({worst['rate']:.1%}), above --max-leak {options.max_leak:g}",
        )
        raise typer.Exit(3)


def _checked(options: SimpleNamespace) -> tuple[dict[str, Path], Any, list[str]]:
    """Refuse options that cannot be, before any work; return models, settings and attacks."""
    from palu.evaluation.attacks.run import read_results
    from palu.evaluation.attacks.settings import AttackSettings, check_names
    from palu.models.hub import place_beside
    from palu.models.loading import model_folder, resolve_device, resolve_dtype

    quiet()
    if options.max_leak is not None and not 0 <= options.max_leak <= 1:
        raise ValueError(f"--max-leak is {options.max_leak}; it must be between 0 and 1")
    given = options.attacks
    numbers = {
        name: _numbers(f"--{name.replace('_', '-')}", getattr(options, name))
        for name in ("temperatures", "relearning_rates")
    }
    sizes = ("samples", "relearning_steps", "max_new_tokens", "batch_size", "max_length")
    try:
        names = check_names(None if given is None else [n.strip() for n in given.split(",")])
        settings = AttackSettings(**numbers, **{name: getattr(options, name) for name in sizes})
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from None
    models = {"original": options.original, "unlearned": options.model}
    models["retrained"] = options.retrained
    models = {name: model_folder(path) for name, path in models.items() if path is not None}
    resolve_device(options.device)
    resolve_dtype(options.dtype)
    if options.output is None:
        options.output = place_beside(options.model, ATTACK_FILE, "--output")
    if options.output.is_dir():
        raise ValueError(f"--output {str(options.output)!r} is a folder; name a file in it")
    if options.output.is_file() and options.output.stat().st_size:
        read_results(options.output)  # else it would be replaced
    for file in without_slices(options.forget, options.retain, options.holdout):
        if Path(file).resolve() == options.output.resolve():
            raise ValueError(f"--output {str(options.output)!r} is an input of this run")
    return models, settings.quick() if options.quick else settings, names


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} {text!r} must be numbers with commas between them") from None


def _read(options: SimpleNamespace, models: dict[str, Path]) -> dict[str, Any]:
    """Return tokenizer, template and examples."""
    from palu.data.files import load_examples
    from palu.models.loading import folder_with, load_tokenizer
    from palu.run_record import RECORD

    tokenizer = load_tokenizer(options.model)
    for name, path in models.items():
        if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"--{name} {str(path)!r} has another tokenizer than --model: their answers are of "
                "different tokens"
            )
    data: dict[str, Any] = {
        "tokenizer": tokenizer,
        "template": template_of(options, folder_with(RECORD, options.model)),
    }
    for name in ("forget", "retain", "holdout"):
        file = getattr(options, name)
        data[name] = (
            []
            if file is None
            else load_examples(
                file,
                require_spans=name == "forget",
                repair=options.repair,
                columns=(name == "retain" and options.retain_columns) or options.columns,
                tokenizer=tokenizer,
                max_length=options.max_length,
            )
        )
    return data


def _run(
    options: SimpleNamespace, models: dict[str, Path], settings: Any, names: list[str], data: Any
) -> dict[str, Any]:
    from palu.evaluation.attacks.run import run_attacks
    from palu.progress import bar

    loading = {name: getattr(options, name) for name in ("dtype", "device", "allow_missing")}
    with user_errors(ValueError, TypeError), plain_warnings(), bar(bars, "attacks") as report:
        return run_attacks(
            models,
            data["tokenizer"],
            data["forget"],
            retain=data["retain"],
            holdout=data["holdout"],
            attacks=names,
            settings=settings,
            template=data["template"],
            seed=options.seed,
            report=report,
            resume=options.output,
            overwrite=options.overwrite,
            show_secrets=options.show_secrets,
            loading=loading,
        )


def _print(content: dict[str, Any], options: SimpleNamespace) -> None:
    from palu.evaluation.attacks.table import attack_table, stress_table

    if content["attacks"]:
        out.print(attack_table(content, f"Secrets that leak: {options.model}"))
    for model in content["models"] if "open_unlearning" in content else ():
        out.print(stress_table(content, model))
    if worst := content["worst"]:
        beside = worst.get("retrained")
        out.print(
            f"Worst leak: {worst['title']}: {worst['leaked']} of {worst['of']} secrets "
            f"({worst['rate']:.0%}; 95% interval {worst['low']:.0%} to {worst['high']:.0%})"
            + (f"; of the retrained model {beside['leaked']} of {beside['of']}" if beside else "")
        )
    left = content["not_judged"]
    told, empty = left["in_the_prompt"], left["stop_words_only"]
    if told or empty:
        out.print(
            f"Not judged after the questions: {told} secrets that the prompt itself says, "
            f"{empty} of stop words alone"
        )
    for skipped in content["skipped"]:
        out.print(f"Skipped: {skipped['name']}: {skipped['why']}", soft_wrap=True)
    if not options.show_secrets:
        out.print("Secrets are masked in the file (--show-secrets leaves them).")
    out.print(f"Written to {options.output}", soft_wrap=True)
