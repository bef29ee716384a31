"""A rank of a sharded vocabulary: computes every case with its rows of the head and with the whole
head, and writes how far the two are apart.

`python vocabulary.py FOLDER RANK RANKS [wide | kernels]`
"""

from __future__ import annotations

import itertools
import json
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import palu_kernels as kernels
from palu import PALULoss
from palu_kernels import LMHead, slices
from palu_kernels.distributed import traffic
from palu_kernels.linear import cost_model, op
from tests.support import readme_world

V, D, BATCH, LENGTH = 43, 24, 2, 7


def layouts(ranks, wide):
    """How many rows each rank has: V is divisible by none of them."""
    some = {2: [[22, 21]], 4: [[11, 11, 11, 10]]}[ranks]
    if wide:
        some += {2: [[0, 43], [40, 3]], 4: [[20, 0, 3, 20], [0, 0, 43, 0]]}[ranks]
    return some


def tensors(dtype, seed=0, length=LENGTH):
    """Hidden rows, reference's, weights and biases, labels; rows with ties among them."""
    g = torch.Generator().manual_seed(seed)

    def new(*shape):  # sixteenths: a logit is exact, in whatever order it is added up
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * 5).round() / 16

    hidden, weight, bias = new(BATCH, length, D) * 3, new(V, D), new(V)
    weight[30:38] = weight[3:11]  # ties between ranks
    bias[30:38] = bias[3:11]
    bias[5] = bias[20] = -torch.inf
    ref_hidden = hidden + new(BATCH, length, D)
    ref_weight = weight + new(V, D) / 2
    ref_weight[30:38] = ref_weight[3:11]
    labels = torch.randint(0, V, (BATCH, length), generator=g)
    labels[labels == 5], labels[labels == 20] = 6, 6
    labels[0, 1] = -100
    made = (t.to(dtype) for t in (hidden, weight, bias, ref_hidden, ref_weight))
    return [*made, labels]


def calls(wide, backend="auto"):
    """(name, function of hidden, head, reference's rows and head, labels)."""
    reductions = ("none", "sum") if wide else ("none", "mean")
    for reduction in reductions:
        more = {"reduction": reduction, "backend": backend}
        for direction in ("reverse", "forward"):
            yield (
                f"{direction} kl {reduction}",
                lambda h, head, rh, rhead, labels, o=more, d=direction, **k: kernels.linear_kl_loss(
                    h, head, rh, rhead, direction=d, **o, **k
                ),
            )
        yield (
            f"cross-entropy {reduction}",
            lambda h, head, rh, rhead, labels, o=more: kernels.linear_cross_entropy_loss(
                h, head, labels, **o
            ),
        )
        kinds = [("entropy", "global_mean")]
        kinds += [("flatten", c) for c in ("global_mean", "local_mean", 0.25)]
        ks = (1, 5, 30, 70) if wide else (5, 70)
        for (objective, center), k, way in itertools.product(kinds, ks, ("dense", "sparse")):
            yield from forget_calls(objective, center, k, way, more)


def forget_calls(objective, center, k, way, more):
    options = {"top_k": k, "objective": objective, "center": center, "implementation": way, **more}
    name = f"{objective} {center} {k} {way} {more['reduction']}"

    def by_reference(h, head, rh, rhead, labels, **more):
        return kernels.linear_local_entropy_loss(h, head, rh, rhead, **options, **more)

    def by_indices(h, head, rh, rhead, labels):
        spread = torch.arange(h[..., 0].numel())[:, None] + 7 * torch.arange(min(k, V))
        indices = (spread % V).view(*h.shape[:-1], -1)
        return kernels.linear_local_entropy_loss(h, head, indices=indices, **options)

    def by_current(h, head, rh, rhead, labels):
        return kernels.linear_local_entropy_loss(h, head, **options)

    yield f"by reference {name}", by_reference
    yield f"by indices {name}", by_indices
    if way == "dense":
        yield f"by current {name}", by_current


