"""Trains the cases of tests/palu/training/test_sharding.py sharded by FSDP2, as one of several
processes.

    PYTHONPATH=. torchrun --standalone --nproc-per-node 2 tests/support/workers/sharded.py FOLDER

Every process writes what it found to `FOLDER/rank-N.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from palu.training import sharding
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
ADAPTER = ("--lora-rank", "2", "--reference", "adapter_off")
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
    trainer = distributed.build(small.tokenizer(), folder, processes, name, CASES[name], **more)
    before = numbers(trainer.evaluate()) if name == "live" else None
    trainer.train()
    found = outcome(trainer)
    after = numbers(trainer.evaluate()) if name == "live" else None
    return {**found, "before": before, "after": after}


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
    return {
        "checks": trainer.outcome.checks,
        "kept": kept,
        "put_back": outcome(trainer)["weights"],
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


def main() -> None:
    from accelerate import PartialState

    folder = Path(sys.argv[1])
    state = PartialState(cpu=True)
    processes = state.num_processes
    found: dict = {name: run_case(folder, processes, name, **SHARDED) for name in CASES}
    old = {**SHARDED, "fsdp_config": {"version": 1}}
    found["version 1"] = refused(folder, processes, **old)
    found["checks"] = run_checks(folder, processes, **SHARDED)
    if state.is_main_process:
        distributed.unlearn_words(folder, processes)
    state.wait_for_everyone()
    os.environ |= LAUNCHED
    for more in ((), ADAPTER):
        found[f"unlearn-{len(more)}"] = run_unlearn(folder, processes, *more)
    (folder / f"rank-{state.process_index}.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads abort now and then when Python takes the process down


if __name__ == "__main__":
    main()
