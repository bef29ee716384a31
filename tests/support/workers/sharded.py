"""Trains the cases of tests/palu/training/test_sharding.py sharded by FSDP2, as one of several
processes.

    PYTHONPATH=. torchrun --nproc-per-node 2 tests/support/workers/sharded.py FOLDER WHAT

WHAT is `all`; or `resume`, which goes on from the checkpoints of another launch, by any number of
processes. Every process writes what it found to `FOLDER/WHAT-rank-N.json`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from palu.training import checkpoints, nonfinite, ranks, sharding
from palu.training.trainer import PALUTrainer
from tests.support import small, training
from tests.support.workers import distributed

SHARDED = {"fsdp": "full_shard", "fsdp_config": {"version": 2}}
CASES: dict[str, dict] = {
    "live": distributed.CASES["live"],
    "tied": distributed.CASES["tied"],
    "cached": distributed.CASES["cached"],
    "lora": distributed.CASES["lora"],
    "rare": distributed.CASES["rare"],
    "clipped": {**distributed.CASES["adamw"], "max_grad_norm": 0.5, "accumulation": 2},
}
# name -> (how its checkpoints are sharded, changes); SGD's optimizer has no state.
SAVED: dict[str, tuple[str, dict]] = {
    "full": ("FULL_STATE_DICT", {}),
    "full-sgd": ("FULL_STATE_DICT", {"optim": "sgd"}),
    "full-lora": ("FULL_STATE_DICT", {"lora": True, "reference": "adapter_off"}),
    "shards": ("SHARDED_STATE_DICT", {}),
    "shards-lora": ("SHARDED_STATE_DICT", {"lora": True, "reference": "adapter_off"}),
}
ADAPTER = ("--lora-rank", "2", "--reference", "adapter_off")
DAMAGED = "optimizer_0/__1_0.distcp"
LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # by `accelerate launch` too
NAMES = ("loss", "forget", "preserve", "retain", "num_forget", "num_preserve", "num_retain")


def outcome(trainer: PALUTrainer) -> dict:
    """Trained weights, which are gathered, and the curve."""
    logs = [[e[n] for n in NAMES] for e in trainer.state.log_history if "forget" in e]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    kinds = sorted({type(p).__name__ for p in trained})
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trained]
    weights = torch.cat([p.detach().flatten() for p in whole])
    return {"weights": weights.tolist(), "logs": logs, "kinds": kinds}


def numbers(metrics: dict) -> dict:
    return {k: v for k, v in metrics.items() if "per_second" not in k and "time" not in k}


def run_case(folder: Path, processes: int, name: str, **more) -> dict:
    """Train one case, and with `live` evaluate before and after."""
    case = dict(CASES[name])
    if processes == 4 and "accumulation" in case:
        case["accumulation"] = 3  # a step has 12 rows
    trainer = distributed.build(small.tokenizer(), folder, processes, name, case, **more)
    before = numbers(trainer.evaluate()) if name == "live" else None
    trainer.train()
    found = outcome(trainer)
    after = numbers(trainer.evaluate()) if name == "live" else None
    return {**found, "before": before, "after": after}


def run_saved(folder: Path, processes: int, name: str, resume: bool, *, sharded: bool) -> dict:
    """A run of four steps that is saved after two, or that goes on from there."""
    kind, changes = SAVED[name]
    case = {"rows": 24, "optim": "adamw_torch", "learning_rate": 1e-2, **changes}
    case |= {"lr_scheduler_type": "linear", "max_grad_norm": 1.0}
    if sharded:
        case |= {"fsdp": "full_shard", "fsdp_config": {"version": 2, "state_dict_type": kind}}
    if sharded and not resume:
        case |= {"save_strategy": "steps", "save_steps": 2}
    case["output_dir"] = str(folder / f"saved-{name}")
    trainer = distributed.build(small.tokenizer(), folder, processes, name, case)
    trainer.train(str(folder / f"saved-{name}" / "checkpoint-2") if resume else None)
    return outcome(trainer)


def run_resumed(folder: Path, processes: int) -> dict:
    return {name: run_saved(folder, processes, name, True, sharded=True) for name in SAVED}


def run_refused(folder: Path, processes: int) -> dict[str, str]:
    """What is said of checkpoints that cannot be resumed from: sharded in another way; one that a
    process alone finds damaged."""
    said = {}
    for name, kind in (("other kind", "FULL_STATE_DICT"), ("damaged", "SHARDED_STATE_DICT")):
        config = {"version": 2, "state_dict_type": kind}
        case = {"rows": 24, "optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0}
        case |= {"lr_scheduler_type": "linear", "fsdp": "full_shard", "fsdp_config": config}
        trainer = distributed.build(small.tokenizer(), folder, processes, "refused", case)
        read = checkpoints.check_digests

        def check(checkpoint, record, read=read, name=name, rank=trainer.args.process_index):
            if name == "damaged" and rank == 1:
                record = {**record, "digests": {**record["digests"], DAMAGED: "0"}}
            read(checkpoint, record)

        checkpoints.check_digests = check
        try:
            trainer.train(str(folder / "saved-shards" / "checkpoint-2"))
        except checkpoints.CheckpointError as error:
            said[name] = str(error)
        finally:
            checkpoints.check_digests = read
    return said


def run_disagreeing(folder: Path, processes: int) -> dict[str, str]:
    """What is said where process 1 is about to do something else than the others."""
    tok, said = small.tokenizer(), {}
    other = int(os.environ["RANK"]) == 1
    known = ranks.versions

    def versions() -> dict:
        return {**known(), "torch": "2.0.0"} if other else known()

    cases = {
        "setting": {"learning_rate": 0.06 if other else 0.05},
        "rows": {"rows": 13 if other else 14},
        "shape": {"model": {"intermediate_size": 36 if other else 32}},
        "adapter": {"lora": True, "reference": "adapter_off"},
        "order": {"reference": "cached", "retain_loss": "kl", "output_dir": str(folder / "cache")},
        "weights": {},
        "version": {},
    }
    for name, case in cases.items():
        trainer = distributed.build(tok, folder, processes, name, {**case, **SHARDED})
        if name == "order" and other:
            trainer.train_dataset = trainer.train_dataset[::-1]
        if name in ("weights", "adapter") and other:
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            trained[-1].data.mul_(1.5).add_(0.1)
        ranks.versions = versions if name == "version" else known
        try:
            trainer.train()
        except ranks.ProcessesDiffer as error:
            said[name] = str(error)
    ranks.versions = known
    return said


def run_checks(folder: Path, processes: int, **more) -> dict:
    """What a model that knows its answers knows and says, and its best weights put back."""
    tok = small.tokenizer()
    size = {"per_device_train_batch_size": 4 // processes, "num_train_epochs": 2, "checks": "ends"}
    args = training.config(folder / "checks", **size, **more)
    rows = small.rows(tok)
    data = {"forget": [*rows[:3], rows[4]], "retain": rows[3:4]}
    trainer = training.trainer(tok, args, model=training.sure_model(tok), **data)
    trainer.train()
    checks = trainer._checks
    checks._keep(0.5)
    kept = outcome(trainer)["weights"]
    sharding.reshard(trainer.model)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    checks._put_back()
    put_back = outcome(trainer)["weights"]
    sharding.reshard(trainer.model)
    *_, last = trainer.model.parameters()  # a NaN in the part of one process
    part = last.data.to_local() if hasattr(last, "to_local") else last.data
    if trainer.args.process_index == processes - 1:
        part.view(-1)[-1:] = float("nan")
    try:
        nonfinite.check_weights(trainer.model, 2)
        said = "finite"
    except FloatingPointError as error:
        said = str(error)
    return {
        "nan": said,
        "checks": trainer.outcome.checks,
        "kept": kept,
        "put_back": put_back,
        "best": list(checks.best),
    }


def run_unlearn(folder: Path, processes: int, *more: str) -> dict:
    """`palu unlearn` as `accelerate launch --use_fsdp` runs it; what it says."""
    name = f"out-{len(more)}-{processes}"
    words = distributed.unlearn_words(folder, processes)
    words[words.index("--output") + 1] = str(folder / name)
    words[words.index("--reference") + 1] = "live"
    return {"name": name, **distributed.run_words([*words, "--checks", "epochs", *more])}


def refused(folder: Path, processes: int, **more) -> str:
    """What is said of settings that cannot be sharded on CPUs."""
    try:
        distributed.build(small.tokenizer(), folder, processes, "refused", {}, **more)
    except ValueError as error:
        return str(error)
    return "no error"


def run_all(folder: Path, state: PartialState) -> dict:
    processes = state.num_processes
    found: dict = {name: run_case(folder, processes, name, **SHARDED) for name in CASES}
    old = {**SHARDED, "fsdp_config": {"version": 1}}
    found["version 1"] = refused(folder, processes, **old)
    found["checks"] = run_checks(folder, processes, **SHARDED)
    for name in SAVED:
        found[f"saved-{name}"] = run_saved(folder, processes, name, False, sharded=True)
    found["resumed"] = run_resumed(folder, processes)
    found["disagreeing"] = run_disagreeing(folder, processes)
    found["refused"] = run_refused(folder, processes)
    if state.is_main_process:
        distributed.unlearn_words(folder, processes)
    state.wait_for_everyone()
    os.environ |= LAUNCHED
    for more in ((), ADAPTER):
        found[f"unlearn-{len(more)}"] = run_unlearn(folder, processes, *more)
    return found


def main() -> None:
    gc.freeze()  # the Trainer collects at the start of every training
    folder, what = Path(sys.argv[1]), sys.argv[2]
    state = PartialState(cpu=True)
    resume = what == "resume"
    found = run_resumed(folder, state.num_processes) if resume else run_all(folder, state)
    (folder / f"{what}-rank-{state.process_index}.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads abort now and then when Python takes the process down


if __name__ == "__main__":
    main()
