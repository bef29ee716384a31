"""Launcher: register PALU with a checkout and run its `train.py`."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from palu.integrations.open_unlearning.compat import restore_defaults
from palu.integrations.open_unlearning.dataset import AnnotatedQA
from palu.integrations.open_unlearning.trainer import PALUMixin

CONFIGS = Path(__file__).parent / "configs"

# What makes a folder a checkout, and what of it is used here.
_NEEDED = (
    "src/train.py",
    "src/data/utils.py",
    "src/trainer/unlearn/grad_diff.py",
    "configs/unlearn.yaml",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `train.py` of the folder after `--checkout`, with the other arguments handed to it.

    The config is `unlearn.yaml` unless `--config-name` says otherwise. Relative paths are relative
    to the current folder, as with that project's own command.

    Args:
        arguments: of the command line; `sys.argv[1:]` when None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m palu.integrations.open_unlearning",
        description="Run train.py of an open-unlearning checkout with PALU added.",
        epilog="All else goes to that project's Hydra: trainer=PALU, overrides, --cfg job, -m.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkout", required=True, metavar="DIR", help="root of the checkout")
    options, rest = parser.parse_known_args(arguments)
    try:
        script = register(options.checkout) / "src" / "train.py"
    except ValueError as error:
        parser.error(str(error))
    restore_defaults(sys.modules["trainer"])
    sys.argv = [str(script), *_hydra_arguments(rest)]
    # As a script: Hydra looks for `../configs` beside the file of `__main__`.
    runpy.run_path(str(script), run_name="__main__")


def register(checkout: str | os.PathLike[str]) -> Path:
    """Put the checkout's `src` on the path and add PALU's trainer and dataset to its registries.

    Args:
        checkout: the root folder of the checkout.

    Returns:
        That folder, absolute.

    Raises:
        ValueError: it is not such a checkout, or modules named `data` and `trainer` of another
            project are already imported.
        ImportError: a package that the checkout needs is not installed.
    """
    root = Path(checkout).resolve()
    missing = [name for name in _NEEDED if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"checkout is {os.fspath(checkout)!r}, which has no {missing[0]}; it must be the root "
            "of a checkout of github.com/locuslab/open-unlearning"
        )
    source = root / "src"
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    try:
        data, trainer = (_import(name, source) for name in ("data", "trainer"))
        base = _import("trainer.unlearn.grad_diff", source).GradDiff
        preprocess = _import("data.utils", source).preprocess_chat_instance
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the checkout {root} needs the package {error.name!r}, which is not installed: "
            f"see {root / 'requirements.txt'}"
        ) from error
    # Handlers are looked up by these names in the configs.
    trainer.TRAINER_REGISTRY["PALU"] = type("PALU", (PALUMixin, base), {})
    data.DATASET_REGISTRY["PALUAnnotatedQA"] = type(
        "PALUAnnotatedQA", (AnnotatedQA,), {"preprocess": staticmethod(preprocess)}
    )
    return root


def _import(name: str, source: Path) -> ModuleType:
    module = importlib.import_module(name)
    if source not in Path(module.__file__ or "").resolve().parents:
        raise ValueError(
            f"module {name!r} was imported from {module.__file__}; it must come from {source}: "
            "use a process of its own for every checkout"
        )
    return module


def _hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with PALU's configs on the search path, and a config name if there is
    none."""
    quoted = str(CONFIGS).replace("'", "\\'")
    search, rest = [f"'file://{quoted}'"], []
    for argument in arguments:
        # Hydra takes the search path once: what the user gave joins ours.
        if argument.startswith("hydra.searchpath=["):
            search.append(argument.removeprefix("hydra.searchpath=[").removesuffix("]"))
        else:
            rest.append(argument)
    # Hydra's parser takes overrides that follow one another, flags before or after them.
    overrides = (i for i, a in enumerate(rest) if not a.startswith("-") and ("=" in a or "~" in a))
    rest.insert(next(overrides, 0), f"hydra.searchpath=[{','.join(filter(None, search))}]")
    if not any(argument.startswith(("--config-name", "-cn")) for argument in rest):
        rest.insert(0, "--config-name=unlearn.yaml")
    return rest
