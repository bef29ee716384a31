"""Steps of a small model on one of several processes: what is alive, how long it takes, what is
exchanged.

    torchrun --nproc-per-node 2 -m benchmarks.memory.ranks CASES.json FOLDER

CASES.json is a list of `Case` as dictionaries. Every process runs all of them, over gloo on the
CPU, and writes what it found to `FOLDER/rank-N.json`. A step is that of `palu.planning.sharded`: a
forget and a retain micro-batch, losses in the head's forward, a fused AdamW; the model is sharded
by `fully_shard`, a layer each and what remains (one process alone has a plain model).
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory.ledger import Ledger
from benchmarks.memory.model import examples
from palu import LMHead, PALULoss, loss_in_head, model_hidden_states, whole_head
from palu.data.collator import Collator
from palu.planning.setup import Setup
from palu.training import master_weights
from palu_kernels import linear_cross_entropy_loss
from palu_kernels import torch_backend as eager
from palu_kernels.distributed import traffic
from palu_kernels.linear import chunked as linear

ROOT = Path(__file__).resolve().parents[2]
TOP_K = 20
COLLECTIVES = {  # how the names of operators begin
    "c10d::_allgather_base_": "all-gather",
    "_c10d_functional::all_gather": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "_c10d_functional::reduce_scatter": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
    "_c10d_functional::all_reduce": "all-reduce",
}
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model's config and a way of training it; `setup.devices` is the number of processes."""

    config: dict[str, Any]
    setup: dict[str, Any]
    timed: int = 0  # steps after those that the ledger watches
    watched: bool = True  # by a ledger; else the steps are timed alone


@dataclass
class Found:
    """What one rank found: bytes alive at most, by operator too, seconds of steps."""

    peak: int = 0
    after: dict[str, int] = field(default_factory=dict)  # the peak by the end of each part
    largest: dict[str, int] = field(default_factory=dict)  # at the peak, by operator and shape
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of this process on all its threads
    collectives: dict[str, list[int]] = field(default_factory=dict)  # of a step: calls, bytes
    vocabulary: dict[str, int] = field(default_factory=dict)  # `palu_kernels.distributed.traffic`


class RankLedger(Ledger):
    """Counts what operators made while it watched, and collectives. What is first seen as an
    argument is a copy that gloo made for itself, which NCCL does not make.

    Attributes:
        collectives: by kind the calls, and the bytes that a rank sends where the ranks form a ring:
            of `n` ranks `n - 1` times its share (gathering, reducing to shares), twice that where
            all get the sum.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self.collectives: dict[str, list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.name()
        kind = next((kind for start, kind in COLLECTIVES.items() if name.startswith(start)), None)
        if kind is not None and found is not NotImplemented:
            tensors = [t for t in tree_leaves((args, found)) if isinstance(t, Tensor)]
            small, *_, large = sorted(t.nbytes for t in tensors)
            if kind == "all-reduce":
                ranks = self.setup.tensor_parallel
                ranks = self.setup.devices if ranks == 1 else ranks
                sent = 2 * (ranks - 1) * large // ranks
            else:
                sent = large - small
            calls, moved = self.collectives.get(kind, (0, 0))
            self.collectives[kind] = [calls + 1, moved + sent]
        return found

    def _count(
        self, storage: torch.UntypedStorage, operator: str, shape: tuple, dtype: torch.dtype
    ) -> None:
        key = storage._cdata
        if not operator and key not in self._alive and key not in self._ignored:
            self._references[key] = weakref.ref(storage, partial(self._gone, key))
            self._ignored.add(key)
        super()._count(storage, operator, shape, dtype)


class Rank:
    """A model, its reference and its optimizer in one process."""

    def __init__(self, config: dict[str, Any], setup: Setup) -> None:
        self.config, self.setup = config, setup
        self.model = self._sharded(self._made()).train()
        if setup.checkpointing:
            self.model.gradient_checkpointing_enable()
        self.ref = None
        if setup.reference == "live":
            frozen = self._made().requires_grad_(False)
            self.ref = self._sharded(frozen, reshard_after_forward=True).eval()
        more = {} if self.ref is not None or setup.reference != "none" else {"preserve": None}
        more |= {"select_from": "current"} if more else {}
        self.loss = PALULoss(top_k=TOP_K, prefix_length=0, eos_token_id=2, **more)
        groups: dict[Any, list[nn.Parameter]] = {}  # fused AdamW takes those of one mesh at a time
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        by_mesh = [{"params": own} for own in groups.values()]
        self.optimizer = torch.optim.AdamW(by_mesh, fused=True)
        if setup.data_parallel == 1 and master_weights.trains_in_half(self.model):
            master_weights.MasterWeights(self.optimizer, sum_in_float32=True)
        self.batches = [self._batches(seed) for seed in (0, 1)]

    def _made(self) -> nn.Module:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.setup.dtype == "bfloat16" else torch.float32
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.config), dtype=dtype)
        if rank := self.setup.lora_rank:
            model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
        return model

    def _sharded(self, model: nn.Module, **options: Any) -> nn.Module:
        setup = self.setup
        shape = setup.data_parallel, setup.tensor_parallel
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        if setup.tensor_parallel > 1:
            tensor_parallel(model, mesh["tensor"])
        if setup.data_parallel == 1:
            return model
        if setup.dtype == "autocast":
            options["mp_policy"] = MixedPrecisionPolicy(*[torch.bfloat16] * 3)
        base = model.get_base_model() if setup.lora_rank else model
        own = {name: value for name, value in options.items() if name == "mp_policy"}
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh["data"], **own)
        return fully_shard(model, mesh=mesh["data"], **options)

    def _batches(self, seed: int) -> list[Batch]:
        rows = examples(
            self.config["vocab_size"],
            self.setup,
            2 * (dist.get_rank() // self.setup.tensor_parallel) + seed,
        )
        size, collate = self.setup.batch_size, Collator(0)
        return [collate(rows[n * size : (n + 1) * size]) for n in (0, 1)]

    def step(self, number: int, mark: Callable[[str], None] = lambda name: None) -> None:
        """Take a step on the batches of an even or an odd number."""
        forget, retain = (batches[number % 2] for batches in self.batches)
        loss = self._forget(forget, mark)
        mark("forward of the forget rows")
        loss.backward()
        del loss
        mark("backward of the forget rows")
        loss = loss_in_head(
            self.model, lambda hidden, head: _retain(hidden, head, retain), **_inputs(retain)
        )
        mark("forward of the retain rows")
        loss.backward()
        del loss
        mark("backward of the retain rows")
        self.optimizer.step()
        mark("step of the optimizer")
        self.model.zero_grad()

    def _forget(self, batch: Batch, mark: Callable[[str], None]) -> Tensor:
        with self._reference(batch) as reference:
            mark("forward of the reference")
            return loss_in_head(
                self.model,
                lambda hidden, head: (
                    self.loss.from_hidden(hidden, head, batch["labels"], *reference).loss
                ),
                **_inputs(batch),
            )

    @contextlib.contextmanager
    def _reference(self, batch: Batch) -> Iterator[tuple[Tensor | None, LMHead | None]]:
        if self.setup.reference == "none":
            yield None, None
            return
        if self.setup.reference == "adapter_off":
            with torch.no_grad(), self.model.disable_adapter():
                hidden = model_hidden_states(self.model, **_inputs(batch))
            yield hidden, None
            return
        with torch.no_grad():
            hidden = model_hidden_states(self.ref, **_inputs(batch))
        with whole_head(self.ref) as head:
            yield hidden, head


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the vocabulary and every layer's matrices over the ranks of a mesh."""
    plan = {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        plan[name] = ColwiseParallel()
    plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    ends = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, mesh, ends | {"lm_head": ColwiseParallel(use_local_output=False)})
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _retain(hidden: Tensor, head: LMHead, batch: Batch) -> Tensor:
    answers = nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    following = batch["input_ids"].roll(-1, dims=1)
    return linear_cross_entropy_loss(hidden[answers], head, following[answers])


