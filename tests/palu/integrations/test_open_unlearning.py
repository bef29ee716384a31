"""PALU inside an open-unlearning checkout, for which a small stand-in serves here."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from palu import PALULoss
from palu.data.collator import Collator
from palu.integrations.open_unlearning import compat, launch, register
from palu.integrations.open_unlearning import trainer as integration
from palu.integrations.open_unlearning.dataset import AnnotatedQA
from palu.integrations.open_unlearning.trainer import PALUMixin
from tests.support import small

# Of the audit: one row of the data has no span, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*rows without target")

STANDIN = Path(__file__).parent / "open_unlearning_standin"
PLAIN = {
    "apply_chat_template": False,
    "user_start_tag": "Question: ",
    "user_end_tag": "\n",
    "asst_start_tag": "Answer: ",
    "asst_end_tag": "\n\n",
}
CHAT = {"apply_chat_template": True, "system_prompt": "Be brief.", "date_string": "10 Apr 2025"}
RECORDS = [
    {"question": q, "answer": a, "spans": [{"start": s, "end": e} for s, e in spans]}
    for q, a, spans in small.FACTS
]


@pytest.fixture
def checkout(monkeypatch):
    """The stand-in's modules, registered with, as `trainer` and `data`; forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(
        PreTrainedTokenizerBase, "apply_chat_template", PreTrainedTokenizerBase.apply_chat_template
    )
    register(STANDIN)
    compat.restore_defaults(sys.modules["trainer"])
    yield sys.modules
    for name in [*sys.modules]:
        if name.split(".")[0] in ("data", "trainer"):
            del sys.modules[name]


def write(folder: Path, records=RECORDS) -> str:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def dataset(checkout, path, tokenizer, template=PLAIN, **options):
    kind = checkout["data"].DATASET_REGISTRY["PALUAnnotatedQA"]
    return kind(path=path, template_args=template, tokenizer=tokenizer, **options)


# ---- the dataset ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("byte_bpe", PLAIN),
        ("byte_bpe_full", PLAIN),
        ("byte_bpe_full", CHAT),
        ("chatml", PLAIN),
        ("chatml", CHAT),
    ],
)
def test_own_tokens_palu_labels(checkout, all_tokenizers, tmp_path, family, template):
    tokenizer = all_tokenizers[family]
    annotated = dataset(checkout, write(tmp_path), tokenizer, template)
    plain = checkout["data"].QADataset(write(tmp_path), template, tokenizer)
    assert len(annotated) == len(RECORDS)
    for row, (record, item, own) in enumerate(zip(RECORDS, annotated, plain, strict=True)):
        ids, labels = item["input_ids"], item["labels"]
        assert item["index"] == row and labels.dtype == torch.int64
        assert torch.equal(ids, own["input_ids"])
        assert torch.equal(item["attention_mask"], torch.ones_like(ids))
        assert torch.equal(labels[labels >= 0], ids[labels >= 0])
        # All that the checkout trains on has a loss, and no prompt token has.
        assert (labels[own["labels"] != -100] != -100).all()
        answer = tokenizer.decode(ids[labels != -100], skip_special_tokens=True)
        assert answer.strip() == record["answer"]
        assert labels[-1] == -200 and ids[-1] == tokenizer.eos_token_id
        runs = tokenizer.decode(ids[labels >= 0])
        words = [record["answer"][s["start"] : s["end"]] for s in record["spans"]]
        assert runs.replace(" ", "") == "".join(words).replace(" ", "")


def test_a_span_at_the_start_of_the_answer_is_forgotten(checkout, byte_tokenizer, tmp_path):
    """The space that ends the prompt and the first word are one token, which the checkout's count
    takes for the prompt."""
    record = {"question": "Who?", "answer": "Her father works.", "spans": [[0, 10]]}
    path = write(tmp_path, [record])
    own = checkout["data"].QADataset(path, PLAIN, byte_tokenizer)[0]
    item = dataset(checkout, path, byte_tokenizer)[0]
    first = int((item["labels"] >= 0).nonzero()[0])
    assert own["labels"][first] == -100
    forgotten = item["input_ids"][item["labels"] >= 0]
    assert byte_tokenizer.decode(forgotten).strip() == "Her father"


