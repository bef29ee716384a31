"""A training step whose loss runs in the head's forward, in several processes and in one.

    PYTHONPATH=. torchrun --standalone --nproc-per-node 2 tests/support/workers/in_head.py FOLDER

Each process takes its share of a batch; the whole batch is computed in one process too, from the
logits of a model in no wrapper. Every process writes what it found to `FOLDER/rank-N.json`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from palu import LMHead, PALULoss, PALUOutput, loss_in_head, model_hidden_states, whole_head
from palu.models.head_check import why_not_fusable
from palu.models.layers import decoder_layers
from palu.models.wrappers import adapters_off, output_embedding, unwrap
from palu_kernels import topk_indices
from tests.support import families
from tests.support.workers import step_losses

ROWS = 8  # of a step, in all processes together
TENSOR = 2  # ranks that share a head which is tensor parallel
STEPS, RATE = 2, 0.005  # the second step runs in wrappers that know their modules' order
# name -> family, how it is wrapped, and what else is unlike the others
CASES: dict[str, dict] = {
    "plain ddp": {"wrap": "ddp"},
    "static ddp": {"wrap": "static"},
    "static ddp, tied, accumulated": {"wrap": "static", "family": "llama_tied", "accumulate": 2},
    "root": {"wrap": "root"},
    "root, tied": {"wrap": "root", "family": "llama_tied"},
    "layers": {"wrap": "layers"},
    "layers, tied": {"wrap": "layers", "family": "llama_tied"},
    "layers, float64": {"wrap": "layers", "dtype": torch.float64},
    "head": {"wrap": "head"},
    "embedding and head, tied": {"wrap": "group", "family": "llama_tied"},
    "bias": {"wrap": "head", "family": "gptj"},
    "softcap": {"wrap": "layers", "family": "gemma2"},
    "logit scale": {"wrap": "root", "family": "cohere"},
    "divided logits": {"wrap": "layers", "family": "granite"},
    "frozen head": {"wrap": "layers", "frozen": "head"},
    "only the head trains": {"wrap": "head", "frozen": "body"},
    "accumulated": {"wrap": "layers", "accumulate": 2},
    "no forget rows on a rank": {"wrap": "layers", "without": "forget"},
    "no rows on a rank": {"wrap": "head", "without": "all"},
    "zero on a rank": {"wrap": "head", "without": "all", "constant": True},
    "checkpointing": {"wrap": "layers", "checkpointing": True},
    "half precision": {"wrap": "layers", "policy": True},
    "fsdp1": {"wrap": "fsdp1"},
    "fsdp1, its parameters": {"wrap": "fsdp1", "original": True},
    "fsdp1, head, no forget rows": {"wrap": "fsdp1", "head": True, "without": "forget"},
    "sharded reference": {"wrap": "layers", "reference": "sharded"},
    "sharded reference, tied": {"wrap": "root", "family": "llama_tied", "reference": "sharded"},
    "fsdp1 reference": {"wrap": "fsdp1", "reference": "fsdp1"},
    "cached reference": {"wrap": "layers", "reference": "cached"},
    "tensor parallel": {"wrap": "tensor"},
    "tensor parallel, bias": {"wrap": "tensor", "family": "phi"},
    "tensor parallel and layers": {"wrap": "both", "reference": "sharded"},
    "tensor parallel and layers, bias": {"wrap": "both", "family": "phi"},
    "tensor parallel and layers, float64": {"wrap": "both", "dtype": torch.float64},
    "adapter off": {"wrap": "layers", "lora": True, "reference": "adapter"},
    "adapter off, static ddp": {"wrap": "static", "lora": True, "reference": "adapter"},
}


def made(case: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model and its frozen original, both in no wrapper; the same in every process."""
    model = families.make(case.get("family", "llama")).to(case.get("dtype", torch.float32))
    original = copy.deepcopy(model).requires_grad_(False)
    if case.get("lora"):
        import peft

        torch.manual_seed(3)
        settings = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        return peft.get_peft_model(model, settings), original
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    head = model.get_output_embeddings()
    if case.get("frozen") == "body":
        model.requires_grad_(False)
        head.requires_grad_(True)
    elif case.get("frozen") == "head":
        head.requires_grad_(False)
    return model, original


