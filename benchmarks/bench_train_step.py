"""What does a whole training step cost, and do all providers train to the same losses?

    python -m benchmarks.bench_train_step --model smollm2-tofu --data tofu
    python -m benchmarks.bench_train_step --model smollm2-tofu --data tofu \\
        --group-by-length library --csv benchmarks/results/train_step_grouped.csv
    python -m benchmarks.bench_train_step ... --repo OTHER_CHECKOUT --csv other.csv

Forward, backward, clipping at norm 1 and AdamW, on batches of TOFU's forget10 with as many retain
examples beside them, in bfloat16 autocast over float32 weights. The providers:

* `released`: a live second model, all logits of both, and the method's formulas over all positions
  (`providers.py`).
* `torch`: what PyTorch alone offers: a live second model, logits of the rows that carry a loss, the
  definitions of `palu_kernels/reference.py` under `torch.compile`, and
  `torch.nn.functional.linear_cross_entropy` for the retain rows, one micro-batch after the other
  like `live`. (liger's and flash-linear-attention's losses need a GPU and have no forget loss;
  cut-cross-entropy has the retain loss alone.)
* `live`: `PALUTrainer.train` with a live second model, from the end of a step to that of the next:
  collating and logging are in it, as collating is for the others.
* `cached`: the same from a `ReferenceCache`, which is built first, in a process of its own; no
  second model.

All providers get the same examples in the same order. The first step makes the optimizer's state
and is not timed; then memory is what the steps after it needed at most over what was there before
them: models, optimizer state and data. The second model itself is therefore not in it; its bytes
(the cache's: all its files, the frozen head among them) are `reference_bytes`.

`--group-by-length library` puts the same examples into batches of like length for `live` and
`cached`; their losses are then of other batches and compared with each other only. `all` does so
for every provider. The exit status is 1 if the losses of providers with the same batches differ.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks import declare, machine, providers, runner, tables, timing
from benchmarks.declare import Case, Provider, Result
from benchmarks.providers import FORGET_ROLE, IGNORE, PREFIX, PRESERVE_ROLE
from benchmarks.tables import Row
from palu import (
    Collator,
    LMHead,
    PALUConfig,
    PALUTrainer,
    load_examples,
    token_roles,
    tokenize_examples,
)

TRAIN_STEP = "train_step"
GROUPED = ", grouped"
MAX_GRAD_NORM = 1.0
# How far a step's losses may be apart between two providers, relative and in nats. Roundings of one
# step are fed into the next one through AdamW, which makes small gradients as large as others; and
# in bfloat16 those of the logits alone make a KL of thousandths between equal models.
TOLERANCE = {"float32": (1e-3, 1e-5), "bfloat16": (5e-2, 1e-2)}
NUMBERS = ("loss", "forget_loss", "preserve_loss", "retain_loss", "gradient_norm")
Batch = dict[str, Tensor]
Examples = list[dict[str, Any]]  # tokenised
Step = Callable[[Batch, Batch], Sequence[Tensor]]  # forget and retain batch -> `NUMBERS`


# ---- the data ------------------------------------------------------------------------------------


def make_batches(rows: Examples, size: int, steps: int, grouped: bool) -> list[Examples]:
    """Return `steps + 1` batches of shuffled examples. The first one, which is not measured, is the
    same either way; the others hold the same examples, with `grouped` put together by length.

    Raises:
        ValueError: there are too few examples.
    """
    needed = (steps + 1) * size
    if len(rows) < needed:
        raise ValueError(
            f"{steps} steps of {size} rows and one before them take {needed} rows; the data has "
            f"{len(rows)}"
        )
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator).tolist()[:needed]
    first, rest = order[:size], order[size:]
    turn = list(range(steps))
    if grouped:
        rest.sort(key=lambda n: len(rows[n]["input_ids"]))
        turn = torch.randperm(steps, generator=generator).tolist()
    parts = [first, *(rest[n * size : (n + 1) * size] for n in turn)]
    return [[rows[n] for n in part] for part in parts]


def prepare(benchmark: declare.Benchmark, case: Case, task: dict[str, Any]) -> None:
    """Write the batches of both kinds, and the cache where a provider reads one."""
    try:
        from palu.run_record import choose_template
    except ImportError:  # an older checkout
        from palu.runs import choose_template

    given, folder = task["options"], Path(task["folder"])
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    template, data = choose_template(Path(given["model"])), Path(given["data"])
    sets = {
        "forget": load_examples(str(data / "annotated" / "forget10"), require_spans=True),
        "retain": load_examples(str(data / "full.json[:400]"), require_spans=False),
    }
    tokens = {
        name: tokenize_examples(examples, tokenizer, max_length=512, template=template)
        for name, examples in sets.items()
    }
    for grouped in (False, True):
        batches = {
            name: make_batches(rows, case.rows, given["steps"], grouped)
            for name, rows in tokens.items()
        }
        content = {"pad_id": Collator(tokenizer).pad_id, **batches}
        (folder / f"batches-{grouped}.json").write_text(json.dumps(content), encoding="utf-8")
    if any(name.startswith("cached") for name in task["providers"]):
        by_trainer(Session(case, False, task), "cached", steps=0)


# ---- one measurement -----------------------------------------------------------------------------


class Session:
    """The model and the batches of one process."""

    def __init__(self, case: Case, grouped: bool, task: dict[str, Any]) -> None:
        self.folder, self.options = Path(task["folder"]), task["options"]
        batches = (self.folder / f"batches-{grouped}.json").read_text(encoding="utf-8")
        self.batches = json.loads(batches)
        self.device = torch.device(task["device"])
        self.top_k, self.size = case.k, case.rows
        self.dtype = None if case.dtype == "float32" else getattr(torch, case.dtype)
        self.collate = Collator(self.batches["pad_id"])
        path = self.options["model"]
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model: PreTrainedModel = model.to(self.device)

    def examples(self, name: str) -> Examples:
        return [row for batch in self.batches[name] for row in batch]

    def pairs(self) -> Iterator[tuple[Batch, Batch]]:
        """The forget and the retain batch of each step."""
        for rows in zip(self.batches["forget"], self.batches["retain"], strict=True):
            yield tuple(
                {name: t.to(self.device) for name, t in self.collate(part).items()} for part in rows
            )

    def autocast(self) -> contextlib.AbstractContextManager:
        on = self.dtype is not None
        return torch.autocast(self.device.type, self.dtype) if on else contextlib.nullcontext()


def measure(benchmark: declare.Benchmark, case: Case, name: str, task: dict[str, Any]) -> Result:
    """Train in this process."""
    session = Session(case, name.endswith(GROUPED), task)
    kind = name.removesuffix(GROUPED)
    train = by_trainer if kind in ("live", "cached") else by_hand
    samples = train(session, kind)
    pairs = list(session.pairs())
    samples["positions"] = [sum(b["input_ids"].numel() for b in pair) for pair in pairs]
    samples["real_tokens"] = [sum(int(b["attention_mask"].sum()) for b in pair) for pair in pairs]
    return Result(samples, declare.OK, machine.environment(session.device))


def by_hand(session: Session, kind: str) -> dict[str, list[float]]:
    model, options = session.model.train(), session.options
    losses_of = {"released": Released, "torch": Torch}[kind](session)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options["learning_rate"], weight_decay=0.0)
    pairs = session.pairs()

    def step() -> list[float]:
        losses = losses_of(*next(pairs))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return [float(number) for number in (sum(losses), *losses, norm)]

    steps, seconds, process = [step()], [], []
    with timing.PeakMemory(session.device) as peak:
        for _ in range(options["steps"]):
            numbers, taken = timing.timed(step, session.device)
            steps.append(numbers)
            seconds.append(taken.wall)
            process.append(taken.process)
    samples = _samples(steps, seconds, peak, _bytes(losses_of.reference))
    return samples | ({"cpu_seconds": process} if session.device.type == "cpu" else {})


def _samples(
    steps: Sequence[Sequence[float]],
    seconds: list[float],
    peak: timing.PeakMemory,
    reference_bytes: int,
) -> dict[str, list[float]]:
    numbers = dict(zip(NUMBERS, map(list, zip(*steps, strict=True)), strict=True))
    memory = {"peak_bytes": [peak.extra], "bytes_before": [peak.before]}
    return {"seconds": seconds, **numbers, **memory, "reference_bytes": [reference_bytes]}


class Released:
    """A second model beside the first, all logits of both, each batch in a call of its own."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.reference = copy.deepcopy(session.model).eval().requires_grad_(False)

    def __call__(self, batch: Batch, retain: Batch) -> list[Tensor]:
        """Return the forget, preserve and retain loss; the gradients are in the model."""
        model = self.session.model
        with self.session.autocast():
            logits = self._logits(model, batch)
            with torch.no_grad():
                ref_logits = self._logits(self.reference, batch)
            labels = batch["labels"]
            terms = providers.released_terms(logits, ref_logits, labels, top_k=self.session.top_k)
            retain_logits = self._logits(model, retain)
            kept = providers.released_retain(retain_logits, retain["input_ids"], retain["labels"])
        (sum(terms) + kept).backward()
        return [loss.detach() for loss in (*terms, kept)]

    @staticmethod
    def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs, use_cache=False).logits


