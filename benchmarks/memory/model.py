"""How much memory does a whole unlearning step need, of models that do not fit here?

    python -m benchmarks.memory.model

Two kinds of rows, in one CSV. *Predicted* (`palu.planning.step`): Llama-3.1-8B, Llama-3.2-1B,
Gemma-2-9B and Qwen2.5-7B by their published configs, every weight and LoRA, without and with
checkpointing, by batch and length; nothing is run for them. *Measured*: two steps of small models
of their families,
with `PALUTrainer` itself or in the released code's way, whose largest sum of living tensors
(`ledger.py`) stands beside the prediction. The exit status is 1 if one is off by more than 10%.

The ways: `released` (a second model, all logits of both), `live` (this library, a second
model), `cached` (no second model). What a GPU needs beside tensors is in no number here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks import machine, runner, tables
from benchmarks.bench_train_step import Released
from benchmarks.memory.ledger import Ledger
from palu import PALUConfig, PALUTrainer
from palu.data.collator import Collator
from palu.planning.layer import PRECISIONS
from palu.planning.model import KNOWN_MODELS, ModelSizes
from palu.planning.step import (
    ANSWER_SHARE,
    GIB,
    PRESERVE_SHARE,
    Items,
    Prediction,
    Setup,
    Step,
    predict,
)
from palu.training import master_weights
from palu_kernels import torch_backend as eager
from palu_kernels.linear import chunked as linear

ALLOWED = 0.1
SETUP = ("trains", "way", "dtype", "checkpointing", "batch_size", "length")
PARTS = (
    "weights",
    "master weights",
    "optimizer state",
    "reference",
    "gradients",
    "layer inputs",
    "norms",
)
PARTS += ("attention", "attention scores", "attention masks", "mlp", "linear inputs")
PARTS += ("weight copies", "layer gradients", "head copies", "head gradient", "embedding gradient")
PARTS += ("chunk buffers", "logits")
COLUMNS = ("model", *SETUP, "moment", "predicted", "measured", *PARTS, *tables.ENVIRONMENT)
Rows = list[dict[str, Any]]

# Small models in the proportions of large ones: the vocabulary is 60 times the width, a batch has
# three tokens for every entry of the width.
_SMALL = {"vocab_size": 2003, "hidden_size": 32, "intermediate_size": 112, "num_hidden_layers": 6}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_SMALL |= {"bos_token_id": 1, "eos_token_id": 2}
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "small Llama": {**_SMALL, "model_type": "llama", "tie_word_embeddings": False},
    "small Gemma 2": {**_SMALL, "model_type": "gemma2", "tie_word_embeddings": True},
    "small Qwen 2": {**_SMALL, "model_type": "qwen2", "tie_word_embeddings": False},
}
SMALL_BATCH = {"batch_size": 4, "length": 24}


class Case(NamedTuple):
    """A way of training: `PALUTrainer`'s or the released code's."""

    released: bool
    setup: Setup

    @property
    def way(self) -> str:
        return "released" if self.released else self.setup.reference


def cases(dtypes: Sequence[str], lora_rank: int, batch_size: int, length: int) -> Iterator[Case]:
    """Every way of training a batch."""
    for dtype, checkpointing, rank, (released, reference) in itertools.product(
        dtypes,
        (False, True),
        (0, lora_rank),
        ((True, "live"), (False, "live"), (False, "cached")),
    ):
        yield Case(released, Setup(batch_size, length, dtype, rank, reference, checkpointing))


# ---- predicting ----------------------------------------------------------------------------------


def sizes_of(config: Mapping[str, Any]) -> ModelSizes:
    return ModelSizes.from_config(AutoConfig.for_model(**config))


def predicted(sizes: ModelSizes, case: Case) -> Prediction:
    if not case.released:
        return predict(sizes, case.setup)
    step = ReleasedStep(sizes, case.setup)
    return Prediction({name: {**step.base, **items} for name, items in step.moments()})


class ReleasedStep(Step):
    """The released code's way: all logits of both models, and one backward for both batches, that
    of the retain rows first, and AdamW on the weights as they are."""

    has_masters = keeps_copies = False

    def moments(self) -> Iterator[tuple[str, Items]]:
        p, setup, sizes = self.precision, self.setup, self.sizes
        entries = self.layer.positions * sizes.vocab
        shifted = 4 * setup.batch_size * (setup.length - 1) * sizes.vocab  # of next tokens, float32
        capped = entries * p.products if sizes.final_softcap else 0
        # Logits of both models; in float32 the model's, log p, p and log p - log q.
        forget = capped + 2 * p.products * entries + (3 + bool(p.copy)) * shifted
        head, linears = sizes.head_parameters, sizes.layers * sizes.linear_weights
        # Copies of weights that train stay until both forwards are done, others are made twice.
        copies = {"head copies": head * (p.copy if p.casts else 0)}
        both = self.activations(batches=2)
        if self.full and p.casts:
            both["weight copies"] = linears * p.copy
        both["head copies"] = copies["head copies"] * (1 if self.full else 2)
        # Retain rows, in float32: logits, the shifted ones and their log softmax.
        yield "loss of the retain rows", {**both, "logits": forget + capped + 3 * shifted}
        there = {"head gradient": head * p.weights * self.full, "logits": forget}
        yield "backward of a layer", {**copies, **self.backward_of_layer(batches=2), **there}
        gradients = self.gradients
        if self.full and p.casts:  # of the copies; the embedding has none
            gradients = (linears + head) * p.copy + head * p.weights
        # The gradients of p and of the difference come on top.
        there = {**copies, "gradients": gradients, "logits": forget + 2 * shifted}
        yield "backward of the forget rows' loss", {**self.activations(), **there}
        there = {"gradients": self.gradients, "embedding gradient": self.embedding_gradient}
        yield "backward of the embedding", {**there, "logits": 2 * p.products * entries}


# ---- measuring -----------------------------------------------------------------------------------


def measure(config: Mapping[str, Any], case: Case) -> Ledger:
    """Two steps of a small model on the CPU -> a ledger that holds the peak of the second.

    Row losses take a row at a time, so that the temporaries of PyTorch's road, which kernels on a
    GPU do not have, are small; and pieces of a head are as small beside it as those of a large one.
    """
    ledger = Ledger()
    with (
        ledger,
        warnings.catch_warnings(),
        mock.patch.object(eager, "TILE_ENTRIES", 1),
        mock.patch.object(linear, "HEAD_BLOCK_BYTES", 2**12),
        mock.patch.object(master_weights, "SAMPLE", 1),
        mock.patch.object(master_weights, "_PIECE", 2**12),
    ):
        warnings.simplefilter("ignore")
        steps = _released_steps if case.released else _trainer_steps
        steps(_model(config, case.setup), case.setup, ledger)
    return ledger


def _model(config: Mapping[str, Any], setup: Setup) -> PreTrainedModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setup.dtype == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    if setup.lora_rank:
        model = get_peft_model(model, LoraConfig(r=setup.lora_rank, target_modules="all-linear"))
    return model


def examples(vocab: int, setup: Setup, seed: int) -> Rows:
    """Two batches; of an example the prompt, the forget rows and the preserve rows, in this order.
    Every second example is a token shorter, so that there is padding."""
    generator = torch.Generator().manual_seed(seed)
    answer, preserve = (round(share * setup.length) for share in (ANSWER_SHARE, PRESERVE_SHARE))
    rows = []
    for number in range(2 * setup.batch_size):
        length = setup.length - number % 2
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        forget = slice(length - answer, length - preserve)
        labels = [-100] * forget.start + ids[forget] + [-200] * preserve
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * length})
    return rows


class _FromSecondStep(TrainerCallback):
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.ledger.start()


def _trainer_steps(model: PreTrainedModel, setup: Setup, ledger: Ledger) -> None:
    forget, retain = (examples(model.config.vocab_size, setup, seed) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as folder:
        settings = PALUConfig(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=setup.batch_size,
            use_cpu=True,
            bf16=setup.dtype == "autocast",
            gradient_checkpointing=setup.checkpointing,
            reference=setup.reference,
            top_k=20,
            prefix_length=0,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = PALUTrainer(
            model,
            settings,
            train_dataset=forget,
            retain_dataset=retain,
            callbacks=[_FromSecondStep(ledger)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _released_steps(model: PreTrainedModel, setup: Setup, ledger: Ledger) -> None:
    def autocast() -> Any:
        if setup.dtype != "autocast":
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    if setup.checkpointing:
        model.gradient_checkpointing_enable()
    session = SimpleNamespace(model=model.train(), top_k=20, autocast=autocast)
    losses_of = Released(session)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    collate, size = Collator(0), setup.batch_size
    sets = [examples(model.config.vocab_size, setup, seed) for seed in (0, 1)]
    for step in (0, 1):
        pair = [collate(rows[step * size : (step + 1) * size]) for rows in sets]
        if step == 1:
            ledger.start()
        losses_of(*pair)
        optimizer.step()
        optimizer.zero_grad()


# ---- rows ----------------------------------------------------------------------------------------


def row(model: str, case: Case, found: Prediction, measured: int | None) -> dict[str, Any]:
    setup = case.setup
    trains = f"LoRA {setup.lora_rank}" if setup.lora_rank else "every weight"
    values = (trains, case.way, setup.dtype, setup.checkpointing, setup.batch_size, setup.length)
    return {
        "model": model,
        **dict(zip(SETUP, values, strict=True)),
        "moment": found.moment,
        "predicted": found.peak,
        "measured": measured,
        **{part: found.items.get(part, 0) for part in PARTS},
    }


def predictions(given: argparse.Namespace) -> Rows:
    rows = []
    for (model, config), size, length in itertools.product(
        KNOWN_MODELS.items(), given.batch_size, given.length
    ):
        sizes = sizes_of(config)
        for case in cases(given.dtype, given.lora_rank, size, length):
            rows.append(row(model, case, predicted(sizes, case), None))
    return rows


def measurements(dtypes: Sequence[str], models: Sequence[str]) -> Rows:
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for model in models:
        config = SMALL_MODELS[model]
        for case in cases(dtypes, 2, **SMALL_BATCH):
            found = predicted(sizes_of(config), case)
            rows.append(row(model, case, found, measure(config, case).peak))
    return rows


def off_by(row: Mapping[str, Any]) -> float:
    return row["predicted"] / row["measured"] - 1


def predicted_tables(rows: Rows) -> str:
    """GiB; one table for each dtype, without and with checkpointing."""
    texts = []
    for kind in dict.fromkeys((row["dtype"], row["checkpointing"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["checkpointing"]) == kind]
        shapes = dict.fromkeys(f"{row['batch_size']} x {row['length']}" for row in own)
        lines: dict[tuple, list[str]] = {}
        for row in own:
            line = lines.setdefault((row["model"], row["trains"], row["way"]), [])
            line.append(f"{row['predicted'] / GIB:.1f}")
        text = tables.text(
            ["model", "trains", "way", *shapes], [[*names, *line] for names, line in lines.items()]
        )
        title = f"GiB, {kind[0]}, {'with' if kind[1] else 'without'} checkpointing, predicted:"
        texts.append(f"{title}\n{text}")
    return "\n\n".join(texts)


def measured_table(rows: Rows) -> str:
    """For each kind of case, how many there were and how far off the predictions were."""
    lines = []
    for kind in dict.fromkeys((row["model"], row["trains"], row["way"]) for row in rows):
        off = [off_by(row) for row in rows if (row["model"], row["trains"], row["way"]) == kind]
        lines.append([*kind, str(len(off)), f"{min(off):+.1%}", f"{max(off):+.1%}"])
    heading = ["predicted, over the tensors alive", "trains", "way", "cases", "lowest", "highest"]
    return tables.text(heading, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    count = runner.positive
    parser.add_argument("--batch-size", type=count, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=count, nargs="+", default=[512, 2048])
    parser.add_argument("--lora-rank", type=count, default=16)
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, default=["bfloat16", "autocast"])
    parser.add_argument("--measure", nargs="*", choices=SMALL_MODELS, default=[*SMALL_MODELS])
    default = machine.RESULTS / "memory_model.csv"
    parser.add_argument("--csv", type=Path, default=default, help="raw rows")
    given = parser.parse_args(arguments)
    models, small = predictions(given), measurements(given.dtype, given.measure)
    place = machine.environment(torch.device("cpu")) | {"commit": machine.commit()}
    tables.write(given.csv, [row | place for row in models + small], COLUMNS)
    print(predicted_tables(models), measured_table(small), sep="\n\n")
    wrong = [row for row in small if abs(off_by(row)) > ALLOWED]
    for row in wrong:
        print("OFF:", *(f"{row[name]}" for name in ("model", *SETUP)), f"{off_by(row):+.1%}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
