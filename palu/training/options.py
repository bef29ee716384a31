"""The options of a run, each stated once: name, type, default, help and which methods read it.

Imports neither torch nor transformers: the command line reads these dataclasses before either is
loaded, and `PALUConfig` inherits three of them beside `TrainingArguments`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import groupby
from typing import Any, Literal, get_args, get_type_hints


class Help(str):
    """The help text of an option, which also carries what else is known of the option.

    `HfArgumentParser` hands all metadata of a field to argparse, which takes `help` and refuses the
    rest: so the rest travels as attributes of the text.

    Attributes:
        panel: the heading of `--help` that the option stands under.
        of: the methods that read it and the default of each (None: no fixed one); empty for all.
        objective: the only objective that reads it, if not every one does.
        least, above: bounds of a number, which must also be finite.
        trainer: its name in `TrainingArguments`, where that is another.
        shown: what `--help` shows as the default, where that is not the value.
        metavar: what stands for the value in `--help`, where that is not its type.
        argument: a positional argument of the command line.
        callback: called with its value before the other options are read.
    """

    panel: str = "Options"
    of: Mapping[str, Any] = {}
    objective: str | None = None
    least: float | None = None
    above: float | None = None
    trainer: str | None = None
    shown: str | bool = True
    metavar: str | None = None
    argument: bool = False
    callback: Callable[..., Any] | None = None


def option(default: Any, text: str, **known: Any) -> Any:
    """Return a dataclass field for an option.

    Args:
        default: `MISSING` where the command line must give one.
        text: its help.
        **known: attributes of `Help`.
    """
    if of := known.get("of"):
        groups = groupby(of.items(), key=lambda item: item[1])
        parts = [(", ".join(name for name, _ in group), value) for value, group in groups]
        names = ", ".join(
            f"{who} (default {value})" if value is not None else who for who, value in parts
        )
        text = f"Of {names}: {text}"
        known.setdefault("shown", False)
    text = Help(text)
    vars(text).update(known)
    return field(default=default, metadata={"help": text})


def choices(kind: type, name: str) -> tuple[str, ...]:
    """Return the values that a `Literal` field of a dataclass allows; none for another type."""
    hint = get_type_hints(kind)[name]
    literals = [hint, *get_args(hint)]
    return next((get_args(one) for one in literals if getattr(one, "__origin__", 0) is Literal), ())


_method = partial(option, panel="Method")
_loss = partial(option, panel="PALU's loss")
_other = partial(option, panel="Other methods")
_reference = partial(option, panel="Reference model")
_lora = partial(option, panel="LoRA")
_training = partial(option, panel="Training")
_output = partial(option, panel="Output")
_machine = partial(option, panel="Machine")


# Where `palu unlearn` chooses by model and data: the numbers of the paper and its code, which
# `PALUConfig` has.
PAPER = {"objective": "flatten", "prefix_length": 3, "forget_weight": 1.0, "checks": "none"}


@dataclass
class LossOptions:
    """The options of `palu.PALULoss`: the method that forgets marked spans."""

    objective: Literal["flatten", "entropy"] | None = _loss(
        None,
        "How the largest logits of a token to forget are levelled: flatten (pulled to --center) or "
        "entropy (their softmax made uniform).",
        shown="entropy; with --center flatten",
    )
    top_k: int = _loss(50, "How many of its largest logits are levelled.")
    center: str = _loss(
        "global_mean",
        "Of flatten: the value that logits are pulled to: global_mean, local_mean or a number.",
        objective="flatten",
    )
    prefix_length: int | None = _loss(
        None,
        "Tokens forgotten at the start of each span; 0 or less: all. What stands past a prefix "
        "stays known to whoever has the prefix.",
        shown="0",
    )
    preserve: Literal["reverse_kl", "forward_kl", "nll", "none"] | None = _loss(
        "reverse_kl",
        "The loss that holds the other answer tokens: reverse_kl or forward_kl to the original "
        "model, nll of its likeliest token, or none.",
    )
    preserve_weight: float = _loss(1.0, "Weight of the preserve term.")
    select_from: Literal["reference", "current"] = _loss(
        "reference", "The model whose logits choose the top k."
    )


@dataclass
class MethodOptions:
    """The options that only other methods read; None is the method's default."""

    beta: float | None = _other(
        None,
        "inverse temperature; of wga the exponent of the weight, of undial how far the token's "
        "logit is lowered.",
        of={"npo": 0.1, "dpo": 0.1, "idk_dpo": 0.1, "sim_npo": 4.5, "wga": 1, "undial": 10},
    )
    beta1: float | None = _other(None, "exponent of the saturation weight.", of={"sat_imp": 5})
    beta2: float | None = _other(None, "exponent of the importance weight.", of={"sat_imp": 1})
    delta: float | None = _other(None, "margin.", of={"sim_npo": 0})
    ignore_first: int | None = _other(
        None, "tokens at the start of an answer that are left alone.", of={"ce_u": 1}
    )
    retain_loss_eps: float | None = _other(None, "bound on the retain loss.", of={"pdu": 0.3})
    dual_step_size: float | None = _other(
        None, "step size of the retain weight, which moves to keep the bound.", of={"pdu": 1}
    )
    dual_warmup_epochs: float | None = _other(
        None, "epochs before the retain weight moves.", of={"pdu": 5}
    )
    layer_id: int | None = _other(
        None,
        "the decoder layer whose output is steered, from 0; default 7, or the last of fewer.",
        of={"rmu": None},
    )
    steering_coeff: float | None = _other(None, "length of the vector steered to.", of={"rmu": 2})


