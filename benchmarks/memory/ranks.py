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
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator
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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory.ledger import Ledger
from benchmarks.memory.model import examples
from palu import LMHead, PALULoss, model_hidden_states
from palu.data.collator import Collator
from palu.planning.setup import Setup
from palu.training import master_weights
from palu_kernels import linear_cross_entropy_loss
from palu_kernels import torch_backend as eager
from palu_kernels.linear import chunked as linear

TOP_K = 20
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model's config and a way of training it; `setup.devices` is the number of processes."""

    config: dict[str, Any]
    setup: dict[str, Any]
    timed: int = 0  # steps after those that the ledger watches


@dataclass
class Found:
    """What one rank found: bytes alive at most, by operator too, seconds of steps."""

    peak: int = 0
    after: dict[str, int] = field(default_factory=dict)  # the peak by the end of each part
    largest: dict[str, int] = field(default_factory=dict)  # at the peak, by operator and shape
    seconds: list[float] = field(default_factory=list)


class RankLedger(Ledger):
    """Counts what operators made while it watched. What is first seen as an argument is a copy that
    gloo made for itself, which NCCL does not make."""

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
        self.head = self.model.get_output_embeddings()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, fused=True)
        if master_weights.trains_in_half(self.model):
            master_weights.MasterWeights(self.optimizer, sum_in_float32=setup.devices == 1)
        self.batches = [self._batches(seed) for seed in (0, 1)]

    def _made(self) -> nn.Module:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.setup.dtype == "bfloat16" else torch.float32
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.config), dtype=dtype)
        if rank := self.setup.lora_rank:
            model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
        return model

    def _sharded(self, model: nn.Module, **options: Any) -> nn.Module:
        if self.setup.devices == 1:
            return model
        if self.setup.dtype == "autocast":
            options["mp_policy"] = MixedPrecisionPolicy(*[torch.bfloat16] * 3)
        base = model.get_base_model() if self.setup.lora_rank else model
        own = {name: value for name, value in options.items() if name == "mp_policy"}
        for layer in base.model.layers:
            fully_shard(layer, **own)
        return fully_shard(model, **options)

    def _batches(self, seed: int) -> list[Batch]:
        rows = examples(self.config["vocab_size"], self.setup, 2 * dist.get_rank() + seed)
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
        loss = self._in_head(retain, lambda hidden, head: _retain(hidden, head, retain))
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
            return self._in_head(
                batch,
                lambda hidden, head: (
                    self.loss.from_hidden(hidden, head, batch["labels"], *reference).loss
                ),
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
        if isinstance(self.ref, FSDPModule):
            self.ref.unshard()
        yield hidden, LMHead(self.ref.get_output_embeddings().weight)
        if isinstance(self.ref, FSDPModule):
            self.ref.reshard()

    def _in_head(self, batch: Batch, loss: Callable[[Tensor, LMHead], Tensor]) -> Tensor:
        def forward(module: nn.Module, hidden: Tensor) -> Tensor:
            return loss(hidden, LMHead(module.weight)).view(1, 1, 1)

        self.head.forward = types.MethodType(forward, self.head)
        try:
            return self.model(**_inputs(batch), use_cache=False).logits.view(())
        finally:
            del self.head.forward


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _retain(hidden: Tensor, head: LMHead, batch: Batch) -> Tensor:
    answers = nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    following = batch["input_ids"].roll(-1, dims=1)
    return linear_cross_entropy_loss(hidden[answers], head, following[answers])


def measure(case: Case) -> Found:
    """Take two steps, the second watched by a ledger, and `case.timed` more."""
    setup, found, ledger = Setup(**case.setup), Found(), RankLedger()
    with (
        ledger,
        mock.patch.object(eager, "TILE_ENTRIES", 1),
        mock.patch.object(linear, "HEAD_BLOCK_BYTES", 2**12),
        mock.patch.object(master_weights, "_PIECE", 2**12),
    ):
        rank = Rank(case.config, setup)
        rank.step(0)
        ledger.start()
        rank.step(1, lambda name: found.after.update({name: ledger.peak}))
        found.peak = ledger.peak
        for entry in ledger.at_peak():
            name = f"{entry.operator} {list(entry.shape)} {entry.dtype}"
            found.largest[name] = found.largest.get(name, 0) + entry.bytes
    for number in range(case.timed):
        dist.barrier()
        start = time.perf_counter()
        rank.step(number)
        found.seconds.append(time.perf_counter() - start)
    return found


def main(cases: str, folder: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
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
