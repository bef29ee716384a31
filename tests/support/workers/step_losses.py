"""The step loss of every method in wrappers, in several processes and in one; run by `in_head.py`.

Each process has its share of a micro-batch of forget and retain examples, and the step is
compared with that of the whole one in a plain model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from palu.data.collator import Collator
from palu.data.examples import tokenize_examples
from palu.data.records import Example
from palu.methods import make_method
from palu.methods.micro_batch import ROLES, together
from palu.methods.step_loss import StepLoss
from palu.reference.cache import ReferenceCache
from palu.reference.cached import CachedReference
from palu.reference.model import AdapterOffReference, LiveReference
from palu.training.batching import BatchBuilder
from tests.support import small

PALU = {"method": "palu", "objective": "entropy", "top_k": 7, "eos_token_id": 2}
RMU = {"method": "rmu", "layer_id": 0, "retain_loss": "embed_diff"}
CASES: dict[str, dict] = {
    "palu": {"wrap": "layers", **PALU},
    "palu, KL, sharded reference": {"wrap": "head", **PALU, "retain_loss": "kl", "sharded": True},
    "palu, cached": {"wrap": "layers", **PALU, "retain_loss": "kl", "reference": "cached"},
    "palu, adapter off": {"wrap": "layers", **PALU, "reference": "adapter_off"},
    "palu, static ddp": {"wrap": "static", **PALU},
    "palu, fsdp1": {"wrap": "fsdp1", **PALU},
    "palu, head that is none": {"wrap": "layers", **PALU, "hooked": True},
    "npo": {"wrap": "layers", "method": "npo", "retain_loss": "kl"},
    "npo, sharded reference": {"wrap": "layers", "method": "npo", "sharded": True},
    "sim_npo": {"wrap": "root", "method": "sim_npo", "beta": 0.5},
    "undial": {"wrap": "head", "method": "undial", "sharded": True},
    "undial, fsdp1": {"wrap": "fsdp1", "method": "undial"},
    "ce_u": {"wrap": "static", "method": "ce_u"},
    "pdu": {"wrap": "layers", "method": "pdu"},
    "grad_diff": {"wrap": "layers", "method": "grad_diff"},
    "rmu": {"wrap": "layers", **RMU},
    "rmu, static ddp": {"wrap": "static", **RMU},
    "rmu, fsdp1": {"wrap": "fsdp1", **RMU},
}


def examples(count: int) -> list[Example]:
    facts = [small.FACTS[i % len(small.FACTS)] for i in range(count)]
    return [Example(str(i), f"{q} {i}", a, spans, {}) for i, (q, a, spans) in enumerate(facts)]


def model_of(tok: Any, case: dict) -> torch.nn.Module:
    model = small.model(tok, seed=4, num_hidden_layers=3, initializer_range=0.1).double()
    if case.get("reference") == "adapter_off":
        import peft

        torch.manual_seed(5)
        settings = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        return peft.get_peft_model(model, settings).double()
    return model


def moved(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


def micro_batch(method: Any, collator: Collator, forget: list[dict], retain: list[dict]) -> dict:
    builder = BatchBuilder(None, None, "step", method)
    return together(builder.forget(collator(forget)), builder.retained(collator(retain)))


def step_of(case: dict, model: torch.nn.Module, cache: Any, wrap: Any = None) -> StepLoss:
    """A step loss whose reference is the model as it is now."""
    own = {"method", "wrap", "retain_loss", "reference", "sharded", "hooked"}
    method = make_method(case["method"], {k: v for k, v in case.items() if k not in own})
    method.prepare(model)
    reference: Any = AdapterOffReference(model) if case.get("reference") == "adapter_off" else None
    if case.get("reference") == "cached":
        reference = CachedReference(cache)
    if reference is None:
        reference = LiveReference(model)
        if wrap is not None and case.get("sharded"):
            reference.model = wrap(reference.model)
    return method.step_loss(
        method,
        reference,
        retain_loss=case.get("retain_loss", "nll"),
        retain_weight=0.7,
        autocast=nullcontext,
    )


def one(
    step: StepLoss, model: torch.nn.Module, batch: dict, counts: list[int], times: int
) -> torch.Tensor:
    """Loss and means after an evaluation has given the same; a step of SGD by so many times the
    loss."""
    divisors = torch.tensor(counts, dtype=torch.float64).clamp(min=1)
    with torch.no_grad():
        before, _ = step(model, batch, divisors)
    loss, means = step(model, batch, divisors)
    torch.testing.assert_close(before, loss.detach(), rtol=1e-12, atol=1e-12)
    (loss * times).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    return torch.stack([loss.detach(), *means.double()])


def run_case(
    case: dict, rank: int, processes: int, folder: Path, wrap: Callable, trained: Callable
) -> dict:
    """
    Args:
        wrap: puts a model into the wrapper of its last argument.
        trained: gives the whole parameters of a wrapped model by name.
    """
    tok = small.tokenizer()
    rows = tokenize_examples(examples(6 * processes), tok, max_length=64)
    forget, retain = rows[: 4 * processes], rows[4 * processes :]
    collator, model, cache = Collator(tok), model_of(tok, case), None
    if case.get("reference") == "cached":
        loss = make_method("palu", {k: v for k, v in PALU.items() if k != "method"}).palu_loss
        place = folder / f"cache-{rank}"
        given = {"loss": loss, "retain_dataset": retain, "tokenizer": tok}
        cache = ReferenceCache.build(model, forget, place, **given)
    other = copy.deepcopy(model)
    step = step_of(case, other, cache)
    whole = micro_batch(step.method, collator, forget, retain)
    counts = step.method.counts(whole[ROLES])
    start = trained(moved(other))
    start = {n: p.clone() for n, p in start.items()}
    alone = one(step, other, whole, counts, 1)

    def wrapped(model: torch.nn.Module) -> torch.nn.Module:
        return wrap(model, {"original": True}, case["wrap"])

    step = step_of(case, model, cache, wrapped)
    moved(model)
    if case.get("hooked"):
        model.get_output_embeddings().register_forward_hook(lambda *_: None)
    model = wrapped(model)
    own = forget[4 * rank : 4 * rank + 4], retain[2 * rank : 2 * rank + 2]
    together_ = one(step, model, micro_batch(step.method, collator, *own), counts, processes)
    dist.all_reduce(together_)
    wanted, found = trained(other), trained(model)
    assert found.keys() == wanted.keys()
    return {
        "alone": alone.tolist(),
        "together": together_.tolist(),
        "far": max((found[n] - wanted[n]).abs().max().item() for n in found),
        "moved": max((start[n] - wanted[n]).abs().max().item() for n in found),
        "without_logits": step.without_logits,
    }
