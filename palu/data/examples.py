"""Data files become examples, examples become tokens, tokens become batches."""

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from palu.data.annotations import Audit, snap
from palu.data.labels import IGNORE, Template, label_without_warning
from palu.data.records import Example, parse_record
from palu.data.spans import integer, shown
from palu.errors import one_line
from palu.storage.json_files import NotJSON, look, parse, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Collator", "Example", "load_examples", "tokenize_examples"]


def load_examples(
    path: str | os.PathLike[str],
    *,
    require_spans: bool,
    repair: Literal["none", "snap"] = "none",
    limit: int | None = None,
) -> list[Example]:
    """Read examples from a file or folder. Every row is read or is an error: none is dropped.

    Records have `question` and `answer`, or `text` alone for a plain document, and `spans`:
    `[{"start": s, "end": e}]` (or `[[s, e]]`), character offsets into the answer. The released
    annotation format is read too: `target_words`, a JSON string of `[{"word": w, "start": s, "end":
    e}]`. Where a span says what it covers (`text` or `word`) it must be so; a row whose offsets
    count UTF-16 code units or UTF-8 bytes is known by that, and its spans are placed by them.
    `palu evaluate` also reads `paraphrased_answer` (a text) and `perturbed_answer` (a list of
    wrong texts), as TOFU has them. Fields that are not used stay in `Example.extra`.

    One warning a file tells how many spans or rows look wrong (they are accepted), and what was
    repaired.

    Args:
        path: a `.json` or `.jsonl` file of JSON lines (or one JSON list), or a folder that
            `datasets.load_from_disk` reads. May end in a slice of rows: `PATH[-40:]`, `PATH[:120]`,
            `PATH[0:10]`.
        require_spans: whether each record must have its spans field (which may be an empty list).
        repair: "snap" moves span ends out to whole words and merges overlapping spans.
        limit: read at most so many rows of the slice.

    Raises:
        ValueError: no such file, an empty file or slice, a malformed line, a missing field, one of
            the wrong type, a span outside the answer or that is not the word it says, an id that
            two rows have. Names file, row and field.
    """
    if repair not in ("none", "snap"):
        raise ValueError(f"repair must be 'none' or 'snap', got {repair!r}")
    if limit is not None and integer("limit", limit) < 1:
        raise ValueError(f"limit must be 1 or more, or None, got {limit}")
    file, rows = split_slice(os.fspath(path))
    count, read = _open_folder(file) if os.path.isdir(file) else _open_file(file)
    if not count:
        raise ValueError(f"{file}: holds no rows")
    chosen = range(count)[rows][:limit]
    if not chosen:
        raise ValueError(f"{path}: the slice takes none of the {count} rows of {file}")

    audit = Audit()
    examples, row_of_id = [], {}
    for row in chosen:
        record, place = read(row)
        try:
            example, spans, unit = parse_record(record, row, require_spans=require_spans)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from None
        if example.id in row_of_id:
            raise ValueError(
                f"{place}: field 'id' is {shown(example.id)}, which row "
                f"{row_of_id[example.id]} has already: ids must differ (rename or "
                "remove the field to use row numbers)"
            )
        row_of_id[example.id] = row
        if spans or require_spans:
            audit.add(example.answer, spans)
            audit.units[unit] += len(spans)
        if repair == "snap":
            snapped, moved, merged = snap(example.answer, spans)
            audit.snapped, audit.merged = audit.snapped + moved, audit.merged + merged
            example = dataclasses.replace(example, spans=tuple(snapped))
        examples.append(example)
    if found := audit.summary():
        warnings.warn(
            f"{os.fspath(path)}: {len(examples)} rows with {audit.spans} spans: {found}",
            stacklevel=2,
        )
    return examples


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    template: Template | None = None,
    source: str | None = None,
) -> list[dict[str, Any]]:
    """`label_example` for many: dicts of `input_ids`, `labels`, `attention_mask` (lists of int) and
    `example_id`.

    Examples, tokens and spans that are cut off at `max_length` are counted and warned of once.
    `source` is what the warning calls the examples: their file.

    Raises:
        ValueError: no examples, or an example that cannot be labelled or of which no answer token
            is left within `max_length`; names its id.
        TypeError: as `label_example`.
    """
    if not examples:
        raise ValueError("examples must not be empty")
    rows, without_answer = [], []
    lost_spans = rows_with_loss = cut = lost_tokens = 0
    at_least = ""
    for example in examples:
        try:
            labeled = label_without_warning(
                tokenizer,
                example.question,
                example.answer,
                example.spans,
                max_length,
                template or Template(),
            )
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"example {example.id!r}: {error}") from error
        if labeled.answer_start == len(labeled["input_ids"]):
            without_answer.append(example.id)
        cut += labeled.lost_tokens > 0
        lost_tokens += labeled.lost_tokens
        at_least = "at least " if labeled.too_long else at_least
        lost_spans += labeled.lost_spans
        rows_with_loss += labeled.lost_spans > 0
        rows.append({**labeled, "example_id": example.id})
    if without_answer:
        names = ", ".join(map(repr, without_answer[:5]))
        names += ", ..." if len(without_answer) > 5 else ""
        raise ValueError(
            f"max_length={max_length} leaves no token of the answer in {len(without_answer)} of "
            f"{len(rows)} examples: {names}; raise max_length or shorten them"
        )
    if cut:
        said = "" if source is None else f"{source}: "
        said += f"{cut} of {len(rows)} examples are cut at max_length={max_length}: "
        said += f"{at_least}{lost_tokens} tokens are left out"
        if lost_spans:
            total = sum(len(example.spans) for example in examples)
            said += f"; {lost_spans} of {total} spans, in {rows_with_loss} of {len(rows)} "
            said += f"examples, lost tokens to max_length={max_length}"
        warnings.warn(said, stacklevel=2)
    return rows


