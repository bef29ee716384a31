"""The other methods: each against its formula, written out on full logits in float64."""

import json
import math
import warnings
from functools import partial

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from palu.data.collator import Collator
from palu.data.pairs import PairCollator, add_alternates, own_alternates, refusals
from palu.demo.people import write_jsonl
from palu.methods import METHODS, answers, make_method
from tests.palu.training.test_trainer import config, trainer, weights
from tests.support import WORKERS, ranks, small

# Every option away from its default. (RMU, which has no answers, is in test_rmu.py.)
OPTIONS = {
    "grad_ascent": {},
    "grad_diff": {},
    "npo": {"beta": 0.3},
    "sim_npo": {"beta": 2.0, "delta": 0.4},
    "dpo": {"beta": 0.2},
    "idk_dpo": {"beta": 0.2},
    "wga": {"beta": 0.7},
    "sat_imp": {"beta1": 0.6, "beta2": 1.3},
    "undial": {"beta": 3.0},
    "ce_u": {"ignore_first": 2},
    "pdu": {"retain_loss_eps": 0.2, "dual_step_size": 0.5, "dual_warmup_epochs": 0},
}
NEEDS_REFERENCE = ("npo", "dpo", "undial")
PAIRS = ("dpo", "idk_dpo")


def half_learned(tok, _found={}):  # noqa: B006
    """A float64 model that finds the answers' tokens neither certain nor impossible."""
    model = small.model(tok, initializer_range=0.1).double()
    if not _found:
        batch = Collator(tok)(small.rows(tok))
        labels = batch["input_ids"].where(batch["labels"] != -100, -100)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(25):
            optimizer.zero_grad()
            model(**(batch | {"labels": labels})).loss.backward()
            optimizer.step()
        model.zero_grad()
        _found |= {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(_found)
    return model


def moved(model, size=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def of_answers(model, tok, rows):
    """Of each example: log-probabilities `[tokens, V]` that predict its answer, and its tokens."""
    batch = Collator(tok)(rows)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    found = []
    for logits, ids, labels in zip(
        model(**inputs).logits, batch["input_ids"], batch["labels"], strict=True
    ):
        places = [t for t in range(1, len(ids)) if labels[t] != -100]
        log_p = logits[[t - 1 for t in places]].log_softmax(-1)
        found.append((log_p, ids[places]))
    return found


def sigmoid_loss(beta, x):
    return (2 / beta) * (1 + (-x).exp()).log()


def formula_of_distributions(name, options, log_p, ref_log_p, tokens):
    """The terms of a method that reads whole distributions, token by token."""
    if name == "pdu":
        return [(row.max() - row.sum() / len(row)) ** 2 for row in log_p]
    assert name in ("undial", "ce_u")
    terms = []
    for row, ref_row, token in zip(log_p, ref_log_p, tokens, strict=True):
        if name == "undial":
            lowered = ref_row.clone()
            lowered[token] -= options["beta"]
            terms.append(-(lowered.softmax(0) * row).sum())
        else:
            others = row.detach().exp()
            others[token] = 0
            terms.append(-((others / others.sum()) * row).sum())
    return terms[options.get("ignore_first", 0) :]


def formula(name, options, current, original):
    """The forget term: the mean over tokens or answers of what the papers write."""
    beta, parts, ratios = options.get("beta"), [], []
    for (log_p, tokens), (ref_log_p, _) in zip(current, original, strict=True):
        log_token = torch.stack([row[token] for row, token in zip(log_p, tokens, strict=True)])
        ref_log_token = ref_log_p[range(len(tokens)), tokens]
        fixed = log_token.detach()
        if name in ("grad_ascent", "grad_diff"):
            parts += list(log_token)
        elif name == "wga":
            parts += list(fixed.exp() ** beta * log_token)
        elif name == "sat_imp":
            p = fixed.exp()
            parts += list(p ** options["beta1"] * (1 - p) ** options["beta2"] * log_token)
        elif name == "npo":
            parts.append(sigmoid_loss(beta, -beta * (log_token.sum() - ref_log_token.sum())))
        elif name in PAIRS:
            ratios.append(log_token.sum() - ref_log_token.sum())
        elif name == "sim_npo":
            margin = beta * options["delta"]  # gamma in the paper
            parts.append(sigmoid_loss(beta, -(beta / len(tokens)) * log_token.sum() - margin))
        else:
            parts += formula_of_distributions(name, options, log_p, ref_log_p, tokens)
    for lose, win in zip(ratios[:3], ratios[3:], strict=True):
        parts.append(-(1 / (1 + (-beta * (win - lose)).exp())).log())
    return torch.stack(parts).mean()


def retain_term(kind, current, original):
    parts = []
    for (log_p, tokens), (ref_log_p, _) in zip(current, original, strict=True):
        for row, ref_row, token in zip(log_p, ref_log_p, tokens, strict=True):
            kl = (ref_row.exp() * (ref_row - row)).sum()
            parts.append(kl if kind == "kl" else -row[token])
    return torch.stack(parts).mean()


def forget_rows(tok, name):
    rows = small.rows(tok, 3)
    if name not in PAIRS:
        return rows
    texts = ["No idea.", "Ask somebody else about Bob, not me.", "A cat."]
    return add_alternates(rows, small.examples(3), texts, tok, max_length=64)


def second_rows(rows):
    return [
        {"input_ids": row["alternate_input_ids"], "labels": row["alternate_labels"]}
        for row in rows
        if "alternate_labels" in row
    ]


def made_by(tok, tmp_path, name, *, plain=True, model=None, **options):
    args = config(tmp_path, method=name, **OPTIONS[name], **options)
    model = half_learned(tok) if model is None else model
    retain = None if name == "grad_ascent" else True
    made = trainer(tok, args, model=model, forget=forget_rows(tok, name), retain=retain)
    moved(made.model)
    if not plain:  # what cannot be seen through takes the road of logits
        made.model.get_output_embeddings().register_forward_hook(lambda *_: None)
    return made


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def batch_of(tok, name):
    collator = PairCollator(Collator(tok))
    retain = None if name == "grad_ascent" else collator(small.rows(tok)[3:])
    return dict(collator(forget_rows(tok, name)), palu_retain=retain)


@pytest.mark.parametrize("plain", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_the_formula(tok, tmp_path, name, retain_loss, plain, monkeypatch):
    monkeypatch.setattr(answers, "CHUNK_BYTES", 1)  # chunks of 64 rows: more than one
    weighted = {"forget_weight": 0.7}
    if name != "grad_ascent":
        weighted |= {"retain_weight": 2.0, "retain_loss": retain_loss}
    made = made_by(tok, tmp_path, name, plain=plain, **weighted)
    terms = made._terms(made.model, batch_of(tok, name))
    assert made.step_loss.without_logits == plain
    terms.loss.backward()
    got = gradients(made.model)

    rows, kept, ref = forget_rows(tok, name), small.rows(tok)[3:], half_learned(tok)
    rows += second_rows(rows)
    with torch.no_grad():
        ref_forget, ref_retain = (of_answers(ref, tok, part) for part in (rows, kept))
    forget = formula(name, OPTIONS[name], of_answers(made.model, tok, rows), ref_forget)
    want = 0.7 * forget
    if name != "grad_ascent":
        retain = retain_term(retain_loss, of_answers(made.model, tok, kept), ref_retain)
        want = want + 2.0 * retain
    want.backward()
    expected = gradients(made.model)
    assert terms.loss.dtype == torch.float64 and abs(forget) > 0.05
    assert expected.norm() > 0.05
    torch.testing.assert_close(terms.loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.means[0], forget.detach().float(), rtol=1e-6, atol=0)
    assert terms.means[1] == 0
    assert (got - expected).norm() <= 1e-10 * expected.norm()


def same_when_split(make):
    """`make(**options)` gives a trainer of 3 forget rows: two steps of one batch
    are two steps of three. -> the log of the whole ones."""
    after = []
    for batch, accumulation in ((3, 1), (1, 3)):
        made = make(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0,
            max_steps=2,
        )
        before = weights(made.model)
        made.train()
        after.append((weights(made.model) - before, made.state.log_history))
    (one, log), (other, split_log) = after
    assert one.norm() > 1e-3
    assert (one - other).norm() <= 1e-9 * one.norm()
    for name in ("forget", "retain", "num_forget", "num_retain"):
        assert log[1][name] == pytest.approx(split_log[1][name], rel=1e-6)
    return log


@pytest.mark.parametrize("name", OPTIONS)
def test_a_split_step_is_the_same_step(tok, tmp_path, name):
    """Means over tokens and over answers are those of the whole step, in turns or not."""
    log = same_when_split(partial(made_by, tok, tmp_path, name, learning_rate=0.1))
    per_example = METHODS[name].per_example
    assert per_example == (log[0]["num_forget"] == 3) == ("loss_token_fraction" not in log[0])
    assert log[0]["preserve"] == 0 == log[0]["num_preserve"]


def test_the_first_tokens_of_every_answer_are_left_alone():
    labels = torch.tensor([[-100, 5, -200, -200, -100, -100, 7, 8, -200, -200, -100, 9]])
    found = make_method("ce_u", {"ignore_first": 2}).roles(labels)
    assert found.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0]]
    whole = make_method("ce_u", {"ignore_first": 0}).roles(labels)
    assert torch.equal(whole == 1, labels != -100)


def test_evaluation_gives_the_means_over_all(tok, tmp_path):
    made = made_by(tok, tmp_path, "npo", per_device_eval_batch_size=2)
    found = made.evaluate()
    rows, ref = small.rows(tok), half_learned(tok)
    with torch.no_grad():
        current, original = (of_answers(m, tok, rows[:3]) for m in (made.model, ref))
        want = formula("npo", OPTIONS["npo"], current, original)
    assert found["eval_forget"] == pytest.approx(float(want), rel=1e-6)
    assert found["eval_num_forget"] == 3


def test_no_logits_are_kept_where_the_head_is_plain(tok, tmp_path, monkeypatch):
    """Neither by operators nor by `map_logits`, whose chunks live one at a time."""
    monkeypatch.setattr(answers, "CHUNK_BYTES", 1)
    monkeypatch.setattr(answers, "chunk_shape", lambda *_: (5, 0))
    made = made_by(tok, tmp_path, "ce_u")
    batch = batch_of(tok, "ce_u")
    made._terms(made.model, batch)
    columns, kept, head = len(tok), [], made.model.lm_head.weight.data_ptr()

    def pack(x):
        if x.dim() == 2 and x.shape[1] == columns and x.data_ptr() != head:
            kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = made._terms(made.model, {**batch, "palu_retain": None}).loss
    assert kept == []
    loss.backward()
    assert made.model.lm_head.weight.grad.norm() > 0


@pytest.mark.parametrize("name", OPTIONS)
def test_a_token_the_model_is_sure_of_has_a_finite_gradient(name):
    """p = 1 in float32."""
    logits = torch.zeros(3, 11)
    logits[range(3), range(3)] = 200.0
    logits.requires_grad_()
    lengths = torch.tensor([1, 2])
    part = answers.Answers(logits, None, torch.arange(3), lengths, logits.detach(), None, "torch")
    loss = make_method(name, {}).loss(part)
    count = (1 if name in PAIRS else 2) if METHODS[name].per_example else 3
    assert loss.shape == (count,)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all() and grad.isfinite().all()
    if name == "ce_u":  # p - q
        torch.testing.assert_close(grad.sum(1), torch.zeros(3), atol=1e-6, rtol=0)
        torch.testing.assert_close(grad[range(3), range(3)], torch.ones(3))


@pytest.mark.parametrize("name", OPTIONS)
def test_no_rows_give_a_zero_with_a_gradient(tok, tmp_path, name):
    made = made_by(tok, tmp_path, name)
    batch = {k: v for k, v in batch_of(tok, name).items() if k != "palu_retain"}
    batch["labels"] = torch.full_like(batch["labels"], -100)
    terms = made._terms(made.model, batch)
    assert terms.loss == 0 and terms.rows.tolist() == [0, 0, 0]
    terms.loss.backward()
    assert made.model.lm_head.weight.grad.abs().max() == 0


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    ranks.launch([WORKERS / "methods.py", tmp_path], 2, tmp_path)
    found = [json.loads((tmp_path / f"rank-{n}.json").read_text()) for n in range(2)]
    from tests.support.workers import methods

    wanted = methods.run(tmp_path / "alone", 1)
    assert found[0] == found[1]
    for name, one in wanted.items():
        assert len(one["logs"]) == 4
        for key in ("logs", "weights"):
            got, want = torch.tensor(found[0][name][key]), torch.tensor(one[key])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NEEDS_REFERENCE)
