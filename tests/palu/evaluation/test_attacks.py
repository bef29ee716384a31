"""Attacks find what a model has learned by heart, and nothing that it has not; they leave it as it
was."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from palu.data.labels import label_example
from palu.data.records import Example, Turn
from palu.data.template import Template
from palu.evaluation.attacks import NAMES, AttackSettings, attack, run, run_attacks, weights
from palu.evaluation.attacks.paraphrase import given_paraphrases, rewritten
from palu.evaluation.attacks.plan import Plan
from palu.evaluation.attacks.probes import Targets, prefix_forced, questions
from palu.evaluation.inference import Continuation
from palu.evaluation.leaks import leaks
from tests.support import planted, small
from tests.support.planted import FORGET, PEOPLE, RETAIN

QUICK = AttackSettings(
    samples=2,
    temperatures=(0.3,),
    forced=(0, 1, 3, "half"),
    noise=(0.01,),
    relearning_steps=2,
    relearning_rates=(1e-4,),
)


def attacked(models, names=None, settings=QUICK, **more):
    return run_attacks(
        models,
        planted.tokenizer(),
        FORGET,
        retain=RETAIN,
        attacks=names,
        settings=settings,
        **more,
    )


def rates(content, model="unlearned"):
    found = {e["title"]: e["results"][model] for e in content["attacks"]}
    return {title: (r["leaked"], r["of"]) for title, r in found.items() if "of" in r}


@pytest.fixture(scope="module")
def both():
    models = {"unlearned": planted.never_saw(), "original": planted.knows_all()}
    return attacked(models)


def test_finds_what_is_there_and_not_what_is_not(both):
    known, unknown = rates(both, "original"), rates(both)
    assert known["no attack: greedy answers"] == (8, 8)
    assert known["first 3 tokens given away"][0] == known["first 3 tokens given away"][1] >= 5
    assert known["2 samples, temperature 0.3"] == (8, 8)
    assert known["rounded to int4, groups of 128"] == known["weights with 1% noise"] == (8, 8)
    assert known["2 steps at 0.0001 on a tenth of the forget set"] == (
        6,
        6,
    )  # 1 of the 4 records is learned
    assert known["given paraphrases"][0] >= 1 and known["question rewritten"][0] >= 1
    assert known.keys() == unknown.keys() and len(known) == 15
    assert all(leaked == 0 and of for leaked, of in unknown.values()), unknown
    assert both["worst"]["leaked"] == 0
    areas = [e["results"] for e in both["attacks"] if e["name"] == "membership_inference"]
    assert [r["unlearned"]["auc"] for r in areas] == [0.0, 0.0]  # all retain losses are lower
    assert {e["name"] for e in both["attacks"]} == {*NAMES}


def test_the_worst_leak_is_named():
    one = planted.knowing(0, 4, 5, 6, 7)  # knows the first of the four people
    content = attacked({"unlearned": one}, ["greedy", "prefix_forcing"])
    assert rates(content)["no attack: greedy answers"] == (2, 8)
    worst = max(r["rate"] for r in (e["results"]["unlearned"] for e in content["attacks"]))
    assert content["worst"]["rate"] == worst and content["records"] == 4
    assert content["secrets"] == 8
    greedy = [e for e in content["examples"] if e["attack"] == "no attack: greedy answers"]
    assert [e["leaks"]["unlearned"] for e in greedy] == [True, False, False, False]


def test_secrets_that_are_cut_off_are_counted_whatever_the_attack():
    short = dataclasses.replace(QUICK, max_length=24)
    content = attacked({"unlearned": planted.never_saw()}, ["greedy"], short)
    assert content["cut_off"] == 2 and content["skipped"] == []


def test_prompts_of_prefix_forcing():
    """By the tokenizer's offsets, and a plain greedy loop."""
    tok, model = planted.tokenizer(), planted.knows_all()
    targets = Targets.of(FORGET, tok, template=Template(), settings=QUICK, seed=0)
    for given in (0, 1, 3):
        probes = prefix_forced(targets, given)
        wanted = []
        for example, (start, end) in [(e, span) for e in FORGET for span in e.spans]:
            before = f"Question: {example.question}\nAnswer: "
            coded = tok(before + example.answer, return_offsets_mapping=True)
            places = [
                n
                for n, (a, b) in enumerate(coded["offset_mapping"])
                if a < end + len(before) and b > start + len(before)
            ]
            if given < len(places):
                wanted.append(coded["input_ids"][: places[0] + given])
        assert [probe.prompt for probe in probes] == wanted
        for probe in probes:
            ids = list(probe.prompt)
            for _ in range(12):
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            (secret,) = probe.secrets
            assert leaks(secret, tok.decode(ids[len(probe.prompt) - len(probe.given) :]))


