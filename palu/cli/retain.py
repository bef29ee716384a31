"""What holds the rest of a model in place: `--retain FILE`, `self` or `none`."""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from palu import distributed
from palu.terminal import bars, out, warn
from palu.training.options import option

if TYPE_CHECKING:
    from palu.training.self_retain import SelfRetain

FILE, SELF, NONE = "file", "self", "none"


@dataclass(kw_only=True)
class RetainOptions:
    """What a run keeps."""

    retain: str | None = option(
        None,
        "What to keep: a file, same formats; self: answers that the original model gives to "
        "neutral prompts, to questions like the forget file's about others, and to its own; none: "
        "nothing. A file of one of these names is ./self.",
        panel="Data",
        shown="self, where the method keeps something",
    )


def chosen(options: SimpleNamespace) -> tuple[SimpleNamespace, str]:
    """Return the options, `retain` of them a file or None, and whether a file, the model's own
    answers or nothing is kept."""
    from palu.methods import METHODS

    options, retain = copy(options), options.retain
    if retain not in (None, SELF, NONE):
        return options, FILE
    options.retain = None
    method = METHODS.get(options.method)  # what is none is refused later
    keeps = method is not None and method.retain != "refused" and options.retain_weight > 0
    return options, retain or (SELF if keeps else NONE)


def own_answers(
    options: SimpleNamespace,
    model: Any,
    tokenizer: Any,
    template: Any,
    place: Path | None,
    *,
    resumed: bool,
) -> tuple[dict[str, Any], list[dict]]:
    """Return what `palu.json` tells of the model's own answers, and these, tokenised; say what they
    are.

    Args:
        place: the folder of the run's checkpoints, where they are kept.
        resumed: the run goes on from a checkpoint: it takes those that are kept. Without one
            nothing tells whether they are of this model and of these secrets.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from palu.data.files import load_examples
    from palu.progress import bar
    from palu.training.checkpoints import SELF_RETAIN
    from palu.training.known import mark_known
    from palu.training.self_retain import SelfRetain, self_retain, self_retain_rows

    how = {"template": template, "max_length": options.max_length}
    # Weights that are spread over the processes need all of them at every batch.
    alone = is_deepspeed_zero3_enabled()
    on_cpu = next(model.parameters()).device.type == "cpu"
    processes = distributed.ALONE if alone else distributed.Processes.launched(cpu=on_cpu)
    kept = None if place is None else place / SELF_RETAIN
    if resumed and kept is not None and kept.is_file():
        made = SelfRetain.read(kept)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was read before, and its warnings were said
            examples = load_examples(
                options.forget,
                require_spans=False,
                repair=options.repair,
                columns=options.columns,
                tokenizer=tokenizer,
                max_length=options.max_length,
            )
        with bar(bars, "Asking the original model what to keep") as report:
            made = self_retain(
                model,
                tokenizer,
                examples,
                batch_size=4 * options.batch_size,  # without gradients as much memory
                seed=options.seed,
                processes=processes,
                report=report,
                **how,
            )
        if kept is not None and distributed.rank() == 0:
            kept.parent.mkdir(parents=True, exist_ok=True)
            made.write(kept)
    rows = self_retain_rows(made, tokenizer, **how)
    size = options.batch_size  # with logits
    measured = mark_known(model, tokenizer, rows, batch_size=size, processes=processes)
    _say(made, measured)
    return made.record() | {"measured": measured}, rows


def _say(made: SelfRetain, measured: str) -> None:
    kinds = ", ".join(f"{number} to {kind}s" for kind, number in made.kinds.items())
    text = f"No --retain file: {len(made.examples)} answers of the original model itself hold the "
    text += f"rest in place ({kinds}"
    if made.left_out:
        left_out = ", ".join(f"{number} {reason}" for reason, number in made.left_out.items())
        text += f"; thrown away: {left_out}"
    text += f"); harm is measured by {measured}"
    out.print(f"{text}. A file of what must stay holds it better.", soft_wrap=True)


def warn_of_nothing(by_span: bool) -> None:
    """Say that nothing is kept."""
    hold = "only the other words of the forget answers hold" if by_span else "nothing holds"
    warn(f"no retain set: {hold} the model in place")