def test_the_adapter_switched_off_is_the_original(tok, tmp_path, name):
    peft = pytest.importorskip("peft")
    found = []
    for reference in ("live", "adapter_off"):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(half_learned(tok), lora)
        original = {"ref_model": half_learned(tok)} if reference == "live" else {}
        args = config(tmp_path, method=name, reference=reference, retain_loss="kl")
        made = trainer(tok, args, model=model, forget=forget_rows(tok, name), **original)
        terms = made._terms(made.model, batch_of(tok, name))
        terms.loss.backward()
        found.append((terms.loss.detach(), gradients(made.model)))
    torch.testing.assert_close(found[0], found[1])


def test_a_resumed_run_is_the_run(tok, tmp_path):
    options = {"max_steps": 4, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    whole = made_by(tok, tmp_path, "npo", **options)
    whole.train()
    again = made_by(tok, tmp_path, "npo", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    torch.testing.assert_close(weights(again.model), weights(whole.model))
    other = made_by(tok, tmp_path, "sim_npo", **options)
    with pytest.raises(ValueError, match="method is 'npo' in the checkpoint and 'sim_npo' here"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_it_stops_by_the_probability_of_whole_answers(tok, tmp_path):
    made = made_by(tok, tmp_path, "npo", stop_at_forget_prob=0.999, max_steps=50)
    measure = next(c for c in made.callback_handler.callbacks if hasattr(c, "forget_probability"))
    found = []
    with torch.no_grad():
        for log_p, tokens in of_answers(made.model, tok, small.rows(tok)[:3]):
            found.append(math.exp(log_p[range(len(tokens)), tokens].mean()))
    assert measure.forget_probability() == pytest.approx(sum(found) / 3, rel=1e-5)
    made.train()
    assert made.state.global_step == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "nope"}, "method must be one of palu, grad_ascent, .*not 'nope'"),
        ({"beta": 0.1}, "beta is 0.1 and method 'palu' has no such option"),
        ({"method": "grad_diff", "delta": 0.1}, r"delta is 0.1 .*\(its own: none\)"),
        ({"method": "npo", "beta": 0.0}, "beta is 0.0; it must be a finite number above 0"),
        ({"method": "npo", "beta": math.nan}, "beta is nan; it must be a finite number"),
        ({"method": "sim_npo", "delta": -1.0}, "delta is -1.0; it must be .*at least 0"),
        ({"method": "sat_imp", "beta2": -1.0}, "beta2 is -1.0; it must be"),
        ({"method": "ce_u", "ignore_first": -1}, "ignore_first is -1; it must be at least 0"),
        ({"method": "npo", "forget_weight": -1.0}, "forget_weight is -1.0; it must be"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "retain", "said"),
    [
        ({"method": "grad_ascent"}, True, "'grad_ascent' has no retain term"),
        ({"method": "grad_diff"}, None, "'grad_diff' needs a retain set"),
        ({"method": "npo", "reference": "cached"}, True, "reference='cached' holds what"),
        ({"method": "wga", "reference": "cached", "retain_loss": "kl"}, True, "'cached' holds"),
    ],
)
def test_a_run_without_what_it_needs_is_refused(tok, tmp_path, options, retain, said):
    with pytest.raises(ValueError, match=said):
        trainer(tok, config(tmp_path, **options), retain=retain)