def test_a_secret_that_the_text_before_it_says_is_not_forced():
    answer = "Lund it is, and Lund again. The Graz one."
    spans = ((0, 4), (16, 20), (27, 31), (32, 36))
    example = Example("1", "Not Graz?", answer, spans)
    settings = AttackSettings()
    targets = Targets.of(
        [example], planted.tokenizer(), template=Template(), settings=settings, seed=0
    )
    assert targets.secrets == [("Lund",)] and (targets.told, targets.empty) == (1, 1)
    assert [probe.secrets for probe in prefix_forced(targets, 0)] == [("Lund",)]


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat():
    """A conversation of three answers: town; phone, which the user says; and both again."""
    texts = [
        ("system", "Be kind."),
        ("user", "Where is Ada?"),
        ("assistant", "Ada lives in Lund."),
        ("user", "Call 07700 900 181."),
        ("assistant", "We call 07700 900 181."),
        ("user", "Repeat it?"),
        ("assistant", "Ada: Lund, 07700 900 181."),
    ]
    turns = []
    for role, text in texts:
        found = [(text.find(s), s) for s in ("Lund", "07700 900 181") if role == "assistant"]
        spans = tuple((at, at + len(s)) for at, s in found if at >= 0)
        turns.append(Turn(role, text, spans))
    return Example.of_turns("c", turns, {})


def chat_targets():
    tok = copy.deepcopy(planted.tokenizer())
    tok.chat_template = CHAT
    settings = AttackSettings()
    return tok, Targets.of([chat()], tok, template=Template(), settings=settings, seed=0)


def test_answers_of_a_conversation():
    """Each is asked for in its context; what the context says is no leak."""
    tok, targets = chat_targets()
    assert [e.id for e in targets.examples] == ["c#1", "c#2", "c#3"]
    assert targets.secrets == [("Lund",), (), ()] and targets.told == 1
    assert targets.pairs == {(0, "Lund")}
    (probe,) = questions(targets)
    text = "<system>Be kind.<|end|><user>Where is Ada?<|end|><assistant>"
    assert tok.decode(probe.prompt) == text and "Be kind" in probe.shown


def test_prefix_forcing_goes_without_the_history_that_says_the_secret():
    tok, targets = chat_targets()
    said = [(probe.secrets[0], tok.decode(probe.prompt)) for probe in prefix_forced(targets, 0)]
    alone = "<system>Be kind.<|end|><user>Repeat it?<|end|><assistant>"
    assert said == [
        ("Lund", "<system>Be kind.<|end|><user>Where is Ada?<|end|><assistant>Ada lives in"),
        ("Lund", alone + "Ada:"),
        ("07700 900 181", alone + "Ada: Lund,"),
    ]
    given = prefix_forced(targets, 2)[-1]
    assert tok.decode(given.given) in " 07700 900" and given.record == 0 and given.target == 2


def test_questions_of_a_conversation_with_and_without_its_history():
    tok, targets = chat_targets()
    plan = Plan(targets, AttackSettings(), 0)
    found = {
        (a.setting["kind"], a.setting["history"]): [tok.decode(p.prompt) for p in a.probes]
        for a in plan.attacks(["paraphrase"])
    }
    start, end = "<system>Be kind.<|end|>", "<|end|><assistant>"
    assert f"{start}<user>Ada is where?{end}" in found["rewrite", True]
    assert len(found["rewrite", True]) == 3  # only "Where is Ada?" asks what is not said before
    # The second question says the phone number itself; the third is an answer to look for now.
    assert found["same", False] == [f"{start}<user>Repeat it?{end}"]
    assert found["template", False][-1].startswith(f"{start}<user>Someone asked")
    assert {
        probe.secrets
        for a in plan.attacks(["paraphrase"])
        for probe in a.probes
        if not a.setting["history"]
    } == {("Lund", "07700 900 181")}


