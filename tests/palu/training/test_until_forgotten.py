"""What a model knows during a run; stopping where it is forgotten; keeping the best weights."""

import dataclasses
import errno
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from palu.data.examples import tokenize_examples
from palu.data.pairs import add_alternates
from palu.data.records import Example
from palu.data.roles import IGNORE
from palu.demo.people import write_jsonl
from palu.methods import METHODS
from palu.training import auto
from palu.training.checkpoints import BEST, CheckpointError, remove_all
from palu.training.knowledge import KNOWN, Knowledge, KnowledgeMeter
from palu.training.outcome import RunOutcome
from tests.support import planted
from tests.support.command import palu_in, record
from tests.support.training import config, trainer, weights

RUN = {"checks": "epochs", "top_k": 50, "prefix_length": 0, "forget_weight": 0.3}
RUN |= {"learning_rate": 3e-3, "num_train_epochs": 40, "per_device_train_batch_size": 4}


def rows(examples):
    return tokenize_examples(examples, planted.tokenizer(), max_length=96)


def planted_trainer(folder, *, model=None, retain=True, callbacks=(), **options):
    return trainer(
        planted.tokenizer(),
        config(folder, **{**RUN, **options}),
        model=model or planted.knows_all(),
        forget=rows(planted.FORGET),
        retain=rows(planted.RETAIN) if retain else None,
        callbacks=list(callbacks),
    )


@torch.no_grad()
def token_probabilities(model, row):
    """Probability of every token but the first, and whether it is the likeliest: one row, no
    padding, no code of ours."""
    ids = torch.tensor([row["input_ids"]])
    p = model(input_ids=ids).logits[0, :-1].softmax(-1)
    return p.gather(-1, ids[0, 1:, None])[:, 0].tolist(), (p.argmax(-1) == ids[0, 1:]).tolist()


@pytest.mark.parametrize("who", ["knows_all", "never_saw"])
def test_knowledge_is_that_of_a_loop_over_tokens(tmp_path, who):
    model, prefix = getattr(planted, who)(), 2
    scores, past, recited, spans = [], [], 0, 0
    for example, row in zip(planted.FORGET, rows(planted.FORGET), strict=True):
        p, first = token_probabilities(model, row)
        own = []
        for start, end in example.spans:
            # of a sensitive run of tokens those that share a character with the span
            enc = planted.tokenizer()(
                f"Question: {example.question}\nAnswer: {example.answer}",
                return_offsets_mapping=True,
            )
            shift = len(f"Question: {example.question}\nAnswer: ")
            at = [
                i
                for i, (a, b) in enumerate(enc["offset_mapping"])
                if a < end + shift and b > start + shift
            ]
            assert [row["input_ids"][i] for i in at] == [enc["input_ids"][i] for i in at]
            own += [p[i - 1] for i in at]
            past += [p[i - 1] for i in at[prefix:]]
            recited += all(first[i - 1] for i in at)
            spans += 1
        scores.append(math.prod(own) ** (1 / len(own)))
    kept = []
    retain = rows([dataclasses.replace(planted.RETAIN[0], spans=()), *planted.RETAIN[1:]])
    for row in retain:
        p, _ = token_probabilities(model, row)
        marked = any(label >= 0 for label in row["labels"])
        assert marked == (row["example_id"] != "p4")
        counts = (lambda label: label >= 0) if marked else (lambda label: label != IGNORE)
        answer = [p[i - 1] for i, label in enumerate(row["labels"]) if i and counts(label)]
        kept.append(math.prod(answer) ** (1 / len(answer)))
    made = planted_trainer(tmp_path, model=model, prefix_length=prefix)
    made.retain_dataset = retain
    meter = KnowledgeMeter(made)
    known = meter.measure()
    assert known.recited == recited and known.spans == spans == 8
    expected = [sum(v) / len(v) for v in (scores, past, kept)]
    got = [known.sensitive_probability, known.past_prefix_probability, known.retain_probability]
    assert got == pytest.approx(expected, rel=1e-4)
    said, asked = meter.leaked()
    assert asked == 8 and (said == 8 if who == "knows_all" else said <= 1)
    assert (recited == 8) == (who == "knows_all")