def test_a_cache_that_nothing_asks_for_is_none(tok, tmp_path):
    made = trainer(tok, config(tmp_path, method="sim_npo", reference="cached", max_steps=1))
    made.train()
    assert made.reference is None


def test_defaults_are_the_methods_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {n: {o: getattr(make_method(n, {}), o) for o in OPTIONS[n]} for n in OPTIONS}
    assert {*METHODS} == {*OPTIONS, "palu", "rmu"}
    assert found == {
        "grad_ascent": {},
        "grad_diff": {},
        "npo": {"beta": 0.1},
        "sim_npo": {"beta": 4.5, "delta": 0.0},
        "dpo": {"beta": 0.1},
        "idk_dpo": {"beta": 0.1},
        "wga": {"beta": 1.0},
        "sat_imp": {"beta1": 5.0, "beta2": 1.0},
        "undial": {"beta": 10.0},
        "ce_u": {"ignore_first": 1},
        "pdu": {"retain_loss_eps": 0.3, "dual_step_size": 1.0, "dual_warmup_epochs": 5},
    }


def test_second_answers_come_from_the_record_or_are_refusals(tok):
    examples = small.examples(2)
    with pytest.raises(ValueError, match="example '0': field 'alternate_answer' is None"):
        own_alternates(examples)
    for example, text in zip(examples, ("A", "B"), strict=True):
        example.extra["alternate_answer"] = text
    assert own_alternates(examples) == ["A", "B"]
    assert refusals(examples * 20, 3) == refusals(examples * 20, 3) != refusals(examples * 20, 4)
    rows = add_alternates(small.rows(tok, 2), examples, ["A", "B"], tok, max_length=64)
    told = [
        tok.decode(
            [
                i
                for i, label in zip(r["alternate_input_ids"], r["alternate_labels"], strict=True)
                if label != -100
            ]
        )
        for r in rows
    ]
    assert told[0].startswith("A") and told[1].startswith("B")
    assert [r["input_ids"] for r in rows] == [r["input_ids"] for r in small.rows(tok, 2)]


