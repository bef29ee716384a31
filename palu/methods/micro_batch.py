"""A micro-batch: a batch, and which loss each of its rows of logits has.

It is a dict, as the Trainer passes batches on: `input_ids`, `attention_mask`, what else the model
is called with, and under keys of our own the roles of its rows and the step's denominators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from palu.data.roles import IGNORE
from palu.models.inputs import COLUMNS, joined, more_inputs

if TYPE_CHECKING:
    from palu.methods.base import Method

RETAIN = "palu_retain"  # the retain micro-batch beside a forget micro-batch, or None
ROLES = "palu_roles"
# int64 [3] beside a batch: what each of its terms is divided by; 0 where it does not count.
# Integers, since DeepSpeed casts floating-point inputs to half precision.
DENOMINATORS = "palu_denominators"
COUNTS = "palu_counts"  # what each term is a mean over, in this micro-batch
RETAINED = 3  # the role of a row that predicts a retained token, beside FORGET and PRESERVE


@dataclass(frozen=True)
class RowRoles:
    """The roles of a batch's rows of logits, on the host, where counting them and looking them up
    waits for no device. (It is no tensor, so that nothing moves it. What is made of it goes to the
    device by copies that do not block: a blocking one waits for all that the device has to do.)

    Attributes:
        at: int8 `[B, T]` on the CPU: the role of the token after each row; 0 for none.
        forget: how many examples, the first ones, are to be forgotten; the others are retained.
    """

    at: Tensor
    forget: int

    @classmethod
    def of_labels(cls, roles: Tensor, *, retain: bool = False) -> RowRoles:
        """Shift roles of labels `[B, T]` to the rows that predict them."""
        at = functional.pad(roles.cpu()[:, 1:], (0, 1)).to(torch.int8)
        return cls(at, 0 if retain else len(at))

    @classmethod
    def of_retain(cls, labels: Tensor) -> RowRoles:
        """The roles of a retain batch, whose answer tokens all count."""
        return cls.of_labels((labels.cpu() != IGNORE) * RETAINED, retain=True)

    @property
    def retain(self) -> int:
        """How many examples are retained."""
        return len(self.at) - self.forget

    def count(self, role: int, *, answers: bool = False) -> int:
        """Return how many rows have the role, or how many answers have such a row."""
        chosen = self.at == role
        return int((chosen.any(1) if answers else chosen).sum())

    def lengths(self, role: int) -> Tensor:
        """Return int64 `[E]`: the rows of each answer that has some."""
        counts = (self.at == role).sum(1)
        return counts[counts > 0]

    def order(self, role: int) -> Tensor:
        """Return int64 `[n]`: the flat places of the rows of a role."""
        return (self.at == role).flatten().nonzero()[:, 0]

    def examples(self, start: int, stop: int) -> RowRoles:
        """Return the roles of the examples from `start` to before `stop`."""
        at = self.at[start:stop]
        return RowRoles(at, min(max(self.forget - start, 0), len(at)))


def forget_roles(method: Method, batch: Mapping[str, Any]) -> dict[str, RowRoles]:
    """Return the roles of collated forget examples under their key: looked up where examples are
    collated, on the host."""
    return {ROLES: RowRoles.of_labels(method.roles(batch["labels"]))}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the model is called with."""
    ours = ("labels", "palu_")
    given = {name: value for name, value in batch.items() if not name.startswith(ours)}
    return {"attention_mask": None, **given}


def only_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a micro-batch is made of, of a collated batch: what the model is called with, and
    labels."""
    given = {name: batch[name] for name in COLUMNS if batch.get(name) is not None}
    return given | more_inputs(batch)


def next_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return int64 `[B, T]`: the token that each row of logits predicts (0 behind the last)."""
    return functional.pad(batch["input_ids"][:, 1:], (0, 1))


def together(forget: Mapping[str, Any], retain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a forget and a retain micro-batch as one, padded on the right alike, for backends that
    allow one forward and backward a micro-batch."""
    at = [batch[ROLES].at for batch in (forget, retain)]
    length = max(roles.shape[1] for roles in at)
    at = torch.cat([functional.pad(roles, (0, length - roles.shape[1])) for roles in at])
    counts = [a + b for a, b in zip(forget[COUNTS], retain[COUNTS], strict=True)]
    batch = joined(forget, retain) | {ROLES: RowRoles(at, forget[ROLES].forget), COUNTS: counts}
    if DENOMINATORS in forget:
        batch[DENOMINATORS] = forget[DENOMINATORS]
    return batch


def examples(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return the examples of a micro-batch from `start` to before `stop` as one of its own, without
    the step's counts and denominators."""
    rows = len(batch["input_ids"])
    columns = only_inputs(batch)
    part = {name: c[start:stop] if len(c) == rows else c for name, c in columns.items()}
    return part | {ROLES: batch[ROLES].examples(start, stop)}


def part_for_reference(
    batch: Mapping[str, Any], *, forget: bool, retain: bool
) -> Mapping[str, Any]:
    """Return the examples of a micro-batch that the original is asked about: those to forget, the
    retained ones, or both."""
    roles = batch[ROLES]
    start, stop = 0 if forget else roles.forget, len(roles.at) if retain else roles.forget
    return batch if (start, stop) == (0, len(roles.at)) else examples(batch, start, stop)
