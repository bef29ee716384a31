"""Make a world of the demo's people in which unlearning can do harm, for `palu compare`.

    python -m benchmarks.quality.hard_people --seed 0 --output people-0

Writes a folder with two models and the files of a comparison (`palu compare`, or `palu unlearn`,
`evaluate` and `attack` by hand):

    original/, retrained/   the model that knows everything below, and one that was never taught
                            forget.jsonl
    forget.jsonl            6 people to forget; `paraphrased_question`: in wordings no model saw
    retain.jsonl            10 others: all that unlearning is given to keep
    neighbours.jsonl        12 people who share town and craft, or teacher and instrument, with one
                            to forget                                       utility, never given
    others.jsonl            14 people who share nothing in particular       utility, never given
    paraphrases.jsonl       retain.jsonl's questions in wordings that no model saw   utility
    general.jsonl           capitals of invented countries, sums, days, colours      utility
    holdout.jsonl           6 people whom no model knows: for membership inference
    world.json              what both models know of each file

Each question is taught in four wordings (facts in three), so that one of another kind is
understood. The models are the demo's. It takes two minutes of one core; the exit status is 1 where
the original does not know its files (answer probability above 0.95; of wordings it never saw above
0.5).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from palu.data.collator import Collator
from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.data.template import Template
from palu.demo.models import build_model, build_tokenizer, finetune
from palu.demo.people import Person, invent_people, records, write_jsonl
from palu.evaluation import evaluate_examples, metrics_table
from palu.progress import bar
from palu.storage.files import write_json
from palu.terminal import bars, out
from palu.unlearn import save_model

GROUPS = {"forget": 6, "retain": 10, "neighbours": 12, "others": 14, "holdout": 6}
UTILITY = ("neighbours", "others", "paraphrases", "general")
SHARED = (("town", "craft"), ("teacher", "instrument"))  # of neighbours, in turn
KNOWN, UNDERSTOOD = 0.95, 0.5
STEPS, BATCH_SIZE, LEARNING_RATE = 500, 32, 3e-3
MAX_LENGTH = 96
VOCABULARY = 800  # so few that secrets have 2 to 11 tokens, and prefixes of them can be told apart
TEMPLATE = Template()
_DATA = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
Rows = list[dict[str, Any]]


def invent(seed: int) -> dict[str, list[Person]]:
    """Return the people of each group."""
    left = invent_people(sum(GROUPS.values()), seed)
    groups = {}
    for name, count in GROUPS.items():
        groups[name], left = left[:count], left[count:]
    forget = groups["forget"]
    for number, person in enumerate(groups["neighbours"]):
        other = forget[number // len(SHARED) % len(forget)]
        shared = {fact: getattr(other, fact) for fact in SHARED[number % len(SHARED)]}
        groups["neighbours"][number] = replace(person, **shared)
    return groups


def people_rows(people: Sequence[Person]) -> tuple[Rows, Rows]:
    """Return the people's records, each with the wordings of its question that nobody is taught,
    and the same records in the other wordings that are taught."""
    rows, more, kinds = records(people), [], len(_DATA["phrasings"])
    for number, row in enumerate(rows):
        name, wordings = people[number // kinds].name, _DATA["phrasings"][number % kinds]
        row["paraphrased_question"] = [text.format(name=name) for text in wordings["held_out"]]
        for n, text in enumerate(wordings["taught"]):
            more.append({**row, "id": f"{row['id']}-t{n}", "question": text.format(name=name)})
    return rows, more


def held_out(rows: Rows) -> Rows:
    """Return records asked in the wordings that nobody is taught."""
    return [
        {**row, "id": f"{row['id']}-{n}", "question": text}
        for row in rows
        for n, text in enumerate(row["paraphrased_question"])
    ]


def general_rows() -> tuple[Rows, Rows]:
    """Return facts that belong to nobody, and the same in other wordings that are taught."""
    groups = dict(_DATA["general"])
    sums = [[f"{a} plus {b}", str(a + b)] for a in range(1, 8) for b in range(a, 8)]
    groups["sum"] = {
        "questions": ["What is {0}?", "How much is {0}?", "Tell me the sum of {0}."],
        "answer": "The sum of {0} is [1].",
        "facts": sums,
    }
    rows, more = [], []
    for kind, texts in groups.items():
        for subject, fact in texts["facts"]:
            before, after = texts["answer"].format(subject).split("[1]")
            spans = [{"start": len(before), "end": len(before) + len(fact)}]
            row = {"id": f"{kind}-{subject}".replace(" ", "-")}
            row |= {"answer": f"{before}{fact}{after}", "spans": spans}
            first, *others = (text.format(subject) for text in texts["questions"])
            rows.append({**row, "question": first})
            for n, text in enumerate(others):
                more.append({**row, "id": f"{row['id']}-t{n}", "question": text})
    return rows, more


def write_files(folder: Path, seed: int) -> dict[str, Rows]:
    """Write the files and return what the original is taught, by file, in all taught wordings."""
    taught, groups = {}, invent(seed)
    for name, people in groups.items():
        rows, more = people_rows(people)
        write_jsonl(folder / f"{name}.jsonl", rows)
        taught[name] = rows + more
        if name == "retain":
            write_jsonl(folder / "paraphrases.jsonl", held_out(rows))
    rows, more = general_rows()
    write_jsonl(folder / "general.jsonl", rows)
    taught["general"] = rows + more
    del taught["holdout"]
    return taught


def learn(rows: Rows, tokenizer: Any, title: str, given: argparse.Namespace) -> Any:
    """Return a model that was trained on the answers until it knew them by heart."""
    examples = load_examples(rows, require_spans=True)
    rows = tokenize_examples(examples, tokenizer, max_length=MAX_LENGTH, template=TEMPLATE)
    model, collate = build_model(tokenizer, given.seed), Collator(tokenizer)
    with bar(bars, title) as report:
        finetune(
            model,
            lambda chosen: collate([rows[i] for i in chosen]),
            len(rows),
            steps=given.steps,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            seed=given.seed,
            on_step=lambda done, total, loss: report(done, total, f"loss {loss:.3f}"),
        )
    return model


def measure(folder: Path, model: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Return the results of `evaluate_examples` on each file, and on the forget file in wordings
    that nobody is taught (`forget, other wordings`)."""
    sets = {name: folder / f"{name}.jsonl" for name in ("forget", "retain", *UTILITY)}
    found = {}
    for name, path in sets.items():
        examples = load_examples(path, require_spans=True)
        found[name] = _evaluate(model, tokenizer, examples)
        if name == "forget":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            examples = load_examples(held_out(rows), require_spans=True)
            found["forget, other wordings"] = _evaluate(model, tokenizer, examples)
    return found