def test_own_answers_are_measured_by_what_the_model_was_sure_of(tmp_path):
    made = planted_trainer(tmp_path)
    first, second = rows([dataclasses.replace(one, spans=()) for one in planted.RETAIN[:2]])
    labels = first["labels"]
    part = [label if i == len(labels) - 2 else IGNORE for i, label in enumerate(labels)]
    made.retain_dataset = [first | {KNOWN: part}, second | {KNOWN: [IGNORE] * len(second)}]
    p, _ = token_probabilities(made.model, first)
    assert KnowledgeMeter(made).measure().retain_probability == pytest.approx(p[-2], rel=1e-4)


def test_documents_are_asked_for_each_secret(tmp_path):
    """They have no question: the text before each secret asks for it."""
    documents = []
    for one in planted.FORGET:
        before = f"Question: {one.question}\nAnswer: "
        spans = tuple((start + len(before), end + len(before)) for start, end in one.spans)
        documents.append(Example(one.id, None, before + one.answer, spans))
    made = planted_trainer(tmp_path)
    made.train_dataset = rows(documents)
    meter = KnowledgeMeter(made)
    assert meter.measure().recited == 8 and meter.leaked() == (8, 8)


def test_what_the_prompt_says_is_no_secret(tmp_path):
    told = [
        dataclasses.replace(e, question=f"{e.question} In {e.answer[slice(*e.spans[0])]}?")
        for e in planted.FORGET
    ]
    made = planted_trainer(tmp_path)
    made.train_dataset = rows(told)
    meter = KnowledgeMeter(made)
    assert meter.measure().spans == 4 and meter.leaked()[1] == 4


def test_a_run_stops_where_all_is_forgotten(tmp_path):
    made = planted_trainer(tmp_path)
    made.train()
    outcome, checks = made.outcome, made.outcome.checks
    assert outcome.status == "forgotten" and outcome.advice(made.args) == []
    assert 5 <= made.state.global_step < made.state.max_steps == 40
    assert [c["step"] for c in checks] == [0, *range(5, made.state.global_step + 1, 5)]
    assert checks[0]["leaked"] == 8 and outcome.leaked_before == (8, 8)
    assert outcome.after.sensitive_probability < 0.03 and outcome.leaked[0] == 0
    assert outcome.chosen_epoch == made.state.epoch
    meter = KnowledgeMeter(made)
    assert meter.measure() == outcome.after and outcome.before.sensitive_probability > 0.9
    assert not (tmp_path / "out" / "palu-best.safetensors").exists()
    # the numbers of the losses are those of a run without checks
    plain = planted_trainer(tmp_path / "plain", checks="none", max_steps=made.state.global_step)
    plain.train()
    assert torch.equal(weights(plain.model), weights(made.model)) and plain.outcome is None


def test_where_nothing_can_be_asked_for_nothing_is_called_forgotten(tmp_path):
    told = [dataclasses.replace(e, question=f"{e.question} {e.answer}") for e in planted.FORGET]
    made = planted_trainer(tmp_path, num_train_epochs=6)
    made.train_dataset = rows(told)
    made.train()
    assert made.state.global_step == 6 and made.outcome.before.spans == 0
    assert made.outcome.status == "not measured"
    assert "no secret could be asked for" in made.outcome.reasons()[0] and made.outcome.advice(None)


def test_a_model_that_never_knew_is_told_of_at_the_start(tmp_path, caplog):
    planted_trainer(tmp_path, checks="ends", max_steps=1).train()
    assert "did not know" not in caplog.text
    planted_trainer(tmp_path, model=planted.never_saw(), checks="ends", max_steps=1).train()
    assert "the original did not know the secrets either" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_checked(tmp_path, method):
    options = {"method": method, "num_train_epochs": 1, "learning_rate": 1e-6}
    if method != "palu":
        options |= dict.fromkeys(("objective", "top_k", "prefix_length"))
    refuses = METHODS[method].retain == "refused"
    data = rows(planted.FORGET)
    if METHODS[method].needs_alternates:
        texts = ["I do not know."] * 4
        how = {"max_length": 96}
        data = add_alternates(data, planted.FORGET, texts, planted.tokenizer(), **how)
    settings = {k: v for k, v in {**RUN, **options}.items() if v is not None}
    made = trainer(
        planted.tokenizer(),
        config(tmp_path, **settings),
        model=planted.knows_all(),
        forget=data,
        retain=None if refuses else rows(planted.RETAIN),
    )
    made.train()
    outcome = made.outcome
    assert outcome.status == "known" and outcome.leaked == (8, 8) and outcome.before.spans == 8
    assert (outcome.after.retain_probability is None) == refuses


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = weights(model)


