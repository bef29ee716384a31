"""PALU: make a language model forget chosen spans and keep the rest (arXiv 2601.03190)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palu.cache import ReferenceCache
    from palu.config import PALUConfig
    from palu.data import Collator, Example, load_examples, tokenize_examples
    from palu.heads import LMHead, model_hidden_states
    from palu.labels import label_example, token_roles
    from palu.loss import PALULoss, PALUOutput
    from palu.template import Template
    from palu.trainer import PALUTrainer

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
    "label_example",
    "load_examples",
    "model_hidden_states",
    "token_roles",
    "tokenize_examples",
]

# Where each name lives. Nothing is imported before it is asked for: the loss and the labels do not
# need the packages of the extra "train", and the command line sets the environment before torch.
_HOMES = {
    "Collator": "palu.data",
    "Example": "palu.data",
    "LMHead": "palu.heads",
    "PALUConfig": "palu.config",
    "PALULoss": "palu.loss",
    "PALUOutput": "palu.loss",
    "PALUTrainer": "palu.trainer",
    "ReferenceCache": "palu.cache",
    "Template": "palu.template",
    "label_example": "palu.labels",
    "load_examples": "palu.data",
    "model_hidden_states": "palu.heads",
    "token_roles": "palu.labels",
    "tokenize_examples": "palu.data",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
