"""What `PALUTrainer` takes beside modules and tokens: names of models, adapters to be made, and
records that are not tokenised yet."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from transformers import set_seed

from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.data.pairs import add_alternates, own_alternates, refusals
from palu.data.records import Example
from palu.data.template import Template
from palu.methods import Method
from palu.models.hub import hub_name
from palu.models.loading import (
    check_token_ids,
    freeze_other_towers,
    load_to_train,
    load_tokenizer,
    model_folder,
)
from palu.models.lora import is_adapter
from palu.run_record import choose_template
from palu.training.config import PALUConfig

if TYPE_CHECKING:
    from peft import PeftConfig


class Loaded(NamedTuple):
    """A model that is there, its tokenizer (None: none was given) and its template."""

    model: nn.Module
    tokenizer: Any
    template: Template


def load_named(
    model: nn.Module | str | os.PathLike[str],
    args: PALUConfig,
    tokenizer: Any,
    template: Template | None,
) -> Loaded:
    """Return the model and its tokenizer, read from a folder or the hub where `model` is a name.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or it is an adapter.
        TypeError: `model` is neither a module nor a name.
    """
    if not isinstance(model, nn.Module | str | os.PathLike):
        kind = type(model).__name__
        raise TypeError(f"model must be a module, or a folder or id on the hub, not {kind}")
    if isinstance(model, nn.Module):
        return Loaded(model, tokenizer, Template() if template is None else template)
    folder = model_folder(Path(model))
    if is_adapter(folder):
        raise ValueError(
            f"model {os.fspath(model)!r} is an adapter; unlearning starts from a whole model: "
            f"merge it first (palu merge --adapter {os.fspath(model)} --output MERGED)"
        )
    template = choose_template(folder) if template is None else template
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    loaded, _ = load_to_train(folder, None, str(args.device), bf16=args.bf16)
    # What an adapter's config will name as its base.
    loaded.name_or_path = hub_name(folder) or str(folder.resolve())
    freeze_other_towers(loaded)
    return Loaded(loaded, tokenizer, template)


def with_adapter(model: nn.Module, config: PeftConfig | None, args: PALUConfig) -> nn.Module:
    """Return the model with a fresh adapter on it, of `args.seed`; as it is where `config` is None.

    Raises:
        TypeError: `config` is no `peft.PeftConfig`.
        ValueError: it has an adapter already.
    """
    if config is None:
        return model
    from peft import PeftConfig, get_peft_model

    if not isinstance(config, PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig, not {type(config).__name__}")
    if hasattr(model, "peft_config"):
        raise ValueError("peft_config is given and the model has an adapter already: leave one out")
    set_seed(args.seed)
    return get_peft_model(model, config)


def reference_of(asked: str | None, args: PALUConfig, peft_config: Any) -> str:
    """Return where the original's numbers come from: what was asked for, or where an adapter is
    made for the run the model without it, which needs no copy."""
    if asked is not None:
        return asked
    return "adapter_off" if peft_config is not None and args.reference == "live" else args.reference


def second_answers(config: PALUConfig) -> Callable[[Sequence[Example]], list[str]] | None:
    """Return a function from examples to the second answers that the method needs; None where it
    needs none."""
    refuse = partial(refusals, seed=config.seed)
    return {"dpo": own_alternates, "idk_dpo": refuse}.get(config.method)


class Tokenizing:
    """Tokenises data sets that hold records as a user has them; others stay as they are.

    Args:
        loaded: whose tokenizer and template are used.
        args, method: of the run.
        max_length: of `palu.tokenize_examples`.
    """

    def __init__(self, loaded: Loaded, args: PALUConfig, method: Method, max_length: int) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.how = {"max_length": max_length, "template": loaded.template}
        self.by_span, self.second_answers = method.by_span, second_answers(args)

    def __call__(self, name: str, data: Any, *, forget: bool) -> Any:
        """Return the rows of a data set.

        Args:
            name: the argument that it was given as, for messages.
            forget: whether its spans, or its answers, are to be forgotten.

        Raises:
            ValueError, TypeError: the records cannot be read or tokenised; names the argument, the
                row and the field.
        """
        if isinstance(data, dict) and data and not _is_record(data):  # several, to evaluate on
            return {k: self(f"{name}[{k!r}]", v, forget=forget) for k, v in data.items()}
        if not _is_raw(data):
            return data
        if self.tokenizer is None:
            raise ValueError(f"{name} holds records: processing_class must be the tokenizer")
        try:
            return self._rows(name, data, forget)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _rows(self, name: str, data: Any, forget: bool) -> list[dict[str, Any]]:
        examples = load_examples(
            data,
            require_spans=forget and self.by_span,
            tokenizer=self.tokenizer,
            max_length=self.how["max_length"],
        )
        rows = tokenize_examples(examples, self.tokenizer, source=name, **self.how)
        if forget and self.second_answers is not None:
            texts = self.second_answers(examples)
            source = f"{name}, second answers"
            rows = add_alternates(rows, examples, texts, self.tokenizer, source=source, **self.how)
        check_token_ids(self.model, self.tokenizer, rows)
        return rows


def _is_record(data: Mapping[str, Any]) -> bool:
    return any(isinstance(value, str) for value in data.values())


def _is_raw(data: Any) -> bool:
    """Return whether a data set holds records and no tokens: what `load_examples` reads."""
    if isinstance(data, str | os.PathLike) or (hasattr(data, "to_dict") and hasattr(data, "iloc")):
        return True
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or not len(data):
        return False
    first = data[0]
    return isinstance(first, str) or (isinstance(first, Mapping) and "input_ids" not in first)