class Torch(Released):
    """The best that PyTorch alone has: logits of the rows that carry a loss, the definitions under
    `torch.compile`, `linear_cross_entropy` for the retain rows; a second model beside the first,
    and forget and retain micro-batches one after the other."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.loss = torch.compile(self._loss, dynamic=True)

    def __call__(self, batch: Batch, retain: Batch) -> list[Tensor]:
        model, dtype = self.session.model, self.session.dtype
        with self.session.autocast():
            roles = token_roles(batch["labels"], PREFIX)[:, 1:]
            hidden = self._hidden(model, batch)
            with torch.no_grad():
                ref_hidden = self._hidden(self.reference, batch)
            terms = []
            for role, name in ((FORGET_ROLE, "flatten"), (PRESERVE_ROLE, "kl_reverse")):
                logits = model.lm_head(hidden[roles == role])
                with torch.no_grad():
                    ref_logits = self.reference.lm_head(ref_hidden[roles == role])
                terms.append(self.loss(name, logits, ref_logits))
        sum(terms).backward()
        with self.session.autocast():
            answers = retain["labels"][:, 1:] != IGNORE
            rows, targets = self._hidden(model, retain)[answers], retain["input_ids"][:, 1:]
            weight = model.lm_head.weight
            if dtype is not None:
                rows, weight = rows.to(dtype), weight.to(dtype)
            kept = F.linear_cross_entropy(rows, weight, targets[answers])
        kept.backward()
        return [loss.detach().float() for loss in (*terms, kept)]

    def _loss(self, name: str, logits: Tensor, ref_logits: Tensor) -> Tensor:
        k = self.session.top_k
        return providers.row_losses(name, logits, k=k, ref_logits=ref_logits).mean()

    @staticmethod
    def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return `[B, T - 1, D]` of the rows that predict a token."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]


def _bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# ---- PALUTrainer ---------------------------------------------------------------------------------


class InOrder:
    """A data set that hands out its examples one after the other once training begins, whichever is
    asked for: the trainer's own order, which differs from the other providers', does not matter."""

    def __init__(self, rows: Examples) -> None:
        self.rows, self.next = rows, None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.next is None:
            return self.rows[index]
        if self.next == len(self.rows):
            raise RuntimeError(f"the trainer takes more than the {len(self)} examples of the steps")
        self.next += 1
        return self.rows[self.next - 1]


class Clock(TrainerCallback):
    """Begins to hand out the examples in order; notes when each step ends, and the memory of those
    after the first."""

    def __init__(self, session: Session, *sets: InOrder) -> None:
        self.session, self.sets = session, sets
        self.peak = timing.PeakMemory(session.device)
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        for rows in self.sets:
            rows.next = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.session.device.type != "cpu":
            torch.accelerator.synchronize(self.session.device)
        if self.last is not None:
            self.seconds.append(time.perf_counter() - self.last)
        else:
            self.peak.__enter__()
        self.last = time.perf_counter()


def by_trainer(
    session: Session, kind: str, steps: int | None = None
) -> dict[str, list[float]] | None:
    """With `steps` it only takes a step: it builds the cache that it does not find."""
    forget, retain = (InOrder(session.examples(name)) for name in ("forget", "retain"))
    clock, options = Clock(session, forget, retain), session.options
    LMHead.from_model(session.model)  # refuses a head with which another path would be measured
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = PALUConfig(
            output_dir=folder,
            reference=kind,
            reference_cache=str(session.folder / "cache") if kind == "cached" else None,
            top_k=session.top_k,
            prefix_length=PREFIX,
            max_steps=1 + (options["steps"] if steps is None else steps),
            per_device_train_batch_size=session.size,
            learning_rate=options["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            bf16=session.dtype == torch.bfloat16,
            use_cpu=session.device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = PALUTrainer(
            session.model,
            settings,
            train_dataset=forget,
            retain_dataset=retain,
            data_collator=session.collate,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        clock.peak.__exit__()
    if steps is not None:
        return None
    if (forget.next, retain.next) != (len(forget), len(retain)):
        raise RuntimeError(f"the trainer took {forget.next} forget and {retain.next} retain rows")
    numbers = [
        [entry[name] for name in ("forget", "preserve", "retain", "grad_norm")]
        for entry in trainer.state.log_history
        if "grad_norm" in entry
    ]
    numbers = [[sum(step[:3]), *step] for step in numbers]
    if kind == "live":
        reference_bytes = _bytes(session.model)
    else:
        files = (session.folder / "cache").rglob("*")
        reference_bytes = sum(file.stat().st_size for file in files if file.is_file())
    return _samples(numbers, clock.seconds, clock.peak, reference_bytes)


# ---- the run -------------------------------------------------------------------------------------


def disagreements(rows: list[Row]) -> list[str]:
    """Say which losses differ, of any process and step, among providers that had the same batches;
    add the largest relative difference of each provider's loss as `loss_error`."""
    wrong, added = [], []
    measured = {(row["provider"], row["metric"]): row for row in rows if row["samples"]}
    for grouped in (False, True):
        names = [
            name
            for name, metric in measured
            if metric == "loss" and name.endswith(GROUPED) == grouped
        ]
        for provider in names:
            off = 0.0
            for metric in NUMBERS:
                row = measured[provider, metric]
                truth = tables.by_process(measured[names[0], metric])[0]
                relative, absolute = TOLERANCE[row["dtype"]]
                for process in tables.by_process(row):
                    for step, (a, b) in enumerate(zip(process, truth, strict=True)):
                        if metric == "loss" and b:
                            off = max(off, abs(a - b) / abs(b))
                        if not abs(a - b) <= relative * abs(b) + absolute:  # a NaN too
                            wrong.append(
                                f"step {step}: the {metric} of {provider} is {a:.6g}, that of "
                                f"{names[0]} {b:.6g}"
                            )
            row = measured[provider, "loss"]
            added.append(tables.row(row, provider, "loss_error", [[off]], row["status"], row))
    rows += added
    return wrong


