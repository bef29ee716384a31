"""How much of the forget set, and of the retain set, a model knows in the course of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from palu.data.roles import FORGET, IGNORE, token_roles
from palu.distributed import Processes
from palu.evaluation.inference import continuations
from palu.evaluation.leaks import leaks, sort_secrets
from palu.models.checks import is_whole
from palu.models.forward import logits_at, shift_to_logits
from palu.models.inputs import more_inputs
from palu.models.wrappers import eos_token_ids, eval_mode, is_sharded
from palu.training.trainer_checks import marks_something
from palu_kernels import LMHead, cross_entropy_loss, linear_cross_entropy_loss

if TYPE_CHECKING:
    from palu.training.trainer import PALUTrainer

# Of a larger retain set so many examples are measured, spread evenly over it.
RETAIN_ROWS = 256
# A model's own answers have in this field the labels of what it was sure of, by which they are
# measured (`palu.training.known.mark_known`).
KNOWN = "palu_known"
# So many answers are generated, spread evenly over the forget set.
ANSWERS = 200


class Knowledge(NamedTuple):
    """What a model knows, each token given the true ones before it.

    Attributes:
        sensitive_probability: `exp(-mean NLL)` over the sensitive tokens of an example, averaged
            over the examples.
        past_prefix_probability: mean probability of the sensitive tokens past the first
            `prefix_length` of their span; None where there are none.
        recited: spans whose every token is the likeliest.
        spans: how many there are, without those that the text before them says already and those
            of stop words alone.
        retain_probability: `exp(-mean NLL)` over the answer tokens of a retained example (where
            spans are marked in it, over theirs: facts are what is lost first), averaged over the
            examples (of a model's own answers by what it was sure of); None without a retain set.
    """

    sensitive_probability: float
    past_prefix_probability: float | None
    recited: int
    spans: int
    retain_probability: float | None


def token_scores(
    trainer: PALUTrainer, batch: dict[str, Any], positions: Tensor, *, likeliest: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the negative log-likelihood (float64 `[n]`, on the CPU) of the tokens at `positions`,
    and whether each is the likeliest (None unless asked for).

    Args:
        positions: bool `[B, T]`, the tokens; none in the first column.
    """
    device = trainer.args.device
    ids, positions = batch["input_ids"].to(device), positions.to(device)
    mask = batch.get("attention_mask")
    mask = None if mask is None else mask.to(device)
    more = more_inputs(batch, device)
    keep, targets = shift_to_logits(positions), ids[:, 1:][positions[:, 1:]]
    options = {"reduction": "none", "backend": trainer.args.backend}
    first = None
    # `trainer.model` is inside DDP, whose forward makes processes wait for one another.
    with trainer.compute_loss_context_manager():
        if likeliest or not trainer.step_loss.without_logits:
            logits = logits_at(trainer.model, ids, mask, keep, **more)
            nll = cross_entropy_loss(logits, targets, **options)
            first = (logits.argmax(-1) == targets).cpu() if likeliest else None
        else:

            def of_rows(hidden: Tensor, head: LMHead) -> Tensor:
                return linear_cross_entropy_loss(hidden[keep], head, targets, **options)

            inputs = {"input_ids": ids, "attention_mask": mask, **more}
            nll = trainer.step_loss.over_head(trainer.model, inputs, of_rows)
    return nll.double().cpu(), first


class KnowledgeMeter:
    """Measure a trainer's model on its forget and retain rows; processes share the rows and all get
    the same numbers.

    Args:
        trainer: its data sets must have a length.
    """

    def __init__(self, trainer: PALUTrainer) -> None:
        self.trainer, rows = trainer, trainer.train_dataset
        check_length("checks", rows)
        self.eos = eos_token_ids(trainer.model, trainer.processing_class)
        self.prefix = getattr(trainer.method, "prefix_length", 0)
        # A method of whole answers may be given rows without spans: then the answer is the secret.
        by_span = trainer.method.by_span or marks_something(
            map(rows.__getitem__, range(len(rows))), self.eos
        )
        self._roles = partial(token_roles, prefix_length=0, eos_token_id=self.eos)
        self._roles = self._roles if by_span else trainer.method.roles
        self._texts: dict[int, list[str | None]] = {}  # of each row's spans, see `_secrets`

    @torch.no_grad()
    def measure(self) -> Knowledge:
        """Return what the model knows now."""
        trainer = self.trainer
        retained = _retained(trainer.retain_dataset)
        totals = [0.0] * 8
        with eval_mode(trainer.model, keep_rng=False):
            # Without rows of its own a process still calls the model: a sharded one waits.
            for rows in self._shares(range(len(trainer.train_dataset))):
                sums = self._forget(rows or [0])
                if rows:
                    totals[:6] = [a + b for a, b in zip(totals[:6], sums, strict=True)]
            for rows in self._shares(retained):
                scores = self._retain(rows or retained[:1])
                totals[6] += math.fsum(scores) if rows else 0.0
                totals[7] += len(scores) if rows else 0
        own = torch.tensor([totals], dtype=torch.float64).to(trainer.args.device)
        found = trainer.accelerator.gather(own).tolist()
        # The same sums in the same order on every process: all of them stop, or none.
        score, examples, past, past_tokens, recited, spans, retain, retained = (
            math.fsum(column) for column in zip(*found, strict=True)
        )
        return Knowledge(
            score / max(examples, 1),
            past / past_tokens if past_tokens else None,
            int(recited),
            int(spans),
            retain / retained if retained else None,
        )

    def leaked(self) -> tuple[int, int] | None:
        """Return how many secrets the model says in greedy answers, and how many were asked for;
        None where DeepSpeed keeps parts of the model.

        Every answer, and every sensitive place of another turn or of a plain document, is generated
        from the true text before it.
        """
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        if tokenizer is None or not (is_whole(trainer.model) or is_sharded(trainer.model)):
            return None
        asked = [one for i in range(len(trainer.train_dataset)) for one in self._asked(i)]
        asked = [asked[i] for i in _spread(len(asked), ANSWERS)]
        if not asked:
            return 0, 0
        args = trainer.args
        with eval_mode(trainer.model), trainer.compute_loss_context_manager():
            answers = continuations(
                trainer.model,
                tokenizer,
                [prompt for prompt, _, _ in asked],
                eos_token_ids=self.eos,
                max_new_tokens=max(length for _, length, _ in asked) + 8,
                batch_size=4 * args.per_device_train_batch_size,
                processes=Processes(args.process_index, args.world_size),
            )
        said = [
            leaks(secret, answer.text)
            for (_, _, secrets), answer in zip(asked, answers, strict=True)
            for secret in secrets
        ]
        return sum(said), len(said)

    # ---- parts -----------------------------------------------------------------------------------

    def _shares(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Yield this process's batches of row numbers, as many (or empty) in every process."""
        args = self.trainer.args
        size, rank = args.per_device_train_batch_size, args.process_index
        for start in range(0, len(numbers), size * args.world_size):
            yield list(numbers[start + rank * size : start + (rank + 1) * size])

    def _sensitive(self, rows: Sequence[int]) -> tuple[dict[str, Any], Tensor]:
        """Return forget rows as a batch, and bool `[B, T]`: their sensitive tokens."""
        trainer = self.trainer
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        return batch, self._roles(batch["labels"]) == FORGET

    def _forget(self, rows: Sequence[int]) -> tuple[float, ...]:
        """Return sums over rows: score, examples, probability past the prefix, tokens there, spans
        recited, spans."""
        batch, sensitive = self._sensitive(rows)
        nll, first = token_scores(self.trainer, batch, sensitive, likeliest=True)
        sums, at = [0.0] * 6, 0
        for row, marked in zip(rows, sensitive.tolist(), strict=True):
            scores: list[float] = []
            for (start, end), secret in zip(_runs(marked), self._secrets(row), strict=True):
                own = slice(at, at + end - start)
                at += end - start
                if secret is None:
                    continue
                scores += nll[own].tolist()
                deep = [] if self.prefix <= 0 else nll[own][self.prefix :].tolist()
                sums[2] += math.fsum(math.exp(-value) for value in deep)
                sums[3] += len(deep)
                sums[4] += bool(first[own].all())
                sums[5] += 1
            if scores:
                sums[0] += math.exp(-math.fsum(scores) / len(scores))
                sums[1] += 1
        return tuple(sums)

    def _tokens(self, row: int) -> tuple[list[int], list[int], list[bool]]:
        """Return a row's token ids, labels and which are sensitive, without padding."""
        batch, sensitive = self._sensitive([row])
        columns = torch.stack([batch["input_ids"][0], batch["labels"][0], sensitive[0].long()])
        if "attention_mask" in batch:
            columns = columns[:, batch["attention_mask"][0].bool()]
        ids, labels, marked = columns.tolist()
        return ids, labels, list(map(bool, marked))

    def _secrets(self, row: int) -> list[str | None]:
        """Return the text of each span of a row; None where the text before it says it, or it says
        nothing. It is the same at every check."""
        tokenizer = self.trainer.processing_class
        if row not in self._texts:
            ids, _, marked = self._tokens(row)
            texts: list[str | None] = []
            for start, end in _runs(marked):
                if tokenizer is None:
                    texts.append("")  # it counts, and cannot be read
                    continue
                before, text = (
                    tokenizer.decode(part, skip_special_tokens=True)
                    for part in (ids[:start], ids[start:end])
                )
                judged = sort_secrets([text.strip()], before).judged
                texts.append(judged[0] if judged else None)
            self._texts[row] = texts
        return self._texts[row]

    def _retain(self, rows: Sequence[int]) -> list[float]:
        trainer = self.trainer
        batch = trainer.data_collator([_measured(trainer.retain_dataset[i]) for i in rows])
        labels = batch["labels"]
        marked = token_roles(labels, 0, self.eos) == FORGET
        answer = torch.where(marked.any(1, keepdim=True), marked, labels != IGNORE)
        answer[:, 0] = False
        nll, _ = token_scores(trainer, batch, answer, likeliest=False)
        parts = nll.split(answer.sum(1).tolist())
        return [math.exp(-part.mean().item()) for part in parts if len(part)]

    def _asked(self, row: int) -> list[tuple[list[int], int, list[str]]]:
        """Return of each answer of a row that has secrets, and of each secret of a plain document,
        which nobody asks for: the prompt, its length, the secrets."""
        ids, labels, marked = self._tokens(row)
        spans = list(zip(_runs(marked), self._secrets(row), strict=True))
        runs = _runs([label != IGNORE for label in labels])
        decode = partial(self.trainer.processing_class.decode, skip_special_tokens=True)
        if [end for _, end in runs] == [len(ids)] and not decode(ids[: runs[0][0]]):
            return [(ids[:a], b - a, [text]) for (a, b), text in spans if a > 0 and text]
        asked = []
        for start, end in runs:
            secrets = [text for (a, _), text in spans if start <= a < end and text]
            if secrets and start > 0:
                asked.append((ids[:start], end - start, list(dict.fromkeys(secrets))))
        return asked


def check_length(option: str, rows: Any) -> None:
    """Raise ValueError where a training set has no length, and `option` measures all its rows."""
    if not hasattr(rows, "__len__"):
        raise ValueError(
            f"{option} needs a train_dataset with a length, not a {type(rows).__name__}: all its "
            "rows are measured"
        )


def _runs(marked: Sequence[bool]) -> list[tuple[int, int]]:
    """Return start and end of every stretch of true values."""
    runs, at = [], 0
    for value, group in groupby(marked):
        length = len(list(group))
        if value:
            runs.append((at, at + length))
        at += length
    return runs


def _retained(rows: Any) -> Sequence[int]:
    """Return the numbers of the retain rows that are measured."""
    if rows is None:
        return ()
    numbers: Sequence[int] = range(len(rows))
    if _is_own(rows[0]):
        numbers = [i for i in numbers if any(label != IGNORE for label in rows[i][KNOWN])]
    return [numbers[i] for i in _spread(len(numbers), RETAIN_ROWS)]


def _is_own(row: Any) -> bool:
    return isinstance(row, Mapping) and KNOWN in row


def _measured(row: Any) -> Any:
    """Return a retain row with the labels by which it is measured."""
    return {**row, "labels": row[KNOWN]} if _is_own(row) else row


def _spread(count: int, most: int) -> range | list[int]:
    """Return at most `most` of `count` places, spread evenly."""
    return range(count) if count <= most else [i * count // most for i in range(most)]
