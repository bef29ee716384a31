"""`train.py settings=FILE.json ...`: train with what the registries hold, and report."""

import json
import sys
from pathlib import Path

import torch
from data import DATASET_REGISTRY
from torch.nn.utils.rnn import pad_sequence
from trainer import load_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer


class Pairs(torch.utils.data.Dataset):
    """Every forget row with the retain row of the same number."""

    def __init__(self, forget, retain):
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, row):
        return {"forget": self.forget[row], "retain": self.retain[row % len(self.retain)]}


def collate(items):
    batch = {}
    for part in ("forget", "retain"):
        columns = {
            key: [item[part][key] for item in items]
            for key in ("input_ids", "labels", "attention_mask")
        }
        padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        batch[part] = {
            key: pad_sequence(value, batch_first=True, padding_value=padding[key])
            for key, value in columns.items()
        }
    return batch


def main():
    chosen = [word for word in sys.argv[1:] if word.startswith("settings=")]
    settings = json.loads(Path(chosen[0].removeprefix("settings=")).read_text())
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    shared = {"tokenizer": tokenizer, "template_args": settings["template_args"]}
    sets = []
    for part in ("forget", "retain"):
        arguments = dict(settings[part])
        sets.append(DATASET_REGISTRY[arguments.pop("handler")](**arguments, **shared))
    trainer = load_trainer(
        **settings["trainer"],
        model=AutoModelForCausalLM.from_pretrained(settings["model"]),
        tokenizer=tokenizer,
        train_dataset=Pairs(*sets),
        data_collator=collate,
    )
    trainer.train()
    report = {
        "arguments": sys.argv,
        "logs": trainer.state.log_history,
        "modules": sorted(name for name in sys.modules if name.startswith("palu")),
    }
    Path(settings["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
