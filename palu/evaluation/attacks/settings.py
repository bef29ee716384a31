"""What attacks are made, and how hard they try."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

NAMES = {
    "greedy": "the question as it is: what the model answers without any attack",
    "prefix_forcing": "the beginning of the secret is given away",
    "sampling": "many answers are drawn",
    "paraphrase": "the question is asked in other words",
    "quantization": "the weights are rounded to 8 or 4 bits",
    "relearning": "the model is trained a little further",
    "weight_noise": "random numbers are added to the weights",
    "membership_inference": "can losses tell what was in the training data?",
}
"""Attacks by name, in the order in which they are made."""

OPEN_UNLEARNING = "open_unlearning"
"""Its stress tests, which measure and do not ask; made where they are named. Relearning teaches the
secrets themselves there."""

HALF = "half"


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """How hard attacks try.

    Attributes:
        samples: answers drawn for a question at each temperature.
        temperatures: of sampling, each above 0.
        forced: how many tokens of a secret prefix forcing gives away; "half" of them, rounded up.
        noise: standard deviations of the noise, in those of each weight matrix.
        relearning_steps, relearning_rates: steps of AdamW, and its learning rates: one that suits
            large models and one for small ones.
        max_new_tokens: limit of an answer; it is not longer than the longest true one by more than
            a few tokens anyway.
        batch_size: examples in a forward pass.
        max_length: tokens in an example.
        records: at most so many forget records are asked about, drawn by the seed from those with a
            secret to look for; None: all.
    """

    samples: int = 10
    temperatures: Sequence[float] = (0.5, 1.0)
    forced: Sequence[int | str] = (0, 1, 2, 3, 5, 8, HALF)
    noise: Sequence[float] = (0.01, 0.03, 0.1)
    relearning_steps: int = 20
    relearning_rates: Sequence[float] = (1e-4, 1e-3)
    max_new_tokens: int = 200
    batch_size: int = 16
    max_length: int = 512
    records: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperatures", "forced", "noise", "relearning_rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("samples", "relearning_steps", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be 2 or more, got {self.max_length}")
        if self.records is not None and self.records < 1:
            raise ValueError(f"records must be 1 or more, or None, got {self.records}")
        for name in ("temperatures", "noise", "relearning_rates"):
            for value in getattr(self, name):
                if not 0 < value < math.inf:
                    raise ValueError(f"{name} must be finite and above 0, got {value}")
        for value in self.forced:
            if value != HALF and (isinstance(value, str) or value < 0):
                raise ValueError(f"forced must hold numbers of 0 or more, or 'half', got {value!r}")

    def quick(self) -> AttackSettings:
        """Return settings for a first look: few samples, strengths and records."""
        return dataclasses.replace(
            self,
            samples=min(self.samples, 3),
            temperatures=self.temperatures[-1:],
            forced=tuple(n for n in self.forced if n in (1, 3, HALF)) or self.forced[:1],
            relearning_rates=self.relearning_rates[:1],
            noise=self.noise[len(self.noise) // 2 :][:1],
            records=min(self.records or 20, 20),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def check_names(names: Sequence[str] | None) -> list[str]:
    """Return the names of the chosen attacks, each once, in their order; those of `NAMES` when
    None.

    Raises:
        ValueError: a name of no attack, or none at all.
    """
    known = (*NAMES, OPEN_UNLEARNING)
    if names is None:
        return list(NAMES)
    for name in names:
        if name not in known:
            raise ValueError(f"attacks has {name!r}; it must be of {', '.join(known)}")
    if not names:
        raise ValueError(f"attacks must name at least one of {', '.join(known)}")
    return [name for name in known if name in names]
