"""PALU: make a language model forget chosen spans and keep the rest (arXiv 2601.03190)."""

from palu.labels import label_example, token_roles
from palu.loss import PALULoss, PALUOutput

__all__ = ["PALULoss", "PALUOutput", "label_example", "token_roles"]