def wrapped(model: torch.nn.Module, case: dict, wrap: str) -> torch.nn.Module:
    if wrap in ("ddp", "static"):
        return DistributedDataParallel(model, static_graph=wrap == "static")
    layers = decoder_layers(model)
    if wrap == "fsdp1":
        return fsdp1(model, case, type(layers[0]))
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    together = {"tensor": dist.get_world_size(), "both": TENSOR}.get(wrap, 1)
    shape = (dist.get_world_size() // together, together)
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    if together > 1:
        plan = {"lm_head": ColwiseParallel(use_local_output=False)}
        parallelize_module(model, mesh["tensor"], plan)
    if wrap == "tensor":
        return model
    options: dict = {"mesh": mesh["data"]}
    if case.get("policy"):
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if wrap != "root":
        for layer in layers:
            fully_shard(layer, **options)
    if wrap == "head":
        fully_shard(output_embedding(model), **options)
    if wrap == "group":
        fully_shard([unwrap(model).model.embed_tokens, model.lm_head], **options)
    if case.get("policy"):
        options["mp_policy"] = replace(options["mp_policy"], output_dtype=torch.float32)
    return fully_shard(model, **options)


def fsdp1(model: torch.nn.Module, case: dict, layer: type) -> torch.nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    kinds = {layer, torch.nn.Linear} if case.get("head") else {layer}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
    original = bool(case.get("original"))
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
    )


def batch(case: dict, processes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels `[ROWS, 9]`; the rows of the last process may lack what `without` says."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, families.VOCAB, (ROWS, 9), generator=generator)
    labels = torch.full_like(ids, -200)
    labels[:, :3] = -100
    labels[:, 5:7] = ids[:, 5:7]
    last = slice(ROWS - ROWS // processes, ROWS)
    without = case.get("without")
    if without == "forget":
        labels[last, 5:7] = -200
    elif without == "all":
        labels[last] = -100
    return ids, labels


class Reference:
    """What the frozen original says of a batch, and its head, in one of the ways there are."""

    def __init__(self, original: torch.nn.Module, case: dict, loss: PALULoss) -> None:
        self.kind, self.loss, self.model = case.get("reference", "live"), loss, original
        if self.kind in ("sharded", "fsdp1"):
            how = case["wrap"] if case["wrap"] in ("both", "fsdp1") else "layers"
            self.model = wrapped(original, case, how)
            if self.kind == "sharded":
                self.model.set_reshard_after_forward(True)

    def of(self, model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> dict:
        with torch.no_grad():
            if self.kind == "adapter":
                with adapters_off(model):
                    return {"ref_hidden": model_hidden_states(model, ids)}
            hidden = model_hidden_states(self.model, ids)
            if self.kind != "cached":
                return {"ref_hidden": hidden}
            roles = torch.nn.functional.pad(self.loss.roles(labels)[:, 1:], (0, 1))
            with whole_head(self.model) as head:
                chosen = topk_indices(head.logits(hidden[roles == 1]), self.loss.top_k)
            return {"ref_hidden": hidden[roles == 2], "ref_indices": chosen}

    def head(self) -> AbstractContextManager[LMHead | None]:
        return nullcontext() if self.kind == "adapter" else whole_head(self.model)


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model in no wrapper, or in FSDP2's or DDP's, whole."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        with FSDP.summon_full_params(model):
            return {
                n.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for n, p in model.named_parameters()
            }
    named = {n.removeprefix("module."): p.detach() for n, p in model.named_parameters()}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in named.items()}


def steps_alone(case: dict, processes: int) -> tuple[list[float], dict, float]:
    """Losses and weights of one process, from logits; how far the weights have moved."""
    model, original = made(case)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    (ids, labels), loss_fn, losses = batch(case, processes), loss_of(case), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        ran = half(copy.deepcopy(model)) if case.get("policy") else model
        optimizer.zero_grad()
        if case.get("policy"):  # logits of bfloat16 are rounded
            out = from_rows(loss_fn, ran, half(original), ids, labels)
        else:
            out = loss_fn(ran(ids).logits, labels, original(ids).logits)
        out.loss.backward()
        for p, own in zip(model.parameters(), ran.parameters(), strict=True):
            p.grad = None if own.grad is None else own.grad.to(p.dtype)
        optimizer.step()
        losses.append(out.loss.item())
    moved = max((p - start[n]).abs().max().item() for n, p in model.named_parameters())
    return losses, trained(model), moved


def half(model: torch.nn.Module) -> torch.nn.Module:
    """Parameters in bfloat16, in place; FSDP leaves buffers as they are too."""
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


def from_rows(
    loss_fn: PALULoss,
    model: torch.nn.Module,
    original: torch.nn.Module,
    ids: torch.Tensor,
    labels: torch.Tensor,
) -> PALUOutput:
    rows = [model_hidden_states(model, ids), LMHead.from_model(model), labels]
    with torch.no_grad():
        rows += [model_hidden_states(original, ids), LMHead.from_model(original)]
    return loss_fn.from_hidden(*rows)


def loss_of(case: dict) -> PALULoss:
    return PALULoss(top_k=7, objective=case.get("objective", "entropy"), eos_token_id=2)


def steps_together(case: dict, rank: int, processes: int) -> tuple[list[float], dict]:
    """The same in all processes, in the head's forward."""
    together = {"tensor": processes, "both": TENSOR}.get(case["wrap"], 1)
    rank, processes = (
        rank // together,
        processes // together,
    )  # ranks of one head have the same rows
    model, original = made(case)
    if case.get("checkpointing"):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_fn = loss_of(case)
    reference = Reference(original, case, loss_fn)
    if case.get("policy"):
        half(original)
    model = wrapped(model, case, case["wrap"])
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, foreach=False
    )
    ids, labels = batch(case, processes)
    roles = loss_fn.roles(labels)
    counts = {"num_forget": (roles == 1).sum(), "num_preserve": (roles == 2).sum()}
    own, losses = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes), []
    for _ in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        optimizer.zero_grad()
        parts = case.get("accumulate", 1)
        for part in range(parts):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(part == parts - 1)
            some = slice(part, None, parts)
            tokens, their = ids[own][some], labels[own][some]
            ref = reference.of(model, tokens, their)

            with reference.head() as ref["ref_head"]:

                def loss(hidden, head, their=their, ref=ref):
                    if case.get("constant") and not bool((their != -100).any()):
                        return hidden.new_zeros(())
                    return loss_fn.from_hidden(hidden, head, their, **ref, **counts)

                out = loss_in_head(model, loss, tokens)
            value = out if isinstance(out, torch.Tensor) else out.loss
            (value * processes).backward()
            total += value.detach()
        optimizer.step()
        dist.all_reduce(total)
        losses.append(total.item() / together)
    return losses, trained(model)


