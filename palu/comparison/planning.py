"""What a comparison will take: runs, time and memory, before any is done."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palu.comparison.config import Comparison, Task
from palu.comparison.run_file import DONE, Run
from palu.comparison.search import corners, trials_of

FEW, MORE = 2, 6
"""Steps of the two runs of a probe: what a step takes is their difference."""
EXAMPLES = 8
"""Of each set, what a probe evaluates and attacks at most."""


@dataclass(frozen=True)
class Row:
    """What the runs of a method take.

    Attributes:
        runs, there: how many, and how many of them are done.
        seconds: of one run, the median of those that are there or else of a probe; None: unknown.
        memory: bytes of a training step at its peak, the largest of its settings.
    """

    method: str
    runs: int
    there: int
    seconds: float | None
    probed: bool
    memory: int | None


def tried(comparison: Comparison) -> list[Task]:
    """Return the runs of all settings that are written down, and, for each search, runs at the ends
    of its space."""
    ends = [
        comparison.task(name, setting, comparison.seeds[0])
        for name, method in comparison.methods.items()
        if method.search is not None
        for setting in corners(method.search["space"])
    ]
    return [*comparison.tasks(), *ends]


def rows(
    comparison: Comparison,
    runs: Mapping[str, Run],
    setups: Mapping[str, Mapping[str, Any]],
    probed: Mapping[str, float],
) -> list[Row]:
    """Return a row for each method.

    Args:
        runs: those that are there, by name.
        setups: `memory` and `steps` of each setting, by (method, setting) joined by a newline.
        probed: seconds of a run, by method, where no run is there.
    """
    found = []
    for name, method in comparison.methods.items():
        tasks = [task for task in tried(comparison) if task.method == name]
        settings = len(method.settings) + (trials_of(method.search) if method.search else 0)
        count = settings * len(comparison.seeds)
        own = [run for run in runs.values() if run.method == name]
        # Which settings a search looks for is known once those before them are there.
        there = len(own) if method.search else sum(task.id in runs for task in tasks)
        took = [sum(run.seconds.values()) for run in own if run.status == DONE]
        seconds = statistics.median(took) if took else probed.get(name)
        memory = [setups[key_of(task)]["memory"] for task in tasks]
        known = [size for size in memory if size is not None]
        peak = max(known) if known else None
        found.append(Row(name, count, min(there, count), seconds, not took, peak))
    return found


def key_of(task: Task) -> str:
    """Return the name of a method's setting."""
    return f"{task.method}\n{task.setting}"


def setup_of(run: Any, model: str, rows: int, length: int) -> dict[str, Any]:
    """Return `steps` of a run and the `memory` of one of them, None where the model's config does
    not tell.

    Args:
        run: of `palu.cli.unlearn`, checked: it has `config`, `options`, `lora` and `kept`.
        rows: forget examples.
        length: tokens of the longest example.
    """
    from palu.planning.model import ModelSizes, read_config
    from palu.planning.setup import NO_REFERENCE
    from palu.planning.step import Setup, predict
    from palu.training import auto

    config, options, lora = run.config, run.options, run.lora
    batch = config.per_device_train_batch_size
    a_step = batch * config.gradient_accumulation_steps
    epochs = options.epochs if options.epochs is not None else auto.epochs(rows, a_step).value
    steps = math.ceil(math.ceil(rows / a_step) * epochs)
    if config.max_steps > 0:
        steps = config.max_steps
    method = config.make_loss()
    keeps = run.kept != "none" and config.retain_weight > 0
    needed = method.needs_reference or (keeps and config.retain_loss != "nll")
    try:
        sizes = read_config(model)
        own = str(options.dtype if options.dtype != "auto" else sizes.dtype)
        kind = "float32" if own.endswith("float32") or own == "None" else "bfloat16"
        setup = Setup(
            batch,
            length,
            "autocast" if options.bf16 else kind,
            0 if lora is None else lora.rank,
            config.reference if needed else NO_REFERENCE,
            bool(options.gradient_checkpointing),
        )
        memory = predict(ModelSizes.from_config(sizes), setup).peak
    except (ValueError, AttributeError, TypeError):
        memory = None
    return {"steps": steps, "memory": memory}


def probe(
    comparison: Comparison,
    steps: int,
    words: Callable[[int], Sequence[str]],
    unlearn: Callable[[list[str]], int],
    folder: Path,
    threads: int,
) -> float:
    """Return about how many seconds a run takes, from a few steps and a few examples. For a process
    of its own.

    Args:
        steps: of the run.
        words: the words of `palu unlearn` for so many steps, which write into `folder`.
    """
    import torch

    from palu.comparison.measure import Measuring

    torch.set_num_threads(threads)
    took = []
    for count in (1, FEW, MORE):  # the first one imports and warms up
        began = time.perf_counter()
        unlearn([*words(count)])
        took.append(time.perf_counter() - began)
    a_step = max(took[2] - took[1], 0) / (MORE - FEW)
    whole = Measuring(comparison)
    sizes = {name: len(some) for name, some in whole.sets.items()}
    few = {name: some[:EXAMPLES] for name, some in whole.sets.items()}
    records = min(EXAMPLES, sizes["forget"])
    whole.sets, settings = few, whole.settings
    whole.settings = replace(settings, records=records)
    found = whole.measure(folder, folder.parent, None)["seconds"]
    asked = min(settings.records or sizes["forget"], sizes["forget"])
    evaluate = found["evaluate"] * sum(sizes.values()) / sum(map(len, few.values()))
    attack = found["attack"] * max(asked, 1) / records
    return took[1] - FEW * a_step + steps * a_step + evaluate + attack


def memory_here() -> int | None:
    """Return the bytes of this machine's memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