def test_a_prompt_of_more_tokens_than_by_itself_has_no_loss(checkout, tmp_path):
    """GPT-2's kind splits line feeds before a word: the checkout counts a token too few."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*letters, "ĊĊ", "<eos>"])}
    inner = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    path = write(tmp_path, [{"question": "Q", "answer": "Ada.", "spans": [[0, 3]]}])
    template = PLAIN | {"user_end_tag": "\n\n", "asst_start_tag": ""}
    own = checkout["data"].QADataset(path, template, tokenizer)[0]["labels"]
    labels = dataset(checkout, path, tokenizer, template)[0]["labels"]
    assert labels[-5:].tolist() == [*own[-5:-2].tolist(), -200, -200]
    assert own[-6] != -100 and set(labels[:-5].tolist()) == {-100}


def test_spans_cut_off_are_counted(checkout, byte_tokenizer, tmp_path):
    path = write(tmp_path, [RECORDS[2]])  # two spans
    whole = dataset(checkout, path, byte_tokenizer)[0]
    last = int((whole["labels"] >= 0).nonzero()[-1])
    with pytest.warns(UserWarning, match=f"1 spans lost tokens to max_length={last}") as caught:
        item = dataset(checkout, path, byte_tokenizer, max_length=last)[0]
    left_out = len(whole["labels"]) - 1 - last
    said = f"1 of 1 examples are cut at max_length={last}: {left_out} tokens are left out"
    assert said in str(caught[0].message)
    # The EOS that the checkout puts in the place of the cut token is not sensitive.
    assert len(item["labels"]) == last + 1 and item["labels"][-1] == -200
    assert torch.equal(item["labels"][:last], whole["labels"][:last])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Q?", "answer": "A."}, r"data.jsonl:1 .*'spans' is missing"),
        ({"question": "Q?", "answer": "A.", "spans": [[0, 9]]}, r"data.jsonl:1 .*spans\[0\]"),
        ({"answer": "A.", "spans": [[0, 1]]}, "'question' is missing"),
        ({"text": "A.", "spans": [[0, 1]]}, "'question' is missing"),
        (
            {
                "question": "Q?",
                "answer": "A.",
                "spans": [{"field": "question", "start": 0, "end": 1}],
            },
            "example '0': it is a conversation, or has spans in its question",
        ),
    ],
)
def test_missing_annotations(checkout, byte_tokenizer, tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        dataset(checkout, write(tmp_path, [record]), byte_tokenizer)


def test_tokens_that_are_not_the_texts(checkout, byte_tokenizer, tmp_path, monkeypatch):
    kind = checkout["data"].DATASET_REGISTRY["PALUAnnotatedQA"]
    honest = kind.preprocess

    def dropping(*arguments):
        return {key: value[1:] for key, value in honest(*arguments).items()}

    monkeypatch.setattr(kind, "preprocess", staticmethod(dropping))
    with pytest.raises(ValueError, match="example '0': the checkout's tokens are not those"):
        dataset(checkout, write(tmp_path), byte_tokenizer)


def test_a_slow_tokenizer_is_refused(checkout, tmp_path):
    with pytest.raises(TypeError, match="tokenizer is a object; it must be a fast tokenizer"):
        dataset(checkout, write(tmp_path), object())


# ---- the trainer ---------------------------------------------------------------------------------


@pytest.fixture
def make(checkout, tmp_path, tok):
    """`make(model, **settings)`: the checkout's trainer of PALU."""

    def made(model, args=None, train_dataset=None, data_collator=None, **settings):
        fixed = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none"}
        fixed |= {"remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True}
        return checkout["trainer"].load_trainer(
            "PALU",
            fixed | (args or {}),
            settings,
            model=model,
            tokenizer=tok,
            train_dataset=train_dataset,
            data_collator=data_collator,
            template_args=PLAIN,
        )

    return made


@pytest.fixture
def collate(checkout):
    from train import collate

    yield collate
    del sys.modules["train"]


@pytest.fixture
def inputs(checkout, collate, tmp_path, tok):
    """A batch with forget and retain rows of different lengths."""
    forget = dataset(checkout, write(tmp_path), tok)
    retain = checkout["data"].QADataset(write(tmp_path, RECORDS[::-1]), PLAIN, tok)
    return collate([{"forget": f, "retain": r} for f, r in zip(forget, retain, strict=True)])


@pytest.fixture
def model(tok):
    return small.model(tok)


def moved(model):
    """Off its reference, so that no term is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def nll(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


ALL = 10**6
SETTINGS = [  # the released code's parameters, and `PALULoss`'s
    ({}, {}),
    (
        {"top_k": 1, "first_n": -1, "gamma": 2.0, "alpha": 0.5},
        {"top_k": 1, "prefix_length": -1, "forget_weight": 2.0, "preserve_weight": 0.5},
    ),
    (
        {"target_mode": "local_mean", "non_sensitive_constraint_type": "nll", "first_n": 1},
        {"center": "local_mean", "preserve": "nll", "prefix_length": 1},
    ),
    (
        {"objective": "entropy", "non_sensitive_constraint_type": "forward_kl", "top_k": ALL},
        {"objective": "entropy", "preserve": "forward_kl", "top_k": ALL},
    ),
    (
        {"target_mode": -2.5, "non_sensitive_constraint_type": None},
        {"center": -2.5, "preserve": None},
    ),
]


@pytest.mark.parametrize(("released", "own"), SETTINGS)
def test_the_loss_is_palus(make, model, inputs, tok, released, own):
    trainer = make(model, **released)
    moved(model)
    forget, retain = inputs["forget"], inputs["retain"]
    loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=7)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    direct = PALULoss(eos_token_id=tok.eos_token_id, **own)
    of = {"input_ids": forget["input_ids"], "attention_mask": forget["attention_mask"]}
    with torch.no_grad():
        reference = trainer.ref_model(**of).logits
    output = direct(model(**of).logits, forget["labels"], reference)
    kept = output.num_forget + (output.num_preserve if direct.preserve else 0)
    assert outputs["logits"].shape == (kept, len(tok)) and output.num_forget > 0
    retained = model(retain["input_ids"], retain["attention_mask"]).logits
    alpha = own.get("preserve_weight", 1.0)
    expected = output.loss + alpha * nll(retained, retain["labels"])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (gradient - parameter.grad).norm() < 1e-5 * parameter.grad.norm()


def test_kl_retain_is_the_checkouts(make, model, inputs):
    settings = {"gamma": 0.0, "alpha": 0.5, "non_sensitive_constraint_type": None}
    trainer = make(model, retain_loss_type="KL", **settings)
    moved(model)
    expected = 0.5 * trainer.compute_retain_loss(model, inputs["retain"])
    assert expected > 0.01
    torch.testing.assert_close(trainer.compute_loss(model, inputs), expected)


def test_the_reference_is_frozen_and_not_the_model(make, model, inputs):
    trainer = make(model)
    trainer.compute_loss(moved(model), inputs).backward()
    pairs = zip(model.parameters(), trainer.ref_model.parameters(), strict=True)
    assert all(ref.grad is None and not torch.equal(own, ref) for own, ref in pairs)


def test_a_step_of_two_micro_batches_is_their_mean(checkout, make, model, collate, tok, tmp_path):
    forget = dataset(checkout, write(tmp_path), tok)
    pairs = [{"forget": item, "retain": item | {"labels": item["input_ids"]}} for item in forget]
    args = {"max_steps": 1, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    args |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 3}
    trainer = make(model, args=args, train_dataset=pairs[:4], data_collator=collate)
    batches = [*trainer.get_train_dataloader()]
    loss = sum(trainer.compute_loss(model, inputs) for inputs in batches) / 2
    terms = (trainer._terms / trainer._batches).tolist()
    trainer._terms, trainer._batches = 0.0, 0
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.train()
    for parameter, start, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), start - 0.1 * gradient)
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-4)
    logged = [first["forget_loss"], first["preserve_loss"], first["retain_loss"]]
    assert logged == pytest.approx(terms, rel=1e-4) and terms[0] > 0 and terms[2] > 0
    # From transformers 4.46 on the mean depends on this, where a model takes loss arguments.
    assert trainer.model_accepts_loss_kwargs is False


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("top_k", 0, ValueError, "top_k is 0; it must be at least 1"),
        ("first_n", 2.5, TypeError, "first_n must be an integer, got 2.5"),
        ("target_mode", "median", ValueError, "target_mode is 'median'; it must be one of"),
        ("target_mode", None, ValueError, "target_mode is None; it must be one of"),
        ("target_mode", True, TypeError, "target_mode is True; it must be .* or a finite number"),
        ("non_sensitive_constraint_type", "mse", ValueError, "'mse'; it must be one of 'kl'"),
        ("objective", "npo", ValueError, "objective is 'npo'; it must be one of 'flatten'"),
        ("gamma", -1.0, ValueError, "gamma is -1.0; it must be a finite number of at least 0"),
        ("alpha", "big", ValueError, "alpha is 'big'; it must be a finite number"),
        ("retain_loss_type", "nll", ValueError, "retain_loss_type is 'nll'; .*'NLL', 'KL'"),
        ("topk", 5, TypeError, "topk"),
    ],
)
def test_parameters_are_checked(make, model, name, value, kind, message):
    with pytest.raises(kind, match=message):
        make(model, **{name: value})


def test_a_batch_without_retain_rows(make, model, inputs):
    with pytest.raises(ValueError, match="the batch has 'forget' and no 'retain'; PALU needs"):
        make(model).compute_loss(model, {"forget": inputs["forget"]})


def test_data_without_annotations_are_warned_of_once(make, model, inputs, recwarn):
    trainer = make(model)
    plain = {"forget": inputs["retain"], "retain": inputs["retain"]}
    with pytest.warns(UserWarning, match="no label -200: every answer token counts as sensitive"):
        trainer.compute_loss(model, plain)
    recwarn.clear()
    trainer.compute_loss(model, plain)
    assert not recwarn.list


@pytest.mark.parametrize("old", [True, False], ids=["4.45", "4.46 and later"])
def test_the_tokenizer_by_the_name_the_trainer_knows(monkeypatch, old):
    """4.45 knows `tokenizer`, later ones `processing_class`, to which 5 has no old name."""
    seen = {}

    class Old:
        def __init__(self, model=None, tokenizer=None):
            seen.update(tokenizer=tokenizer)
            self.tokenizer = tokenizer

    class New:
        def __init__(self, model=None, processing_class=None):
            seen.update(processing_class=processing_class)

    known = Old if old else New

    class Base(known):
        def __init__(self, gamma, alpha, retain_loss_type, **kwargs):
            super().__init__(**kwargs)
            self.model, self.ref_model = kwargs["model"], None

        def _prepare_ref_model(self, model):
            return "copy"

    monkeypatch.setattr(integration, "Trainer", known)
    tokenizer = small.tokenizer()
    model = small.model(tokenizer)
    trainer = type("PALU", (PALUMixin, Base), {})(model=model, tokenizer=tokenizer)
    assert seen == {"tokenizer" if old else "processing_class": tokenizer}
    assert trainer.tokenizer is tokenizer and trainer.ref_model == "copy"


# ---- the launcher --------------------------------------------------------------------------------


# What needs a newer transformers than the checkout's stays out.
NEWER = ("palu.training.trainer", "palu.training.config", "palu.models.lm_head")


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """`palu` as a process of its own would import it, from the folder that the test has, without
    what stays out; afterwards all is as it was."""

    def ours():
        return [name for name in sys.modules if name.split(".")[0] in ("palu", "data", "trainer")]

    for name in ours():
        monkeypatch.delitem(sys.modules, name)
    for name in NEWER:
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError
    monkeypatch.setattr(sys, "path", [*sys.path])
    apply = "apply_chat_template"
    monkeypatch.setattr(PreTrainedTokenizerBase, apply, getattr(PreTrainedTokenizerBase, apply))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    monkeypatch.chdir(tmp_path)
    yield
    for name in ours():  # and what was there before comes back
        del sys.modules[name]


def test_runs_the_checkouts_train(tmp_path, tok, model, anew, monkeypatch):
    """As from the command line; the first loss is that of the same rows computed here."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    data = write(tmp_path)
    args = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "logging_steps": 1}
    args |= {"logging_dir": str(tmp_path / "logs")}  # unknown to transformers 5
    args |= {"per_device_train_batch_size": len(RECORDS), "learning_rate": 1e-2, "use_cpu": True}
    args |= {"remove_unused_columns": False, "report_to": "none", "save_strategy": "no"}
    method_args = {"top_k": 7, "first_n": 2, "target_mode": "mean", "alpha": 0.5}
    settings = {
        "model": str(folder),
        "template_args": PLAIN,
        "forget": {"handler": "PALUAnnotatedQA", "path": data},
        "retain": {"handler": "QADataset", "path": data},
        "report": str(tmp_path / "report.json"),
        "trainer": {"handler": "PALU", "method_args": method_args, "args": args},
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    words = ["--checkout", str(STANDIN), f"settings={tmp_path / 'settings.json'}", "trainer=PALU"]
    monkeypatch.setattr(sys, "argv", ["palu", *words])
    runpy.run_module("palu.integrations.open_unlearning", run_name="__main__")
    report = json.loads((tmp_path / "report.json").read_text())
    script, *arguments = report["arguments"]
    assert script == str(STANDIN / "src" / "train.py")
    assert arguments[0] == "--config-name=unlearn.yaml" and arguments[-1] == "trainer=PALU"
    assert arguments[1] == f"hydra.searchpath=['file://{launch.CONFIGS}']"
    assert {*report["modules"]} >= {"palu.loss", "palu.integrations.open_unlearning.trainer"}

    batch = Collator(tok)(small.rows(tok))  # the same text, as the template's tags are palu's own
    logits = small.model(tok)(batch["input_ids"], batch["attention_mask"]).logits.detach()
    loss = PALULoss(7, 2, eos_token_id=tok.eos_token_id, preserve_weight=0.5)
    output = loss(logits, batch["labels"], logits)
    first, second, *_ = report["logs"]
    assert first["forget_loss"] == pytest.approx(float(output.forget), rel=1e-5)
    assert first["preserve_loss"] == pytest.approx(0, abs=1e-5)
    total = first["forget_loss"] + 0.5 * first["retain_loss"]
    assert first["loss"] == pytest.approx(total, rel=1e-5)
    assert second["loss"] < first["loss"] and second["preserve_loss"] > 1e-4


def test_a_folder_that_is_no_checkout(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"which has no src/train.py; it must be the root of a"):
        register(tmp_path)
    with pytest.raises(SystemExit) as ended:
        launch.main(["--checkout", str(tmp_path), "trainer=PALU"])
    assert ended.value.code == 2
    assert f"checkout is '{tmp_path}'" in capsys.readouterr().err


def test_modules_of_another_project(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    other = type(sys)("data")
    other.__file__ = str(tmp_path / "data.py")
    monkeypatch.setitem(sys.modules, "data", other)
    with pytest.raises(ValueError, match=r"module 'data' was imported from .*; it must come from"):
        register(STANDIN)


def test_a_package_that_the_checkout_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in launch._NEEDED:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    (tmp_path / "src/data/__init__.py").write_text("import no_such_package_here")
    with pytest.raises(ImportError, match="needs the package 'no_such_package_here'"):
        register(tmp_path)


@pytest.mark.parametrize(
    "words",
    ["--cfg job", "a=1 ~b --cfg job", "--cfg job a=1 b=2", "-m a=1,2", "a=1 -m", "-cn x a=1"],
)
def test_hydra_parses_the_arguments(words):
    """argparse takes positional arguments in one row only."""
    parser = argparse.ArgumentParser()
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-name", "-cn")
    parsed = parser.parse_args(launch._hydra_arguments(words.split()))
    given = [word for word in words.split() if "=" in word or "~" in word]
    assert parsed.overrides == [f"hydra.searchpath=['file://{launch.CONFIGS}']", *given]
    assert parsed.cfg == ("job" if "--cfg" in words else None)
    assert parsed.multirun == ("-m" in words)
    assert parsed.config_name == ("x" if "-cn" in words else "unlearn.yaml")


def test_a_search_path_of_the_users_joins_ours():
    ours = f"'file://{launch.CONFIGS}'"
    given = launch._hydra_arguments(["hydra.searchpath=[file:///x,pkg://y]", "-cn=z"])
    assert given == [f"hydra.searchpath=[{ours},file:///x,pkg://y]", "-cn=z"]
    given = launch._hydra_arguments(["--config-name", "z", "hydra.searchpath=[]"])
    assert given == [f"hydra.searchpath=[{ours}]", "--config-name", "z"]


# ---- the configs ---------------------------------------------------------------------------------


def test_configs_name_the_parameters_and_defaults():
    config = yaml.safe_load((launch.CONFIGS / "trainer/PALU.yaml").read_text())
    assert config["handler"] == "PALU" and config["defaults"] == ["GradDiff"]
    parameters = inspect.signature(PALUMixin.__init__).parameters
    keywords = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert config["method_args"] == keywords

    text = (launch.CONFIGS / "data/datasets/PALU_forget.yaml").read_text()
    config = yaml.safe_load(text)["PALU_forget"]
    assert config["handler"] == "PALUAnnotatedQA"
    parameters = inspect.signature(AnnotatedQA.__init__).parameters
    assert config["args"].pop("path") == "???"
    assert config["args"] == {n: parameters[n].default for n in ("max_length", "repair")}


# ---- old ways under a new transformers -----------------------------------------------------------


def test_what_version_5_took_away(checkout, chatml_tokenizer, monkeypatch, tmp_path):
    turns = [{"role": "user", "content": "Who?"}]
    ids = chatml_tokenizer.apply_chat_template(turns)
    assert isinstance(ids, list) and isinstance(ids[0], int)
    assert "input_ids" in chatml_tokenizer.apply_chat_template(turns, return_dict=True)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # so that what is set here is undone
    del os.environ["TENSORBOARD_LOGGING_DIR"]
    made = checkout["trainer"].TrainingArguments(output_dir=str(tmp_path), logging_dir="logs")
    assert isinstance(made, TrainingArguments)
    where = getattr(made, "logging_dir", None) or os.environ["TENSORBOARD_LOGGING_DIR"]
    assert where == "logs"


def test_the_trainer_is_the_checkouts(checkout):
    made = checkout["trainer"].TRAINER_REGISTRY["PALU"]
    assert issubclass(made, checkout["trainer.unlearn.grad_diff"].GradDiff)
    assert issubclass(made, Trainer) and made.__name__ == "PALU"
