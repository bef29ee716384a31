"""Trains the cases of tests/palu/training/test_distributed.py, alone or as one process of several.

    PYTHONPATH=. torchrun --nproc-per-node 2 tests/support/workers/distributed.py FOLDER TARGET

TARGET is where `run_stopped` stops. Every process writes what it found to `FOLDER/rank-N.json`. A
case has the same total batch for any number of processes, so its numbers must be the same.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
from pathlib import Path

import torch
from transformers import PrinterCallback

from palu.data.examples import tokenize_examples
from palu.data.records import Example
from palu.data.template import Template
from palu.demo.people import write_jsonl
from palu.reference.cache import CacheError
from palu.training.config import PALUConfig
from palu.training.trainer import PALUTrainer
from palu.unlearn import save_model
from tests.support import small, training

TOTAL = 12  # rows of a step
# name -> (options, how the case is built); 14 rows in steps of 12 end in a step of 2.
CASES: dict[str, dict] = {
    "live": {},
    "tied": {"model": {"tie_word_embeddings": True}, "accumulation": 2},
    "cached": {"reference": "cached", "retain_loss": "kl"},
    "lora": {"reference": "adapter_off", "lora": True, "accumulation": 2},
    "logits": {"hooked": True},
    "bare": {"retain": False, "preserve": "none", "rows": 13},
    "rare": {"retain": False, "preserve": "none", "every": 9, "accumulation": 2},
    "lengths": {"train_sampling_strategy": "group_by_length", "retain_batch": 2, "rows": 31},
    "adamw": {"optim": "adamw_torch", "max_grad_norm": 1.0, "learning_rate": 1e-3},
}
STRATEGIES = ("random", "group_by_length")
EVALUATIONS = {"eval": {}, "eval_cached": {"reference": "cached", "retain_loss": "kl"}}


def forget_examples(count: int, every: int = 1) -> list[Example]:
    """Rows of many lengths, every third of them without anything to forget; with `every` only that
    many have something."""
    made = []
    for i in range(count):
        question, answer, spans = small.FACTS[i % len(small.FACTS)]
        answer = answer + " Yes." * (i % 4)
        spans = () if i % 3 == 2 or i % every else spans
        made.append(Example(str(i), f"{question} {i}", answer, spans, {}))
    return made


def rows(tok, count: int, every: int = 1) -> list[dict]:
    return tokenize_examples(forget_examples(count, every), tok, max_length=64)


def build(tok, folder: Path, processes: int, name: str, case: dict, **more) -> PALUTrainer:
    case = dict(case)
    model = small.model(tok, seed=3, **case.pop("model", {}))
    if case.pop("lora", False):
        import peft

        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(5)
        model = peft.get_peft_model(model, settings)
    if case.pop("hooked", False):
        model.lm_head.register_forward_hook(lambda *_: None)
    accumulation = case.pop("accumulation", 1)
    data = rows(tok, case.pop("rows", 14), case.pop("every", 1))
    retain = rows(tok, 23)[14:] if case.pop("retain", True) else None
    options = {
        "per_device_train_batch_size": TOTAL // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "objective": "entropy",
        "top_k": 7,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "ddp_timeout": 60,
    }
    if "retain_batch" in case:  # of a step
        case["retain_batch_size"] = TOTAL // processes * case.pop("retain_batch")
    options |= {"output_dir": str(folder / f"{name}-{processes}"), **case, **more}
    made = PALUTrainer(
        model,
        PALUConfig(**options),
        train_dataset=data,
        retain_dataset=retain,
        processing_class=tok,
    )
    made.remove_callback(PrinterCallback)
    return made


def outcome(trainer: PALUTrainer) -> dict:
    """Trained weights and the curve."""
    names = ("loss", "forget", "preserve", "retain", "num_forget", "num_preserve", "num_retain")
    logs = [[e[n] for n in names] for e in trainer.state.log_history if "forget" in e]
    trained = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
    return {"weights": torch.cat(trained).tolist(), "logs": logs}


def run_cases(folder: Path, processes: int, per_device_eval_batch_size: int = 3) -> dict[str, dict]:
    tok = small.tokenizer()
    found: dict[str, dict] = {}
    for name, case in CASES.items():
        trainer = build(tok, folder, processes, name, case)
        trainer.train()
        found[name] = outcome(trainer)
    for name, case in EVALUATIONS.items():
        size = {"per_device_eval_batch_size": per_device_eval_batch_size}
        trainer = build(tok, folder, processes, name, case, **size)
        metrics = trainer.evaluate()
        found[name] = {k: v for k, v in metrics.items() if k.startswith(("eval_", "num_"))}
    return found


def run_micro_batch(folder: Path, processes: int, micro_batches: int) -> dict:
    """Means of micro-batches of 2: the same whoever holds them, as long as none is uneven."""
    case = {"normalization": "micro_batch", "rows": 24}
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": micro_batches}
    trainer = build(small.tokenizer(), folder, processes, "micro", case, **options)
    trainer.train()
    return outcome(trainer)


def run_step_of_16(folder: Path, processes: int, micro_batches: int) -> dict:
    """The gradient of one step of 16 examples, as plain SGD leaves it in the weights."""
    options = {"per_device_train_batch_size": 16 // processes // micro_batches}
    options |= {"gradient_accumulation_steps": micro_batches, "max_steps": 1, "learning_rate": 1.0}
    name = f"sixteen-{micro_batches}"
    trainer = build(small.tokenizer(), folder, processes, name, {"rows": 16}, **options)
    trainer.train()
    return outcome(trainer)


def run_stopped(folder: Path, processes: int, target: float) -> dict:
    """A run of four steps that stops where its probability is at most `target`."""
    tok = small.tokenizer()
    every = small.rows(tok)
    size = {"per_device_train_batch_size": 4 // processes, "num_train_epochs": 4}
    options = {"learning_rate": 1e-3, "logging_steps": 2, "stop_at_forget_prob": target}
    args = training.config(folder / "stopped", **size, **options)
    data = {"forget": [*every[:3], every[4]], "retain": every[3:4]}
    made = training.trainer(tok, args, model=training.sure_model(tok), **data)
    made.train()
    return {"step": made.state.global_step, "logs": made.state.log_history}


def run_broken_cache(folder: Path, processes: int) -> str:
    """What a process says when the main one finds a cache that it cannot use."""
    place = folder / "no-cache"
    place.mkdir(exist_ok=True)
    (place / "manifest.json").write_text("{}")
    case = {"reference": "cached", "reference_cache": str(place)}
    try:
        build(small.tokenizer(), folder, processes, "broken", case).train()
    except CacheError as error:
        return str(error)
    return "no error"


def run_uneven_batches(folder: Path, processes: int) -> str:
    """What is said of batches that would leave one process without any."""
    try:
        build(
            small.tokenizer(),
            folder,
            processes,
            "uneven",
            {"accelerator_config": {"even_batches": False}},
        )
    except ValueError as error:
        return str(error)
    return "no error"


def run_resumed(folder: Path, processes: int, strategy: str) -> dict:
    """A run from the middle of its second epoch on, into the third."""
    case = {"rows": 40, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 6}
    case |= {"lr_scheduler_type": "linear", "optim": "adamw_torch", "learning_rate": 1e-2}
    case |= {"model": {"attention_dropout": 0.1}, "train_sampling_strategy": strategy}
    tok, name = small.tokenizer(), f"resumed-{strategy}"
    whole = build(tok, folder, processes, name, case)
    whole.train()
    checkpoint = Path(whole.args.output_dir, "checkpoint-6")
    again = build(tok, folder, processes, name, case)
    again.train(resume_from_checkpoint=str(checkpoint))
    return {"whole": outcome(whole), "again": outcome(again)}


def unlearn_words(folder: Path, processes: int) -> list[str]:
    """A command line of `palu unlearn` with data and a model, which are made if need be."""
    tok = small.tokenizer()
    if not (folder / "forget.jsonl").exists():
        records = [
            {
                "question": e.question,
                "answer": e.answer,
                "spans": [{"start": s, "end": t} for s, t in e.spans],
            }
            for e in forget_examples(18)
        ]
        write_jsonl(folder / "forget.jsonl", records[:14])
        write_jsonl(folder / "retain.jsonl", records[14:])
        save_model(folder / "model", small.model(tok, seed=3), tok, Template(), made_by="test")
    words = f"unlearn --model {folder}/model --forget {folder}/forget.jsonl --device cpu --epochs 2"
    words += f" --retain {folder}/retain.jsonl --output {folder}/out-{processes}"
    words += f" --batch-size {TOTAL // processes} --learning-rate 1e-3 --objective entropy"
    return [*words.split(), "--reference", "cached", "--top-k", "7"]


def run_unlearn(folder: Path, processes: int) -> dict:
    return run_words(unlearn_words(folder, processes))


def run_words(words: list[str]) -> dict:
    """The exit status of a command of `palu`, and what it says."""
    from palu.cli import app as cli

    sys.argv = ["palu", *words]
    said = io.StringIO()
    status = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    return {"status": status, "said": said.getvalue()}


def main() -> None:
    from accelerate import PartialState

    gc.freeze()  # the Trainer collects at the start of every training
    folder, target = Path(sys.argv[1]), float(sys.argv[2])
    state = PartialState(cpu=True)
    processes = state.num_processes
    if state.is_main_process:
        unlearn_words(folder, processes)
    state.wait_for_everyone()
    found = run_cases(folder, processes)
    found["micro_batch"] = run_micro_batch(folder, processes, 12 // 2 // processes)
    if 16 % processes == 0:
        found["sixteen"] = run_step_of_16(folder, processes, 1)
        found["stopped"] = run_stopped(folder, processes, target)
    found["uneven_batches"] = run_uneven_batches(folder, processes)
    found["broken_cache"] = run_broken_cache(folder, processes)
    for strategy in STRATEGIES:
        found[f"resumed-{strategy}"] = run_resumed(folder, processes, strategy)
    found["unlearn"] = run_unlearn(folder, processes)
    (folder / f"rank-{state.process_index}.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads abort now and then when Python takes the process down


if __name__ == "__main__":
    main()