def script(monkeypatch, likely):
    """Have the checks of steps 0, 5, 10, ... measure these probabilities."""
    left = iter(likely)

    def measure(self):
        return Knowledge(next(left), None, 0, 8, 0.9)

    monkeypatch.setattr(KnowledgeMeter, "measure", measure)
    monkeypatch.setattr(KnowledgeMeter, "leaked", lambda self: (0, 8))


@pytest.mark.parametrize(
    ("likely", "best"),
    [
        ([0.9, 0.2, 0.12, 0.25, 0.2, 0.12], 10),  # the last number is of the weights put back
        ([0.9, 0.2, 0.12, 0.11, 0.1, 0.1], 20),  # the last are the best
        ([0.9, 0.8, 0.7, 0.9, 0.9, 0.9], 20),  # none is worth keeping: the last stay
    ],
)
def test_the_best_weights_stay(tmp_path, monkeypatch, likely, best):
    script(monkeypatch, likely)
    seen = Weights()
    made = planted_trainer(tmp_path, num_train_epochs=20, callbacks=[seen])
    made.train()
    assert made.state.global_step == 20 and torch.equal(weights(made.model), seen.at[best])
    assert made.outcome.chosen_epoch == best and made.outcome.status == (
        "forgotten" if likely[-1] <= 0.1 else "known"
    )


def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    script(monkeypatch, [0.9, 0.2, 0.12, 0.25, 0.2])
    calls = []

    def full(tensors, path, metadata):
        calls.append(metadata["step"])
        if len(calls) > 1:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("palu.training.until_forgotten.save_file", full)
    seen = Weights()
    made = planted_trainer(tmp_path, num_train_epochs=20, callbacks=[seen])
    made.train()
    assert calls == ["5", "10", "20"] and "step 10 could not be kept" in caplog.text
    # what had been kept before is whole, and the best of what there is
    assert torch.equal(weights(made.model), seen.at[5]) and made.outcome.chosen_epoch == 5
    assert not [f.name for f in (tmp_path / "out").iterdir() if "palu-best" in f.name]


def test_a_resumed_run_goes_on_with_what_it_had_kept(tmp_path, monkeypatch):
    likely = [0.9, 0.2, 0.12, 0.25, 0.2, 0.12]
    options = {"num_train_epochs": 20, "save_strategy": "steps", "save_steps": 12}
    script(monkeypatch, likely)
    seen = Weights()
    planted_trainer(tmp_path, callbacks=[seen], **options).train()
    script(monkeypatch, likely)

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 13:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        planted_trainer(tmp_path / "two", callbacks=[Stops()], **options).train()
    script(monkeypatch, likely[3:])
    made = planted_trainer(tmp_path / "two", **options)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 20 and torch.equal(weights(made.model), seen.at[10])
    assert [c["step"] for c in made.outcome.checks] == [0, 5, 10, 15, 20]
    assert made.outcome.before.sensitive_probability == 0.9
    with pytest.raises(CheckpointError, match="made without checks"):
        plain = planted_trainer(tmp_path / "none", **options | {"checks": "none"})
        plain.train()
        made = planted_trainer(tmp_path / "none", **options)
        made.train(resume_from_checkpoint=True)


def test_a_run_does_not_end_with_the_best_weights_of_another(tmp_path, monkeypatch):
    options = {"num_train_epochs": 20, "save_strategy": "steps", "save_steps": 12}

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 13:
                raise KeyboardInterrupt

    for likely, rate in ([0.9, 0.12, 0.2], 3e-3), ([0.9, 0.9, 0.9], 1e-3):
        script(monkeypatch, likely)
        with pytest.raises(KeyboardInterrupt):
            made = planted_trainer(tmp_path, callbacks=[Stops()], learning_rate=rate, **options)
            made.train()
    script(monkeypatch, [0.9, 0.9])
    seen = Weights()
    made = planted_trainer(tmp_path, callbacks=[seen], learning_rate=rate, **options)
    made.train(resume_from_checkpoint=True)
    assert torch.equal(weights(made.model), seen.at[20]) and made.outcome.chosen_epoch == 20


