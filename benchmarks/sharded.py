"""What does a step cost over several processes, in time, memory and bytes exchanged?

    python -m benchmarks run sharded
    python -m benchmarks run sharded --show benchmarks/results/sharded.csv  # its tables

One step (a forget and a retain micro-batch, AdamW) of a small Llama, by one process and by 2 and 4:
sharded by FSDP2, each rank with its share of the same batch, or tensor-parallel, each with all of
it. They talk over gloo and share this machine's processors, so what is told is what sharding adds
beside the single process of the same run, and not what it gains on devices of their own. Every
measurement has processes of its own, which take turns; `process ms` are of all of them together,
which tells more on a busy machine. Memory is the ledger's (bytes of live
tensors, the largest rank), bytes are what a rank sends in a ring, both beside the prediction.

The rows of kernel `sharded_model` were not run: the same predictions for Llama-3.1-8B and -70B on 8
and 64 devices.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, runner, tables
from benchmarks.declare import OK, Benchmark, Case, Provider, Result
from benchmarks.memory import ranks
from benchmarks.memory.exchange import exchanges
from benchmarks.memory.model import sizes_of
from benchmarks.tables import Row
from palu.planning.model import KNOWN_MODELS
from palu.planning.step import GIB, Setup, predict

STEP, MODEL = "sharded_step", "sharded_model"
PREDICTED = "predicted: nothing was run"
ALONE = "1 process"
THREADS = 1  # of a process
Metrics = dict[str, float]
# provider -> devices, tensor-parallel ranks
WAYS = {
    ALONE: (1, 1),
    "FSDP2 x2": (2, 1),
    "tensor parallel x2": (2, 2),
    "FSDP2 x4": (4, 1),
    "tensor parallel x4": (4, 4),
    "FSDP2 x2 of tensor parallel x2": (4, 2),
}
LARGE_WAYS = {
    "FSDP2 x8": (8, 1),
    "tensor parallel x8": (8, 8),
    "FSDP2 x64": (64, 1),
    "FSDP2 x8 of tensor parallel x8": (64, 8),
}
LARGE_MODELS = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B")
LARGE = {"batch_size": 8, "length": 512, "dtype": "autocast", "checkpointing": True}
LARGE_TRAINS = {"every weight": (0, "live"), "LoRA 16": (16, "adapter_off")}
LARGE_K = 1000


def options(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, runner.positive
    add("--vocab", type=count, default=32000, help="V")
    add("--hidden", type=count, default=128, help="D")
    add("--layers", type=count, default=4)
    add("--batch", type=count, default=8, help="examples of all data-parallel ranks")
    add("--length", type=count, default=64, help="tokens of an example")
    add("--tiny", action="store_true", help="a model and a batch that only show that it runs")


def cases(given: argparse.Namespace) -> list[Case]:
    if given.tiny:
        given.vocab, given.hidden, given.layers, given.length = 301, 32, 2, 16
    setting = f"layers={given.layers} length={given.length} reference=live"
    one = (given.vocab, given.hidden, given.batch, ranks.TOP_K)
    return [Case(STEP, *one, dtype, setting) for dtype in given.dtype]


def config(case: Case) -> dict[str, Any]:
    values = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": case.V}
    values |= {"hidden_size": case.D, "intermediate_size": 3 * case.D, "num_attention_heads": 8}
    values |= {"num_key_value_heads": 4, "num_hidden_layers": int(case.given()["layers"])}
    return values | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def setup_of(case: Case, provider: str) -> Setup:
    devices, split = WAYS[provider]
    data, given = devices // split, case.given()
    if case.rows % data:
        raise ValueError(f"--batch is {case.rows}; it must be divisible by {data} ranks")
    shape = case.rows // data, int(given["length"])
    reference = given["reference"]
    return Setup(*shape, case.dtype, reference=reference, devices=devices, tensor_parallel=split)


def predictions(setup: Setup, values: dict[str, Any], top_k: int) -> dict[str, list[float]]:
    """Return the metrics of a prediction."""
    sizes = sizes_of(values)
    found = exchanges(sizes, setup, top_k)
    of_rows = [one for one in found if one.purpose in ("statistics", "select")]
    return {
        "predicted_bytes": [predict(sizes, setup).peak],
        "predicted_sent_bytes": [sum(one.sent for one in found)],
        "predicted_collectives": [sum(one.calls for one in found)],
        "predicted_loss_bytes": [sum(one.sent for one in of_rows)],
        "predicted_loss_collectives": [sum(one.calls for one in of_rows)],
    }


def measure(benchmark: Benchmark, case: Case, provider: str, task: dict[str, Any]) -> Result:
    faulthandler.cancel_dump_traceback_later()  # a launch has a deadline of its own
    setup = setup_of(case, provider)
    values = {name: getattr(setup, name) for name in setup.__dataclass_fields__}
    watched = task["repeat"] == 0
    one = ranks.Case(config(case), values, timed=task["calls"], watched=watched)
    with tempfile.TemporaryDirectory() as folder:
        found = ranks.fork(setup.devices, [one], Path(folder))[0]
    samples: dict[str, list[float]] = {}
    if task["calls"]:  # a step ends when the last rank has taken it
        times = zip(*(rank.seconds for rank in found), strict=True)
        samples["seconds"] = [max(step) for step in times]
        times = zip(*(rank.cpu_seconds for rank in found), strict=True)
        samples["cpu_seconds"] = [sum(step) for step in times]
    if watched:
        samples["live_bytes"] = [max(rank.peak for rank in found)]
        sent = [sum(moved for _, moved in rank.collectives.values()) for rank in found]
        calls = [sum(number for number, _ in rank.collectives.values()) for rank in found]
        samples |= {"sent_bytes": [max(sent)], "collectives": [max(calls)]}
        samples |= predictions(setup, one.config, case.k)
    environment = machine.environment(torch.device("cpu")) | {"threads": THREADS}
    return Result(samples, OK, environment)


def cost_model(place: Row) -> list[Row]:
    """Return the rows of large models, beside those that were measured at `place`."""
    rows = []
    for model, (trains, (rank, reference)) in itertools.product(LARGE_MODELS, LARGE_TRAINS.items()):
        values = KNOWN_MODELS[model]
        setting = f"model={model.rpartition('/')[2]} trains={trains.replace(' ', '_')}"
        setting += f" length={LARGE['length']} reference={reference}"
        sizes = values["vocab_size"], values["hidden_size"], LARGE["batch_size"]
        case = Case(MODEL, *sizes, LARGE_K, LARGE["dtype"], setting)
        for provider, (devices, split) in LARGE_WAYS.items():
            setup = Setup(
                **LARGE,
                lora_rank=rank,
                reference=reference,
                devices=devices,
                tensor_parallel=split,
            )
            for metric, found in predictions(setup, values, LARGE_K).items():
                own = tables.row(case._asdict(), provider, metric, [found], PREDICTED, place)
                rows.append(own | {"device": "none", "processor": "none", "threads": None})
    return rows


def check(rows: list[Row]) -> list[str]:
    """Add the cost model; say where a prediction is more than a tenth off."""
    wrong = []
    for own in tables.grouped(rows, lambda row: (row["dtype"], row["provider"])).values():
        found = {row["metric"]: row["p50"] for row in own}
        if found.get("live_bytes"):
            off = found["predicted_bytes"] / found["live_bytes"] - 1
            if abs(off) > 0.1:
                wrong.append(f"{own[0]['provider']} {own[0]['dtype']}: predicted {off:+.1%}")
    rows += cost_model(rows[0])
    return wrong


# ---- the last tables -----------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    """Return what was measured, over the single process, and what was predicted."""
    parts = []
    for kind, same in tables.grouped(rows, lambda row: (row["kernel"], row["dtype"])).items():
        lines = []
        alone = None
        for own in tables.grouped(same, lambda row: (row["setting"], row["provider"])).values():
            found = {row["metric"]: row["p50"] for row in own}
            if kind[0] == MODEL:
                lines.append(_of_large(own[0], found))
                continue
            alone = found if own[0]["provider"] == ALONE else alone
            lines.append(_of_small(own[0], found, alone))
        title, headings = TITLES[kind[0]]
        parts.append(f"{title}, {kind[1]}\n{tables.text(headings, lines)}")
    return "\n\n".join(parts)


OF_SMALL = ["", "ms", f"of {ALONE}", "process ms", f"of {ALONE}", "live MiB", "predicted"]
OF_SMALL += ["sent MiB", "predicted", "collectives", "predicted"]
OF_LARGE = ["", "GiB a device", "sent GiB", "collectives", "of the loss MiB", "its collectives"]
TITLES = {
    STEP: ("A step, processes with a thread each on the same processors", OF_SMALL),
    MODEL: (
        "Predicted, nothing was run: 8 x 512 a data-parallel rank, checkpointing, k = 1000",
        OF_LARGE,
    ),
}


def _of_small(row: Row, found: Metrics, alone: Metrics | None) -> list[str]:
    def shown(name: str, unit: float = 1, how: str = ".1f") -> str:
        return "-" if found.get(name) is None else format(found[name] / unit, how)

    def ratio(name: str) -> str:
        pair = found.get(name), (alone or {}).get(name)
        return "-" if None in pair else f"{pair[0] / pair[1]:.2f}"

    return [
        row["provider"],
        shown("seconds", 1e-3, ".0f"),
        ratio("seconds"),
        shown("cpu_seconds", 1e-3, ".0f"),
        ratio("cpu_seconds"),
        *(shown(name, 2**20) for name in ("live_bytes", "predicted_bytes")),
        *(shown(name, 2**20) for name in ("sent_bytes", "predicted_sent_bytes")),
        *(shown(name, how=".0f") for name in ("collectives", "predicted_collectives")),
    ]


def _of_large(row: Row, found: Metrics) -> list[str]:
    given = dict(word.split("=", 1) for word in row["setting"].split())
    return [
        f"{given['model']}, {given['trains'].replace('_', ' ')}, {row['provider']}",
        f"{found['predicted_bytes'] / GIB:.1f}",
        f"{found['predicted_sent_bytes'] / GIB:.1f}",
        f"{found['predicted_collectives']:.0f}",
        f"{found['predicted_loss_bytes'] / 2**20:.1f}",
        f"{found['predicted_loss_collectives']:.0f}",
    ]


BENCHMARK = Benchmark(
    name="sharded",
    description=__doc__,
    kernels={STEP: {name: Provider(lambda *_: None) for name in WAYS}},
    add_options=options,
    cases=cases,
    dtypes=("float32",),
    repeats=2,
    calls=5,
    axes=(),
    measure=measure,
    check=check,
    summary=summary,
)


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if len(words) == 2 and words[0] == "--show":
        print(summary(tables.read(Path(words[1]))))
        return 0
    return runner.main(BENCHMARK, words)


if __name__ == "__main__":
    sys.exit(main())
