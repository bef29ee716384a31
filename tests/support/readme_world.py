"""The names that README's examples take for granted, small; README's own two records as data.

Run as a script it is one process of the example for several: `readme_world.py FOLDER NUMBER`.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from palu.data.collator import Collator
from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.demo.models import build_tokenizer
from tests.support import ROOT


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# Every example of every page, by the page and its place on it.
EXAMPLES = {
    (name, number): code
    for name in ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").iterdir()))]
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page(name), re.S))
}
LOOP, FSDP_LOOP, TRAINER = (("README.md", number) for number in range(3))
FSDP = ("docs/distributed.md", 0)
ONE_MORE_LOSS, DISTRIBUTED, LORA = (("docs/training.md", number) for number in range(3))
HIDDEN, METHOD = ("docs/memory.md", 0), ("docs/methods.md", 0)
OPERATORS, REPORT = ("docs/kernels.md", 0), ("docs/report.md", 0)
ANNOTATION = ("docs/annotation.md", 0)
ATTACKS = ("docs/attacks.md", 0)
SHARDED = ("docs/distributed.md", 1)  # run by the ranks of palu_kernels/test_vocabulary.py
RECORDS = [
    json.loads(line)
    for line in re.findall(r'^\{"(?:question|text)".*\}$', page("docs/data.md"), re.M)
]


def world(folder: Path, rank: int = 0) -> dict:
    """Writes the data files into `folder`. `rank` decides which of the two rows comes first in
    `forget_steps`, whose micro-batches are of one row."""
    for name in ("forget", "retain"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    tokenizer = build_tokenizer([json.dumps(record) for record in RECORDS], vocab_size=300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,  # or every distribution is flat from the start
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    data = load_examples(folder / "forget.jsonl", require_spans=True)
    rows = tokenize_examples(data, tokenizer, max_length=64)
    collate = Collator(tokenizer)
    return {
        "tokenizer": tokenizer,
        "model": model,
        "torch": torch,
        "rows": rows,
        "frozen_original": copy.deepcopy(model).eval(),
        "forget_loader": [collate(rows)] * 2,
        "forget_steps": [[collate([rows[rank]]), collate([rows[1 - rank]])]] * 2,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }


Example = tuple[str, int]


def run(example: Example, names: dict, edit: Callable[[str], str] = str) -> None:
    """An example with `names`."""
    exec(compile(edit(EXAMPLES[example]), f"{example[0]}, example {example[1]}", "exec"), names)


def prepare(number: Example, names: dict) -> dict:
    """The names that an example before leaves behind, which has not trained."""
    run(number, given := names | {"forget_loader": [], "forget_steps": []})
    return names | {name: given[name] for name in given if name not in names}


def sgd(example: str) -> str:
    """The example with the optimizer of `world`, in the process group that there is (one after
    another would meet under the same address)."""
    optimizer = "torch.optim.AdamW(model.parameters(), lr=1e-5)"
    assert optimizer in example
    example = re.sub(r"^.*init_process_group\(\)$", "", example, count=1, flags=re.M)
    return example.replace(optimizer, "torch.optim.SGD(model.parameters(), lr=0.1)")


def main(place: Path) -> None:
    rank = int(os.environ["RANK"])
    (place / str(rank)).mkdir()
    for name, example in {"ddp": DISTRIBUTED, "fsdp": FSDP, "fsdp_loop": FSDP_LOOP}.items():
        names = prepare(LOOP, world(place / str(rank), rank))
        run(example, names, str if name == "ddp" else sgd)
        found = {
            n: p.full_tensor() if hasattr(p, "full_tensor") else p
            for n, p in names["model"].state_dict().items()
        }
        if name == "fsdp" and rank == 0:
            assert all(torch.equal(found[n], p) for n, p in names["weights"].items())
        save_file(found, place / f"{name}-{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort now and then when Python takes the process down


if __name__ == "__main__":
    main(Path(sys.argv[1]))
