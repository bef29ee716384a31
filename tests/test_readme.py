"""The examples in README and docs run as they stand there."""

import copy
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from safetensors.torch import load_file
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainingArguments

from palu.data.collator import Collator
from palu.methods import METHODS
from tests.support import ROOT, erasure, ranks, readme_world
from tests.support.readme_world import (
    ANNOTATION,
    ATTACKS,
    DISTRIBUTED,
    FSDP,
    FSDP_LOOP,
    HIDDEN,
    LOOP,
    LORA,
    METHOD,
    ONE_MORE_LOSS,
    OPERATORS,
    REPORT,
    SHARDED,
    TRAINER,
    prepare,
    run,
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return readme_world.world(tmp_path)


def weights(names):
    return copy.deepcopy(names["model"].state_dict())


def changed(before, after):
    return any(not torch.equal(before[name], after[name].cpu()) for name in before)


def test_every_example_is_here():
    tested = {LOOP, TRAINER, ONE_MORE_LOSS, DISTRIBUTED, LORA, HIDDEN, METHOD, OPERATORS}
    tested |= {ATTACKS, ANNOTATION, REPORT, SHARDED, FSDP, FSDP_LOOP}
    assert {*readme_world.EXAMPLES} == tested and len(readme_world.RECORDS) == 2


def test_annotation():
    names = {}
    run(ANNOTATION, names)
    assert names["found"] == [("Ada Brook", 1.0)] * 2


def test_attacks(world, capsys):
    before = weights(world)
    run(ATTACKS, world)
    assert world["found"]["secrets"] == 2 and "worst" in world["found"]
    assert not changed(before, world["model"].state_dict()) and capsys.readouterr().out


def test_pages_and_links():
    """README fits two screens, lines fit 100 columns, and what is linked is there."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    assert (ROOT / "README.md").stat().st_size <= 9000
    for page in pages:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for link in re.findall(r"\]\((?!http)([^)#]+)", prose):
            assert (page.parent / link).exists(), (page.name, link)
        long = [x for x in prose.split("\n") if len(x) > 100 and not x.startswith(("|", "!"))]
        assert not [x for x in long if " " in x.strip("`. ")], (page.name, long)


def test_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = erasure.write(tmp_path, called="OUT")
    run(REPORT, names := {})
    assert names["report"]["verdict"]["level"] == "bad"
    assert (tmp_path / "report.html").is_file() and (folder / "README.md").is_file()


def test_operators():
    names = {}
    run(OPERATORS, names)
    assert names["logits"].grad.shape == (2, 8, 5000) and names["hidden"].grad.shape == (2, 8, 64)
    assert names["loss"].shape == (2, 8)


def test_an_operator_of_ones_own(tmp_path):
    """What docs/kernels.md adds in six files, in a copy of the package."""
    command = [sys.executable, "-m", "tests.support.new_operator", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_method_of_ones_own(world):
    try:
        run(METHOD, world)
        before = weights(world)
        options = 'objective="entropy"', 'method="floor_ascent"'
        run(TRAINER, world, lambda code: code.replace(*options))
        assert changed(before, world["model"].state_dict())
    finally:
        METHODS.pop("floor_ascent", None)


@pytest.mark.parametrize("number", [LOOP, TRAINER, HIDDEN])
def test_example_runs_and_trains(number, world):
    before = weights(world)
    run(number, world)
    assert changed(before, world["model"].state_dict())


def test_one_more_loss_in_a_trainer(world, tmp_path):
    names = prepare(LOOP, world)
    run(ONE_MORE_LOSS, names)
    before = weights(names)
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, report_to="none", remove_unused_columns=False
    )
    trainer = names["MyTrainer"](
        names["model"],
        args,
        train_dataset=names["rows"],
        data_collator=Collator(names["tokenizer"]),
    )
    trainer.train()
    assert changed(before, names["model"].state_dict())


def test_lora(world):
    names = prepare(TRAINER, world)
    base = weights(world)
    run(LORA, names)
    adapted = dict(names["trainer"].model.named_parameters())
    lora = {name: p for name, p in adapted.items() if "lora_B" in name}
    assert lora and all(p.any() for p in lora.values())
    frozen = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p.cpu()
        for n, p in adapted.items()
    }
    assert all(torch.equal(frozen[name], value) for name, value in base.items() if name in frozen)


@pytest.mark.parametrize("launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_are_one(world, tmp_path, launcher):
    """The examples for several devices, by `torchrun` or as it starts them, against the plain loop:
    with DDP and FSDP2 two micro-batches a step in each process, whose rows are those of the loop,
    twice; and README's loop with the rows of the plain one in each process."""
    words = ["-m", "tests.support.readme_world", str(tmp_path)]
    if launcher == "forked":
        ranks.launch(words, 2, tmp_path)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        options = {"capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(command, cwd=ROOT, env=environment, **options)
        assert done.returncode == 0, done.stderr[-3000:]
    before = weights(world)
    run(LOOP, world)
    assert changed(before, world["model"].state_dict())
    for rank in range(2):
        for example in ("ddp", "fsdp", "fsdp_loop"):
            found = load_file(tmp_path / f"{example}-{rank}.safetensors")
            for name, right in world["model"].state_dict().items():
                torch.testing.assert_close(found[name], right, rtol=1e-4, atol=1e-6)


# ---- gradients of each example's second step, against METHOD.md's formulas on all logits ---------


class Stepped(Exception):
    """The optimizer is about to step for the second time."""


def second_gradient(work, names):
    """Runs something until an optimizer is about to step again -> the gradients it would step with.
    (At the first step the model is the original, and nothing holds it back.)"""
    steps = []

    def stop(optimizer, args, kwargs):
        steps.append(optimizer)
        if len(steps) == 2:
            raise Stepped

    hook = register_optimizer_step_pre_hook(stop)
    try:
        with pytest.raises(Stepped):
            work()
    finally:
        hook.remove()
    return gradients(names["model"])


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def eager(names, rows, *, autocast=False, forget_weight=1.0, retain=False):
    """The loss of some rows, as METHOD.md writes it: prefixes of 3, k = 50, entropy, reverse KL."""
    batch = Collator(names["tokenizer"])(rows)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = names["model"](**inputs).logits
        with torch.no_grad():
            ref = names["frozen_original"](**inputs).logits.float()[:, :-1]
    logits, labels = whole.float()[:, :-1], batch["labels"][:, 1:]
    sensitive = (labels >= 0) & (labels != names["tokenizer"].eos_token_id)
    rank = torch.zeros_like(labels)
    for t in range(labels.shape[1]):
        rank[:, t] = torch.where(sensitive[:, t], 1 + (rank[:, t - 1] if t else 0), 0)
    forget, preserve = sensitive & (rank <= 3), labels == -200
    top = ref[forget].sort(dim=-1, descending=True, stable=True).indices[:, :50]
    log_q = logits[forget].gather(-1, top).log_softmax(-1)
    levels = math.log(top.shape[1]) + (log_q.exp() * log_q).sum(-1)
    log_p, log_ref = logits[preserve].log_softmax(-1), ref[preserve].log_softmax(-1)
    held = (log_p.exp() * (log_p - log_ref)).sum(-1)
    loss = forget_weight * levels.mean() + held.mean()
    if retain:
        answer = labels != -100
        loss = loss + functional.cross_entropy(logits[answer], batch["input_ids"][:, 1:][answer])
    return loss, whole


def compare(found, names, loss, bf16=False):
    loss.backward()
    right = gradients(names["model"])
    assert found.keys() == right.keys()
    found, right = (torch.cat([g.flatten() for g in x.values()]) for x in (found, right))
    assert found.norm() / right.norm() == pytest.approx(1, rel=1e-2 if bf16 else 1e-4)
    assert (found - right).norm() / right.norm() < (3e-2 if bf16 else 1e-4)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("number", [LOOP, HIDDEN])
def test_gradient_of_a_loop(number, bf16, world):
    def work():
        # Without the cache of casts, since the weights change inside.
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            run(number, world)

    found = second_gradient(work, world)
    compare(found, world, eager(world, world["rows"], autocast=bf16)[0], bf16=bf16)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("reference", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_of_one_more_loss(accumulation, bf16, reference, world, tmp_path):
    """Trainer's step is the mean of its micro-batches' losses; the original may be in bfloat16."""
    names = prepare(LOOP, world)
    names["frozen_original"].to(getattr(torch, reference))
    run(ONE_MORE_LOSS, names)
    args = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=2 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        report_to="none",
        bf16=bf16,
        use_cpu=True,
    )
    data = {"train_dataset": names["rows"], "data_collator": Collator(names["tokenizer"])}
    trainer = names["MyTrainer"](names["model"], args, **data)
    found = second_gradient(trainer.train, names)
    losses = []
    for rows in [names["rows"]] if accumulation == 1 else [[row] for row in names["rows"]]:
        loss, logits = eager(names, rows, autocast=bf16)
        losses.append(loss + 0.01 * logits.float().logsumexp(-1).square().mean())
    compare(found, names, sum(losses) / accumulation, bf16=bf16)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("number", [TRAINER, LORA])
def test_gradient_of_palu_trainer(number, accumulation, bf16, world):
    """Means are over the rows of the step, however it is split."""
    names = world
    if number == LORA:
        names = prepare(TRAINER, world)  # which trains the model
        names["frozen_original"] = copy.deepcopy(names["model"])
    options = f"per_device_train_batch_size={2 // accumulation}, max_grad_norm=0.0, use_cpu=True, "
    options += f"bf16={bf16}, gradient_accumulation_steps={accumulation}, learning_rate=1e-2"

    def edit(example):
        edited, count = re.subn(r"learning_rate=[\de-]+", options, example)
        assert count == 1
        return edited

    found = second_gradient(lambda: run(number, names, edit), names)
    weight = 3.0 if number == TRAINER else 1.0
    loss, _ = eager(names, names["rows"], autocast=bf16, forget_weight=weight, retain=True)
    compare(found, names, loss, bf16=bf16)


@pytest.mark.parametrize("counted", [False, True])
def test_what_accelerate_divides(counted, world):
    """Nothing to do for a batch's own means; counts of the step as README's sentence has them."""
    page = readme_world.page("docs/training.md")
    (counted_loss,) = re.findall(r"^accelerator\.backward\((.+)\)$", page, re.M)
    names = prepare(LOOP, world)
    names["frozen_original"].lm_head.weight.data.mul_(1.2)
    batches = [Collator(names["tokenizer"])([row]) for row in names["rows"]]
    counts = {}
    if counted:
        roles = [names["loss_fn"].roles(batch["labels"]) for batch in batches]
        counts["num_forget"] = sum((r == 1).sum() for r in roles)
        counts["num_preserve"] = sum((r == 2).sum() for r in roles)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        for batch in batches:
            with accelerator.accumulate(names["model"]):
                inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
                with torch.no_grad():
                    ref_logits = names["frozen_original"](**inputs).logits
                logits = names["model"](**inputs).logits
                out = names["loss_fn"](logits, batch["labels"], ref_logits, **counts)
                accelerator.backward(eval(counted_loss) if counted else out.loss)
    finally:
        GradientState._reset_state()
    found = gradients(names["model"])
    parts = [names["rows"]] if counted else [[row] for row in names["rows"]]
    compare(found, names, sum(eager(names, rows)[0] for rows in parts) / len(parts))