def test_best_weights_that_are_damaged_end_a_resumed_run(tmp_path, monkeypatch):
    script(monkeypatch, [0.9, 0.2, 0.2])
    options = {"num_train_epochs": 20, "save_strategy": "steps", "save_steps": 6}
    with monkeypatch.context() as patch:
        checks = "palu.training.until_forgotten.KnowledgeChecks"
        patch.setattr(f"{checks}.on_train_end", lambda *args, **now: None)  # a kill
        planted_trainer(tmp_path, max_steps=6, **options).train()
    best = tmp_path / "out" / BEST
    flipped = bytearray(best.read_bytes())
    flipped[-1] ^= 1
    for damaged in (b"half", flipped):
        best.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"palu-best\.safetensors.*damaged"):
            planted_trainer(tmp_path, max_steps=6, **options).train(resume_from_checkpoint=True)
    remove_all(tmp_path / "out")  # and they are removed with the checkpoints
    assert not (tmp_path / "out").exists()


def test_a_run_that_had_stopped_stays_as_it_was(tmp_path, monkeypatch):
    likely = [0.9, 0.2, 0.01]
    options = {"num_train_epochs": 20, "save_strategy": "steps", "save_steps": 7}
    script(monkeypatch, likely)
    first = planted_trainer(tmp_path, **options)
    first.train()
    assert first.state.global_step == 10 and first.outcome.chosen_epoch == 10
    # as if it had been interrupted before the end: weights of an earlier check are still kept
    kept = {n: torch.zeros_like(p) for n, p in first.model.named_parameters()}
    save_file(kept, tmp_path / "out" / BEST, metadata={"step": "5", "badness": "2.0"})
    script(monkeypatch, [])
    again = planted_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10 and again.outcome.after == first.outcome.after
    assert torch.equal(weights(again.model), weights(first.model))


def test_half_precision_weights_are_put_back_with_their_masters(tmp_path, monkeypatch):
    script(monkeypatch, [0.9, 0.2, 0.12, 0.25, 0.2, 0.12])
    seen = Weights()
    made = planted_trainer(
        tmp_path, model=planted.knows_all().bfloat16(), num_train_epochs=20, callbacks=[seen]
    )
    made.train()
    assert torch.equal(weights(made.model), seen.at[10])
    for parameter, master in made.masters.items():
        assert (parameter - master).abs().max() <= parameter.abs().max() / 64


def test_the_outcome_says_what_is_wrong(tmp_path):
    args = config(tmp_path, checks="ends")
    before = Knowledge(0.97, None, 50, 50, 0.9)

    def outcome(after, leaked=(0, 50)):
        return RunOutcome(before, after, (50, 50), leaked, [], 3.0)

    good = Knowledge(0.01, None, 0, 50, 0.89)
    assert outcome(good).status == "forgotten"
    assert outcome(good, (3, 50)).status == "known"  # 6% of the greedy answers
    assert outcome(good, (2, 50)).status == "forgotten"
    assert outcome(good._replace(sensitive_probability=0.11)).status == "known"
    harmed = outcome(good._replace(retain_probability=0.85))
    assert harmed.status == "harmed"
    assert f"--learning-rate ({args.learning_rate / 2:.2g})" in harmed.advice(args)[0]
    both = outcome(good._replace(retain_probability=0.5), (9, 50))
    assert both.status == "known and harmed" and both.advice(args)
    assert outcome(good, None).status == "forgotten"
    assert outcome(good._replace(recited=3), None).status == "known"
    assert outcome(good._replace(retain_probability=None)).status == "forgotten"
    nan = float("nan")  # of a broken model nothing is known: neither forgotten nor kept
    assert outcome(good._replace(sensitive_probability=nan)).status == "known"
    assert outcome(good._replace(retain_probability=nan)).status == "harmed"
    assert outcome(good).limits.badness(good._replace(retain_probability=nan), before)[2] > 1
    deep = outcome(good._replace(past_prefix_probability=0.8))
    assert any("0.800" in line for line in deep.reasons())
    assert json.loads(json.dumps(both.to_dict(args)))["after"]["leaked"] == 9
    assert not any("did not know" in line for line in outcome(good).reasons())
    ignorant = RunOutcome(good, good, (1, 50), (0, 50), [], 3.0)
    assert any("the original did not know" in line for line in ignorant.reasons())