class Collator:
    """Makes a batch of tokenised examples: tensors padded on the right to the longest.

    Args:
        tokenizer: the tokenizer, or the id to pad with. A tokenizer's pad token is used, else its
            EOS, else 0: the choice does not matter, since the mask is built from lengths and never
            from ids.
        keep_ids: whether the batch holds `example_id`, a list of str. (Models do not take it.)
        pad_to_multiple_of: round the length up to a multiple of this.

    Calling it with a list of B dicts returns `input_ids`, `labels` (padded with -100) and
    `attention_mask` (1 for real tokens), each int64 [B, T]; `position_ids` and `token_type_ids`
    too (padded with 0) where an example has them. Other fields are left out.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | int",
        *,
        keep_ids: bool = False,
        pad_to_multiple_of: int | None = None,
    ):
        self.pad_id = tokenizer if isinstance(tokenizer, int) else _pad_id(tokenizer)
        if self.pad_id < 0:
            raise ValueError(f"the padding id must be 0 or more, got {self.pad_id}")
        if pad_to_multiple_of is not None and integer("pad_to_multiple_of", pad_to_multiple_of) < 1:
            raise ValueError(f"pad_to_multiple_of must be 1 or more, got {pad_to_multiple_of}")
        self.keep_ids = keep_ids
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("a batch needs at least one example")
        wanted = ["input_ids", "labels"] + ["example_id"] * self.keep_ids
        for number, feature in enumerate(features):
            for name in wanted:
                if name not in feature:
                    raise ValueError(
                        f"example {number} of the batch has no {name!r}, only {[*feature.keys()]}"
                    )
            ids, labels = len(feature["input_ids"]), len(feature["labels"])
            if ids != labels:
                raise ValueError(
                    f"example {number} of the batch has {ids} input_ids but {labels} labels"
                )
        lengths = [len(feature["input_ids"]) for feature in features]
        longest = -(-max(lengths) // self.multiple) * self.multiple
        shape = (len(features), longest)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE, dtype=torch.int64)
        for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
            input_ids[row, :length] = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
            labels[row, :length] = torch.as_tensor(feature["labels"], dtype=torch.int64)
        real = torch.arange(longest) < torch.tensor(lengths)[:, None]
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": real.to(torch.int64),
        }
        for name in ("position_ids", "token_type_ids"):
            if not any(name in feature for feature in features):
                continue
            batch[name] = torch.zeros(shape, dtype=torch.int64)
            for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
                default = range(length) if name == "position_ids" else [0] * length
                values = feature.get(name, default)
                batch[name][row, :length] = torch.as_tensor(values, dtype=torch.int64)
        if self.keep_ids:
            batch["example_id"] = [feature["example_id"] for feature in features]
        return batch


def _pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0


# Reading: how many rows there are, and a function from a row's number to its record and its place,
# for messages.
_Reader = tuple[int, Callable[[int], tuple[Any, str]]]


def split_slice(path: str) -> tuple[str, slice]:
    """`PATH[-40:]` -> the file or folder, which exists, and the rows to take of it.

    Raises:
        ValueError: there is no such file, or the slice has another form.
    """
    if os.path.exists(path):
        look(path, folder=True)
        return path, slice(None)
    file, rows = path, slice(None)
    if path.endswith("]") and "[" in path:
        match = re.fullmatch(r"(.+)\[(-?\d{1,18})?:(-?\d{1,18})?\]", path, flags=re.DOTALL)
        if not match:
            raise ValueError(
                f"{one_line(path, 200)}: a slice of rows looks like [-40:], [:120] or [0:10]"
            )
        file = match[1]
        rows = slice(*(None if end is None else int(end) for end in match.groups()[1:]))
    look(file, folder=True)
    return file, rows


def _open_file(file: str) -> _Reader:
    text = read_text(file)
    if text.lstrip().startswith("["):
        records = _decode(text, file, 1)
        return len(records), lambda row: (records[row], f"{file}, row {row}")
    # Only line feeds end a line of JSON lines: strings may hold other line separators as they are.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]

    def read(row: int) -> tuple[Any, str]:
        number, line = lines[row]
        return _decode(line, file, number), f"{file}:{number} (row {row})"

    return len(lines), read


def _decode(text: str, file: str, first_line: int) -> Any:
    try:
        return parse(text)
    except NotJSON as error:
        line = first_line + (error.line or 1) - 1
        raise ValueError(f"{file}:{line}: malformed JSON, {error}") from None


def _open_folder(folder: str) -> _Reader:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{folder}: reading a folder takes `datasets`: pip install 'palu[train]'"
        ) from error
    try:
        table = datasets.load_from_disk(folder)
    except Exception as error:  # what it raises for damaged files is of many kinds
        raise ValueError(
            f"{folder}: not a folder that `datasets.load_from_disk` reads: {one_line(error)}"
        ) from error
    if not isinstance(table, datasets.Dataset):
        raise ValueError(
            f"{folder}: holds several splits, name one: "
            + ", ".join(f"{folder}/{name}" for name in table)
        )
    table = table.with_format(None)

    def read(row: int) -> tuple[Any, str]:
        try:
            return table[row], f"{folder}, row {row}"
        except Exception as error:
            raise ValueError(f"{folder}, row {row}: cannot be read: {one_line(error)}") from error

    return len(table), read
