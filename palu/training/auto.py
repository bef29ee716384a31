"""Choose the settings that a user of `palu unlearn` leaves open, by the model and the data.

docs/training.md tells the rules, docs/results.md what they give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from palu.data.collator import Collator
from palu.data.roles import FORGET
from palu.loss import PALULoss
from palu.models.forward import logits_at, shift_to_logits
from palu.models.wrappers import eval_mode, unwrap
from palu.reference.model import vocabulary_size
from palu_kernels import local_entropy_loss

# Adam moves every weight by about the learning rate, and a layer adds up as many of those moves as
# it is wide: rates of equal effect are in inverse proportion to the width (muP, arXiv 2203.03466).
RATE_TIMES_WIDTH = 0.06
# Times the rate. The usual ratio is 10; on the demo's people (seed 0) that harmed what was to stay.
LORA = 5
# Norm of the forget loss's gradient with respect to the logits of a token, at the start. That of a
# cross-entropy is at most the square root of 2, and as large as this where a seventh of the
# probability is lost.
LOGIT_GRADIENT = 0.2
EPOCHS, STEPS = 20, 150  # at most, whichever is more
SCHEDULE = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}
BATCHES = 4  # that are looked at for the weight


class Choice(NamedTuple):
    """A setting that was chosen, and why in a sentence."""

    value: Any
    why: str


def learning_rate(hidden_size: int, *, lora: bool) -> Choice:
    """Return the learning rate for a model of a width."""
    rate = float(f"{RATE_TIMES_WIDTH / hidden_size * (LORA if lora else 1):.2g}")
    why = f"{RATE_TIMES_WIDTH} / hidden size {hidden_size}" + (f", times {LORA} for LoRA" * lora)
    return Choice(rate, why)


def epochs(examples: int, step: int) -> Choice:
    """Return the budget of epochs for a number of examples, of which `step` make up a step."""
    a_epoch = math.ceil(examples / step)
    budget = max(EPOCHS, math.ceil(STEPS / a_epoch))
    return Choice(
        float(budget),
        f"at most {EPOCHS} epochs or {STEPS} steps, whichever is more, of {a_epoch} steps each; "
        "the run stops where all is forgotten",
    )


def forget_weight(
    model: nn.Module, tokenizer: Any, rows: Sequence[dict], loss: PALULoss, batch_size: int
) -> Choice:
    """Return the weight with which PALU's forget loss has a gradient of `LOGIT_GRADIENT` a token.

    The entropy of levelled logits starts with almost no gradient where a model is sure; its
    largest grows with the logarithm of k, which is what it is divided by.

    Args:
        rows: of the forget set.
        loss: with the objective, k and center of the run.
    """
    if loss.objective == "entropy":
        k = min(loss.top_k, vocabulary_size(unwrap(model)) or loss.top_k)
        return Choice(float(f"{1 / math.log(max(k, 3)):.2g}"), f"1 / log(k = {k})")
    collate, device = Collator(tokenizer), next(model.parameters()).device
    squares = count = 0.0
    places = torch.linspace(0, len(rows) - 1, min(len(rows), BATCHES * batch_size)).long().tolist()
    for start in range(0, len(places), batch_size):
        batch = collate([rows[i] for i in places[start : start + batch_size]])
        forget = (loss.roles(batch["labels"]) == FORGET).to(device)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        with eval_mode(model, keep_rng=False):
            logits = logits_at(model, ids, mask, shift_to_logits(forget)).float()
        options = {"top_k": loss.top_k, "center": loss.center, "backend": loss.backend}
        total = local_entropy_loss(logits.requires_grad_(), **options, reduction="sum")
        (gradient,) = torch.autograd.grad(total, logits)
        squares += gradient.double().square().sum().item()
        count += len(logits)
    norm = math.sqrt(squares / count) if count else 0.0
    if not norm > 0:
        return Choice(1.0, "the forget loss has no gradient")
    return Choice(
        float(f"{LOGIT_GRADIENT / norm:.1g}"),
        f"so that the forget loss, whose gradient at a token's logits has the norm {norm:.2g}, "
        f"begins with {LOGIT_GRADIENT}",
    )


def simple_choices(
    options: Any, *, hidden_size: int | None, lora: bool, own_answers: bool
) -> dict[str, Choice]:
    """Return what can be chosen before the data is read, of those options that are None.

    Args:
        options: as the command line gives them.
        hidden_size: of the model; None where its configuration does not say.
        own_answers: the retain set are answers of the model itself.
    """
    rate = learning_rate(hidden_size or 1024, lora=lora)
    if hidden_size is None:
        rate = Choice(rate.value, "the model's configuration has no hidden size; as for 1024")
    by_epoch = options.epochs is None
    why = "the run ends where all is forgotten" if by_epoch else "--epochs says how long it trains"
    choices = {"learning_rate": rate, "checks": Choice("epochs" if by_epoch else "ends", why)}
    if options.method != "palu":
        choices["forget_weight"] = Choice(1.0, f"the weight that method {options.method} has")
    else:
        why = "what stands past a prefix stays known to whoever has it"
        choices["prefix_length"] = Choice(0, why)
        why = "greedy answers stay fluent, where flattened logits lead them astray"
        choices["objective"] = Choice("entropy", why)
        if "center" in options.given:
            choices["objective"] = Choice("flatten", "--center is of this objective")
        if own_answers:
            why = "the model's own answers are held as they are; nll would make it surer of them"
            choices["retain_loss"] = Choice("kl", why)
    return {name: one for name, one in choices.items() if getattr(options, name) is None}