@dataclass
class RunOptions:
    """The options of a run that every method reads."""

    method: Literal[
        "palu",
        "grad_ascent",
        "grad_diff",
        "npo",
        "sim_npo",
        "dpo",
        "idk_dpo",
        "wga",
        "sat_imp",
        "undial",
        "ce_u",
        "pdu",
        "rmu",
    ] = _method(
        "palu",
        "palu forgets the marked spans, the others whole answers (dpo prefers alternate_answer, "
        "idk_dpo refusals, pdu bounds the retain loss, rmu steers activations).",
    )
    forget_weight: float | None = _method(
        None,
        "Weight of the forget term.",
        shown="of palu balanced by the gradient of the first batches, else 1",
    )
    retain_weight: float = _method(1.0, "Weight of the retain term.")
    retain_loss: Literal["nll", "kl", "embed_diff"] | None = _method(
        None,
        "Loss on the retain set: nll, kl to the original model, or (of rmu alone, and its default) "
        "embed_diff, the distance to the original's activations.",
        shown="nll; of palu with --retain self kl",
    )
    retain_batch_size: int | None = _method(
        None, "Retain examples beside each forget batch.", shown="as many as forget examples"
    )
    trainable_params_regex: str | None = _method(
        None,
        "Which parameters train: a regular expression of their whole names, such as "
        "'.*layers\\.[0-3]\\..*'. Of rmu within the layers up to --layer-id.",
        shown="all; of rmu that layer and the two before it",
    )
    normalization: Literal["step", "micro_batch"] = _method(
        "step",
        "What the means are over: all tokens of the optimizer step, or each micro-batch by itself, "
        "averaged (the released code).",
    )
    reference: Literal["live", "adapter_off", "cached"] = _reference(
        "live",
        "Where the original model's numbers come from: live (a frozen copy runs beside it), cached "
        "(computed once, before training) or adapter_off (the model without its LoRA adapter: no "
        "second model).",
        shown="live; with --lora-rank adapter_off",
    )
    reference_cache: str | None = _reference(
        None, "Folder of the cache, built if it is not there.", shown="OUTPUT-reference-cache"
    )
    stop_at_forget_prob: float | None = _training(
        None,
        "Stop after the first epoch (or eval_steps) that leaves the tokens to forget with at most "
        "this probability, such as 0.05.",
    )
    checks: Literal["none", "ends", "epochs"] | None = _training(
        None,
        "When to measure what the model still knows: never (none), before and after (ends), or "
        "after each epoch too (epochs), and then stop where it is forgotten and keep the best "
        "weights. What is still known or harmed at the end is said, with exit status 3.",
        shown="epochs; with --epochs ends",
    )
    backend: Literal["auto", "triton", "torch"] = _machine("auto", "What computes the losses.")


