"""PALU: make a language model forget chosen spans and keep the rest (arXiv 2601.03190)."""

import importlib
from typing import TYPE_CHECKING, Any

from palu.labels import label_example, token_roles
from palu.loss import PALULoss, PALUOutput
from palu.template import Template

if TYPE_CHECKING:
    from palu.config import PALUConfig
    from palu.data import Collator, Example, load_examples, tokenize_examples
    from palu.trainer import PALUTrainer

__all__ = [
    "Collator",
    "Example",
    "PALUConfig",
    "PALULoss",
    "PALUOutput",
    "PALUTrainer",
    "Template",
    "label_example",
    "load_examples",
    "token_roles",
    "tokenize_examples",
]

# These need the packages of the extra "train"; the loss and the labels do not.
_LATER = {
    "Collator": "palu.data",
    "Example": "palu.data",
    "PALUConfig": "palu.config",
    "PALUTrainer": "palu.trainer",
    "load_examples": "palu.data",
    "tokenize_examples": "palu.data",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
