"""What the commands of `palu` share: options that mean the same everywhere, and how they speak."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from palu.terminal import bars as bars
from palu.terminal import out as out
from palu.terminal import warn as warn


class Objective(str, Enum):
    """Names of the forget objectives."""

    flatten = "flatten"
    entropy = "entropy"


class Repair(str, Enum):
    """What to do with odd spans."""

    none = "none"
    snap = "snap"


ModelFolder = Annotated[Path, typer.Option("--model", help="Hugging Face model folder.")]
ForgetFile = Annotated[
    str,
    typer.Option(
        "--forget",
        help="What to forget: JSON lines or a datasets folder; PATH[-40:] takes a slice.",
    ),
]
RetainFile = Annotated[str | None, typer.Option("--retain", help="What to keep, same formats.")]
DropOverlap = Annotated[
    bool,
    typer.Option("--drop-overlap", help="Leave out retain rows that are forget rows too."),
]
Method = Annotated[
    str,
    typer.Option(
        help="palu (the marked spans), or one that forgets whole answers: grad_ascent, grad_diff, "
        "npo, sim_npo, dpo (prefers alternate_answer), idk_dpo (prefers refusals), wga, sat_imp, "
        "undial, ce_u, pdu (bounds the retain loss), rmu (steers activations)."
    ),
]


def _of_method(kind: type, says: str) -> Any:
    return Annotated[kind | None, typer.Option(help=says, show_default=False)]


Beta = _of_method(float, "Of npo, dpo, idk_dpo (0.1), sim_npo (4.5), wga (1), undial (10).")
Beta1 = _of_method(float, "Of sat_imp (5).")
Beta2 = _of_method(float, "Of sat_imp (1).")
Delta = _of_method(float, "Of sim_npo (0).")
IgnoreFirst = _of_method(int, "Of ce_u: tokens at the start of an answer left alone (1).")
RetainLossEps = _of_method(float, "Of pdu: bound on the retain loss (0.3).")
DualStepSize = _of_method(float, "Of pdu: how fast the retain weight moves to keep it (1).")
DualWarmupEpochs = _of_method(float, "Of pdu: epochs before it moves (5).")
LayerId = _of_method(
    int, "Of rmu: the decoder layer whose output is steered, from 0 (7, or the last of fewer)."
)
SteeringCoeff = _of_method(float, "Of rmu: length of the vector steered to (2).")
TrainableParamsRegex = _of_method(
    str,
    "Of rmu: which parameters up to that layer train, by whole names (all of that layer and the "
    "two before it).",
)
TopK = Annotated[int, typer.Option(help="Largest logits levelled in a forget row.")]
PrefixLength = Annotated[
    int, typer.Option(help="Tokens forgotten at the start of each span; 0: all.")
]
Preserve = Annotated[
    str, typer.Option(help="Holds other answer tokens: reverse_kl, forward_kl, nll or none.")
]
RetainLoss = Annotated[
    str | None,
    typer.Option(
        help="nll, or kl to the original model (nll); of method rmu embed_diff, the distance to "
        "the original's activations.",
        show_default=False,
    ),
]
Normalization = Annotated[
    str,
    typer.Option(
        help="What the means are over: step (all rows of the step) or micro_batch (each "
        "micro-batch by itself, averaged; the released code)."
    ),
]
SelectFrom = Annotated[
    str, typer.Option(help="Whose logits choose the top k: reference or current.")
]
Reference = Annotated[
    str,
    typer.Option(
        help="Where the original model's numbers come from: live (a frozen copy runs beside it), "
        "cached (computed once, before training) or, with --lora-rank, adapter_off (the model "
        "without its adapter: no second model).",
        show_default="live; with --lora-rank adapter_off",
    ),
]
ReferenceCacheFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the cache, built if it is not there; default: OUTPUT-reference-cache."
    ),
]
LoraRank = Annotated[
    int | None,
    typer.Option(
        help="Train a LoRA adapter of this rank and nothing else; the output is a PEFT folder "
        "(palu merge folds it in)."
    ),
]
LoraAlpha = Annotated[
    int | None,
    typer.Option(help="The adapter's scale is alpha / rank.", show_default="2 * rank"),
]
LoraDropout = Annotated[float, typer.Option(help="Dropout before the adapter.")]
LoraTarget = Annotated[
    str,
    typer.Option(
        help="Where it goes: all-linear (every linear layer but the output head), or names of "
        "modules: q_proj,v_proj."
    ),
]
SaveSteps = Annotated[
    int | None,
    typer.Option(
        help="Write a checkpoint every so many steps, into OUTPUT-checkpoints, for --resume; "
        "removed when the model is written."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the last checkpoint of an interrupted run with the same settings, data "
        "and model; from the beginning where there is none.",
    ),
]
LearningRate = Annotated[
    float,
    typer.Option(
        help="Peak, then linear to 0. LoRA usually wants about ten times what all weights want: "
        "1e-4."
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Compute activations again in backward instead of keeping them: less memory, slower.",
    ),
]
StopAtForgetProb = Annotated[
    float | None,
    typer.Option(
        help="Stop after the first epoch that leaves the tokens to forget with at most this "
        "probability: 0.05.",
        show_default=False,
    ),
]
Backend = Annotated[str, typer.Option(help="Kernels: auto, triton or torch.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BF16 = Annotated[
    bool, typer.Option("--bf16", help="Compute in bfloat16 (autocast) over float32 weights.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
AllowMissing = Annotated[
    str | None,
    typer.Option(
        help="A regular expression: tensors it matches may be missing in the weights, be too many "
        "or of another shape. Missing ones are random.",
        show_default=False,
    ),
]
MaxLength = Annotated[int, typer.Option(help="Tokens an example; longer ones are cut.")]
SystemPrompt = Annotated[str | None, typer.Option(help="System turn of the chat template.")]
DateString = Annotated[str | None, typer.Option(help="Date given to the chat template.")]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        help="More variables of the chat template, a JSON object: '{\"enable_thinking\": false}'."
    ),
]
ForceTemplate = Annotated[
    bool,
    typer.Option("--force-template", help="Take these template options even if palu.json differs."),
]
RepairSpans = Annotated[
    Repair, typer.Option(help="snap: move span ends to word ends and merge overlaps.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that palu wrote.")]


# Of `palu unlearn`: those that only the method of the marked spans has.
SPAN_OPTIONS = ("top_k", "prefix_length", "objective", "center", "preserve", "preserve_weight")
SPAN_OPTIONS += ("select_from",)


def check_training(
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    gradient_accumulation: int,
    seed: int,
) -> None:
    """Raises ValueError for numbers that no training can have, before any work."""
    for name, value in (("epochs", epochs), ("learning-rate", learning_rate)):
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; it must be a finite number above 0")
    for name, value in (
        ("batch-size", batch_size),
        ("gradient-accumulation", gradient_accumulation),
    ):
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed is {seed}; it must be 0 to 2**32 - 1")


def read_rows(
    path: str,
    tokenizer: Any,
    template: Any,
    *,
    require_spans: bool,
    repair: str,
    max_length: int,
    second_answers: Callable[[list], list[str]] | None = None,
    forget: str | None = None,
    drop_overlap: bool = False,
) -> list[dict]:
    """The tokenised examples of a file; with the second answers that `second_answers` gives to its
    examples, if any.

    Args:
        forget: of a retain file the forget file, in whose rows its own must not all be.
        drop_overlap: leave those out that are.
    """
    from palu.data.examples import tokenize_examples
    from palu.data.files import load_examples
    from palu.data.overlap import without_overlap
    from palu.data.pairs import add_alternates

    examples = load_examples(path, require_spans=require_spans, repair=repair)
    if forget is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was read before, and its warnings were said
            forgotten = load_examples(forget, require_spans=False)
        examples = without_overlap(examples, forgotten, files=(path, forget), drop=drop_overlap)
    options = {"max_length": max_length, "template": template}
    rows = tokenize_examples(examples, tokenizer, source=path, **options)
    if second_answers is None:
        return rows
    try:
        texts = second_answers(examples)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    source = f"{path}, second answers"
    return add_alternates(rows, examples, texts, tokenizer, source=source, **options)


@contextmanager
def plain_warnings(often: str = "always") -> Iterator[None]:
    """Warnings about the user's data as one line each, without the place in our source.

    Args:
        often: of `warnings.simplefilter`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(often, UserWarning)
        warnings.showwarning = lambda message, *args, **kwargs: warn(str(message))
        yield


def quiet() -> None:
    """Our own bars are enough."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
