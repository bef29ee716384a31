"""Compare the spans of `palu annotate --contrast` with those that people marked, by characters.

    python -m benchmarks.quality.contrast read --model tofu-model --other smollm2 \\
        --data "tofu/annotated/forget10[120:280]" --words contrast.csv
    python -m benchmarks.quality.contrast curve --words contrast.csv \\
        --data "tofu/annotated/forget10[120:280]" --chosen 80 --output curve.csv
    python -m benchmarks.quality.contrast fit --data "tofu/annotated/forget10[:200]" \\
        --output palu/annotation/word_weights.json

`read` runs both models and writes the log-probability of each word. `curve` compares runs at many
thresholds, and baselines, with the spans of the data: on the first `--chosen` rows, on which a
threshold may be chosen, and on the rest. `fit` fits the weights of `palu.annotation.words`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from palu.annotation.contrast import SELF, Contrast, runs
from palu.annotation.words import cut, features_of, kinds_of_gaps, words
from palu.data.files import load_examples
from palu.data.records import Example
from palu.data.spans import Span
from palu.errors import UserError, user_errors
from palu.progress import bar
from palu.storage.files import write_json
from palu.terminal import bars, out, say

THRESHOLDS = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12]
WORD_COLUMNS = ("row", "start", "end", "model", "other")
CURVE_COLUMNS = ("spans", "threshold", "rows", "precision", "recall", "f1")
GAPS = ("joined", "parted")
LIKELY = -0.6  # log-odds; the best on rows 0 to 199 without a model

Finder = Callable[[int, Example], list[Span]]


def read(options: argparse.Namespace) -> None:
    """Write the log-probability of each word under both models."""
    with user_errors(), bar(bars, "Reading") as report:
        examples = load_examples(options.data, require_spans=True)
        contrast = Contrast(
            options.model, options.other, device=options.device, dtype=options.dtype, report=report
        )
        numbers = contrast.log_probabilities(examples)
    rows = []
    for row, (example, pair) in enumerate(zip(examples, numbers, strict=True)):
        for start, end in cut(example.answer):
            rows.append((row, start, end, *(f"{some[start:end].sum():.4f}" for some in pair)))
    _write(options.words, WORD_COLUMNS, rows)


def curve(options: argparse.Namespace) -> None:
    """Compare with the spans of the data, print a table and write its rows."""
    with user_errors():
        examples = load_examples(options.data, require_spans=True)
    pairs = [(np.zeros(len(e.answer)), np.zeros(len(e.answer))) for e in examples]
    for line in csv.DictReader(options.words.open(encoding="utf-8")):
        for values, name in zip(pairs[int(line["row"])], ("model", "other"), strict=True):
            values[int(line["start"])] = float(line[name])
    found = [
        runs(e.answer, e.question or "", *pair) for e, pair in zip(examples, pairs, strict=True)
    ]

    def above(threshold: float) -> Finder:
        return lambda row, _: [(start, end) for start, end, nats in found[row] if nats >= threshold]

    def ratio_alone(threshold: float) -> Finder:
        def spans(row: int, example: Example) -> list[Span]:
            ratio = pairs[row][0] - pairs[row][1]
            return [w for w in cut(example.answer) if ratio[w[0] : w[1]].sum() >= threshold]

        return spans

    finders = [(name, "", finder) for name, finder in BASELINES.items()]
    finders += [("words by ratio alone", t, ratio_alone(t)) for t in THRESHOLDS]
    finders += [("contrast", t, above(t)) for t in THRESHOLDS]
    sets = {"chosen": range(options.chosen), "rest": range(options.chosen, len(examples))}
    rows = [
        (name, threshold, which, *(f"{x:.4f}" for x in score(examples, finder, chosen)))
        for name, threshold, finder in finders
        for which, chosen in sets.items()
        if len(chosen)
    ]
    table = Table(*CURVE_COLUMNS)
    for row in rows:
        table.add_row(*map(str, row))
    out.print(table)
    if options.output is not None:
        _write(options.output, CURVE_COLUMNS, rows)


def score(
    examples: Sequence[Example], finder: Finder, rows: Sequence[int]
) -> tuple[float, float, float]:
    """Return precision, recall and F1 of characters over all answers together."""
    both = given = marked = 0
    for row in rows:
        wanted, got = (
            _mask(len(examples[row].answer), spans)
            for spans in (examples[row].spans, finder(row, examples[row]))
        )
        both, given, marked = both + (wanted & got).sum(), given + got.sum(), marked + wanted.sum()
    precision, recall = both / max(given, 1), both / max(marked, 1)
    return precision, recall, 2 * both / max(given + marked, 1)


def _mask(length: int, spans: Sequence[Span]) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    for start, end in spans:
        mask[start:end] = True
    return mask


def _unsaid(_: int, example: Example) -> list[Span]:
    said = {example.question[s:e].lower() for s, e in cut(example.question)}
    return [(s, e) for s, e in cut(example.answer) if example.answer[s:e].lower() not in said]


BASELINES: dict[str, Finder] = {
    "all": lambda _, e: [(0, len(e.answer))],
    "capitals and numbers": lambda _, e: [
        (start, end)
        for start, end in cut(e.answer)
        if (start and e.answer[start].isupper()) or e.answer[start].isdigit()
    ],
    "words not in the question": _unsaid,
    "words likely by form and place, no model": lambda _, e: [
        (start, end) for start, end, odds in words(e.answer, e.question or "") if odds >= LIKELY
    ],
}


def fit(options: argparse.Namespace) -> None:
    """Fit the weights of `palu.annotation.words` by maximum likelihood with an L2 penalty."""
    with user_errors():
        examples = load_examples(options.data, require_spans=True)
    texts = list(_labelled(examples))
    names = sorted({name for features, *_ in texts for word in features for name in word})
    stacked = torch.tensor(
        [[word.get(name, 0.0) for name in names] for features, *_ in texts for word in features]
    )
    scale = stacked.std(0).clamp(min=0.05)
    scale[names.index("bias")] = 1.0
    weights = torch.zeros(len(names), requires_grad=True)
    bonds = torch.zeros(len(GAPS), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bonds], max_iter=100, line_search_fn="strong_wolfe")
    sizes = [len(features) for features, *_ in texts]

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = (stacked / scale @ weights).split(sizes)
        penalty = options.l2 * (weights.square().sum() + bonds.square().sum())
        total = penalty - _log_likelihood(
            scores, [t[1] for t in texts], [t[2] for t in texts], bonds
        )
        total.backward()
        return total

    optimizer.step(loss)
    rounded = {
        name: round(value, 3)
        for name, value in zip(names, (weights / scale).tolist(), strict=True)
        if abs(value) >= 0.0005
    }
    bond = {kind: round(value, 3) for kind, value in zip(GAPS, bonds.tolist(), strict=True)}
    write_json(options.output, {"features": rounded, "bonds": bond})


def _labelled(examples: Sequence[Example]) -> Iterator[tuple[list[dict], Tensor, Tensor]]:
    """Yield of each answer with words their features, their states and the numbers of the gaps."""
    for example in examples:
        places, marked = cut(example.answer), _mask(len(example.answer), example.spans)
        if places:
            states = torch.tensor([marked[start:end].mean() > 0.5 for start, end in places])
            gaps = [GAPS.index(kind) for kind in kinds_of_gaps(example.answer, places)]
            features = features_of(example.answer, places, example.question or "")
            yield features, states.float(), torch.tensor(gaps, dtype=torch.long)


def _log_likelihood(
    scores: Sequence[Tensor], states: Sequence[Tensor], gaps: Sequence[Tensor], bonds: Tensor
) -> Tensor:
    """Return the log-likelihood of all chains, each of its own length, side by side."""
    pad = torch.nn.utils.rnn.pad_sequence
    score, state, gap = (pad(list(x), batch_first=True) for x in (scores, states, gaps))
    real = pad([torch.ones(len(x), dtype=torch.bool) for x in scores], batch_first=True)
    bond = bonds[gap] * real[:, 1:][:, : gap.shape[1]] if gap.numel() else bonds[gap]
    known = (score * state).sum() + (bond * state[:, 1:] * state[:, :-1]).sum()
    off, on = torch.zeros_like(score[:, 0]), score[:, 0]  # log-weights of both states so far
    for k in range(1, score.shape[1]):
        next_off = torch.logaddexp(off, on)
        next_on = torch.logaddexp(off, on + bond[:, k - 1]) + score[:, k]
        off = torch.where(real[:, k], next_off, off)
        on = torch.where(real[:, k], next_on, on)
    return known - torch.logaddexp(off, on).sum()


def _write(path: Path, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.contrast",
        description="Compare the spans of `palu annotate --contrast` with marked ones.",
    )
    actions = p.add_subparsers(dest="action", required=True)
    for name, action in {"read": read, "curve": curve, "fit": fit}.items():
        sub = actions.add_parser(name, help=action.__doc__)
        sub.set_defaults(run=action)
        sub.add_argument("--data", required=True, help="examples with spans; PATH[:200] slices")
        if name != "fit":
            sub.add_argument("--words", type=Path, required=True, help="CSV of the words")
        if name == "read":
            sub.add_argument("--model", type=Path, required=True, help="the model to be changed")
            sub.add_argument("--other", required=True, help=f"the base, or {SELF!r}")
            sub.add_argument("--dtype", default="auto")
            sub.add_argument("--device", default="auto")
        elif name == "curve":
            sub.add_argument("--chosen", type=int, default=200, help="rows to choose on")
            sub.add_argument("--output", type=Path, help="CSV of the curve")
        else:
            sub.add_argument("--l2", type=float, default=10.0, help="weight of the penalty")
            sub.add_argument("--output", type=Path, required=True, help="JSON of the weights")
    return p


def main() -> int:
    """Entry point: the exit status is 2 for a user's mistake."""
    options = parser().parse_args()
    try:
        options.run(options)
    except UserError as error:
        say("error", "red", str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