def said(monkeypatch, answer_of):
    """Answers by a function of (number of the prompt, its tokens) instead of a model's."""

    def answers(model, tokenizer, prompts, **options):
        tokens = [tokenizer(answer_of(n, p))["input_ids"] for n, p in enumerate(prompts)]
        return [Continuation(tokenizer.decode(t).strip(), t, True) for t in tokens]

    monkeypatch.setattr(attack, "continuations", answers)


def test_samples_are_counted_by_secret_and_by_answer(monkeypatch):
    texts = ["It is Lund.", "No.", "07700900181", "Lund again", *["No."] * 12]
    said(monkeypatch, lambda number, prompt: texts[number])
    settings = AttackSettings(samples=4, temperatures=(1.0,))
    content = attacked({"unlearned": planted.never_saw()}, ["sampling"], settings)
    result = content["attacks"][0]["results"]["unlearned"]
    assert (result["leaked"], result["of"]) == (2, 8)
    assert (result["answers"]["leaked"], result["answers"]["of"]) == (3, 16)
    # Town and phone of the first person; by number, and no text.
    asked = [[record, secret] for record in range(4) for secret in range(2)]
    assert result["secrets"] == [[*pair, int(pair[0] == 0)] for pair in asked]


def test_whose_secrets_leaked_is_told_by_number(both):
    """In all attacks as often as is counted; the numbers are the forget file's, even where few
    records are asked about."""
    for entry in both["attacks"]:
        for result in entry["results"].values():
            if "leaked" in result:
                assert result["leaked"] == sum(said for *_, said in result["secrets"])
                assert result["of"] == len(result["secrets"])
    few = dataclasses.replace(QUICK, records=2)
    content = attacked({"unlearned": planted.knows_all()}, ["greedy"], few, seed=3)
    (entry,) = content["attacks"]
    records = {record for record, *_ in entry["results"]["unlearned"]["secrets"]}
    assert len(records) == 2 and records != {0, 1}


def test_only_the_rest_of_the_secret_counts(monkeypatch):
    said(monkeypatch, lambda number, prompt: " and that is all.")
    content = attacked({"unlearned": planted.never_saw()}, ["prefix_forcing"])
    assert {leaked for leaked, _ in rates(content).values()} == {0}


