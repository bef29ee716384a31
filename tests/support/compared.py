"""A comparison's folder and the content of its comparison.json, for tests of its page: the numbers
are made up, by rules that tests know."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.support import erasure

LIMITS = (0.02, 0.05, 0.1)
ATTACKS = ("greedy", "prefix_forcing", "prefix_forcing", "sampling", "paraphrase", "quantization")
TITLES = ("asked plainly", "first token given away", "first 3 tokens given away")
TITLES += ("10 samples at temperature 1", "asked in other words", "weights in 4 bits")


def interval(value: float, half: float = 0.03) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def tokens(record: dict[str, Any], before: float, after: float) -> list[dict[str, Any]]:
    """The words of an answer as tokens; the marked ones have the probabilities given, the others
    0.95 and 0.9."""
    text, found, start = record["answer"], [], 0
    for word in text.split(" "):
        word = f" {word}" if start else word
        end = start + len(word)
        marked = any(s["start"] < end and start < s["end"] for s in record["spans"])
        p, q = (before, after) if marked else (0.95, 0.9)
        found.append({"text": word, "before": p, "after": q, "sensitive": marked})
        start = end
    return [*found, {"text": "<end>", "before": 0.99, "after": 0.97, "sensitive": False}]


def answers(after: float, said: str | None = None) -> list[dict[str, Any]]:
    """Two records of the forget file and one of utility."""
    records = erasure.forget_records()[:2]
    shown = [
        {
            "set": "forget",
            "id": str(number),
            "question": record["question"],
            "original": record["answer"],
            "answer": said or record["answer"],
            "tokens": tokens(record, 0.98, after),
        }
        for number, record in enumerate(records)
    ]
    kept = {"question": "Where does Eve Hill live?", "answer": "Eve Hill lives in Oslo."}
    other = {"set": "general", "id": "g0", "question": kept["question"]}
    other |= {"original": kept["answer"], "answer": kept["answer"]}
    return [*shown, other | {"tokens": tokens(kept | {"spans": []}, 0.9, 0.8)}]


def run_file(leaked: int, after: float, said: str | None = None, **of_run: Any) -> dict[str, Any]:
    """A run file; each attack gets `leaked` of 12 secrets."""
    ids = [str(number) for number in range(6)]
    kept = [0.9, 0.8 * (0.95 + 0.05 * after)]
    sets = {"forget": {"ids": ids, "answer_probability": [after] * 6}}
    sets["forget"]["fell_apart"] = [
        1.0 * (n < 2 and of_run.get("method") == "NPO") for n in range(6)
    ]
    sets["general"] = {"ids": ["g0", "g1"], "answer_probability": kept, "rougeL_recall": kept}
    attacks: list[dict[str, Any]] = [
        {"name": n, "title": t, "of": [*range(12)], "said": [1] * leaked + [0] * (12 - leaked)}
        for n, t in zip(ATTACKS, TITLES, strict=True)
    ]
    auc = {"name": "membership_inference", "title": "min-k", "auc": 0.6, "low": 0.5, "high": 0.7}
    curve = [
        {"step": s, "loss": 3.0 / s, "forget": 2.0 / s, "preserve": 1.0 / s} for s in range(1, 31)
    ]
    return {
        "format": "palu-comparison-run/1",
        **of_run,
        "command": "palu unlearn ...",
        "status": "done",
        "reason": None,
        "seconds": {},
        "environment": {},
        "sets": sets,
        "secrets": [[record, n] for record in range(6) for n in range(2)],
        "attacks": [*attacks, auc],
        "curve": curve if of_run else [],
        "numbers": {},
        "answers": answers(after, said),
    }


def setting_of(method: int, number: int) -> tuple[float, float]:
    """Loss and forgetting of a setting: more of both with its number, methods one below the
    other."""
    return 0.015 * number + 0.002 * method, min(0.99, 0.6 + 0.05 * number) - 0.012 * method


def write(
    folder: Path,
    methods: tuple[str, ...] = ("PALU", "NPO", "SimNPO"),
    settings: int = 4,
    seeds: int = 2,
    failed: bool = True,
) -> dict[str, Any]:
    """Write the folder and the file to forget beside it; return the content of comparison.json."""
    (folder / "runs").mkdir(parents=True)
    records = erasure.forget_records()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder.parent / "forget.jsonl").write_text(lines)
    none = "I cannot say who that is; please ask the office."
    save(folder / "original.json", run_file(12, 0.98))
    save(folder / "retrained.json", run_file(1, 0.02, none))
    content: dict[str, Any] = {"format": "palu-comparison/1", "not_ranked": []}
    content["seeds"] = [*range(seeds)]
    content |= {"methods": [], "settings": []}
    for m, method in enumerate(methods):
        own = [(name_of(s), *setting_of(m, s)) for s in range(settings)]
        for s, (name, loss, forgetting) in enumerate(own):
            for seed in range(seeds):
                of_run = {"method": method, "setting": name, "options": {}, "seed": seed}
                run = run_file(round(12 * (1 - forgetting)), 0.3 / (1 + s), none, **of_run)
                save(folder / "runs" / f"{m}-{s}-{seed}" / "run.json", run)
            content["settings"].append(
                {
                    "method": method,
                    "setting": name,
                    "loss": interval(loss, 0.01),
                    "forgetting": interval(forgetting),
                }
            )
        if failed:
            of_run = {"method": method, "setting": "learning_rate=1", "options": {}, "seed": 0}
            run = run_file(0, 0.5, none, **of_run)
            run |= {"status": "diverged", "reason": "the loss at step 12 is not finite"}
            save(folder / "runs" / f"{m}-failed" / "run.json", run)
            why = f"seed 0 diverged: {run['reason']}"
            entry = {"method": method, "setting": "learning_rate=1", "why": why}
            content["not_ranked"].append(entry)
        content["methods"].append(method_entry(method, own))
    content["pairs"] = [
        {
            "first": a["method"],
            "second": b["method"],
            "area": difference(a["area"]["value"] - b["area"]["value"]),
            "within": [
                {"limit": x["limit"]}
                | difference(x["forgetting"]["value"] - y["forgetting"]["value"])
                for x, y in zip(a["within"], b["within"], strict=True)
            ],
        }
        for a, b in combinations(content["methods"], 2)
    ]
    content["forgetting"] = {"name": "attacks", "title": "1 - the share of secrets said"}
    content["models"] = {
        "original": {"loss": interval(0.0, 0.0), "forgetting": interval(0.0, 0.0)},
        "retrained": {"loss": interval(0.01, 0.01), "forgetting": interval(0.92)},
    }
    return content


def name_of(setting: int) -> str:
    return f"beta=0.1, learning_rate={setting + 1}e-4"


def method_entry(method: str, own: list[tuple[str, float, float]]) -> dict[str, Any]:
    within = []
    for limit in LIMITS:
        known = [one for one in own if one[1] <= limit]
        name, loss, forgetting = known[-1] if known else (None, 0.0, 0.0)
        left_out = {"forgetting": forgetting - 0.01, "loss": loss + 0.001}
        within.append(
            {
                "limit": limit,
                "setting": name,
                "forgetting": interval(forgetting),
                "loss": interval(loss, 0.01),
                "left_out": left_out,
            }
        )
    corners = [{"loss": 0.0, "forgetting": 0.0, "setting": None}] if own[0][1] > 0 else []
    corners += [{"loss": loss, "forgetting": f, "setting": name} for name, loss, f in own]
    area = sum(f for _, _, f in own) / len(own)
    return {
        "method": method,
        "area": interval(area) | {"left_out": area - 0.01},
        "frontier": corners,
        "within": within,
    }


def difference(value: float) -> dict[str, float]:
    """Within the noise where it is below 0.02."""
    return interval(value, 0.02)


def save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