def test_pairs_that_are_none_are_refused(tok, tmp_path):
    made = trainer(tok, config(tmp_path, method="dpo"))
    with pytest.raises(ValueError, match="forget rows have no alternate_input_ids"):
        made.train()
    rows = forget_rows(tok, "dpo")
    del rows[1]["alternate_labels"]
    with pytest.raises(ValueError, match="example 1 of the batch has no answer token in"):
        PairCollator(Collator(tok))(rows)


def test_pairs_are_padded_by_a_collator_that_pads_few_columns(tok):
    rows = [{n: v for n, v in row.items() if n != "example_id"} for row in forget_rows(tok, "dpo")]
    batch = PairCollator(DataCollatorForSeq2Seq(tok))(rows)
    own = PairCollator(Collator(tok))(rows)
    assert batch.keys() == own.keys()
    for name, value in own.items():
        assert torch.equal(batch[name], value), name


RUN = ["unlearn", "--model", "model", "--device", "cpu", "--epochs", 1, "--batch-size", 2]


@pytest.fixture
def unmarked(work):
    """A forget file without spans, and one with second answers."""
    records = [{"question": q, "answer": a} for q, a, _ in small.FACTS[:3]]
    write_jsonl(work / "unmarked.jsonl", records)
    write_jsonl(work / "pairs.jsonl", [r | {"alternate_answer": "No idea."} for r in records])


