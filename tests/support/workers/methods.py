"""Trains some methods for tests/palu/methods/test_methods.py, alone or as one process of several.

    PYTHONPATH=.:tests/palu torchrun --nproc-per-node 2 tests/support/workers/methods.py FOLDER

Every process writes what it found to `FOLDER/rank-N.json`; a step has the same rows for any number
of processes, so its numbers must be the same.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

from transformers import PrinterCallback

from palu.data.pairs import add_alternates
from palu.training.config import PALUConfig
from palu.training.trainer import PALUTrainer
from tests.support import small

RUNS = {
    "npo": {},  # of answers
    "dpo": {},  # of pairs
    "ce_u": {},  # by chunks of logits
    "pdu": {"dual_warmup_epochs": 1, "dual_step_size": 0.1},  # moves a weight between steps
    "rmu": {"layer_id": 0},  # of activations; what comes after that layer is frozen
}


def run(folder: Path, processes: int) -> dict:
    tok = small.tokenizer()
    texts = ["No idea.", "Ask her.", "A cat, or two.", "They.", "Nobody at all."]
    pairs = add_alternates(small.rows(tok), small.examples(), texts, tok, max_length=64)
    found = {}
    for name, own in RUNS.items():
        args = PALUConfig(
            output_dir=str(folder / name),
            method=name,
            **own,
            per_device_train_batch_size=4 // processes,
            num_train_epochs=2,  # 5 rows in steps of 4 end in a step of 1
            learning_rate=0.05,
            optim="sgd",
            max_grad_norm=0,
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        model = small.model(tok, seed=3)
        options = {"train_dataset": pairs, "retain_dataset": small.rows(tok)}
        trainer = PALUTrainer(model, args, **options, processing_class=tok)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        keys = ("forget", "retain", "num_forget", "num_retain")
        logs = [[e[k] for k in keys] for e in trainer.state.log_history if "forget" in e]
        weights = [p.detach().norm().item() for p in model.parameters()]
        found[name] = {"logs": logs, "weights": [*weights, trainer.step_loss.retain_weight]}
    return found


if __name__ == "__main__":
    import torch.distributed

    gc.freeze()  # the Trainer collects at the start of every training
    folder = Path(sys.argv[1])
    found = run(folder, 2)
    rank = torch.distributed.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads abort now and then when Python takes the process down
