"""Predicted peaks of a device are within 10% of what lives in the ranks of sharded steps of small
models, each a process over gloo."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.memory.model import ALLOWED, SMALL_BATCH, SMALL_MODELS, sizes_of
from palu.planning.step import Setup, predict
from tests.support import ROOT

LLAMA, GEMMA, QWEN = SMALL_MODELS.values()
MODELS = {
    "llama": LLAMA,
    "tied": LLAMA | {"tie_word_embeddings": True},
    "wide": LLAMA | {"num_hidden_layers": 2, "vocab_size": 8003},
    "deep": LLAMA | {"num_hidden_layers": 16, "vocab_size": 301},
    "thick": LLAMA | {"num_hidden_layers": 2, "vocab_size": 301, "intermediate_size": 1200},
    "gemma2": GEMMA,
    "qwen2": QWEN,
}
# processes -> name -> model and the fields of a Setup
QUICK = {
    2: {
        "live": ("llama", {"dtype": "float32"}),
        "wide vocabulary": ("wide", {"dtype": "autocast", "reference": "none", "batch_size": 1}),
        "deep": ("deep", {"dtype": "bfloat16", "checkpointing": True}),
        "tied, many rows": ("tied", {"dtype": "float32", "batch_size": 24, "checkpointing": True}),
        "thick layers": (
            "thick",
            {"dtype": "float32", "reference": "none", "batch_size": 1, "length": 6},
        ),
        "adapter off": ("llama", {"lora_rank": 2, "reference": "adapter_off"}),
    }
}
SLOW = {
    processes: {
        f"{model}, {dtype}, {rank or 'all'}, {reference}, {'again' if again else 'kept'}": (
            model,
            {"dtype": dtype, "lora_rank": rank, "reference": reference, "checkpointing": again},
        )
        for model in models
        for dtype in ("float32", "bfloat16", "autocast")
        for rank in (0, 2)
        for reference in ("live", "none", "adapter_off")
        for again in (False, True)
        if rank or reference != "adapter_off"
    }
    for processes, models in ((2, ("tied", "wide", "gemma2")), (4, ("wide", "deep", "qwen2")))
}


def launch(processes, cases, folder):
    """-> what every rank found, a list a case."""
    made = [
        {"config": MODELS[model], "setup": {**SMALL_BATCH, "devices": processes, **setup}}
        for model, setup in cases
    ]
    (folder / "cases.json").write_text(json.dumps(made))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc-per-node={processes}", "-m", "benchmarks.memory.ranks"]
    words += [str(folder / "cases.json"), str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ranks = [json.loads((folder / f"rank-{n}.json").read_text()) for n in range(processes)]
    return [list(found) for found in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(processes, cases) -> name -> (prediction, peaks of the ranks); one launch for all."""
    kept = {}

    def found(processes, cases):
        key = processes, tuple(cases)
        if key not in kept:
            folder = tmp_path_factory.mktemp(f"ranks-{processes}")
            ranks = launch(processes, cases.values(), folder)
            kept[key] = {
                name: (
                    predict(
                        sizes_of(MODELS[model]),
                        Setup(**{**SMALL_BATCH, "devices": processes, **setup}),
                    ),
                    [one["peak"] for one in own],
                )
                for (name, (model, setup)), own in zip(cases.items(), ranks, strict=True)
            }
        return kept[key]

    return found


def off_by(prediction, peaks, without=()):
    """The largest distance over the ranks."""
    peak = max(
        sum(size for part, size in items.items() if part not in without)
        for items in prediction.moments.values()
    )
    return max(abs(peak / one - 1) for one in peaks)


CASES = [pytest.param(n, QUICK, name, id=name) for n, own in QUICK.items() for name in own]
CASES += [
    pytest.param(n, SLOW, name, id=f"{n}: {name}", marks=pytest.mark.slow)
    for n, own in SLOW.items()
    for name in own
]


@pytest.mark.parametrize(("processes", "cases", "name"), CASES)
def test_within_a_tenth(found, processes, cases, name):
    assert off_by(*found(processes, cases[processes])[name]) <= ALLOWED


@pytest.mark.parametrize(
    "part",
    [
        "weights",
        "optimizer state",
        "reference",
        "gradients",
        "whole root",
        "whole layers",
        "reductions",
        "chunk buffers",
    ],
)
def test_every_part_is_needed(found, part):
    """Some case is off by more than a tenth without it."""
    assert max(off_by(*one, [part]) for one in found(2, QUICK[2]).values()) > ALLOWED
