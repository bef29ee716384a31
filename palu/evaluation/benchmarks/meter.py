"""What benchmarks ask of a model: log-likelihoods of choices and of texts, and continuations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from palu.data.collator import Collator
from palu.data.labels import LabeledExample
from palu.data.roles import IGNORE, KEEP
from palu.distributed import ALONE, Processes
from palu.evaluation.inference import AnswerScores, continuations, in_batches, score_answers
from palu.models.forward import logits_at
from palu.models.wrappers import eos_token_ids, unwrap

_TOKENS = 512  # of a text in a batch of `batch_size`; batches of longer ones are smaller
_WITHOUT_LIMIT = 10**9  # what a tokenizer says that knows none is above it


class Meter:
    """A model with its tokenizer. Texts are tokenised as the tokenizer does by itself, its BOS
    included, and no chat template is put around them.

    Args:
        model: a causal language model in eval mode.
        batch_size: examples a forward pass.
        processes: those that share the work; all of them must do the same.
        bar: makes a progress bar with a title: a context that gives `report(done, total)`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int,
        processes: Processes = ALONE,
        bar: Callable[[str], AbstractContextManager] = lambda title: nullcontext(),
    ) -> None:
        self.model, self.tokenizer, self.bar = model, tokenizer, bar
        self.batch_size, self.processes = batch_size, processes

    def choices(self, title: str, asked: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Return the log-likelihood of each choice after its context, in nats, as
        lm-evaluation-harness's `HFLM` computes it.

        White space that ends a context belongs to the choice. Both are tokenised together, and the
        choice has the tokens that are more than those of the context alone. What is longer than the
        model takes loses tokens at its beginning.

        Args:
            asked: (context, choices).
        """
        pairs = [[self._pair(context, one) for one in choices] for context, choices in asked]
        flat = [pair for of_one in pairs for pair in of_one]
        limit = self._limit()
        if cut := sum(len(context) + len(choice) > limit + 1 for context, choice in flat):
            warnings.warn(
                f"{title}: {cut} of {len(flat)} contexts with their choices are longer than the "
                f"model's {limit} tokens and lose their beginning",
                stacklevel=2,
            )
        one_pass = all(
            len({tuple(context) for context, _ in of_one}) == 1
            and all(len(choice) == 1 for _, choice in of_one)
            for of_one in pairs
        )
        if one_pass:
            return self.next_tokens(
                title,
                [of_one[0][0][-limit:] for of_one in pairs],
                [[choice[0] for _, choice in of_one] for of_one in pairs],
            )
        rows = [_row((context + choice)[-limit:], len(choice)) for context, choice in flat]
        sums = iter(-float(score.nll.sum()) for score in self._scores(title, rows))
        return [[next(sums) for _ in of_one] for of_one in pairs]

    @torch.no_grad()
    def next_tokens(
        self, title: str, prompts: Sequence[list[int]], candidates: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return the log-probability of each candidate as the token after its prompt, from one
        forward pass a prompt.

        Args:
            prompts: token ids.
            candidates: token ids, a list a prompt.
        """
        collate = Collator(self.tokenizer)
        device = next(self.model.parameters()).device

        def work(chosen: list[int]) -> list[list[float]]:
            batch = collate([_row(prompts[i], 0) for i in chosen])
            ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
            last = torch.arange(ids.shape[1], device=device) == mask.sum(1, keepdim=True) - 1
            log_p = logits_at(self.model, ids, mask, last).float().log_softmax(-1)
            return [log_p[n, list(candidates[i])].tolist() for n, i in enumerate(chosen)]

        lengths = [len(prompt) for prompt in prompts]
        with self.bar(title) as report:
            return in_batches(lengths, self._size(lengths), work, **self._sharing(report))

    def texts(
        self, title: str, texts: Sequence[str], *, standardise: bool = False
    ) -> list[AnswerScores]:
        """Score every token of texts but the first, each given those before it.

        Args:
            standardise: as in `palu.evaluation.inference.score_answers`.
        """
        ids = [self.encode(text) for text in texts]
        limit = self._limit()
        if long := sum(len(one) > limit for one in ids):
            warnings.warn(
                f"{title}: {long} of {len(ids)} texts are longer than the model's {limit} tokens",
                stacklevel=2,
            )
        rows = [_row(one, len(one) - 1) for one in ids]
        return self._scores(title, rows, standardise=standardise)

    def continue_texts(
        self,
        title: str,
        prompts: Sequence[str],
        max_new_tokens: int,
        *,
        ends: Sequence[int] | None = None,
    ) -> list[str]:
        """Continue prompts with the likeliest token until an end token or `max_new_tokens`.

        Args:
            ends: ids that end a text; None: every one that the model and the tokenizer name.

        Returns:
            The new text with its white space, special tokens left out.
        """
        ids = [self.encode(one) for one in prompts]
        ends = eos_token_ids(self.model, self.tokenizer) if ends is None else ends
        with self.bar(title) as report:
            found = continuations(
                self.model,
                self.tokenizer,
                ids,
                eos_token_ids=ends,
                max_new_tokens=max_new_tokens,
                batch_size=self._size([len(one) for one in ids]),
                **self._sharing(report),
            )
        return [self.decode(one.tokens) for one in found]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with what the tokenizer adds."""
        return self.tokenizer(text, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens without special ones, spaces before punctuation kept."""
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _pair(self, context: str, choice: str) -> tuple[list[int], list[int]]:
        kept = context.rstrip()
        before = self.encode(kept)
        return before, self.encode(kept + context[len(kept) :] + choice)[len(before) :]

    def _scores(
        self, title: str, rows: Sequence[LabeledExample], **options: Any
    ) -> list[AnswerScores]:
        with self.bar(title) as report:
            return score_answers(
                self.model,
                self.tokenizer,
                rows,
                batch_size=self._size([len(row["input_ids"]) for row in rows]),
                **options,
                **self._sharing(report),
            )

    def _sharing(self, report: Any) -> dict[str, Any]:
        return {"processes": self.processes, "report": report}

    def _size(self, lengths: Sequence[int]) -> int:
        return max(1, min(self.batch_size, self.batch_size * _TOKENS // max(lengths)))

    def _limit(self) -> int:
        """Return how many tokens the model takes, as lm-evaluation-harness finds it."""
        config = unwrap(self.model).config
        config = getattr(config, "text_config", None) or config
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            if getattr(config, name, None) is not None:
                return int(getattr(config, name))
        known = getattr(self.tokenizer, "model_max_length", None)
        return int(known) if known is not None and known < _WITHOUT_LIMIT else 2048


def _row(ids: list[int], scored: int) -> LabeledExample:
    """Return a row whose last `scored` tokens are scored."""
    start = len(ids) - scored
    return LabeledExample(
        ids, [IGNORE] * start + [KEEP] * scored, [1] * len(ids), answer_start=start
    )
