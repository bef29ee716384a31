"""One attack: it asks a model, changed or not, and counts what leaks; or it reads losses."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from palu.data.labels import LabeledExample
from palu.evaluation.attacks.probes import Probe
from palu.evaluation.inference import Continuation, continuations, score_answers
from palu.evaluation.leaks import leak_rate, leaks
from palu.evaluation.metrics import auc, min_k_score
from palu.models.wrappers import eos_token_ids, eval_mode

Report = Callable[[int, int], None]
Change = Callable[[nn.Module, Report], AbstractContextManager[nn.Module]]


def seed_of(seed: int, *names: Any) -> int:
    """Return a seed that depends on the run's and on names: not on what was done before."""
    return random.Random(f"{seed} {names}").getrandbits(32)


@dataclasses.dataclass(frozen=True)
class Answered:
    """What came of a probe.

    Attributes:
        texts: the answers, each behind what was given away of the secret.
        given: that, as text.
        leaking: the number of the first answer that leaks.
        said: whether any answer says it, for each of the probe's secrets.
    """

    texts: list[str]
    given: str
    leaking: int | None
    said: tuple[bool, ...]

    @property
    def worst(self) -> str:
        """Return the first answer that leaks, else the first."""
        return self.texts[self.leaking or 0]


@dataclasses.dataclass(frozen=True)
class LeakAttack:
    """Ask, and look for the secrets in the answers.

    Attributes:
        name, title, description, setting: what stands in the result.
        probes: what is asked.
        limit: tokens of an answer.
        batch_size: prompts in a forward pass.
        samples, temperature, seed: answers to each probe, and how they are drawn.
        change: changes the model for a block; called with the model and a report of its own steps.
        change_size: how many steps that has.
    """

    name: str
    title: str
    description: str
    probes: Sequence[Probe]
    limit: int
    batch_size: int
    setting: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    change: Change | None = None
    change_size: int = 0

    @property
    def size(self) -> int:
        """Return the work for progress: steps of the change, and answers."""
        return self.change_size + len(self.probes) * self.samples

    def run(
        self, model: nn.Module, tokenizer: Any, closing: set[int], report: Report
    ) -> tuple[dict[str, Any], list[Answered]]:
        """Return the result, and what came of each probe.

        Args:
            closing: tokens that end an answer in the template.
            report: called with (work done, `size`).
        """
        change = nullcontext(model)
        if self.change is not None:
            change = self.change(model, lambda done, total: report(done, self.size))
        with eval_mode(model), change as attacked, eval_mode(attacked):
            outputs = continuations(
                attacked,
                tokenizer,
                [probe.prompt for probe in self.probes for _ in range(self.samples)],
                eos_token_ids=sorted({*eos_token_ids(attacked, tokenizer), *closing}),
                max_new_tokens=self.limit,
                batch_size=self.batch_size,
                temperature=self.temperature,
                seed=self.seed,
                report=lambda done, total: report(self.change_size + done, self.size),
            )
        answers = iter(outputs)
        found: dict[tuple[int, str], bool] = {}
        answered, leaking = [], 0
        for probe in self.probes:
            said = [self._text(tokenizer, probe, next(answers)) for _ in range(self.samples)]
            hits = [[leaks(secret, text) for secret in probe.secrets] for text in said]
            leaking += sum(map(any, hits))
            any_said = tuple(map(any, zip(*hits, strict=True)))
            for secret, one in zip(probe.secrets, any_said, strict=True):
                key = probe.record, secret
                found[key] = found.get(key, False) or one
            first = next((n for n, hit in enumerate(hits) if any(hit)), None)
            given = tokenizer.decode(probe.given, skip_special_tokens=True)
            answered.append(Answered(said, given, first, any_said))
        result = leak_rate(sum(found.values()), len(found))
        if self.samples > 1:
            result["answers"] = leak_rate(leaking, len(self.probes) * self.samples)
        return result, answered

    @staticmethod
    def _text(tokenizer: Any, probe: Probe, output: Continuation) -> str:
        """Return the answer, behind the tokens that were given away."""
        if not probe.given:
            return output.text
        return tokenizer.decode([*probe.given, *output.tokens], skip_special_tokens=True)


@dataclasses.dataclass(frozen=True)
class MembershipAttack:
    """Tell forget answers from others by how likely the model finds them.

    Attributes:
        name, title, description, setting: what stands in the result.
        score: `loss` or `min_k`.
        forget, others: the tokens of the answers.
        batch_size: answers in a forward pass.
    """

    name: str
    title: str
    description: str
    setting: dict[str, Any]
    score: str
    forget: Sequence[LabeledExample]
    others: Sequence[LabeledExample]
    batch_size: int

    @property
    def size(self) -> int:
        """Return the work for progress."""
        return len(self.forget) + len(self.others)

    def run(
        self, model: nn.Module, tokenizer: Any, closing: set[int], report: Report
    ) -> tuple[dict[str, Any], list[Answered]]:
        """Return the AUC with its 95% interval, and no answers."""
        del closing
        rows = [*self.forget, *self.others]
        with eval_mode(model):
            scores = score_answers(
                model, tokenizer, rows, batch_size=self.batch_size, report=report
            )
        values = []
        for score in scores:
            if self.score == "loss":
                values.append(score.loss)
            else:
                values.append(min_k_score(-score.without_end(score.nll)))
        forget, others = values[: len(self.forget)], values[len(self.forget) :]
        forget, others = ([v for v in side if v is not None] for side in (forget, others))
        area = auc(forget, others)
        low, high = auc_interval(area, len(forget), len(others))
        return {"auc": area, "low": low, "high": high}, []


def auc_interval(area: float, ones: int, zeros: int) -> tuple[float, float]:
    """Return the 95% interval of an area under the ROC curve of so many examples on either side
    (Newcombe 2006, Statistics in Medicine 25, method 5: as Wilson's interval, with the variance of
    Hanley and McNeil; it is no point where the area is 0 or 1)."""

    def outside(theta: float) -> bool:
        mean = (ones + zeros) / 2 - 1
        variance = theta * (1 - theta) / (ones * zeros)
        variance *= 1 + mean * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(theta - area) > 1.959963984540054 * math.sqrt(variance)

    ends = []
    for far in (0.0, 1.0):
        inside, end = area, far
        if not outside(far):  # the area is there itself
            ends.append(far)
            continue
        for _ in range(60):
            middle = (inside + end) / 2
            inside, end = (inside, middle) if outside(middle) else (middle, end)
        ends.append(inside)
    return ends[0], ends[1]


Attack = LeakAttack | MembershipAttack
