"""`benchmarks.quality.contrast`: agreement and likelihood against counts and sums by hand."""

import itertools

import pytest
import torch

from benchmarks.quality.contrast import _log_likelihood, score
from palu.data.records import Example


def test_agreement_is_counted_in_characters_of_all_answers():
    examples = [
        Example("0", "q", "0123456789", ((0, 4),)),
        Example("1", "q", "0123456789", ((5, 6), (8, 10))),
    ]
    found = [[(2, 6)], [(8, 10)]]
    precision, recall, f1 = score(examples, lambda row, _: found[row], range(2))
    assert (precision, recall) == (4 / 6, 4 / 7)
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert score(examples, lambda *_: [], range(2)) == (0, 0, 0)
    assert score(examples, lambda row, _: found[row], range(1)) == (0.5, 0.5, 0.5)


def test_likelihood_is_that_of_all_assignments():
    scores = [torch.tensor([0.5, -1.0, 2.0]), torch.tensor([-0.3]), torch.tensor([1.0, 0.2])]
    states = [torch.tensor([1.0, 0, 1]), torch.tensor([1.0]), torch.tensor([1.0, 1])]
    gaps = [torch.tensor([0, 1]), torch.tensor([], dtype=torch.long), torch.tensor([1])]
    bonds = torch.tensor([0.7, -0.4])

    def weight(chain, chosen):
        total = sum(s * x for s, x in zip(scores[chain].tolist(), chosen, strict=True))
        pairs = zip(gaps[chain].tolist(), itertools.pairwise(chosen), strict=True)
        return total + sum(bonds[gap].item() * a * b for gap, (a, b) in pairs)

    want = 0.0
    for chain, state in enumerate(states):
        every = itertools.product((0, 1), repeat=len(state))
        total = torch.tensor([weight(chain, chosen) for chosen in every]).logsumexp(0)
        want += weight(chain, state.int().tolist()) - total.item()
    assert _log_likelihood(scores, states, gaps, bonds).item() == pytest.approx(want, abs=1e-5)
