"""Batched inference for evaluation: scores of given answers, and greedy or sampled answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from palu.data.collator import Collator
from palu.data.labels import LabeledExample
from palu.data.roles import IGNORE
from palu.distributed import ALONE, Processes
from palu.models.forward import logits_at, shift_to_logits
from palu.models.wrappers import is_sharded, unwrap
from palu_kernels import cross_entropy_loss

T = TypeVar("T")

# Logits are standardised in float32 so many tokens at a time: 64 take 33 MB at V = 128,256.
_CHUNK = 64


def in_batches(
    lengths: Sequence[int],
    batch_size: int,
    work: Callable[[list[int]], Sequence[T]],
    *,
    processes: Processes = ALONE,
    report: Callable[[int, int], None] | None = None,
    level: bool = False,
) -> list[T]:
    """Call `work` on batches of examples of similar length, longest first: what does not fit in
    memory fails at once.

    Whole batches go to processes in turn, so an example's padding does not depend on their number,
    and every process gets every result.

    Args:
        lengths: one an example.
        work: returns one result for each example number of the batch.
        report: called with (examples done, of how many), this process's only.
        level: whether every process calls `work` equally often, if need be on the first batch
            again: of a sharded model all wait for each.

    Returns:
        one result an example, in the order of `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rounds, first = -(-len(batches) // processes.count), batches[:1]
    batches = batches[processes.rank :: processes.count]
    total = sum(map(len, batches))
    if level:
        batches += first * (rounds - len(batches))
    results: dict[int, T] = {}
    for batch in batches:
        results.update(zip(batch, work(batch), strict=True))
        if report is not None:
            report(len(results), total)
    gathered: dict[int, T] = {}
    for part in processes.gather(results):
        gathered.update(part)
    return [gathered[i] for i in range(len(lengths))]


@dataclass(frozen=True)
class AnswerScores:
    """Scores of one answer's T tokens, each given the true ones before it: all of the answer, its
    end token included (a text without prompt: but the first).

    Attributes:
        nll: float64 [T], negative log-likelihood.
        argmax_correct: bool [T], whether the token is the likeliest.
        sensitive: bool [T], whether it lies in a marked span.
        closed: whether the last token is the one that ends the answer.
        standardised: float64 [T], `(log p - mu) / sqrt(max(sigma^2, 1e-6))` with mean and variance
            of log p over the vocabulary under the model's own distribution, in float32; None when
            not asked for.
    """

    nll: np.ndarray
    argmax_correct: np.ndarray
    sensitive: np.ndarray
    closed: bool
    standardised: np.ndarray | None

    def without_end(self, values: np.ndarray) -> np.ndarray:
        """Return `values` [T] of this answer without the end token's."""
        return values[:-1] if self.closed else values

    @property
    def loss(self) -> float | None:
        """Mean of `nll`; None when there is no token."""
        return float(self.nll.mean()) if self.nll.size else None


@torch.no_grad()
def score_answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[LabeledExample],
    *,
    batch_size: int,
    standardise: bool = False,
    **sharing: Any,
) -> list[AnswerScores]:
    """Score answers in one forward pass each. The model must be in eval mode.

    Args:
        rows: see `palu.data.labels.label_example`.
        batch_size: examples a forward pass.
        standardise: also compute `AnswerScores.standardised` (min-k++).
        **sharing: `processes` and `report` of `in_batches`.
    """
    collate = Collator(tokenizer)
    device = next(model.parameters()).device

    def work(chosen: list[int]) -> list[AnswerScores]:
        batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
        ids, labels = batch["input_ids"], batch["labels"]
        predicted = labels != IGNORE
        logits = logits_at(model, ids, batch["attention_mask"], shift_to_logits(predicted))
        predicted = predicted[:, 1:]
        targets = ids[:, 1:][predicted]
        columns = [
            cross_entropy_loss(logits, targets, reduction="none").double(),
            logits.argmax(-1) == targets,
            labels[:, 1:][predicted] >= 0,
        ]
        if standardise:
            columns.append(_standardised(logits, targets).double())
        sizes = predicted.sum(1).tolist()
        parts = zip(*(values.cpu().split(sizes) for values in columns), strict=True)
        return [
            AnswerScores(
                *(values.numpy() for values in part[:3]),
                closed=rows[i].closed,
                standardised=part[3].numpy() if standardise else None,
            )
            for i, part in zip(chosen, parts, strict=True)
        ]

    return in_batches([len(row["input_ids"]) for row in rows], batch_size, work, **sharing)


def _standardised(logits: Tensor, targets: Tensor) -> Tensor:
    """Return float32 `[N]` of logits `[N, V]` and targets `[N]`."""
    chunks = [logits.new_zeros(0, dtype=torch.float32)]
    for rows, ids in zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True):
        log_p = rows.float().log_softmax(-1)
        p = log_p.exp()
        known = log_p.masked_fill(p == 0, 0.0)  # 0 * log 0 is 0
        mean = (p * known).sum(-1)
        variance = (p * known.square()).sum(-1) - mean.square()
        log_p = log_p.gather(-1, ids[:, None]).squeeze(-1)
        chunks.append((log_p - mean) / variance.clamp(min=1e-6).sqrt())
    return torch.cat(chunks)


class Continuation(NamedTuple):
    """What a model wrote after a prompt.

    Attributes:
        text: without special tokens and outer white space.
        tokens: the new tokens, without the one that ended it.
        end: the token that ended it; None where `max_new_tokens` did.
    """

    text: str
    tokens: list[int]
    end: int | None

    @property
    def ended(self) -> bool:
        """Return whether it ended by itself, and not at `max_new_tokens`."""
        return self.end is not None


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    **sharing: Any,
) -> list[Continuation]:
    """Continue each prompt until an end token or `max_new_tokens`. The model must be in eval mode.

    Prompts of a batch are padded on the left under a mask that comes from their lengths, so a
    padding token that is also an end token harms nothing, and positions are counted from the first
    real token. Sampling settings stored with the model have no effect.

    Args:
        prompts: token ids, each at least one token long. Give a prompt several times for several
            samples.
        eos_token_ids: ids that end an answer.
        temperature: 0 takes the likeliest token; above, tokens are drawn from the whole vocabulary.
        seed: of the draws, which depend on it, the prompts and `batch_size` alone: not on the
            number of processes, nor on what was drawn before. They leave the global state of the
            random numbers as it was.
        **sharing: `processes` and `report` of `in_batches`. A sharded model needs all `processes`.
    """
    device, sharded = next(model.parameters()).device, is_sharded(model)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos_token_ids[0] if eos_token_ids else 0
    ends = set(eos_token_ids)

    def work(chosen: list[int]) -> list[Continuation]:
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            start = width - len(prompts[i])
            ids[row, start:] = torch.tensor(prompts[i], dtype=torch.long)
            mask[row, start:] = 1
        with _seeded(device, f"{seed} {chosen[0]}"):
            new = _generate(
                model, ids.to(device), mask.to(device), ends, max_new_tokens, temperature, sharded
            )
        return [_continuation(tokenizer, tokens, ends) for tokens in new.tolist()]

    lengths = [len(prompt) for prompt in prompts]
    return in_batches(lengths, batch_size, work, **sharing, level=sharded)


def _continuation(tokenizer: Any, tokens: list[int], ends: set[int]) -> Continuation:
    at = next((n for n, token in enumerate(tokens) if token in ends), None)
    return written(tokenizer, tokens[:at], None if at is None else tokens[at])


def written(tokenizer: Any, tokens: list[int], end: int | None) -> Continuation:
    """Return a continuation of tokens that are known, see `Continuation`."""
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return Continuation(text, tokens, end)


@contextmanager
def _seeded(device: torch.device, seed: str) -> Iterator[None]:
    """Draw random numbers from `seed` on; afterwards go on where they were."""
    mixed = random.Random(seed).getrandbits(32)  # torch reads 32 bits on the CPU
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type):
        torch.manual_seed(mixed)
        yield


def _generate(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    eos: set[int],
    limit: int,
    temperature: float,
    together: bool,
) -> Tensor:
    """Return the continuation, int64 `[B, new]`, whatever sampling settings are stored.

    Args:
        together: all processes generate, and none ends before the others (else transformers
            looks whether that is so).
    """
    from transformers import GenerationConfig

    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        **how,
        num_beams=1,
        max_new_tokens=limit,
        eos_token_id=sorted(eos) or None,
        # The mask says what is padding; rows that ended are cut at their end token.
        pad_token_id=min(eos) if eos else 0,
        use_cache=True,
    )
    # PEFT's wrapper passes its inner model's settings on: they are replaced in there.
    inner = unwrap(model)
    stored = inner.generation_config
    try:
        # `generate` fills in what `settings` leaves out (temperature, penalties) from the stored
        # ones: an empty config has none.
        inner.generation_config = GenerationConfig()
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            synced_gpus=together or None,
        )
    finally:
        inner.generation_config = stored
    return out[:, ids.shape[1] :]