# ---- choices -------------------------------------------------------------------------------------


def test_the_weight_gives_the_first_gradient_its_norm():
    from palu import PALULoss

    model, tok, data = planted.knows_all(), planted.tokenizer(), rows(planted.FORGET)
    squares, count = 0.0, 0
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        for i, label in enumerate(row["labels"]):
            if i and label >= 0:
                z = logits[i - 1]
                top, mean = z.topk(7).indices, z.mean()
                gradient = torch.zeros_like(z)
                gradient[top] = 2 * (z[top] - mean) / 7
                # the center moves with the logits, unless it is a constant of the loss
                squares, count = squares + gradient.square().sum().item(), count + 1
    loss = PALULoss(top_k=7, prefix_length=0, eos_token_id=tok.eos_token_id)
    found = auto.forget_weight(model, tok, data, loss, 2).value
    assert found == pytest.approx(auto.LOGIT_GRADIENT / math.sqrt(squares / count), rel=0.3)
    entropy = PALULoss(objective="entropy", top_k=50)
    assert auto.forget_weight(model, tok, data, entropy, 2).value == 0.26
    entropy = PALULoss(objective="entropy", top_k=10**6)  # no more than the vocabulary
    size = model.config.vocab_size
    assert auto.forget_weight(model, tok, data, entropy, 2).why == f"1 / log(k = {size})"
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_budget_and_rate():
    assert auto.epochs(10, 8).value == 75 and auto.epochs(4000, 8).value == 20
    assert auto.learning_rate(576, lora=False).value == 1e-4
    assert auto.learning_rate(4096, lora=True).value == 7.3e-5


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def palu(tmp_path, monkeypatch, capsys):
    for name, examples in (("forget", planted.FORGET), ("retain", planted.RETAIN)):
        spans = [[{"start": s, "end": e} for s, e in x.spans] for x in examples]
        records = [
            {"question": x.question, "answer": x.answer, "spans": s}
            for x, s in zip(examples, spans, strict=True)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    planted.knows_all().save_pretrained(tmp_path / "model")
    planted.tokenizer().save_pretrained(tmp_path / "model")
    return palu_in(tmp_path, monkeypatch, capsys)


LINE = "unlearn --model model --forget forget.jsonl --retain retain.jsonl --device cpu --output new"


def test_palu_unlearn_with_nothing_else_forgets_and_keeps(palu):
    status, said, error = palu(f"{LINE} --checks epochs")
    found = record(palu.folder / "new")
    assert status == 0 and "Forgotten, and kept." in said, said + error
    assert found["outcome"]["status"] == "forgotten" and found["outcome"]["before"]["leaked"] == 8
    chosen = {name: one["value"] for name, one in found["chosen"].items()}
    assert chosen["objective"] == "entropy" and chosen["prefix_length"] == 0
    assert chosen["learning_rate"] == 1.3e-3 and "--learning-rate 0.0013: 0.06 / hidden" in error
    # the record is a configuration that does the same again
    again = "unlearn --config new/palu.json --output again --checks epochs"
    assert palu(again)[0] == 0
    assert record(palu.folder / "again")["loss_curve"] == found["loss_curve"]
    assert record(palu.folder / "again")["chosen"] == {}
    for secret in ("07700", "Lund"):
        assert secret not in said + error + json.dumps(found)


def test_palu_unlearn_does_not_say_kept_of_a_retain_file_that_it_did_not_measure(palu):
    status, said, error = palu(f"{LINE} --checks epochs --retain-weight 0")
    assert status == 0 and "what was harmed is not known" in said, said + error
    assert "Forgotten." in said and "kept." not in said


def test_palu_unlearn_says_what_is_still_known_and_what_is_harmed(palu):
    line = f"{LINE} --epochs 1 --checks ends "
    status, said, error = palu(line + "--learning-rate 1e-6")
    assert status == 3 and "greedy answers say 8 of 8 secrets" in said
    assert "not good: the secrets are still known" in error and "try: train longer" in error
    assert record(palu.folder / "new")["outcome"]["status"] == "known"
    status, said, error = palu(line + "--overwrite --learning-rate 0.5")
    assert status == 3 and "the retain set is harmed" in error
    assert "harmed" in record(palu.folder / "new")["outcome"]["status"]
