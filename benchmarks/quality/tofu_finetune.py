"""Fine-tune a causal language model on questions and answers: the model that `palu unlearn` starts
from.

    python -m benchmarks.quality.tofu_finetune --model smollm2 --output smollm2-tofu \\
        --data tofu/forget01.json --data "tofu/full.json[:120]"

The loss is the ordinary next-token loss on the answers, the closing end token included; spans are
not used. Leave the forget file out for the yardstick, a model that never saw it. The questions are
put by the same template that `palu unlearn` and `palu evaluate` use by default, and `palu.json` in
the output folder says which.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, get_linear_schedule_with_warmup
from transformers.utils import logging

from palu.data.collator import Collator
from palu.data.examples import tokenize_examples
from palu.data.files import load_examples, split_slice
from palu.data.roles import IGNORE
from palu.errors import UserError, user_errors
from palu.models.folders import named_from
from palu.models.forward import logits_at, shift_to_logits
from palu.models.loading import load_model, load_tokenizer
from palu.progress import bar
from palu.run_record import choose_template
from palu.storage.output import check_output, output_folder
from palu.terminal import bars, say
from palu.unlearn import save_model
from palu_kernels import cross_entropy_loss

WARMUP, MAX_GRAD_NORM = 0.05, 1.0


def answer_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean next-token loss over the answer tokens of a batch made by `Collator`.

    A label marks a token as an answer token (anything but -100); the target is the token itself,
    since -200 marks one that is not sensitive and is no token.
    """
    answer = batch["labels"] != IGNORE
    rows = shift_to_logits(answer)
    logits = logits_at(model, batch["input_ids"], batch["attention_mask"], rows)
    return cross_entropy_loss(logits, batch["input_ids"][:, 1:][answer[:, 1:]])


def finetune(
    model: PreTrainedModel,
    rows: Sequence[dict[str, Any]],
    collate: Collator,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    report: Callable[..., None],
) -> list[float]:
    """Trains `model` in place with AdamW, warm-up over the first 5% of the steps, then linear decay
    to 0, gradients clipped at norm 1.

    Args:
        rows: as `palu.data.examples.tokenize_examples` makes them; shuffled anew for each epoch.
        report: called with (step, steps, a line with the last loss).

    Returns:
        the mean loss of each epoch.

    Raises:
        FloatingPointError: the loss is not finite; names the step.
    """
    device = next(model.parameters()).device
    steps = epochs * math.ceil(len(rows) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
    torch.manual_seed(seed)  # dropout, where a model has any
    generator = torch.Generator().manual_seed(seed)
    model.train()
    curve, step = [], 0
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        losses = []
        for start in range(0, len(order), batch_size):
            batch = collate([rows[i] for i in order[start : start + batch_size]])
            loss = answer_loss(model, {name: x.to(device) for name, x in batch.items()})
            losses.append(loss.item())
            step += 1
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"the loss is {losses[-1]} at step {step}; lower --learning-rate"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            report(step, steps, f"loss {losses[-1]:.3f}")
        curve.append(math.fsum(losses) / len(losses))
    model.eval()
    return curve


def run(options: argparse.Namespace, console: Console) -> None:
    """Reads, trains, writes. Raises `UserError` for what the user can put right."""
    with user_errors():
        files = [split_slice(path)[0] for path in options.data]
        check_output(options.output, overwrite=options.overwrite, inputs=(options.model, *files))
        for name in ("epochs", "batch_size", "learning_rate"):
            if getattr(options, name) <= 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be above 0, not {getattr(options, name)}"
                )
        tokenizer = load_tokenizer(options.model)
        template = choose_template(options.model)
        examples = [x for path in options.data for x in load_examples(path, require_spans=False)]
        rows = tokenize_examples(
            examples, tokenizer, max_length=options.max_length, template=template
        )
        model = load_model(options.model, options.dtype, options.device)
    settings = {
        name: getattr(options, name) for name in ("epochs", "batch_size", "learning_rate", "seed")
    }
    with output_folder(options.output) as folder:
        with bar(console, "Fine-tuning") as report:
            curve = finetune(model, rows, Collator(tokenizer), **settings, report=report)
        save_model(
            folder,
            model,
            tokenizer,
            template,
            made_by="benchmarks.quality.tofu_finetune",
            base_model=named_from(folder, options.model),
            data=options.data,
            max_length=options.max_length,
            settings=settings,
            loss_curve=curve,
        )
    console.print(
        f"Written to {options.output}: {len(rows)} answers, mean loss of the last epoch "
        f"{curve[-1]:.4f}",
        soft_wrap=True,
    )


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.tofu_finetune",
        description="Fine-tune a causal language model on questions and answers.",
    )
    p.add_argument("--model", type=Path, required=True, help="Hugging Face model folder")
    p.add_argument(
        "--data",
        action="append",
        required=True,
        help="JSON lines with question and answer, or a datasets folder; PATH[:120] takes a slice; "
        "may be given several times",
    )
    p.add_argument("--output", type=Path, required=True, help="folder for the new model")
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--learning-rate", type=float, default=2e-4, help="peak, then linear to 0")
    p.add_argument("--seed", type=int, default=0, help="of the order of the rows")
    p.add_argument("--max-length", type=int, default=512, help="tokens an example")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    return p


def main() -> int:
    """Entry point: the exit status is 2 for a user's mistake, 1 for a diverged run."""
    options = parser().parse_args()
    logging.disable_progress_bar()
    try:
        run(options, bars)
    except (UserError, FloatingPointError) as error:
        say("error", "red", str(error))
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