def test_the_command_line_runs_a_method(palu, work, unmarked):
    files = "--forget", "unmarked.jsonl", "--retain", "retain.jsonl"
    status, said, _ = palu(*RUN, *files, "--method", "npo", "--output", "npo", "--beta", 0.4)
    assert status == 0 and "Written to npo after 2 steps" in said
    record = json.loads((work / "npo" / "palu.json").read_text())
    assert record["settings"]["method"] == "npo" and record["settings"]["beta"] == 0.4
    assert record["loss_curve"][0]["num_forget"] == 2
    assert record["loss_curve"][0]["forget"] == pytest.approx(2 / 0.4 * math.log(2))  # at the start
    method = "--method", "idk_dpo", "--lora-rank", 2
    status, _, _ = palu(*RUN, *files, *method, "--output", "idk")
    record = json.loads((work / "idk" / "palu.json").read_text())
    assert status == 0 and record["settings"]["beta"] == 0.1
    assert record["loss_curve"][0]["forget"] == pytest.approx(math.log(2))
    status, _, told = palu(
        *RUN, "--forget", "pairs.jsonl", "--method", "dpo", "--output", "dpo", "--retain", "none"
    )
    assert status == 0 and "nothing holds the model in place" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "npu"], "method must be one of palu, grad_ascent"),
        (["--method", "grad_ascent"], "'grad_ascent' has no retain term"),
        (["--method", "npo", "--reference", "cached"], "reference='cached' holds what"),
        (["--method", "npo", "--beta", "0"], "beta is 0.0; it must be a finite number above 0"),
        (["--beta", "1"], "beta is 1.0 and method 'palu' has no such option"),
        (["--method", "dpo"], "unmarked.jsonl: example '0': field 'alternate_answer' is None"),
        (["--method", "ce_u", "--ignore-first", "99"], "unmarked.jsonl has no token to forget"),
    ],
)
def test_the_command_line_says_what_is_wrong(palu, work, unmarked, words, said):
    files = "--forget", "unmarked.jsonl", "--retain", "retain.jsonl", "--output", "not"
    status, _, told = palu(*RUN, *files, *words)
    assert status == 2 and said in told and not (work / "not").exists()


@pytest.mark.parametrize("method", ["palu", "npo"])
def test_only_what_a_regex_matches_trains(tok, tmp_path, method):
    options = {"method": method, "max_steps": 1, "weight_decay": 0.1}
    options |= {"trainable_params_regex": r".*layers\.0\..*_proj\.weight"}
    made = trainer(tok, config(tmp_path, **options))
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    named = dict(made.model.named_parameters())
    changed = {name for name, p in named.items() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in named.items() if p.requires_grad}
    wanted = {name for name in named if ".layers.0." in name and name.endswith("_proj.weight")}
    assert changed == wanted and len(wanted) == 7


def test_a_regex_that_matches_nothing_is_refused(tok, tmp_path):
    with pytest.raises(ValueError, match=r"'layers' and matches none .* of one, such as .*weight"):
        trainer(tok, config(tmp_path, trainable_params_regex="layers"))
