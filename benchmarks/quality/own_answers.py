"""Do a model's own answers tell what a run without a retain file has harmed?

    python -m benchmarks.quality.own_answers --name people-0 --original palu-demo/original \\
        --unlearned runs/people-0-nothing-0 --forget palu-demo/forget.jsonl \\
        --retain palu-demo/retain.jsonl --seed 0 --output rows.csv

The original answers anew as it did before training (`--retain self`; the seed is the run's). Of the
`answers` that it gave at least so much probability, `least`, or of the `tokens` in all of them,
`own_kept` is the share of the answers' probability that is left. `retain_kept` is that of the
retain file, which the run never saw.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine, tables
from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.models.loading import load_model, load_tokenizer
from palu.run_record import choose_template
from palu.training.known import token_losses
from palu.training.self_retain import self_retain, self_retain_rows

LEAST = (0.0, 0.5, 0.7, 0.8, 0.9, 0.97)
COLUMNS = ("testbed", "model", "seed", "of", "least", "answers", "own_before", "own_kept")
COLUMNS += ("retain_kept", *tables.ENVIRONMENT)


Losses = Sequence[np.ndarray]


def kept(before: Losses, after: Losses, least: float, of: str) -> tuple[int, float, float]:
    """Return how many answers are measured, their mean probability before, and the share left."""
    pairs = []
    for old, new in zip(before, after, strict=True):
        sure = np.exp(-old) >= least if of == "tokens" else np.exp(-old.mean()) >= least
        sure = np.broadcast_to(sure, old.shape)
        if sure.any():
            pairs.append((np.exp(-old[sure].mean()), np.exp(-new[sure].mean())))
    if not pairs:
        return 0, math.nan, math.nan
    was, now = np.mean(pairs, axis=0).tolist()
    return len(pairs), was, now / was


def rows_of(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row of each unlearned model, kind and least probability."""
    tokenizer, template = load_tokenizer(given.original), choose_template(given.original)
    how = {"template": template, "max_length": 512}
    model = load_model(given.original, device="cpu")
    forget = load_examples(given.forget, require_spans=False)
    # As `palu unlearn` asks with its default batch size.
    made = self_retain(model, tokenizer, forget, batch_size=32, seed=given.seed, **how)
    own = self_retain_rows(made, tokenizer, **how)
    real = tokenize_examples(load_examples(given.retain, require_spans=False), tokenizer, **how)

    def losses(model: Any) -> list[Losses]:
        return [token_losses(model, tokenizer, rows) for rows in (own, real)]

    where = machine.environment(torch.device("cpu")) | {"commit": machine.commit()}
    before, found = losses(model), []
    for folder in given.unlearned:
        after = losses(load_model(folder, device="cpu"))
        retained = kept(before[1], after[1], 0.0, "answers")[2]
        for of, least in itertools.product(("answers", "tokens"), LEAST):
            row = {"testbed": given.name, "model": folder.name, "seed": given.seed}
            measured = kept(before[0], after[0], least, of)
            row |= zip(COLUMNS[3:8], (of, least, *measured), strict=True)
            found.append(row | {"retain_kept": retained} | where)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the testbed, in the rows")
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--unlearned", type=Path, required=True, nargs="+")
    parser.add_argument("--forget", required=True)
    parser.add_argument("--retain", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="CSV, rows are added")
    given = parser.parse_args(arguments)
    tables.check_header(given.output, COLUMNS)
    rows = rows_of(given)
    tables.append(given.output, rows, COLUMNS)
    for row in rows:
        print(*(row[name] for name in COLUMNS[:9]), sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