def gradients(function, given, head, reference):
    """Losses and gradients of hidden, weight and bias, `None` where there are none."""
    hidden, ref_hidden, labels = given
    hidden = hidden.detach().clone().requires_grad_()
    losses = function(hidden, head, ref_hidden, reference, labels)
    weights = torch.linspace(0.5, 2, losses.numel(), dtype=losses.dtype).view(losses.shape)
    (losses * weights).sum().backward()
    return (
        losses.detach(),
        hidden.grad,
        head.weight.grad,
        None if head.bias is None else head.bias.grad,
    )


def heads(weight, bias, ref_weight, trained, cap, rows=None):
    """The head and its reference, of these rows or whole."""
    part = slice(None) if rows is None else slice(rows[0], rows[0] + rows[1])
    group = None if rows is None else distributed.group.WORLD
    place = {} if rows is None else {"process_group": group, "vocab_start": rows[0]}
    own = [
        t[part].clone().requires_grad_(trained) if t is not None else None for t in (weight, bias)
    ]
    return LMHead(*own, 0.5, cap, **place), LMHead(
        ref_weight[part].clone(), None, 0.25, cap, **place
    )


def apart(found, right):
    """The largest distance of entries, relative to 1 and their size; infinite where one is NaN or
    infinite and the other not."""
    if found is None or right is None:
        return 0.0 if found is right else float("inf")
    if found.shape != right.shape:
        return float("inf")
    found, right = found.double(), right.double()
    if not torch.equal(found.nan_to_num(0, 1, -1).isfinite() & found.isfinite(), right.isfinite()):
        return float("inf")
    finite = right.isfinite()
    if not finite.any():
        return 0.0
    return float(((found - right).abs() / (1 + right.abs()))[finite].max())


def compare(name, function, made, rows, trained, cap, whole_reference=False):
    hidden, weight, bias, ref_hidden, ref_weight, labels = made
    bias = None if cap else bias
    given = hidden, ref_hidden, labels
    right = gradients(function, given, *heads(weight, bias, ref_weight, trained, cap))
    head, reference = heads(weight, bias, ref_weight, trained, cap, rows)
    if whole_reference:
        reference = LMHead(ref_weight.clone(), None, 0.25, cap)
    found = gradients(function, given, head, reference)
    part = slice(rows[0], rows[0] + rows[1])
    right = [*right[:2], *(None if t is None else t[part] for t in right[2:])]
    return {name: max(map(apart, found, right))}


def palu_calls():
    """PALULoss on hidden rows."""
    settings = {
        "by reference": {"preserve": "reverse_kl"},
        "by reference, entropy": {"objective": "entropy", "preserve": "forward_kl"},
        "nll, local mean": {"preserve": "nll", "center": "local_mean"},
        "by current": {"preserve": "reverse_kl", "select_from": "current"},
    }
    for name, options in settings.items():

        def loss(h, head, rh, rhead, labels, o=options):
            out = PALULoss(top_k=7, prefix_length=2, **o).from_hidden(h, head, LABELS, rh, rhead)
            return torch.stack(out[:3])

        yield name, loss

    def cached(h, head, rh, rhead, labels):
        palu = PALULoss(top_k=7, prefix_length=2)
        roles = palu._row_roles(LABELS)
        indices = (torch.arange(int((roles == 1).sum()))[:, None] * 5 + torch.arange(7)) % V
        rows = rh[roles == 2]
        out = palu.from_hidden(h, head, LABELS, rows, rhead, ref_indices=indices)
        return torch.stack(out[:3])

    yield "cached", cached


def run_grid(rank, ranks, wide):
    found = {}
    for counts in layouts(ranks, wide):
        rows = sum(counts[:rank]), counts[rank]
        kinds = [
            (torch.float64, True, 4.0),
            (torch.float64, False, None),
            (torch.float32, True, None),
        ]
        some = [(torch.float64, True, None), (torch.float32, False, 4.0)]
        for dtype, trained, cap in some + kinds if wide else some:
            made = tensors(dtype)
            about = f"{counts} {str(dtype)[6:]} {'trained' if trained else 'frozen'} cap {cap}"
            for name, function in calls(wide):
                if cap and "flatten global_mean" in name and "sparse" in name:
                    continue
                found |= compare(f"{name} {about}", function, made, rows, trained, cap)
            for (name, function), sparse in itertools.product(palu_calls(), (False, True)):
                cost_model.prefer_sparse = lambda *_, sparse=sparse, **__: sparse
                name = f"palu {name} {'sparse' if sparse else 'dense'} {about}"
                found |= compare(name, function, made, rows, trained, cap, whole_reference=sparse)
    return found


