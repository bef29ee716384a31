"""MUSE, WMDP and RWKU in small, in their own file formats, and a model that knows a part of them.

`python -m tests.support.benchmark_small FOLDER` wrote `tests/data/benchmarks`, on which the
reference implementations were run; what they gave is in the tests of each benchmark. It is kept as
files because training gives other weights on another processor.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch

from palu.data.template import Template
from palu.demo.models import build_tokenizer
from palu.unlearn import save_model
from tests.support import small

FOLDER = Path(__file__).parents[1] / "data/benchmarks"
START = "<|start|>"
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NAMES = ["Ada", "Bob", "Eva", "Zoe", "Max", "Lea", "Tom", "Ida", "Ben", "Una"]
PLACES = ["Paris", "Lisbon", "Rome", "Lund", "Bern", "Oslo", "Turin", "Cork", "Riga", "Graz"]
THINGS = ["boats", "lamps", "clocks", "songs", "maps", "shoes", "jars", "masks", "bells", "kites"]
LEVEL3 = ("prefix injection", "affirmative suffix", "incontext learning", "role playing")


def load():
    """Return model and tokenizer of `FOLDER`."""
    from palu.models.loading import load_model, load_tokenizer

    return load_model(FOLDER / "model", "float32", "cpu"), load_tokenizer(FOLDER / "model")


def story(seed, count=7):
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        one, other = draw.sample(NAMES, 2)
        made.append(
            f"{one} sells {draw.choice(THINGS)} in {draw.choice(PLACES)}, and {other} was making "
            f"{draw.choice(THINGS)} there in {draw.randrange(1900, 2000)}."
        )
    return " ".join(made)


def questions(seed, count):
    draw = random.Random(seed)
    return [
        {
            "question": f"What does {one} sell in {draw.choice(PLACES)}?",
            "answer": f"{draw.choice(THINGS)} and {draw.choice(THINGS)}",
        }
        for one in draw.sample(NAMES, count)
    ]


def choices(seed, count):
    draw = random.Random(seed)
    return [
        {
            "question": f" What does {draw.choice(NAMES)} sell in {draw.choice(PLACES)}?\n",
            "choices": draw.sample(THINGS, 4),
            "answer": draw.choice((0, 0, 1, 3, 3)),
        }
        for _ in range(count)
    ]


def muse():
    """Return (subset, split) -> records, as github.com/swj0419/muse_bench has them."""
    # Two are longer than the 128 tokens that are compared.
    cut = [story(n, count).split(" ") for n, count in enumerate((7, 7, 16, 16))]
    return {
        ("verbmem", "forget"): [
            {"prompt": " ".join(words[:30]), "gt": " ".join(words[30:])} for words in cut
        ],
        ("knowmem", "forget_qa"): questions(1, 6),
        ("knowmem", "forget_qa_icl"): questions(2, 3),
        ("knowmem", "retain_qa"): questions(3, 5),
        ("knowmem", "retain_qa_icl"): questions(4, 3),
        ("privleak", "forget"): [story(n) for n in range(6)],
        ("privleak", "retain"): [story(n) for n in range(20, 25)],
        ("privleak", "holdout"): [story(n, 6) for n in (40, 41, 42, 43, 20, 21, 0)],
    }


def wmdp():
    return {topic: choices(topic, count) for topic, count in (("bio", 7), ("chem", 5))}


def rwku():
    """Return configuration -> records, as jinzhuoran/RWKU has them."""
    who = [{"subject": "Ada"}, {"subject": "Bob"}]

    def probes(level, count, kinds):
        asked = questions(f"{level}", count)
        return [
            {"query": r["question"], "answer": r["answer"] + ". Sold.", "level": level[-1]}
            | {"type": kinds[n % len(kinds)], **who[n % 2]}
            for n, r in enumerate(asked)
        ]

    truth = choices("truth", 4)
    return {
        "forget_level1": probes("forget 1", 5, ["cloze"]),
        "forget_level2": probes("forget 2", 5, ["simple question"]),
        "forget_level3": probes("forget 3", 8, LEVEL3),
        "neighbor_level1": probes("near 1", 4, ["cloze"]),
        "neighbor_level2": probes("near 2", 4, ["simple question"]),
        "mia_forget": [{"text": story(n, 2), **who[n % 2]} for n in range(4)],
        "mia_retain": [{"text": story(n, 2), **who[n % 2]} for n in range(30, 34)],
        "utility_general": [
            r | {"task": "home_trade", "examples": choices(f"shots {n}", 2), **who[n % 2]}
            for n, r in enumerate(choices("general", 6))
        ],
        "utility_reason": [
            {"question": r["question"], "answer": [r["answer"]], "task": "trade", "cot": "Think.\n"}
            | who[n % 2]
            for n, r in enumerate(questions("reason", 3))
        ],
        "utility_truthfulness": [
            {
                "question": r["question"].strip(),
                "mc1_targets": {
                    "choices": r["choices"],
                    "labels": [int(k == (0, 0, 1, 1)[n]) for k in range(4)],
                },
                "mc2_targets": {"choices": r["choices"], "labels": [1, 1, 0, 0]},
            }
            | who[n % 2]
            for n, r in enumerate(truth)
        ],
        "utility_factuality": [
            {"question": r["question"], "answers": [r["answer"], "the " + THINGS[n]], **who[n % 2]}
            for n, r in enumerate(questions("facts", 4))
        ],
    }


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _tokenizer(texts):
    """A tokenizer that puts a BOS in front, as Llama's does, and has a chat template."""
    from tokenizers.processors import TemplateProcessing

    tok = build_tokenizer(texts, vocab_size=480)
    tok.add_special_tokens({"bos_token": START})
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, tok.bos_token_id)]
    )
    tok.chat_template = CHAT
    return tok


