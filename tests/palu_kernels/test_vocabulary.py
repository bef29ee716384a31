"""A vocabulary spread over gloo processes gives what the whole head does.

Processes are started once (`workers/vocabulary.py`); the tests look at what they found.
"""

import json

import pytest
import torch

from palu_kernels import LMHead
from tests.support import WORKERS, ranks
from tests.support.once import once
from tests.support.workers import vocabulary

TWO = pytest.param((2, ""), id="2 processes")
SLOW = [
    pytest.param((ranks, what), id=f"{ranks} processes {what}", marks=pytest.mark.slow)
    for ranks, what in ((4, ""), (2, "wide"), (4, "wide"))
]


def start(folder, count, what):
    """What every rank found, of processes that are started here."""
    words = [[WORKERS / "vocabulary.py", folder, rank, count, what] for rank in range(count)]
    status, said = ranks.run([(one, {}) for one in words], folder, limit=1800 if what else 500)
    assert not any(status), "\n".join(text[-3000:] for text in said)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module", params=[TWO, *SLOW])
def found(request, tmp_path_factory):
    """What every rank found."""
    name = "vocabulary-{}{}".format(*request.param)
    return once(tmp_path_factory, name, lambda folder: start(folder, *request.param))[1]


def check(errors, at_least):
    bounds = {"float64": 1e-12, "bfloat16": 2**-6, "float32": 2e-6}
    assert len(errors) >= at_least
    apart = {
        name: error
        for name, error in errors.items()
        if not error <= next(bound for kind, bound in bounds.items() if kind in name)
    }
    assert not apart


def test_losses_and_gradients_are_those_of_the_whole_head(found):
    for rank in found:
        check(rank["grid"], 150)


def test_chunks_sums_masks_nan_half_precision_checkpoints_and_compile(found):
    for rank in found:
        check(rank["more"], 150)


@pytest.mark.slow
def test_by_kernels(tmp_path):
    for rank in start(tmp_path, 2, "kernels"):
        check(rank["kernels"], 30)


NAMED = {
    "softcap": "softcap: rank 0 has None, rank 1 has 30.0",
    "dtype": "dtype: rank 0 has 'torch.float32', rank 1 has 'torch.float64'",
    "hidden size": "hidden size: rank 0 has 24, rank 1 has 23",
    "bias": "bias: rank 0 has False, rank 1 has True",
    "gap": "are on no rank: rank 0 has [0, ",
    "overlap": "are on two ranks: rank 0 has [0, ",
    "start": "rank 1: ValueError: vocab_start is '1'; ",
    "shape of bias": "rank 1: ValueError: bias has shape",
    "direction": "losses: rank 0 has \"KL,'reverse'\", rank 1 has \"KL,'forward'\"",
    "unknown direction": "rank 1: ValueError: direction is 'backward'",
    "rows": "rows of the losses: rank 0 has [14], rank 1 has [12]",
    "hidden": "rank 1: ValueError: hidden has shape [2, 7, 23]",
    "values": "differ in rows: rank 0 has ",
    "labels": "differ in integers: rank 0 has ",
    "out of range": "differ in integers: rank 0 has ",
    "call": "losses: rank 0 has 'CrossEntropy,-100', rank 1 has \"KL,'reverse'\"",
    "head and loss": "the call: rank 0 has 'a loss', rank 1 has 'a head'",
}


def test_every_rank_is_told_which_rank_differs_in_what(found):
    assert found[0]["faults"].keys() == NAMED.keys()
    for rank in found:
        for name, message in NAMED.items():
            assert message in rank["faults"][name], name


def test_dtensors_of_logits(found):
    """Sharded by vocabulary, replicated, by rows; the reference likewise or whole."""
    for rank in found:
        check(rank["logits"], 200)


def test_a_model_whose_head_is_sharded(found):
    for rank in found:
        assert rank["model"].keys() == {"logits float64", "hidden rows float64"}
        assert max(rank["model"].values()) < 1e-12


REFUSED = {
    "partial logits": "logits is a DTensor with placements (Partial(sum),) over a mesh",
    "partial scores": "scores is a DTensor with placements (Partial(sum),) over a mesh",
    "rows and vocabulary": "must be sharded by rows or by vocabulary, not both",
    "sharded reference": "must be sharded as logits is, or Replicate()",
    "sharded reference of whole logits": "must be sharded as logits is, or Replicate()",
    "palu": "call logits.redistribute(placements=...) before",
    "weight by columns": "weight is a DTensor with placements (Shard(dim=1),)",
    "partial weight": "palu.loss_in_head",
    "twice sharded": "must be Shard(0) over one dimension of the mesh at most, or Replicate()",
    "group beside a DTensor": "process_group or vocab_start is given and weight is a DTensor",
    "hidden by columns": "hidden is a DTensor with placements (Shard(dim=1),)",
    "slices as plain tensors": "logits of a sharded vocabulary must be DTensors",
    "labels of plain slices": "labels holds 7; ",
}


def test_placements_that_are_refused_are_named(found):
    for rank in found:
        assert rank["refusals"].keys() == REFUSED.keys()
        for name, message in REFUSED.items():
            assert message in rank["refusals"][name], name


def test_bytes_a_row(found):
    """No part of what is exchanged grows with V: 24 bytes of a KL, 16 of cross-entropy, 24 or 40 of
    a forget loss, 4 k (or 8 rounds of 15 counts, and two more) of the select, D float32 of the
    hidden gradient; and D + 2 float64 a call for the mean row."""
    rows = vocabulary.BATCH * vocabulary.LENGTH
    for rank in found:
        for name, moved in rank["traffic"].items():
            statistics = 24 if "kl" in name or "entropy global" in name else 40
            wanted = {"statistics": 16 if name.startswith("cross") else statistics}
            if "by reference" in name or "by current" in name:
                wanted["select"] = 4 * 5 if " 5 " in name else 8 * 15 * 4 + 2 * 4
            wanted["hidden gradient"] = 4 * vocabulary.D
            wanted = {purpose: rows * size for purpose, size in wanted.items()}
            if "flatten global_mean" in name and "sparse" in name:
                wanted["mean row"] = 8 * (vocabulary.D + 2)
            searched = "select" in wanted and " 5 " not in name
            assert moved == wanted | {"calls": len(wanted) + 8 * searched}, name


def test_a_start_without_a_group_is_refused():
    with pytest.raises(ValueError, match="vocab_start is 3 and process_group is None"):
        LMHead(torch.ones(4, 2), vocab_start=3)