def run_more(rank, ranks):
    """Many chunks, gradients of the head summed instead of kept, rows and slices that are not
    finite, half precision, checkpoints, torch.compile."""
    found = {}
    cut = [V * n // ranks for n in range(ranks + 1)]
    rows = cut[rank], cut[rank + 1] - cut[rank]

    def each(about, made, functions, **options):
        for name, function in functions.items():
            found.update(compare(f"{name} {about}", function, made, rows, True, None, **options))

    functions = {
        name: function
        for name, function in calls(False)
        if name.endswith("none") and (" 70 " not in name or "by reference" in name)
    }
    functions |= dict(palu_calls())
    is_kept, op.is_kept = op.is_kept, lambda *_: False
    each("summed float64", tensors(torch.float64), functions)
    op.is_kept = is_kept
    large = tensors(torch.float64, length=75)
    small = {
        name: partial(function, chunk_bytes=1)
        for name, function in calls(False)
        if name.endswith("none") and ("kl" in name or "by reference" in name)
    }
    each("in chunks float64", large, small)

    made = tensors(torch.float64)
    made[0][0, 3, 2], made[3][1, 2, 4] = torch.nan, torch.nan
    # a product with gradients that are kept carries a NaN to all rows of the head, sums do not
    op.is_kept = lambda *_: True
    each("NaN float64", made, functions)
    op.is_kept = lambda *_: False
    sparse = {name: function for name, function in functions.items() if "sparse" in name}
    each("NaN summed float64", made, sparse)
    op.is_kept = is_kept
    made = tensors(torch.float64)
    made[2][cut[1] : cut[2]] = -torch.inf
    made[5][(made[5] >= cut[1]) & (made[5] < cut[2])] = 0
    each("a masked slice float64", made, functions)
    each("bfloat16", tensors(torch.bfloat16), functions)

    def again(name):
        return lambda *given: checkpoint(functions[name], *given, use_reentrant=False)

    names = "reverse kl none", "by reference flatten global_mean 5 sparse none"
    each("checkpoint float64", tensors(torch.float64), {name: again(name) for name in names})

    def autocast(name):
        def loss(*given):
            with torch.autocast("cpu", torch.bfloat16):
                return functions[name](*given)

        return loss

    each("autocast bfloat16", tensors(torch.float32), {name: autocast(name) for name in names})
    traced = {name: torch.compile(functions[name], backend="eager") for name in names}
    each("compiled float64", tensors(torch.float64), traced)
    return found


def run_kernels(rank, ranks):
    """The kernels of Triton, under its interpreter."""
    cut = [V * n // ranks for n in range(ranks + 1)]
    rows = cut[rank], cut[rank + 1] - cut[rank]
    found = {}
    for kept, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        op.is_kept = lambda *_, kept=kept: kept
        for name, function in calls(False, "triton"):
            if name.endswith("none") and ("indices" not in name or " 5 " in name):
                about = f"{name} {'kept' if kept else 'summed'} {str(dtype)[6:]}"
                made = tensors(dtype, length=3)
                found |= compare(about, function, made, rows, True, None)
    return found


def run_faults(rank, ranks):
    """What every rank is told where rank 1 differs."""
    group, other = distributed.group.WORLD, rank == 1
    hidden, weight, bias, ref_hidden, _, labels = tensors(torch.float32)
    cut = [V * n // ranks for n in range(ranks + 1)]
    start, rows = cut[rank], cut[rank + 1] - cut[rank]
    own = weight[start : start + rows]

    def head(weight=own, bias=None, at=start, **options):
        return LMHead(weight, bias, process_group=group, vocab_start=at, **options)

    def kl(h=hidden, r=ref_hidden, **options):
        return kernels.linear_kl_loss(h, head(), r, **options)

    def entropy(**options):
        return kernels.linear_cross_entropy_loss(hidden, head(), **options)

    shared = head()
    faults = {
        "softcap": lambda: head(softcap=30.0 if other else None),
        "dtype": lambda: head(own.double() if other else own),
        "hidden size": lambda: head(own[:, 1:] if other else own),
        "bias": lambda: head(own, bias[:rows] if other else None),
        "gap": lambda: head(at=start + other),
        "overlap": lambda: head(at=start - other),
        "start": lambda: head(at="1" if other else start),
        "shape of bias": lambda: head(own, bias[: rows - other]),
        "direction": lambda: kl(direction="forward" if other else "reverse"),
        "unknown direction": lambda: kl(direction="backward" if other else "reverse"),
        "rows": lambda: kl(hidden[:, other:], ref_hidden[:, other:]),
        "hidden": lambda: kl(hidden[:, :, : D - other]),
        "values": lambda: kl(hidden + other),
        "labels": lambda: entropy(labels=labels.flip(-1) if other else labels),
        "out of range": lambda: entropy(labels=labels + V if other else labels),
        "call": lambda: kl() if other else entropy(labels=labels),
        "head and loss": lambda: (
            head() if other else kernels.linear_kl_loss(hidden, shared, ref_hidden)
        ),
    }
    found = {}
    for name, fault in faults.items():
        try:
            fault()
            found[name] = "nothing"
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        distributed.barrier()
    return found


def run_traffic(rank, ranks):
    """Bytes by purpose that this rank hands over for every loss, of 14 rows."""
    hidden, weight, _, ref_hidden, ref_weight, labels = tensors(torch.float32)
    cut = [V * n // ranks for n in range(ranks + 1)]
    rows = cut[rank], cut[rank + 1] - cut[rank]
    head, reference = heads(weight, None, ref_weight, True, None, rows)
    found = {}
    for name, function in calls(False):
        if name.endswith("mean"):
            traffic.clear()
            given = hidden.clone().requires_grad_(), head, ref_hidden, reference, labels
            function(*given).backward()
            found[name] = dict(traffic)
    return found


LABELS = torch.tensor([[-100, 3, 9, -200, 11, -200, -200], [-100, -200, 1, 2, 4, 30, -200]])


def logits_calls(columns):
    """(name, function of logits, reference's logits and labels)."""
    for reduction in ("none", "mean"):
        yield (
            f"kl {reduction}",
            lambda z, r, labels, o=reduction: kernels.kl_loss(z, r, reduction=o),
        )
        yield (
            f"cross-entropy {reduction}",
            lambda z, r, labels, o=reduction: kernels.cross_entropy_loss(z, labels, reduction=o),
        )
        for k, center in ((3, "global_mean"), (30, "local_mean")):
            options = {"top_k": k, "center": center, "reduction": reduction}
            spread = torch.arange(BATCH * LENGTH)[:, None] + torch.arange(min(k, columns))
            chosen = (spread % columns).view(BATCH, LENGTH, -1)
            for by in ("reference", "indices", "current"):

                def forget(z, r, labels, by=by, chosen=chosen, options=options):
                    indices = chosen if by == "indices" else None
                    ref = r if by == "reference" else None
                    return kernels.local_entropy_loss(z, ref, indices=indices, **options)

                yield f"forget by {by} {k} {reduction}", forget
    for preserve in ("reverse_kl", "nll"):

        def palu(z, r, labels, preserve=preserve):
            return torch.stack(
                PALULoss(top_k=7, prefix_length=2, preserve=preserve)(z, labels, r)[:3]
            )

        yield f"palu {preserve}", palu

    def palu_rows(z, r, labels):
        roles = torch.tensor([0, 1, 2, 1, 2, 0, 2])
        return torch.stack(PALULoss(top_k=7).from_rows(z[0], roles, r[0])[:3])

    yield "palu from_rows", palu_rows


def of_logits(function, z, r, labels):
    losses = function(z, r, labels)
    weights = torch.linspace(0.5, 2, losses.numel(), dtype=losses.dtype).view(losses.shape)
    (losses * weights).sum().backward()
    grad = z.grad.full_tensor() if isinstance(z, DTensor) else z.grad
    return losses.detach(), grad


def run_logits(ranks):
    """Logits as DTensors: how far from plain ones."""
    mesh = init_device_mesh("cpu", (ranks,))
    found = {}
    g = torch.Generator().manual_seed(3)
    for columns, dtype in ((V, torch.float64), (V, torch.float32), (5, torch.float64)):
        z, r = (
            (torch.randn(BATCH, LENGTH, columns, generator=g) * 4).round().to(dtype) / 2
            for _ in range(2)
        )
        r[0, 1, ::2] = z[0, 1, ::2] = -torch.inf
        z[1, 1, columns - 1] = torch.nan
        labels = torch.where(LABELS >= 0, LABELS % columns, LABELS)
        references = {
            "sharded": distribute_tensor(r, mesh, [Shard(-1)]),
            "replicated": distribute_tensor(r, mesh, [Replicate()]),
            "whole": r,
        }
        about = f"{columns} {str(dtype)[6:]}"
        for k in (1, 3, 30):
            scores = distribute_tensor(z, mesh, [Shard(-1)])
            same = torch.equal(kernels.topk_indices(scores, k), kernels.topk_indices(z, k))
            found[f"top {k} {about}"] = 0.0 if same else float("inf")
        for name, function in logits_calls(columns):
            own = labels.clamp(min=-100) if "cross" in name else labels
            right = of_logits(function, z.clone().requires_grad_(), r, own)
            for kind, ref in references.items():
                shards = distribute_tensor(z, mesh, [Shard(-1)]).requires_grad_()
                pair = zip(of_logits(function, shards, ref, own), right, strict=True)
                found[f"{name} ref {kind} {about}"] = max(itertools.starmap(apart, pair))
            copies = distribute_tensor(z, mesh, [Replicate()]).requires_grad_()
            pair = zip(
                of_logits(function, copies, references["replicated"], own), right, strict=True
            )
            found[f"{name} replicated {about}"] = max(itertools.starmap(apart, pair))
    found |= run_head_of_dtensors(init_device_mesh("cpu", (1, ranks)))
    # rows of their own on every rank
    z, r = (
        torch.randn(2 * ranks, LENGTH, V, generator=g),
        torch.randn(2 * ranks, LENGTH, V, generator=g),
    )
    right = kernels.kl_loss(z, r, reduction="none")
    own = kernels.kl_loss(
        *(distribute_tensor(t, mesh, [Shard(0)]) for t in (z, r)), reduction="none"
    )
    mine = slice(2 * distributed.get_rank(), 2 * distributed.get_rank() + 2)
    found["kl by rows float32"] = apart(own, right[mine])
    return found


def run_head_of_dtensors(mesh):
    """Weight and bias over the second dimension of a mesh, hidden rows a DTensor too."""
    hidden, weight, bias, ref_hidden, ref_weight, _ = tensors(torch.float64)
    right = gradients(
        lambda h, head, r, ref, _: kernels.linear_kl_loss(h, head, r, ref, reduction="none"),
        (hidden, ref_hidden, None),
        *heads(weight, bias, ref_weight, True, None),
    )
    parts = [
        distribute_tensor(t, mesh, [Replicate(), Shard(0)]).requires_grad_() for t in (weight, bias)
    ]
    reference = LMHead(distribute_tensor(ref_weight, mesh, [Replicate(), Shard(0)]), None, 0.25)
    rows = distribute_tensor(hidden, mesh, [Replicate(), Replicate()]).requires_grad_()
    with torch.no_grad():  # where a head is made says nothing of whether it trains
        head = LMHead(*parts, 0.5)
    losses = kernels.linear_kl_loss(rows, head, ref_hidden, reference, reduction="none")
    (
        losses * torch.linspace(0.5, 2, losses.numel(), dtype=losses.dtype).view_as(losses)
    ).sum().backward()
    grads = (t.grad.full_tensor() for t in (rows, *parts))
    pair = zip((losses.detach(), *grads), right, strict=True)
    return {"head of DTensors float64": max(itertools.starmap(apart, pair))}


def run_refusals(ranks):
    """What is said of placements that are not served."""
    mesh = init_device_mesh("cpu", (ranks,))
    square = init_device_mesh("cpu", (1, ranks))
    z = torch.randn(BATCH, 2 * ranks, 8)
    whole = distribute_tensor(z, mesh, [Replicate()])
    partial = DTensor.from_local(z, mesh, [Partial()])
    shards = distribute_tensor(z, mesh, [Shard(-1)])
    weight = torch.randn(8, 4)
    refusals = {
        "partial logits": lambda: kernels.kl_loss(partial, z),
        "partial scores": lambda: kernels.topk_indices(partial, 2),
        "rows and vocabulary": lambda: kernels.kl_loss(
            distribute_tensor(z, square, [Shard(0), Shard(-1)]), z
        ),
        "sharded reference": lambda: kernels.kl_loss(z, shards),
        "sharded reference of whole logits": lambda: kernels.kl_loss(whole, shards),
        "palu": lambda: PALULoss()(partial, torch.zeros(BATCH, 2 * ranks, dtype=torch.long), z),
        "weight by columns": lambda: LMHead(distribute_tensor(weight, mesh, [Shard(1)])),
        "partial weight": lambda: LMHead(DTensor.from_local(weight, mesh, [Partial()])),
        "twice sharded": lambda: LMHead(distribute_tensor(weight, square, [Shard(0), Shard(0)])),
        "group beside a DTensor": lambda: LMHead(
            distribute_tensor(weight, mesh, [Shard(0)]), process_group=distributed.group.WORLD
        ),
        "hidden by columns": lambda: kernels.linear_kl_loss(
            distribute_tensor(torch.randn(2, 4), mesh, [Shard(1)]),
            LMHead(weight),
            torch.zeros(2, 4),
        ),
        "slices as plain tensors": lambda: kernels.kl_loss(shards.to_local(), z),
        "labels of plain slices": lambda: kernels.cross_entropy_loss(
            shards.to_local(), torch.full((BATCH, 2 * ranks), 7)
        ),
    }
    found = {}
    for name, call in refusals.items():
        try:
            call()
            found[name] = "nothing"
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def run_model(ranks):
    """A transformers model whose head `parallelize_module` shards, by logits (the example of
    docs/distributed.md) and by hidden rows: how far loss and gradients of all parameters are from
    those of one device."""
    ids = torch.randint(3, V, LABELS.shape, generator=torch.Generator().manual_seed(1))
    labels = torch.where(LABELS >= 0, ids, LABELS)
    settings = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    palu = PALULoss(top_k=6, prefix_length=2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def make(seed):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings)).double()

    def result(model, loss):
        grads = [p.grad for p in model.parameters()]
        return loss.detach(), *(t.full_tensor() if isinstance(t, DTensor) else t for t in grads)

    def by_hidden(model, reference):
        with torch.no_grad():
            ref = reference.model(ids).last_hidden_state
        hidden = model.model(ids, use_cache=False).last_hidden_state
        head, ref_head = LMHead(model.lm_head.weight), LMHead(reference.lm_head.weight.detach())
        loss = palu.from_hidden(hidden, head, labels, ref, ref_head).loss
        loss.backward()
        return result(model, loss)

    right = by_hidden(make(0), make(1).requires_grad_(False))
    models = make(0), make(1).requires_grad_(False)
    nothing = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    names = {"torch": torch, "loss_fn": palu, "optimizer": nothing, "forget_loader": [batch]}
    names |= {"model": models[0], "frozen_original": models[1]}
    exec(readme_world.EXAMPLES[readme_world.SHARDED], names)
    found = {"logits float64": result(models[0], names["out"].loss)}
    models[0].zero_grad()
    found["hidden rows float64"] = by_hidden(*models)
    return {
        name: max(itertools.starmap(apart, zip(one, right, strict=True)))
        for name, one in found.items()
    }


def main(folder, rank, ranks, what=""):
    rank, ranks = int(rank), int(ranks)
    torch.set_num_threads(1)
    slices.GATHERED_K = 20  # so that both ways to select are gone
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=5),
    )
    parts = {
        "grid": lambda: run_grid(rank, ranks, what == "wide"),
        "more": lambda: run_more(rank, ranks),
        "faults": lambda: run_faults(rank, ranks),
        "traffic": lambda: run_traffic(rank, ranks),
        "logits": lambda: run_logits(ranks),
        "refusals": lambda: run_refusals(ranks),
        "model": lambda: run_model(ranks),
    }
    if what == "kernels":
        parts = {"kernels": lambda: run_kernels(rank, ranks)}
    found = {}
    for name, run in parts.items():
        found[name] = run()
        Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