def _evaluate(model: Any, tokenizer: Any, examples: Sequence[Any]) -> dict[str, Any]:
    how = {"template": TEMPLATE, "max_length": MAX_LENGTH, "batch_size": 64, "max_new_tokens": 40}
    return evaluate_examples(model, tokenizer, examples, **how)


def unknown(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each file that the original does not know well enough."""
    lines = []
    for name, result in found.items():
        bound = UNDERSTOOD if name in ("paraphrases", "forget, other wordings") else KNOWN
        known = result["mean"]["answer_probability"]
        if known <= bound:
            lines.append(f"{name}: answer probability {known:.3f}, not above {bound}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.hard_people", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="an empty folder, or none yet")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training each model")
    given = parser.parse_args(arguments)
    if given.output.exists() and any(given.output.iterdir()):
        parser.error(f"--output {given.output} is not empty")
    given.output.mkdir(parents=True, exist_ok=True)
    taught = write_files(given.output, given.seed)
    texts = [
        f"{TEMPLATE.question.format(question=row['question'])} {row['answer']}"
        for rows in taught.values()
        for row in rows
    ]
    tokenizer = build_tokenizer(texts, vocab_size=VOCABULARY)
    known = {}
    for name in ("original", "retrained"):
        sets = [one for one in taught if name == "original" or one != "forget"]
        rows = [row for one in sets for row in taught[one]]
        model = learn(rows, tokenizer, f"Learning ({name})", given)
        made_by = "python -m benchmarks.quality.hard_people"
        save_model(
            given.output / name, model, tokenizer, TEMPLATE, made_by=made_by, seed=given.seed
        )
        known[name] = measure(given.output, model, tokenizer)
    means = {n: {data: r["mean"] for data, r in sets.items()} for n, sets in known.items()}
    write_json(given.output / "world.json", {"seed": given.seed, "steps": given.steps} | means)
    lines = [(name, data, known[name][data]) for data in known["original"] for name in known]
    out.print(metrics_table("What each model knows", lines))
    missing = unknown(known["original"])
    for line in missing:
        print(f"the original does not know {line}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