@dataclass
class TrainingOptions:
    """The options of `transformers.TrainingArguments` that `palu unlearn` has, by its names."""

    learning_rate: float | None = _training(
        None,
        "Peak of the learning rate.",
        above=0,
        shown="by the width of the model; five times as much with LoRA",
    )
    epochs: float | None = _training(
        None,
        "Passes over the forget set, at most.",
        above=0,
        trainer="num_train_epochs",
        shown="until forgotten, at most 20 or 150 steps",
    )
    batch_size: int = _training(
        8, "Forget examples in a micro-batch.", least=1, trainer="per_device_train_batch_size"
    )
    gradient_accumulation: int = _training(
        1, "Micro-batches in an optimizer step.", least=1, trainer="gradient_accumulation_steps"
    )
    gradient_checkpointing: bool = _training(
        False, "Compute activations again in backward instead of keeping them: less memory, slower."
    )
    seed: int = _training(0, "Seed of the batches and the adapter.")
    report_to: str = _training(
        "none",
        "Where the logs go too: tensorboard (into OUTPUT-logs), wandb, ... or all; several with "
        "commas between them.",
    )
    save_steps: int | None = _output(
        None,
        "Write a checkpoint every so many steps, into OUTPUT-checkpoints, for --resume; removed "
        "when the model is written.",
    )
    bf16: bool = _machine(False, "Compute in bfloat16 (autocast) over float32 weights.")


@dataclass
class LoRAOptions:
    """The options of a LoRA adapter, see `palu.models.lora`."""

    lora_rank: int | None = _lora(
        None,
        "Train a LoRA adapter of this rank and nothing else; the output is a PEFT folder (palu "
        "merge folds it in).",
    )
    lora_alpha: int | None = _lora(None, "The adapter's scale is alpha / rank.", shown="2 * rank")
    lora_dropout: float = _lora(0.0, "Dropout before the adapter.")
    lora_target: str = _lora(
        "all-linear",
        "Where it goes: all-linear (every linear layer but the output head), or names of modules: "
        "q_proj,v_proj.",
    )


def check_choice(options: object, kind: type, *names: str) -> None:
    """Raise ValueError for a value that is none of its field's choices."""
    for name in names:
        allowed, value = choices(kind, name), getattr(options, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def unread(name: str, *, method: str, objective: str | None) -> str | None:
    """Return which method or objective it is that does not read an option of `LossOptions`; None
    where it is read."""
    (help,) = (one.metadata["help"] for one in fields(LossOptions) if one.name == name)
    if method != "palu":
        return f"method {method!r}"
    if help.objective not in (None, objective):
        return f"objective {objective!r}"
    return None


def check_read(options: Any, given: Collection[str] | None = None) -> None:
    """Raise ValueError for an option of PALU's loss that the method or the objective does not read,
    and for the weight of a preserve term that is not there.

    Args:
        options: has the fields of `LossOptions`, and `method`.
        given: names of the options that a user gave; None: those that differ from their defaults.
    """
    for one in fields(LossOptions):
        value = getattr(options, one.name)
        changed = value not in (one.default, PAPER.get(one.name, one.default))
        if one.name in given if given is not None else changed:
            who = unread(one.name, method=options.method, objective=options.objective)
            if who is not None:
                raise ValueError(
                    f"{one.name} is {value!r} and {who} has no such option; it must be left out"
                )
    if options.preserve in (None, "none") and options.preserve_weight not in (1, 0):
        raise ValueError(
            f"preserve_weight is {options.preserve_weight!r} and preserve is 'none': there is no "
            "such term, and it must be left out"
        )
