"""A retain set of the model's own answers: what is in it, and what never is."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from palu.data.labels import label_example
from palu.data.records import Example, Turn
from palu.data.roles import IGNORE
from palu.demo.models import build_tokenizer
from palu.distributed import Processes
from palu.training import known as knowing
from palu.training import self_retain as module
from palu.training.self_retain import SelfRetain, self_retain, self_retain_rows
from tests.support import small
from tests.support.answers import greedy_answers
from tests.support.tofu_small import learn

SECRET = "Paris"
FORGET = [Example("0", "Where is Ada?", "Ada is in Paris now.", ((10, 15),))]
FACTS = [(q, a) for q, a, _ in small.FACTS]


@pytest.fixture(scope="module")
def known():
    """A model that knows its facts by heart and says one of them to whatever it is asked."""
    tok = small.tokenizer()
    return learn(small.model(tok, initializer_range=0.05), tok, FACTS, 60), tok


def made_by(model, tok, examples=FORGET, **changes):
    options = {"count": 12, "max_new_tokens": 24, "max_length": 100, "batch_size": 32, "seed": 1}
    return self_retain(model, tok, examples, **options | changes)


def texts(made):
    return [(e.question, e.answer) for e in made.examples]


def test_answers_are_the_models_and_no_secret_is_in_them(known):
    model, tok = known
    made = made_by(model, tok, temperature=0)
    assert made.left_out["with a secret of the forget set"] > 0  # the model does say it
    assert 8 <= len(made.examples) == sum(made.kinds.values()) <= 12
    assert not any("paris" in f"{q} {a}".casefold() for q, a in texts(made))
    assert len(set(texts(made))) == len(made.examples) and all(a.strip() for _, a in texts(made))
    assert not any(e.spans for e in made.examples)
    assert [e.id for e in made.examples] == [f"own-{n}" for n in range(len(made.examples))]
    asked = [pair for pair in texts(made) if pair[0] is not None]
    rows = [label_example(tok, q, a, (), max_length=100) for q, a in asked]
    prompts = [row["input_ids"][: row.answer_start] for row in rows]
    options = {"eos_token_ids": [tok.eos_token_id], "max_new_tokens": 24, "batch_size": 1}
    assert len(asked) > 4
    assert greedy_answers(model, tok, prompts, **options) == [answer for _, answer in asked]


def test_the_same_seed_gives_the_same_texts_and_changes_nothing(known):
    model, tok = known
    made = made_by(model, tok)
    model.train()
    state = torch.random.get_rng_state()
    again = made_by(model, tok)
    assert texts(again) == texts(made) and again.digest() == made.digest()
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    model.eval()
    assert made_by(model, tok, seed=2).digest() != made.digest()


def test_processes_share_the_work(known, monkeypatch):
    model, tok = known
    alone = made_by(model, tok, batch_size=4)
    plain = module.continuations

    def shared(*args, processes, **options):
        whole = plain(*args, **options)
        done = {}

        class Both(Processes):
            def gather(self, value):
                done.update(value)
                return [{i: one for i, one in enumerate(whole) if i not in value}, value]

        result = plain(*args, processes=Both(1, 2), **options)
        assert len(done) < len(whole) or len(whole) <= 4
        return result

    monkeypatch.setattr(module, "continuations", shared)
    assert texts(made_by(model, tok, batch_size=4)) == texts(alone)


@pytest.mark.parametrize("kind", ["adapter", "bfloat16"])
def test_adapters_and_bfloat16(known, kind):
    model, tok = copy.deepcopy(known[0]), known[1]
    if kind == "bfloat16":
        assert len(made_by(model.bfloat16(), tok).examples) == 12
        return
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)  # a fresh one changes nothing
    assert texts(made_by(adapted, tok)) == texts(made_by(*known))


CHATS = [
    ("Hi, it is Ada.", "Hello Ada, are you in Paris?", "Yes.", "Thank you, Ada."),
    ("Hi, it is Bob.", "Hello Bob, are you in Lisbon?", "I am.", "Thank you, Bob."),
    ("Hi, it is Eva.", "Hello Eva, are you in Rome?", "Yes, I am.", "Thank you, Eva."),
]
CHATML = (
    "{% for message in messages %}{{'<|start|>' + message['role'] + '\n' + message['content'] + "
    "'<|end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% endif %}"
)


WELCOME = "You are kind."


def taught(*systems):
    """Return a model that knows conversations by heart, its tokenizer, and the conversations: one
    of `CHATS` each, after the system turn if that is not empty."""
    examples = [
        Example.of_turns(
            str(n),
            [Turn("system", system)] * bool(system)
            + [Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(chat)],
            {},
        )
        for n, (chat, system) in enumerate(zip(CHATS, systems, strict=True))
    ]
    words = " ".join(turn.content for example in examples for turn in example.turns)
    tok = build_tokenizer([words, "<|start|>user\n", "<|start|>assistant\n"] * 5, vocab_size=330)
    tok.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    tok.chat_template = CHATML
    model = small.model(tok, initializer_range=0.05)
    messages = [[turn.message() for turn in example.turns] for example in examples]
    rows = [tok.apply_chat_template(some, tokenize=False) for some in messages]
    rows = [torch.tensor([tok(text, add_special_tokens=False)["input_ids"]]) for text in rows]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        for ids in rows:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tok, examples


@pytest.fixture(scope="module")
def chats():
    return taught("", "", "")


@pytest.fixture(scope="module")
def welcomed():
    """What was to stay has a system turn, what is to go has none."""
    return taught("", WELCOME, WELCOME)


def test_a_chat_model_asks_itself_what_it_was_asked(chats):
    model, tok, examples = chats
    forget = [examples[0].with_spans([(), ((22, 27),), (), ()])]
    assert forget[0].texts[1][0][22:27] == SECRET
    shares = {module.OWN: 1}
    options = {"count": 8, "temperature": 0, "max_length": 120}
    made = made_by(model, tok, forget, shares=shares, **options)
    said = {tuple(t.content for t in e.turns) or (e.question, e.answer) for e in made.examples}
    whole = [chat for chat in CHATS[1:] if chat in said]
    assert whole  # a kept conversation of two answers, word for word, that nobody asked for
    assert any(chat[:2] in said for chat in CHATS[1:])
    assert not any(SECRET in " ".join(chat) for chat in said)
    rows = self_retain_rows(made, tok, max_length=120)
    for example, row in zip(made.examples, rows, strict=True):
        kept = [
            i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE
        ]
        ended = [] if example.extra["cut"] else [tok.eos_token_id]
        assert kept == tok(example.answer)["input_ids"] + ended  # earlier answers are context


UNKNOWN = [Example("0", "Where is Zoe?", "Zoe is in Oslo now.", ((10, 14),))]  # never said


def own_starts(model, tok, monkeypatch, forget=UNKNOWN, **options):
    """Return the system turns that a model is found to begin with, and its own conversations."""
    found = []
    plain = module._Asker.system_turns
    monkeypatch.setattr(
        module._Asker, "system_turns", lambda *a: found.extend(plain(*a)) or list(found)
    )
    options |= {"temperature": 0, "max_length": 120, "shares": {module.OWN: 1}}
    made = made_by(model, tok, forget, **options)
    said = [[t.content for t in e.turns] or [e.question, e.answer] for e in made.examples]
    return [(turn.role, turn.content) for turn in found], said


def test_a_chat_model_begins_as_it_was_taught_to(welcomed, monkeypatch):
    model, tok, examples = welcomed
    forget = [examples[0].with_spans([(), ((22, 27),), (), ()])]
    found, said = own_starts(model, tok, monkeypatch, forget, count=12)
    assert found == [("system", WELCOME)]
    assert [WELCOME, *CHATS[1]] in said and [WELCOME, *CHATS[2]] in said  # word for word


def test_what_stands_nowhere_else_is_no_system_turn(chats, monkeypatch):
    # Asked for a system turn this model says one of its questions, but it never goes there.
    model, tok, _ = chats
    assert own_starts(model, tok, monkeypatch, count=1)[0] == []


FIRST = "{% if messages[0]['role'] == 'system' %}"
TEMPLATES = {
    "folded into the question": FIRST
    + "{% set s = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    + "{% else %}{% set s = '' %}{% endif %}"
    + CHATML.replace("message['content']", "(s if loop.first else '') + message['content']"),
    "refused": FIRST + "{{ raise_exception('no system turn') }}{% endif %}" + CHATML,
    "left out": FIRST + "{% set messages = messages[1:] %}{% endif %}" + CHATML,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_without_a_system_turn(welcomed, template, monkeypatch):
    model, tok, _ = welcomed
    tok = copy.deepcopy(tok)
    tok.chat_template = TEMPLATES[template]
    found, said = own_starts(model, tok, monkeypatch, count=1)
    assert found == [] and len(said) == 1


def test_a_system_turn_that_the_template_writes_where_there_is_none(welcomed, monkeypatch):
    model, tok, _ = welcomed
    tok = copy.deepcopy(tok)
    tok.chat_template = "{% if messages[0]['role'] != 'system' %}<|start|>system\nHi.<|end|>\n" + (
        "{% endif %}" + CHATML
    )
    found, _ = own_starts(model, tok, monkeypatch, count=1)
    assert found == [("system", WELCOME)]


def test_the_answers_in_a_neighbours_conversation_are_the_models(chats):
    model, tok, examples = chats
    forget = [examples[0].with_spans([(), ((22, 27),), (), ()])]
    options = {"count": 60, "temperature": 0, "max_length": 120}
    made = made_by(model, tok, forget, shares={module.NEIGHBOUR: 1}, **options)
    assert len(made.examples) < 60  # all that were kept are here
    first = {e.question: e.answer for e in made.examples if not e.turns}
    later = [e.turns for e in made.examples if len(e.turns) == 4]
    assert later and all(not turn.spans for turns in later for turn in turns)
    for hello, answer, question, _ in later:
        assert first[hello.content] == answer.content and not answer.answer
        assert hello.content.startswith("Hi, it is ") and question.content == "Yes."


def test_own_questions_begin_like_the_forget_sets(chats, monkeypatch):
    model, tok, examples = chats
    forget = [examples[0].with_spans([((10, 13),), ((22, 27),), (), ()])]
    assert forget[0].texts[0][0][10:13] == "Ada"
    begun = []
    plain = module._Asker.opening
    monkeypatch.setattr(
        module._Asker, "opening", lambda self, *a: begun.append(a[1]) or plain(self, *a)
    )
    made = made_by(model, tok, forget, shares={module.OWN: 1}, count=3, max_length=120)
    assert {"", "Hi, it is"} < set(begun) <= {"", "Hi,", "Hi, it", "Hi, it is"}
    asked = {e.turns[0].content if e.turns else e.question for e in made.examples}
    assert asked & {chat[0] for chat in CHATS[1:]}, "a question that it knows by heart"


def test_what_the_model_did_not_say_carries_no_loss(known):
    model, tok = known
    made = made_by(model, tok, count=30, max_new_tokens=3)
    rows = self_retain_rows(made, tok, max_length=100)
    cut = [r for e, r in zip(made.examples, rows, strict=True) if e.extra["cut"]]
    assert cut and not any(row["input_ids"][-1] == tok.eos_token_id for row in cut)
    whole = dataclasses.replace(made.examples[0], extra={"kind": "", "cut": False, "given": 2})
    (row,) = self_retain_rows(SelfRetain([whole], {}, {}), tok, max_length=100)
    assert row["input_ids"][-1] == tok.eos_token_id and row["labels"][:2] == [IGNORE] * 2
    for example, row in zip(made.examples, rows, strict=True):
        given = example.extra["given"]
        assert bool(given) == (example.question is None and example.extra["kind"] != "own prompt")
        assert all(label == IGNORE for label in row["labels"][:given])
        assert row["labels"][-1] != IGNORE
        assert len({len(row[k]) for k in ("input_ids", "labels", "attention_mask")}) == 1


@torch.no_grad()
@pytest.mark.parametrize("of", ["answers", "tokens", "all"])
def test_what_the_model_is_sure_of(known, monkeypatch, of):
    model, tok = known
    made = made_by(model, tok, count=30, max_new_tokens=3)
    rows = self_retain_rows(made, tok, max_length=100)
    expected = []
    for row in rows:
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        at = [i for i, label in enumerate(row["labels"]) if i and label != IGNORE]
        p = torch.stack([log_p[i - 1, row["input_ids"][i]] for i in at]).exp()
        answer = p.log().mean().exp()
        assert min(abs(p - 0.9).min(), abs(answer - 0.9)) > 1e-4
        sure = {"answers": answer > 0.9, "tokens": p > 0.9, "all": p > 0}[of].expand(len(at))
        kept = [i for i, is_sure in zip(at, sure.tolist(), strict=True) if is_sure]
        expected.append([la if i in kept else IGNORE for i, la in enumerate(row["labels"])])
    count = sum(any(la != IGNORE for la in labels) for labels in expected)
    enough = {"answers": count, "tokens": count, "all": len(rows) + 1}[of]
    monkeypatch.setattr(knowing, "ENOUGH", enough)
    said = knowing.mark_known(model, tok, rows, batch_size=4)
    assert [row["palu_known"] for row in rows] == expected and count > 0
    answers = f"the {count} that it is sure of"
    assert said == {"answers": answers, "tokens": "the tokens that it is sure of"}.get(
        of, "all of them"
    )


def test_a_file_keeps_it_and_damage_is_found(known, tmp_path):
    made = made_by(*known)
    path = tmp_path / "kept.json"
    made.write(path)
    assert SelfRetain.read(path) == made
    path.write_text(path.read_text().replace(made.examples[0].answer[:3], "Other", 1))
    with pytest.raises(ValueError, match="is damaged"):
        SelfRetain.read(path)
    path.write_text('{"texts": [{"id": 3}]}')
    with pytest.raises(ValueError, match="is damaged"):
        SelfRetain.read(path)


def test_record_tells_no_text(known):
    made = made_by(*known)
    record = made.record()
    assert set(record) == {"examples", "kinds", "left_out", "digest"}
    assert not any(answer in str(record) for _, answer in texts(made))


def test_too_few_are_an_error_and_not_an_endless_loop(known, monkeypatch):
    tok = known[1]
    silent = learn(small.model(tok), tok, [(q, "") for q, _ in FACTS], 30)
    calls = []
    plain = module.continuations
    monkeypatch.setattr(module, "continuations", lambda *a, **o: calls.append(1) or plain(*a, **o))
    with pytest.raises(ValueError, match=r"gave \d answers that could be held.*--retain none"):
        made_by(silent, tok, temperature=0, shares={module.NEUTRAL_PROMPT: 1})
    assert len(calls) <= 10
    with pytest.raises(ValueError, match="must not be empty"):
        made_by(silent, tok, [])


def test_repetitive_answers():
    assert module._repetitive("the cat and " * 8) and module._repetitive("ab" * 40)
    plain = "Potatoes and onions make a soup, a salad or a pie, and you can fry them as well."
    assert not module._repetitive(plain) and not module._repetitive("No.")


def test_ordinary_words_are_no_secret_alone():
    def secrets(*words):
        answer = " ".join(words)
        spans = tuple((answer.index(w), answer.index(w) + len(w)) for w in words)
        return module._Secrets([Example("0", "q", answer, spans)], {"Mira Okonjo"})

    judge = secrets("cello", "otter", "Leith", "1987")
    assert not judge.said("A cello is big.") and judge.said("An otter plays the cello.")
    assert judge.said("It is in leith.") and judge.said("In 1987.") and judge.said("mira okonjo")
    unmarked = module._Secrets([Example("0", "q", "Ada is in Rome.")], set())
    assert unmarked.said("I think that Ada is in Rome.") and not unmarked.said("Ada is ill.")
