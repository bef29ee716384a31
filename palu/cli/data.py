"""What several commands do first: read data, choose the template, keep libraries quiet."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from palu.errors import user_errors
from palu.terminal import warn


def template_of(options: SimpleNamespace, folder: Any = None) -> Any:
    """Return the template to use with `options.model`; see `palu.run_record.choose_template`.

    Args:
        folder: where its `palu.json` is, if not there.
    """
    from palu.run_record import choose_template

    return choose_template(
        options.model if folder is None else folder,
        system_prompt=options.system_prompt,
        date_string=options.date_string,
        chat_template_kwargs=options.chat_template_kwargs,
        force=options.force_template,
    )


def find_models(options: SimpleNamespace, *names: str) -> None:
    """Put the folder of each model in the place of what names it; a model on the hub is downloaded
    where it is not in the cache, with the bars of the hub's own library.

    Args:
        names: of the options that name models.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value.is_dir():
            with user_errors():
                from palu.models.hub import located

                setattr(options, name, located(value))


def without_slices(*files: str | None) -> list[str]:
    """Return the paths of data as a user names them, without their slices; what is on the hub has
    none."""
    from palu.data.files import local_path

    return [path for path in map(local_path, files) if path is not None]


def read_rows(
    path: str,
    tokenizer: Any,
    template: Any,
    *,
    require_spans: bool,
    repair: str,
    max_length: int,
    columns: str | None = None,
    second_answers: Callable[[list], list[str]] | None = None,
    forget: str | None = None,
    forget_columns: str | None = None,
    drop_overlap: bool = False,
) -> list[dict]:
    """Return the tokenised examples of a file; with the second answers that `second_answers` gives
    to its examples, if any.

    Args:
        columns: see `palu.load_examples`.
        forget: of a retain file the forget file, in whose examples its own must not all be.
        forget_columns: its columns.
        drop_overlap: leave those out that are.
    """
    from palu.data.examples import tokenize_examples
    from palu.data.files import load_examples
    from palu.data.overlap import without_overlap
    from palu.data.pairs import add_alternates

    windows = {"tokenizer": tokenizer, "max_length": max_length}
    examples = load_examples(
        path, require_spans=require_spans, repair=repair, columns=columns, **windows
    )
    if forget is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was read before, and its warnings were said
            forgotten = load_examples(
                forget, require_spans=False, columns=forget_columns, **windows
            )
        examples = without_overlap(examples, forgotten, files=(path, forget), drop=drop_overlap)
    how = {"max_length": max_length, "template": template}
    rows = tokenize_examples(examples, tokenizer, source=path, **how)
    if second_answers is None:
        return rows
    try:
        texts = second_answers(examples)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    source = f"{path}, second answers"
    return add_alternates(rows, examples, texts, tokenizer, source=source, **how)


def read_both(
    options: SimpleNamespace, tokenizer: Any, template: Any, **of_forget: Any
) -> tuple[list[dict], list[dict] | None]:
    """Return the tokenised examples of `options.forget` and of `options.retain`, if there is one.

    Args:
        **of_forget: arguments of `read_rows` for the forget file.
    """
    how = {"repair": options.repair, "max_length": options.max_length}
    columns = options.columns
    rows = read_rows(options.forget, tokenizer, template, columns=columns, **of_forget, **how)
    if options.retain is None:
        return rows, None
    both = {"forget": options.forget, "drop_overlap": options.drop_overlap}
    both |= {"columns": options.retain_columns or columns, "forget_columns": columns}
    retain = read_rows(options.retain, tokenizer, template, require_spans=False, **both, **how)
    return rows, retain


def load_for_training(
    options: SimpleNamespace, device: str, tokenizer: Any, rows: list[dict], retain: list[dict]
) -> tuple[Any, Any]:
    """Return the model and the dtypes that its weights are saved in, see `load_to_train`.

    Raises:
        ValueError: it is no causal model, or has no embedding of some token.
    """
    from palu.models.checks import check_causal, first_texts
    from palu.models.loading import check_token_ids, load_to_train

    how = {"bf16": options.bf16, "allow_missing": options.allow_missing}
    model, saved = load_to_train(options.model, options.dtype, device, **how)
    check_token_ids(model, tokenizer, [*rows, *retain])
    check_causal(model, first_texts(rows))
    return model, saved


def data_notes(options: SimpleNamespace) -> dict[str, Any]:
    """Return what a record says of the data of a run."""
    names = ("forget", "retain", "columns", "retain_columns", "drop_overlap", "repair")
    names += ("max_length",)
    return {name: getattr(options, name) for name in names}


def digests_of(options: SimpleNamespace) -> dict[str, Any]:
    """Return SHA-256 of the files of a run's model and data, for `palu.json`."""
    from palu.storage.fingerprint import data_digests, model_digests

    named = {"forget": options.forget, "retain": options.retain}
    data = {name: without_slices(path) for name, path in named.items()}
    found = {name: data_digests(path[0]) for name, path in data.items() if path}
    return {"algorithm": "sha256", "model": model_digests(options.model), "data": found}


@contextmanager
def plain_warnings(often: str = "always") -> Iterator[None]:
    """Print warnings about the user's data as one line each, without the place in our source.

    Args:
        often: of `warnings.simplefilter`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(often, UserWarning)
        warnings.showwarning = lambda message, *args, **kwargs: warn(str(message))
        yield


def quiet() -> None:
    """Silence transformers: our own bars are enough."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