def losses(rows: Sequence[Row]) -> str:
    """Return the loss of every step, a column a provider."""
    columns = {
        row["provider"]: tables.by_process(row)[0] for row in rows if row["metric"] == "loss"
    }
    steps = zip(*columns.values(), strict=True)
    lines = [[str(step), *(f"{loss:.5f}" for loss in own)] for step, own in enumerate(steps)]
    return tables.text(["step", *(f"loss, {name}" for name in columns)], lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, runner.positive
    add("--model", type=lambda path: Path(path).resolve(), required=True, help="model folder")
    add("--data", type=lambda path: Path(path).resolve(), required=True, help="TOFU's files")
    add("--steps", type=count, default=6, help="timed steps, after one that is not")
    add("--batch-size", type=count, default=8, help="forget examples, and retain examples")
    add("--top-k", type=count, default=1000)
    add("--learning-rate", type=float, default=1e-5)
    add("--group-by-length", choices=BY_LENGTH, default="none")


def _old_torch(device: torch.device) -> str | None:
    return providers.no_compiler(device) or providers.old_torch(device)


OWN = {name: Provider(measure) for name in ("live", "cached")}
OTHERS = {"released": Provider(measure), "torch": Provider(measure, lacks=_old_torch)}
BY_LENGTH = {
    "none": (TRAIN_STEP, OTHERS | OWN),
    "library": (f"{TRAIN_STEP}_library_grouped", OTHERS | {n + GROUPED: OWN[n] for n in OWN}),
    "all": (f"{TRAIN_STEP}_grouped", {n + GROUPED: p for n, p in (OTHERS | OWN).items()}),
}


def cases(given: argparse.Namespace) -> list[Case]:
    kernel, _ = BY_LENGTH[given.group_by_length]
    setting = f"model={given.model.name.replace(' ', '-')} learning_rate={given.learning_rate}"
    sizes = (kernel, None, None, given.batch_size, given.top_k)
    return [Case(*sizes, dtype, setting) for dtype in given.dtype]


BENCHMARK = declare.Benchmark(
    name="bench_train_step",
    description=__doc__,
    kernels=dict(BY_LENGTH.values()),
    add_options=add_options,
    cases=cases,
    dtypes=("bfloat16",),
    axes=(),
    csv="train_step.csv",
    prepare=prepare,
    measure=measure,
    check=disagreements,
    summary=losses,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return runner.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())