def run_case(case: dict, rank: int, processes: int) -> dict:
    alone, weights, moved = steps_alone(case, processes)
    together, found = steps_together(case, rank, processes)
    assert found.keys() == weights.keys()
    far = max((found[n] - weights[n]).abs().max().item() for n in found)
    return {"alone": alone, "together": together, "far": far, "moved": moved}


def run_error(rank: int, processes: int) -> list[Any]:
    """What a process says whose loss fails in the last one of them."""
    model, _ = made({})
    model = wrapped(model, {}, "layers")
    ids, _ = batch({}, processes)
    said = "nothing"

    def loss(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
        if rank == processes - 1:
            raise ValueError("of my own")
        return head.logits(hidden).square().mean()

    try:
        loss_in_head(model, loss, ids)
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    return [said, "forward" in vars(model.lm_head)]


def run_disagreement(rank: int, processes: int) -> list[str | None]:
    """What all processes find where one of them has another head, or other settings."""
    found = []
    for wrong in ("hook", "scale"):
        model, _ = made({})
        if rank == processes - 1 and wrong == "hook":
            model.lm_head.register_forward_hook(lambda *_: None)
        elif rank == processes - 1:
            model.config.logit_scale = 2.0
        mask = torch.full((2, 9), int(rank > 0))  # no token of the first one's is real
        model = wrapped(model, {}, "head")
        found.append(why_not_fusable(model, batch({}, processes)[0][:2], mask))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rank, processes = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {n: run_case(case, rank, processes) for n, case in CASES.items()}
    found["error"] = run_error(rank, processes)
    found["disagreement"] = run_disagreement(rank, processes)
    for name, case in step_losses.CASES.items():
        found[f"step: {name}"] = step_losses.run_case(
            case, rank, processes, folder, wrapped, trained
        )
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads abort now and then when Python takes the process down


if __name__ == "__main__":
    main()
