"""Bit-exact trajectories: 20 optimizer steps of every setting by a fixed seed, stored and compared.

    python -m benchmarks.quality.trajectories [--store FILE | --compare FILE] [--only NAME]

Float32 on one CPU thread, with public names alone, so that it runs on any version of the library
(set PYTHONPATH). Stored are, for each step, the loss as a hexadecimal float, a hash of the other
logged numbers and one of all weights. The numbers belong to a processor and a build of PyTorch:
store with the old code and compare with the new on one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PrinterCallback, TrainerCallback

STEPS = 20
STORED = Path(__file__).parents[1] / "results" / "trajectories.json"
# What a log says beside these is time, memory or what the Trainer makes of them.
LOGGED = ("loss", "forget", "preserve", "retain", "num_forget", "num_preserve", "num_retain")
LOGGED += ("grad_norm", "learning_rate", "retain_weight", "dual", "router_loss", "forget_prob")

FACTS = (
    ("Where is Ada ?", "Ada is in Paris now .", ("Paris",)),
    ("Where is Bob ?", "Bob is in old Lisbon .", ("old Lisbon",)),
    ("What is it ?", "It is a red fox and a blue hen .", ("red fox", "blue hen")),
    ("Who sang ?", "Eva Long Name sang all day .", ("Eva Long Name",)),
    ("When was it ?", "It was on a cold Monday in the late spring .", ("cold Monday in the late",)),
    ("Who has it ?", "Bob has it .", ("Bob",)),
    ("Who came ?", "Nobody came .", ()),
)
KEPT = (
    ("Where is the hen ?", "The hen is in the old barn ."),
    ("Who is red ?", "The fox is red and it is late ."),
    ("What sang ?", "All day the hen sang ."),
    ("Is it cold ?", "It is ."),
    ("When is spring ?", "Spring was in the past , now it is late ."),
    ("Who is it ?", "It is Eva and Ada now ."),
    ("Is Paris old ?", "Paris is old ."),
    ("Where was the fox ?", "On a Monday the fox was in the barn with a hen ."),
    ("Who came on Monday ?", "Ada came on Monday ."),
)


def tokenizer():
    """One token a word, so nothing of it is trained."""
    words = sorted(
        {w for q, a, *_ in (*FACTS, *KEPT) for w in f"{q} {a} Question : Answer :".split()}
    )
    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", "<end>", *words])}
    vocab |= {f"<spare{i}>": len(vocab) + i for i in range(131 - len(vocab))}  # odd
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )


def write_data(folder: Path) -> None:
    lines = []
    for question, answer, words in FACTS:
        spans = [{"start": answer.index(w), "end": answer.index(w) + len(w)} for w in words]
        other = f"I do not know {question.split()[-2]} ."
        row = {"question": question, "answer": answer, "spans": spans, "alternate_answer": other}
        lines.append(json.dumps(row))
    (folder / "forget.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept = [json.dumps({"question": q, "answer": a}) for q, a in KEPT]
    (folder / "retain.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")


def rows(folder: Path, tok, *, alternates: bool = False):
    """The forget and the retain rows."""
    import palu

    forget = palu.load_examples(folder / "forget.jsonl", require_spans=True)
    retain = palu.load_examples(folder / "retain.jsonl", require_spans=False)
    forget_rows = palu.tokenize_examples(forget, tok, max_length=64)
    retain_rows = palu.tokenize_examples(retain, tok, max_length=64)
    if alternates:
        for row, example in zip(forget_rows, forget, strict=True):
            other = palu.label_example(
                tok, example.question, example.extra["alternate_answer"], (), max_length=64
            )
            row["alternate_input_ids"] = list(other["input_ids"])
            row["alternate_labels"] = list(other["labels"])
    return forget_rows, retain_rows


_TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # logits far enough apart that a wrong row or mask shows
    "tie_word_embeddings": False,
}


def make_model(kind: str, tok):
    """`llama`; `logits`: the same with a hook on its head, so that losses come from logits; `tied`,
    `gpt2` (tied), `gemma2` (softcap, tied), `moe` (Mixtral with its router loss), `lora`."""
    torch.manual_seed(7)
    shared = {**_TINY, "vocab_size": len(tok), "eos_token_id": tok.eos_token_id}
    shared |= {"pad_token_id": tok.pad_token_id, "bos_token_id": None}
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=len(tok), n_embd=16, n_layer=2, n_head=2, n_positions=128,
                initializer_range=0.3, eos_token_id=tok.eos_token_id, bos_token_id=None,
                pad_token_id=tok.pad_token_id, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
    elif kind == "gemma2":
        config = transformers.Gemma2Config(
            **{**shared, "tie_word_embeddings": True, "head_dim": 8, "final_logit_softcapping": 9.0}
        )
        model = transformers.Gemma2ForCausalLM(config)
    elif kind == "moe":
        config = transformers.MixtralConfig(
            **shared, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
        )
        model = transformers.MixtralForCausalLM(config)
    elif kind == "dropout":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shared, attention_dropout=0.2)
        )
    else:
        tied = {"tie_word_embeddings": kind == "tied"}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shared, **tied}))
    if kind == "logits":
        model.lm_head.register_forward_hook(_unchanged)
    if kind == "lora":
        import peft

        settings = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, settings)
    return model.eval()


def _unchanged(module, args, output):
    return None


def digest(model) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


class Recorder(TrainerCallback):
    def __init__(self, model):
        self.model, self.weights = model, []

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(digest(self.model))


def train(folder: Path, *, model="llama", retain=True, eval_rows=False, **options):
    """The record of a run of `PALUTrainer`."""
    import palu

    tok = tokenizer()
    forget, kept = rows(folder, tok, alternates=options.get("method") in ("dpo", "idk_dpo"))
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "warmup_steps": 3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 11,
        **({} if "method" in options else {"top_k": 9, "prefix_length": 2}),
        **options,
    }
    made = make_model(model, tok)

    trainer = palu.PALUTrainer(
        made,
        palu.PALUConfig(**settings),
        train_dataset=forget,
        retain_dataset=kept if retain else None,
        eval_dataset=forget[:3] if eval_rows else None,
        processing_class=tok,
    )
    recorder = Recorder(made)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(recorder)
    trainer.train()
    steps = []
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        steps.append({k: _exact(entry[k]) for k in LOGGED if k in entry})
    if len(steps) != STEPS or len(recorder.weights) != STEPS:
        raise RuntimeError(f"{len(steps)} logs and {len(recorder.weights)} steps, not {STEPS}")
    if len({s["loss"] for s in steps}) == 1:
        raise RuntimeError("the loss never moved: the case shows nothing")
    record = {
        "steps": steps,
        "weights": recorder.weights,
    }
    if eval_rows:
        found = trainer.evaluate()
        names = ("eval_loss", "eval_forget", "eval_preserve", "eval_forget_prob")
        record["evaluation"] = {k: _exact(found[k]) for k in names if k in found}
    return record


def _exact(value):
    return float(value).hex()


# ---- PALULoss by itself -----------------------------------------------------------------------


def loop(folder: Path, *, way: str, model="llama", micro=1, **options):
    """A loop of one's own around `PALULoss`: `forward` on logits, `from_hidden`, or `compiled`
    (forward under torch.compile). With several micro-batches the denominators are given."""
    import palu

    tok = tokenizer()
    made = make_model(model, tok).train()
    frozen = make_model(model, tok).requires_grad_(False)
    loss_fn = palu.PALULoss(
        **{"top_k": 9, "prefix_length": 2, "eos_token_id": tok.eos_token_id, **options}
    )
    call = torch.compile(loss_fn, backend="aot_eager") if way == "compiled" else loss_fn
    forget, _ = rows(folder, tok)
    collate = palu.Collator(tok)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    steps, weights = [], []
    for step in range(STEPS):
        picked = [forget[(step * 4 + i) % len(forget)] for i in range(4)]
        parts = [collate(picked[i::micro]) for i in range(micro)]
        roles = [palu.token_roles(p["labels"], 2, tok.eos_token_id) for p in parts]
        numbers = {}
        if micro > 1:
            numbers = {
                "num_forget": sum(int((r == 1).sum()) for r in roles),
                "num_preserve": sum(int((r == 2).sum()) for r in roles),
            }
        entry = {}
        for number, batch in enumerate(parts):
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            if way == "from_hidden":
                with torch.no_grad():
                    ref = palu.model_hidden_states(frozen, **inputs)
                out = loss_fn.from_hidden(
                    palu.model_hidden_states(made, **inputs),
                    palu.LMHead.from_model(made),
                    batch["labels"],
                    ref,
                    palu.LMHead.from_model(frozen),
                    **numbers,
                )
            else:
                with torch.no_grad():
                    ref = frozen(**inputs).logits
                out = call(made(**inputs).logits, batch["labels"], ref, **numbers)
            out.loss.backward()
            for name in ("loss", "forget", "preserve", "num_forget", "num_preserve"):
                entry[f"{name}{number}" if micro > 1 else name] = _exact(getattr(out, name))
        optimizer.step()
        optimizer.zero_grad()
        steps.append(entry)
        weights.append(digest(made))
    return {"steps": steps, "weights": weights}


def operators(folder: Path, **_):
    """Every public operator of `palu_kernels` on the CPU: values, and a hash of the gradients."""
    import palu_kernels as pk

    gen = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=gen) * 3

    steps, hashes = [], []

    def note(name, out, *leaves):
        if out.requires_grad:
            (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum().backward()
        sha = hashlib.sha256(out.detach().contiguous().numpy().tobytes())
        for leaf in leaves:
            sha.update(leaf.grad.contiguous().numpy().tobytes())
        steps.append({name: _exact(out.detach().double().sum())})
        hashes.append(f"{name} {sha.hexdigest()}")

    n, v, d, k = 13, 1031, 24, 17
    note("topk", pk.topk_indices(draw(n, v).round(decimals=1), k))
    labels = torch.randint(0, v, (n,), generator=gen)
    labels[4] = -100
    for reduction in ("mean", "sum", "none"):
        for objective in ("flatten", "entropy"):
            for center in ("global_mean", "local_mean", 0.25):
                if objective == "entropy" and center != "global_mean":
                    continue
                name = f"{objective}/{center}/{reduction}"
                z, ref = draw(n, v).requires_grad_(), draw(n, v)
                opts = {"top_k": k, "objective": objective, "reduction": reduction}
                opts |= {"center": center} if objective == "flatten" else {}
                note(f"local/{name}", pk.local_entropy_loss(z, ref, **opts), z)
                z = draw(n, v).requires_grad_()
                note(f"local_current/{name}", pk.local_entropy_loss(z, **opts), z)
                h, w = draw(n, d).requires_grad_(), draw(v, d).requires_grad_()
                head = pk.LMHead(w, draw(v), 0.7, 20.0 if center == "local_mean" else None)
                ref_head = pk.LMHead(draw(v, d))
                note(
                    f"linear/{name}",
                    pk.linear_local_entropy_loss(h, head, draw(n, d), ref_head, **opts), h, w,
                )  # fmt: skip
                h = draw(n, d).requires_grad_()
                indices = torch.stack([torch.randperm(v, generator=gen)[:k] for _ in range(n)])
                note(
                    f"sparse/{name}",
                    pk.linear_local_entropy_loss(
                        h, pk.LMHead(draw(v, d)), indices=indices.int(), **opts
                    ), h,
                )  # fmt: skip
        for direction in ("reverse", "forward"):
            z = draw(n, v).requires_grad_()
            opts = {"direction": direction, "reduction": reduction}
            note(f"kl/{direction}/{reduction}", pk.kl_loss(z, draw(n, v), **opts), z)
            h, w = draw(n, d).requires_grad_(), draw(v, d).requires_grad_()
            note(
                f"linear_kl/{direction}/{reduction}",
                pk.linear_kl_loss(
                    h, pk.LMHead(w, None, 1.0, 15.0), draw(n, d), pk.LMHead(draw(v, d)), **opts
                ), h, w,
            )  # fmt: skip
        z = draw(n, v).requires_grad_()
        note(f"ce/{reduction}", pk.cross_entropy_loss(z, labels, reduction=reduction), z)
        h, w = draw(n, d).requires_grad_(), draw(v, d).requires_grad_()
        out = pk.linear_cross_entropy_loss(h, pk.LMHead(w), labels, reduction=reduction)
        note(f"linear_ce/{reduction}", out, h, w)
    return {"steps": steps, "weights": hashes}


def command_line(folder: Path, *, arguments=(), **_):
    """`palu unlearn` in this process; the weights it writes."""
    from safetensors.torch import load_file

    from palu.cli import main

    tok = tokenizer()
    source, output = folder / "model", folder / "unlearned"
    make_model("llama", tok).save_pretrained(source)
    tok.save_pretrained(source)
    argv = ["palu", "unlearn", "--model", source, "--forget", folder / "forget.jsonl"]
    argv += ["--retain", folder / "retain.jsonl", "--output", output, "--device", "cpu"]
    argv += ["--epochs", "5", "--batch-size", "2", "--learning-rate", "1e-3", *arguments]
    before, sys.argv = sys.argv, [str(a) for a in argv]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            said = getattr(sys.stderr, "getvalue", str)()[-2000:]
            raise RuntimeError(f"palu unlearn failed with {stop.code}: {said}") from None
    finally:
        sys.argv = before
    sha = hashlib.sha256()
    for file in sorted(output.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(tensor.contiguous().numpy().tobytes())
    record = json.loads((output / "palu.json").read_text(encoding="utf-8"))
    curve = record["loss_curve"]
    steps = [{k: _exact(e[k]) for k in LOGGED if k in e} for e in curve]
    return {"steps": steps, "weights": [sha.hexdigest()]}


# ---- the cases ----------------------------------------------------------------------------------

CASES = {
    # PALU, hidden rows
    "palu-flatten": (train, {}),
    "palu-entropy": (train, {"objective": "entropy"}),
    "palu-flatten-local_mean": (train, {"center": "local_mean"}),
    "palu-flatten-number": (train, {"center": "0.5"}),
    "palu-forward_kl": (train, {"preserve": "forward_kl"}),
    "palu-nll": (train, {"preserve": "nll"}),
    "palu-none": (train, {"preserve": "none"}),
    "palu-no-retain": (train, {"retain": False}),
    "palu-weights": (
        train,
        {"forget_weight": 0.7, "preserve_weight": 1.3, "retain_weight": 2.5, "prefix_length": 0},
    ),
    "palu-retain-kl": (train, {"retain_loss": "kl", "objective": "entropy"}),
    "palu-retain-batch": (train, {"retain_batch_size": 3}),
    "palu-accumulation": (
        train,
        {"gradient_accumulation_steps": 3, "objective": "entropy", "max_grad_norm": 0.5},
    ),
    "palu-accumulation-micro_batch": (
        train,
        {"gradient_accumulation_steps": 2, "normalization": "micro_batch"},
    ),
    "palu-current-flatten": (train, {"select_from": "current"}),
    "palu-current-entropy": (train, {"select_from": "current", "objective": "entropy"}),
    "palu-current-none": (train, {"select_from": "current", "preserve": "none"}),
    "palu-tied": (train, {"model": "tied", "objective": "entropy"}),
    "palu-checkpointing": (train, {"gradient_checkpointing": True}),
    "palu-dropout": (train, {"model": "dropout", "gradient_accumulation_steps": 2}),
    "palu-evaluation": (train, {"eval_rows": True, "eval_strategy": "steps", "eval_steps": 5}),
    "palu-stop-measured": (train, {"stop_at_forget_prob": 1e-9, "eval_steps": 4}),
    # PALU, other heads
    "palu-gpt2": (train, {"model": "gpt2", "objective": "entropy"}),
    "palu-gemma2-flatten": (train, {"model": "gemma2"}),
    "palu-gemma2-entropy": (train, {"model": "gemma2", "objective": "entropy"}),
    "palu-moe": (train, {"model": "moe", "gradient_accumulation_steps": 2}),
    "palu-moe-entropy": (train, {"model": "moe", "objective": "entropy", "preserve": "nll"}),
    # PALU, logits
    "palu-logits-flatten": (train, {"model": "logits"}),
    "palu-logits-entropy": (train, {"model": "logits", "objective": "entropy"}),
    "palu-logits-accumulation": (
        train,
        {"model": "logits", "gradient_accumulation_steps": 3, "retain_loss": "kl"},
    ),
    "palu-logits-current": (train, {"model": "logits", "select_from": "current"}),
    "palu-logits-nll": (train, {"model": "logits", "preserve": "nll", "retain": False}),
    # PALU, the reference's other kinds
    "palu-lora-live": (train, {"model": "lora", "objective": "entropy"}),
    "palu-adapter_off-flatten": (train, {"model": "lora", "reference": "adapter_off"}),
    "palu-adapter_off-entropy": (
        train,
        {
            "model": "lora",
            "reference": "adapter_off",
            "objective": "entropy",
            "retain_loss": "kl",
            "gradient_accumulation_steps": 2,
        },
    ),
    "palu-cached-flatten": (train, {"reference": "cached"}),
    "palu-cached-entropy": (
        train,
        {"reference": "cached", "objective": "entropy", "gradient_accumulation_steps": 2},
    ),
    "palu-cached-kl": (train, {"reference": "cached", "retain_loss": "kl", "model": "tied"}),
    "palu-cached-lora": (
        train,
        {"reference": "cached", "model": "lora", "objective": "entropy", "preserve": "forward_kl"},
    ),
    "palu-cached-current": (train, {"reference": "cached", "select_from": "current"}),
    # the other methods
    "grad_ascent": (train, {"method": "grad_ascent", "retain": False, "learning_rate": 1e-4}),
    "grad_diff": (train, {"method": "grad_diff", "learning_rate": 1e-4}),
    "grad_diff-kl": (train, {"method": "grad_diff", "learning_rate": 1e-4, "retain_loss": "kl"}),
    "grad_diff-logits": (train, {"method": "grad_diff", "learning_rate": 1e-4, "model": "logits"}),
    "npo": (train, {"method": "npo"}),
    "npo-kl": (train, {"method": "npo", "retain_loss": "kl", "gradient_accumulation_steps": 3}),
    "npo-logits": (train, {"method": "npo", "model": "logits", "retain_loss": "kl"}),
    "npo-adapter_off": (train, {"method": "npo", "model": "lora", "reference": "adapter_off"}),
    "sim_npo": (train, {"method": "sim_npo", "delta": 0.3}),
    "dpo": (train, {"method": "dpo", "retain_loss": "kl"}),
    "dpo-accumulation": (train, {"method": "dpo", "gradient_accumulation_steps": 2}),
    "idk_dpo": (train, {"method": "idk_dpo", "beta": 0.2, "model": "logits"}),
    "wga": (train, {"method": "wga"}),
    "sat_imp": (train, {"method": "sat_imp"}),
    "undial": (train, {"method": "undial"}),
    "undial-logits": (train, {"method": "undial", "model": "logits"}),
    "ce_u": (train, {"method": "ce_u"}),
    "ce_u-gpt2": (train, {"method": "ce_u", "model": "gpt2", "ignore_first": 0}),
    "pdu": (
        train,
        {"method": "pdu", "dual_warmup_epochs": 1, "dual_step_size": 0.5, "retain_loss_eps": 0.2},
    ),
    "pdu-accumulation": (
        train,
        {
            "method": "pdu",
            "dual_warmup_epochs": 1,
            "retain_loss": "kl",
            "gradient_accumulation_steps": 2,
        },
    ),
    "rmu": (train, {"method": "rmu", "retain_weight": 3.0}),
    "rmu-accumulation": (
        train,
        {"method": "rmu", "layer_id": 0, "steering_coeff": 5.0, "gradient_accumulation_steps": 2},
    ),
    "rmu-gpt2": (train, {"method": "rmu", "model": "gpt2"}),
    "npo-moe": (train, {"method": "npo", "model": "moe"}),
    # PALULoss and the operators by themselves
    "loss-forward": (loop, {"way": "forward"}),
    "loss-forward-entropy": (loop, {"way": "forward", "objective": "entropy", "micro": 2}),
    "loss-from_hidden": (loop, {"way": "from_hidden"}),
    "loss-from_hidden-entropy": (
        loop,
        {"way": "from_hidden", "objective": "entropy", "preserve": "forward_kl", "micro": 2},
    ),
    "loss-forward-weights": (
        loop,
        {"way": "forward", "forget_weight": 0.7, "preserve_weight": 1.3, "select_from": "current"},
    ),
    "loss-from_hidden-weights": (
        loop,
        {"way": "from_hidden", "forget_weight": 0.7, "preserve_weight": 1.3, "center": 0.5},
    ),
    "loss-from_hidden-none": (
        loop,
        {"way": "from_hidden", "forget_weight": 0.7, "preserve": None, "select_from": "current"},
    ),
    "loss-compiled": (loop, {"way": "compiled"}),
    "loss-compiled-entropy": (loop, {"way": "compiled", "objective": "entropy", "preserve": "nll"}),
    "operators": (operators, {}),
    # the command line
    "cli-unlearn": (command_line, {"arguments": ["--top-k", "9", "--prefix-length", "2"]}),
    "cli-unlearn-cached": (
        command_line,
        {
            "arguments": [
                *("--objective", "entropy", "--reference", "cached", "--retain-loss", "kl"),
                *("--gradient-accumulation", "2", "--top-k", "9"),
            ]
        },
    ),
    "cli-unlearn-lora": (command_line, {"arguments": ["--lora-rank", "4", "--top-k", "9"]}),
    "cli-unlearn-idk_dpo": (command_line, {"arguments": ["--method", "idk_dpo"]}),
    "cli-unlearn-dpo": (command_line, {"arguments": ["--method", "dpo", "--beta", "0.3"]}),
}


def run(name: str, perturb: float = 0.0) -> dict:
    function, options = CASES[name]
    options = dict(options)
    if perturb:
        options["forget_weight"] = options.get("forget_weight", 1.0) + perturb
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="palu-trajectory-") as folder, _quiet():
        write_data(Path(folder))
        return function(Path(folder), **options)


@contextlib.contextmanager
def _quiet():
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(said):
            yield


def compact(record: dict) -> list[str]:
    """Return a line a step: its first number (the loss), a hash of all, and one of the weights."""
    lines = []
    for step, numbers in enumerate(record["steps"]):
        logged = json.dumps([numbers, record.get("evaluation")], sort_keys=True)
        weights = record["weights"][min(step, len(record["weights"]) - 1)]
        hashes = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in (logged, weights)]
        lines.append(" ".join([next(iter(numbers.values())), *hashes]))
    return lines


def differences(name: str, old: list[str], new: list[str]) -> str | None:
    """Return the first thing that differs, in words; None where nothing does."""
    if len(old) != len(new):
        return f"{name}: {len(old)} steps before and {len(new)} now"
    for step, (before, now) in enumerate(zip(old, new, strict=True), 1):
        names = ("loss", "logged numbers", "weights")
        for what, a, b in zip(names, before.split(), now.split(), strict=True):
            if a != b:
                return f"{name}: step {step}: the {what} differ: {a} before, {b} now"
    return None


def machine() -> dict:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return {"torch": torch.__version__, "transformers": transformers.__version__,
                        "cpu": line.split(":", 1)[1].strip()}  # fmt: skip
    return {"torch": torch.__version__, "transformers": transformers.__version__,
            "cpu": platform.processor()}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", metavar="FILE")
    parser.add_argument("--compare", metavar="FILE", default=str(STORED))
    parser.add_argument("--only", metavar="NAME", default="")
    parser.add_argument("--perturb", type=float, default=0.0, help="added to forget_weight")
    options = parser.parse_args()
    names = [name for name in CASES if options.only in name]
    if not names:
        parser.error(f"--only {options.only}: the cases are {', '.join(CASES)}")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    stored = None
    if options.store is None:
        stored = json.loads(Path(options.compare).read_text(encoding="utf-8"))
        for key, value in machine().items():
            if stored["machine"][key] != value:
                print(f"NOTE stored with {key} {stored['machine'][key]}, this is {value}")
    import palu

    print(f"palu from {Path(palu.__file__).parent}")
    records, faults = {}, []
    began = time.perf_counter()
    for name in names:
        try:
            records[name] = compact(run(name, options.perturb))
        except (Exception, SystemExit) as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
            print(faults[-1], flush=True)
            continue
        if stored is not None:
            if name not in stored["cases"]:
                found = f"{name}: not in the stored file"
            else:
                found = differences(name, stored["cases"][name], records[name])
            if found:
                faults.append(found)
                print(found, flush=True)
    seconds = time.perf_counter() - began
    if options.store and not faults:
        content = json.dumps({"machine": machine(), "cases": records}, indent=0)
        Path(options.store).write_text(content + "\n", encoding="utf-8")
    same = len(names) - len(faults)
    word = "ran" if stored is None else "bit-identical"
    print(f"{same} of {len(names)} cases {word} ({seconds:.0f} s)")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