def measure(case: Case) -> Found:
    """Take two steps, the second watched by a ledger, and then `case.timed` more on a model of
    their own."""
    setup, found = Setup(**case.setup), Found()
    if case.watched:
        watch(case, found)
        gc.collect()
    if case.timed:
        rank = Rank(case.config, setup)
        rank.step(0)
        for number in range(case.timed):
            dist.barrier()
            start, used = time.perf_counter(), time.process_time()
            rank.step(number)
            found.seconds.append(time.perf_counter() - start)
            found.cpu_seconds.append(time.process_time() - used)
    return found


def watch(case: Case, found: Found) -> None:
    """Note what is alive and what is exchanged in the second of two steps."""
    setup = Setup(**case.setup)
    ledger = RankLedger(setup)
    with (
        ledger,
        mock.patch.object(eager, "TILE_ENTRIES", 1),
        mock.patch.object(linear, "HEAD_BLOCK_BYTES", 2**12),
        mock.patch.object(master_weights, "_PIECE", 2**12),
    ):
        rank = Rank(case.config, setup)
        rank.step(0)
        ledger.start()
        ledger.collectives.clear()
        traffic.clear()
        rank.step(1, lambda name: found.after.update({name: ledger.peak}))
        found.peak, found.collectives = ledger.peak, ledger.collectives
        found.vocabulary = dict(traffic)
        for entry in ledger.at_peak():
            name = f"{entry.operator} {list(entry.shape)} {entry.dtype}"
            found.largest[name] = found.largest.get(name, 0) + entry.bytes


def launch(processes: int, cases: Sequence[Case], folder: Path) -> list[list[Found]]:
    """Return what every rank of `processes`, started by torchrun, found, a list a case.

    Raises:
        RuntimeError: a process failed; with the end of what was said.
    """
    path = folder / "cases.json"
    path.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc-per-node={processes}", "-m", "benchmarks.memory.ranks"]
    words += [str(path), str(folder)]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(f"{processes} processes failed: {(done.stdout + done.stderr)[-9000:]}")
    return read_found(processes, folder)


def fork(processes: int, cases: Sequence[Case], folder: Path) -> list[list[Found]]:
    """Return what `launch` does, of processes that need not import everything anew, a thread each.
    This one must not have computed anything: threads do not survive.

    Raises:
        RuntimeError: a process failed.
    """
    path = folder / "cases.json"
    path.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_forked, args=(path, folder, rank, processes))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    codes = [process.exitcode for process in started]
    if any(codes):
        raise RuntimeError(f"of {processes} processes the exit codes are {codes}")
    return read_found(processes, folder)


def _forked(cases: Path, folder: Path, rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    main(str(cases), str(folder), init_method=store, rank=rank, world_size=processes)


def read_found(processes: int, folder: Path) -> list[list[Found]]:
    """Return what every rank wrote, a list a case."""
    ranks = [
        json.loads((folder / f"rank-{n}.json").read_text(encoding="utf-8"))
        for n in range(processes)
    ]
    return [[Found(**one) for one in own] for own in zip(*ranks, strict=True)]


def main(cases: str, folder: str, **rendezvous: Any) -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=5), **rendezvous)
    found = []
    for values in json.loads(Path(cases).read_text(encoding="utf-8")):
        found.append(asdict(measure(Case(**values))))
        gc.collect()
    path = Path(folder) / f"rank-{dist.get_rank()}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
