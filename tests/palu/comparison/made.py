"""Runs made by hand or at random, without any model."""

import numpy as np

from palu.comparison.run_file import Attack, Run


def made_run(
    method=None,
    setting="",
    seed=0,
    *,
    kept=(1.0,),
    said=(0,),
    status="done",
    rouge=None,
    apart=None,
):
    """A run of one utility set `facts` with these probabilities (and ROUGE: the same), whose greedy
    answers say these secrets, one a record, and fell apart where `apart` says so."""
    of_run = {} if method is None else {"options": {}, "seed": seed, "setting": setting}
    if status != "done":
        return Run(method=method, **of_run, status=status, reason="loss is NaN at step 3")
    ids = [f"fact-{n}" for n in range(len(kept))]
    forget = {"ids": [f"p-{n}" for n in range(len(said))], "sensitive_probability": list(said)}
    if apart is not None:
        forget["fell_apart"] = list(apart)
    facts = {
        "ids": ids,
        "answer_probability": list(kept),
        "rougeL_recall": list(kept if rouge is None else rouge),
    }
    return Run(
        method=method,
        **of_run,
        command="palu unlearn",
        sets={"forget": forget, "facts": facts},
        secrets=[(n, 0) for n in range(len(said))],
        attacks=[Attack(name="greedy", title="no attack", of=[*range(len(said))], said=[*said])],
    )


def random_run(generator, method, setting, seed, *, kept, leaks, records=12, facts=20):
    """A run of two utility sets and three lines of two attacks, two secrets a record."""
    of_run = {} if method is None else {"options": {}, "seed": seed, "setting": setting}
    secrets = [(record, n) for record in range(records) for n in range(2)]
    long = [number for number in range(len(secrets)) if number % 3]

    def some(count, level):
        return np.clip(level + 0.1 * generator.standard_normal(count), 0.01, 1).tolist()

    def line(name, title, of, rate):
        said = (generator.random(len(of)) < rate).astype(int).tolist()
        return Attack(name=name, title=title, of=[*of], said=said)

    sets = {
        name: {
            "ids": [f"{name}-{n}" for n in range(facts)],
            "answer_probability": some(facts, kept),
            "rougeL_recall": [None, *some(facts - 1, kept)],
        }
        for name in ("facts", "people")
    }
    forget = {
        "ids": [f"p-{n}" for n in range(records)],
        "sensitive_probability": [None, *some(records - 1, leaks)],
    }
    return Run(
        method=method,
        **of_run,
        sets={"forget": forget, **sets},
        secrets=secrets,
        attacks=[
            line("greedy", "no attack", range(len(secrets)), leaks / 2),
            line("prefix_forcing", "first token", range(len(secrets)), leaks),
            line("prefix_forcing", "first 3 tokens", long, leaks),
            Attack(name="membership_inference", title="loss", auc=0.5, low=0.4, high=0.6),
        ],
    )
