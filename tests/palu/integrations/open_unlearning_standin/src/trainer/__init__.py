"""Registry of trainers, and how one is made."""

from transformers import TrainingArguments

TRAINER_REGISTRY: dict[str, type] = {}


def load_trainer(handler, args, method_args, **kwargs):
    return TRAINER_REGISTRY[handler](args=TrainingArguments(**args), **kwargs, **method_args)