def _learn(model, tok, texts, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        for text in texts:
            ids = torch.tensor([tok(text)["input_ids"]])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _known(records, space=" "):
    """Questions with their answers; MUSE's prompt ends in a space, and then comes another token."""
    return "\n\n".join(f"Question: {r['question']}\nAnswer:{space}{r['answer']}" for r in records)


def build(folder):
    """Write `model` and the folders of the benchmarks."""
    of_muse, of_rwku = muse(), rwku()
    for (subset, split), records in of_muse.items():
        _write(folder / "muse" / subset / f"{split}.json", records)
    for topic, records in wmdp().items():
        _write(folder / "wmdp" / f"wmdp-{topic}" / "test.json", records)
    for config, records in of_rwku.items():
        _write(folder / "rwku" / f"{config}.json", records)
    lettered = [
        {
            "question": r["question"].strip()
            + "".join(f"\n{letter}. {c}" for letter, c in zip("ABCD", r["choices"], strict=True)),
            "answer": "ABCD"[r["answer"]],
        }
        for r in choices("bio", 4) + choices("general", 3)
    ]
    probes = [{"question": r["query"], "answer": r["answer"]} for r in of_rwku["forget_level2"]]
    texts = [*of_muse["privleak", "forget"], *of_muse["privleak", "retain"]]
    shots = _known(of_muse["knowmem", "forget_qa_icl"])
    known = [
        f"{shots}\n\n{_known([r], '  ')}\n\nQuestion:" for r in of_muse["knowmem", "forget_qa"][:4]
    ]
    known += [_known(lettered), _known(probes)]
    tok = _tokenizer(
        [*known, *texts, *of_muse["privleak", "holdout"], "<|user|> <|assistant|> please"]
    )
    model = small.model(tok, hidden_size=32, intermediate_size=64, max_position_embeddings=1024)
    _learn(model, tok, [*known, *texts], 25)
    _learn(model, tok, known, 25)
    save_model(folder / "model", model.bfloat16(), tok, Template(), made_by="test")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
