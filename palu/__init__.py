"""PALU: make a language model forget chosen spans and keep the rest (arXiv 2601.03190)."""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palu.data.collator import Collator
    from palu.data.examples import tokenize_examples
    from palu.data.files import load_examples
    from palu.data.labels import label_example
    from palu.data.records import Example
    from palu.data.roles import token_roles
    from palu.data.template import Template
    from palu.loss import PALULoss, PALUOutput
    from palu.models.forward import model_hidden_states
    from palu.models.head_check import check_head
    from palu.models.in_head import loss_in_head, whole_head
    from palu.models.lm_head import LMHead
    from palu.reference.cache import ReferenceCache
    from palu.training.config import PALUConfig
    from palu.training.trainer import PALUTrainer

__all__ = [
    "Collator",
    "Example",
    "LMHead",
    "PALUConfig",
    "PALULoss",
    "PALUOutput",
    "PALUTrainer",
    "ReferenceCache",
    "Template",
    "check_head",
    "label_example",
    "load_examples",
    "loss_in_head",
    "model_hidden_states",
    "token_roles",
    "tokenize_examples",
    "whole_head",
]

# Where each name lives. Nothing is imported before it is asked for: the loss and the labels do not
# need the packages of the extra "train", and the command line sets the environment before torch.
_HOMES = {
    "Collator": "palu.data.collator",
    "Example": "palu.data.records",
    "LMHead": "palu.models.lm_head",
    "PALUConfig": "palu.training.config",
    "PALULoss": "palu.loss",
    "PALUOutput": "palu.loss",
    "PALUTrainer": "palu.training.trainer",
    "ReferenceCache": "palu.reference.cache",
    "Template": "palu.data.template",
    "check_head": "palu.models.head_check",
    "label_example": "palu.data.labels",
    "load_examples": "palu.data.files",
    "loss_in_head": "palu.models.in_head",
    "model_hidden_states": "palu.models.forward",
    "token_roles": "palu.data.roles",
    "tokenize_examples": "palu.data.examples",
    "whole_head": "palu.models.in_head",
}


try:
    __version__ = metadata.version("palu-unlearning")
except metadata.PackageNotFoundError:  # imported from a clone that is not installed
    __version__ = "0+unknown"


def __dir__() -> list[str]:
    """Return the public names too, whether imported already or not."""
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker would take any attribute as there

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            home = importlib.import_module(_HOMES[name])
        except ModuleNotFoundError as error:
            from palu.errors import TRAIN, not_installed

            if error.name in TRAIN:
                error.msg = f"{name}: {not_installed()}"
            raise
        value = globals()[name] = getattr(home, name)
        return value