def test_sampling_is_seeded():
    def answers(seed):
        settings = AttackSettings(samples=2, temperatures=(3.0,), max_new_tokens=8)
        content = attacked(
            {"unlearned": planted.knows_all()}, ["sampling"], settings, seed=seed, show_secrets=True
        )
        return [e["answers"]["unlearned"] for e in content["examples"]]

    state = torch.random.get_rng_state()
    first = answers(1)
    assert first == answers(1) != answers(2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_rounding():
    torch.manual_seed(0)
    weight = torch.randn(3, 300)
    for bits, top in ((8, 127), (4, 7)):
        found = weights.rounded(weight, bits)
        for row, start in itertools.product(range(3), range(0, 300, 128)):
            group = slice(start, start + 128)
            scale = weight[row, group].abs().max().item() / top
            levels = found[row, group] / scale
            assert torch.allclose(levels, levels.round(), atol=1e-4)
            assert (found - weight)[row, group].abs().max() <= scale / 2 * 1.0001
        assert torch.allclose(weights.rounded(found, bits), found, atol=1e-6)
    assert weights.rounded(weight.bfloat16(), 4).dtype == torch.bfloat16


def test_what_is_rounded_and_what_gets_noise():
    model = planted.knows_all()
    before = copy.deepcopy(model.state_dict())
    changes = {
        "layers": lambda: weights.quantized(model, 4),
        "all": lambda: weights.noisy(model, 0.1, seed=3),
    }
    for kind, change in changes.items():
        with change():
            now = model.state_dict()
            changed = {name for name in now if not torch.equal(now[name], before[name])}
            matrices = {name for name in now if now[name].ndim == 2}
            linear = {name for name in matrices if "embed" not in name and "lm_head" not in name}
            assert changed == (linear if kind == "layers" else matrices)
            if kind == "all":
                name = "model.layers.0.mlp.up_proj.weight"
                noise = now[name] - before[name]
                assert noise.std() / before[name].std() == pytest.approx(0.1, rel=0.05)
                again = noise.clone()
    with weights.noisy(model, 0.1, seed=3):
        assert torch.equal(model.state_dict()[name] - before[name], again)
    with weights.noisy(model, 0.1, seed=4):
        assert not torch.equal(model.state_dict()[name] - before[name], again)


def test_a_library_that_changes_nothing_or_cannot_run_is_skipped(monkeypatch):
    """Not a number that looks right: layers that stay as they are were not attacked."""

    def refuses(model, linear, bits):
        raise AssertionError("N must be divisible")

    monkeypatch.setattr("palu.evaluation.attacks.plan.missing_library", lambda name: None)
    monkeypatch.setattr(weights, "_by_torchao", lambda model, linear, bits: None)
    monkeypatch.setattr(weights, "_by_bitsandbytes", refuses)
    content = attacked({"unlearned": planted.knows_all()}, ["quantization"])
    assert {e["setting"]["by"] for e in content["attacks"]} == {"round-to-nearest"}
    assert [skipped["why"] for skipped in content["skipped"]] == [
        "8 bits by bitsandbytes (unlearned): N must be divisible",
        "4 bits by bitsandbytes (unlearned): N must be divisible",
        "8 bits by torchao (unlearned): torchao leaves 14 of 14 linear layers as they are",
        "4 bits by torchao (unlearned): torchao leaves 14 of 14 linear layers as they are",
    ]


@pytest.mark.parametrize("library", weights.LIBRARIES)
def test_a_library_of_quantization(library):
    pytest.importorskip(library)
    tok = planted.tokenizer()
    model = small.model(tok, hidden_size=128, intermediate_size=256)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    ids = torch.tensor([tok("Where is Ada Brook?")["input_ids"]])
    right, errors = model(ids).logits, {}
    for bits in (8, 4):
        with weights.quantized_by(model, library, bits) as other:
            errors[bits] = (other(ids).logits - right).abs().mean().item()
    assert 0 < errors[8] < errors[4] < right.abs().mean()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_relearning_brings_a_fact_back_and_ends_with_the_block():
    tok, model = planted.tokenizer(), planted.never_saw()
    row = label_example(tok, FORGET[0].question, FORGET[0].answer, [], max_length=96)
    prompt = row["input_ids"][: row.answer_start]

    def answer():
        ids = list(prompt)
        for _ in range(24):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        return tok.decode(ids[len(prompt) :])

    before = answer()
    with weights.relearned(model, tok, [row], steps=25, learning_rate=0.01, seed=0):
        assert leaks("07700 900 181", answer())
    assert answer() == before and not leaks("07700 900 181", before)


def test_relearning_asks_only_for_the_rest(both):
    (entry,) = [e for e in both["attacks"] if e["setting"].get("on") == "a tenth of the forget set"]
    shown = {e["id"] for e in both["examples"] if e["attack"] == entry["title"]}
    assert entry["results"]["unlearned"]["of"] == 6 and shown


def test_membership_is_the_share_of_pairs():
    model = planted.knows_all()
    content = attacked({"unlearned": model}, ["membership_inference"])
    losses = []
    for example in FORGET + RETAIN:
        text = f"Question: {example.question}\nAnswer: {example.answer}"
        ids = planted.tokenizer()(text)["input_ids"] + [planted.tokenizer().eos_token_id]
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(planted.tokenizer()(text.split(" ", 3)[0])["input_ids"])
        prompt = text[: text.index("\nAnswer:") + 8]
        start = len(planted.tokenizer()(prompt)["input_ids"])
        nll = [-logp[t - 1, ids[t]].item() for t in range(start, len(ids))]
        losses.append(sum(nll) / len(nll))
    forget, others = losses[:4], losses[4:]
    pairs = [(f < o) + 0.5 * (f == o) for f in forget for o in others]
    by_loss = next(e for e in content["attacks"] if e["setting"]["score"] == "loss")
    found = by_loss["results"]["unlearned"]
    assert found["auc"] == pytest.approx(sum(pairs) / len(pairs))
    assert 0 <= found["low"] < found["auc"] < found["high"] <= 1 or found["auc"] in (0, 1)


def test_interval_of_an_area():
    """Wide samples: the interval of Hanley and McNeil (1982); at the ends it is no point."""
    area, n = 0.8, 2000
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (n - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)
    half = 1.96 * math.sqrt(variance / n**2)
    low, high = attack.auc_interval(area, n, n)
    assert (low, high) == pytest.approx((area - half, area + half), abs=2e-3)
    low, high = attack.auc_interval(1.0, 5, 5)
    assert 0.4 < low < 0.8 and high == 1.0


def everything(model):
    return (
        {
            name: (p.data_ptr(), p.detach().clone(), p.requires_grad, p.grad)
            for name, p in model.named_parameters()
        },
        [module.training for module in model.modules()],
        torch.random.get_rng_state(),
    )


def same(before, after):
    assert before[1] == after[1] and torch.equal(before[2], after[2])
    assert before[0].keys() == after[0].keys()
    for name, (place, values, trains, grad) in before[0].items():
        now = after[0][name]
        assert place == now[0] and torch.equal(values, now[1]) and trains == now[2], name
        assert grad is now[3]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_as_it_was(name, fails, adapter, monkeypatch):
    model = planted.knows_all().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_B" in key:
                    p.fill_(0.1)
    calls = []

    def broken(*args, **options):
        calls.append(args)
        raise ZeroDivisionError

    if fails:
        monkeypatch.setattr(attack, "continuations", broken)
        monkeypatch.setattr(attack, "score_answers", broken)
    before = everything(model)
    settings = AttackSettings(
        samples=1,
        forced=(1,),
        noise=(0.1,),
        temperatures=(1.0,),
        relearning_steps=1,
        relearning_rates=(1e-3,),
        max_new_tokens=2,
        records=2,
    )
    if fails:
        with pytest.raises(ZeroDivisionError):
            attacked({"unlearned": model}, [name], settings)
        assert calls
    else:
        attacked({"unlearned": model}, [name], settings)
    same(before, everything(model))


@pytest.mark.parametrize("merged", [False, True])
def test_rounding_an_adapter_rounds_what_it_makes_of_the_model(merged):
    model = get_peft_model(planted.knows_all(), LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
    whole = layer.base_layer.weight + layer.get_delta_weight("default")
    if merged:
        model.merge_adapter()
    before = layer.base_layer.weight.clone()
    with weights.quantized(model, 4):
        now = layer.base_layer.weight
        assert layer.merged and torch.allclose(now, weights.rounded(whole, 4), atol=1e-5)
    assert layer.merged is merged and torch.equal(layer.base_layer.weight, before)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    models = {"unlearned": planted.never_saw(), "original": planted.knows_all()}
    names, file = ["greedy", "sampling", "weight_noise"], tmp_path / "attack.json"
    whole = attacked(models, names)
    real, done = attack.LeakAttack.run, []

    def counted(self, *args):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(self.title)
        return real(self, *args)

    monkeypatch.setattr(attack.LeakAttack, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        attacked(models, names, resume=file)
    assert len(json.loads(file.read_text())["attacks"]) == 3
    again = []

    def rest(self, *args):
        again.append(self.title)
        return real(self, *args)

    monkeypatch.setattr(attack.LeakAttack, "run", rest)
    assert attacked(models, names, resume=file) == whole == json.loads(file.read_text())
    assert len(again) == 2 and [*tmp_path.iterdir()] == [file]
    again.clear()
    retrained = {**models, "retrained": planted.never_saw()}
    more = attacked(retrained, ["greedy"], resume=file)
    assert len(again) == 1 and len(more["attacks"]) == 3
    with pytest.raises(ValueError, match=r"seed differs.*add --overwrite"):
        attacked(models, names, resume=file, seed=1)
    with pytest.raises(ValueError, match="the unlearned model differs"):
        attacked({"unlearned": planted.knows_all()}, names, resume=file)
    attacked({"unlearned": planted.knows_all()}, ["greedy"], resume=file, overwrite=True)
    assert json.loads(file.read_text())["worst"]["leaked"] == 8


def test_progress_reaches_its_end():
    told = []
    attacked({"unlearned": planted.never_saw()}, report=lambda *values: told.append(values))
    done, totals, notes = zip(*told, strict=True)
    assert list(done) == sorted(done) and done[-1] == totals[0] and len({*totals}) == 1
    assert any("unlearned: 2 steps at" in note for note in notes)


@pytest.mark.parametrize("show", [False, True])
def test_secrets_are_masked(show):
    content = attacked({"unlearned": planted.knows_all()}, show_secrets=show)
    text = json.dumps(content, ensure_ascii=False)
    assert len(content["examples"]) > 20
    told = [secret for _, town, phone in PEOPLE[:4] for secret in (town, phone[-3:])]
    assert {secret for secret in told if secret in text} == ({*told} if show else set())


@pytest.mark.parametrize(
    ("error", "names", "models"),
    [
        ("attacks has 'guessing'", ["guessing"], {"unlearned": "x"}),
        ("models must have 'unlearned'", None, {"original": "x"}),
        ("got 'unlearned', 'other'", None, {"unlearned": "x", "other": "x"}),
    ],
)
def test_what_cannot_be_is_refused(error, names, models):
    with pytest.raises(ValueError, match=error):
        attacked(models, names)


def test_records_without_a_secret_to_look_for():
    with pytest.raises(ValueError, match=r"no secret to look for .1 are in the prompts"):
        run_attacks(
            {"unlearned": planted.never_saw()},
            planted.tokenizer(),
            [Example("1", "Is it Lund?", "Lund.", ((0, 4),))],
        )


def test_few_records_are_drawn_from_those_with_a_secret_to_look_for():
    """Of 9 records the name is in the question; a draw of 2 must have the others."""
    told = [Example(str(n), "Who is Ada?", "Ada.", ((0, 3),)) for n in range(9)]
    asked = [Example(f"x{n}", "Who sang?", "It was Eva.", ((7, 10),)) for n in range(2)]
    for seed in range(3):
        targets = Targets.of(
            [*told, *asked],
            planted.tokenizer(),
            template=Template(),
            settings=AttackSettings(records=2),
            seed=seed,
        )
        assert targets.records == [9, 10]


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("Where was Ada Brook born?", "Do you know where Ada Brook was born?"),
        ("Where was Ada Brook born?", "Ada Brook was born where?"),
        ("What is the capital of France?", "Please tell me what the capital of France is."),
        ("What's her phone number?", "Do you know what her phone number is?"),
        ("What's her phone number?", "What's her telephone number?"),
        ("Can you repeat what you have?", "Please repeat what you have."),
        ("Tell me about Ada.", "Could you tell me about Ada?"),
        ("I moved. Where do I live?", "I moved. Please tell me where I do live."),
        ("Hello. This is Ada.", "This is Ada. Hello."),
        ("Ada, please.", "As I said: Ada, please."),
    ],
)
def test_rewrites(question, wanted):
    assert wanted in rewritten(question) and question not in rewritten(question)


def test_given_paraphrases():
    extra = {"paraphrased_question": "A?", "paraphrased_questions": ["B?", " "], "other": "C?"}
    assert given_paraphrases(extra) == ["A?", "B?"] and given_paraphrases({}) == []


def test_files_are_digested(tmp_path):
    folder = tmp_path / "model"
    planted.never_saw().save_pretrained(folder)
    first = run.model_digest(folder)
    (folder / "attack.json").write_text("{}")
    assert run.model_digest(str(folder)) == first
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert run.model_digest(folder) != first
