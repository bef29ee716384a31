"""`token_roles` against its definition, spelled out as a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palu.data.roles import FORGET, IGNORE, KEEP, NONE, PRESERVE, token_roles


def roles_by_definition(row: list[int], prefix_length: int, eos_ids: set[int]) -> list[int]:
    """The words of METHOD.md, one label at a time."""
    roles = []
    in_run = 0  # sensitive labels of the current run so far
    for position, label in enumerate(row):
        if position == 0:
            roles.append(NONE)  # never predicted, in no run
        elif label >= 0 and label not in eos_ids:
            in_run += 1
            within = prefix_length <= 0 or in_run <= prefix_length
            roles.append(FORGET if within else NONE)
        else:
            in_run = 0
            roles.append(PRESERVE if label == KEEP or label >= 0 else NONE)
    return roles


LABEL = st.sampled_from([IGNORE, KEEP, 0, 1, 2, 3, 7, 7, 7, 7])


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(0, 12).flatmap(
        lambda length: st.lists(
            st.lists(LABEL, min_size=length, max_size=length), min_size=1, max_size=4
        )
    ),
    prefix_length=st.integers(-1, 5),
    eos=st.sampled_from([None, 2, 0, [2], [2, 3], (0, 3), []]),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_roles_are_those_of_the_definition(rows, prefix_length, eos, dtype):
    eos_ids = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    expected = [roles_by_definition(row, prefix_length, eos_ids) for row in rows]
    labels = torch.tensor(rows, dtype=dtype).reshape(len(rows), len(rows[0]))
    before = labels.clone()
    roles = token_roles(labels, prefix_length, eos)
    assert roles.dtype == torch.int8 and roles.shape == labels.shape
    assert roles.tolist() == expected
    assert torch.equal(labels, before)


# Written out by hand, so that the loop above cannot be wrong in the same way.
@pytest.mark.parametrize(
    ("row", "prefix_length", "eos", "expected"),
    [
        ([IGNORE, 5, 5, 5, KEEP, 5], 2, None, [0, 1, 1, 0, 2, 1]),  # runs at both ends
        ([5, 5, 5, 5], 1, None, [0, 1, 0, 0]),  # the run starts at position 1
        ([IGNORE, 5, 9, 5, 5], 1, 9, [0, 1, 2, 1, 0]),  # EOS ends a run
        ([IGNORE, 5, 8, 5, 9, 5], 1, [8, 9], [0, 1, 2, 1, 2, 1]),
        ([IGNORE, 5, 9, 5, 5], 1, None, [0, 1, 0, 0, 0]),
        ([IGNORE, 5, IGNORE, 5, 5], 1, None, [0, 1, 0, 1, 0]),  # any other label ends one too
        ([IGNORE, 5, 5, 5], 0, None, [0, 1, 1, 1]),
        ([IGNORE, 5, 5, 5], -3, None, [0, 1, 1, 1]),
        ([IGNORE] * 4, 3, None, [0, 0, 0, 0]),
        ([KEEP, KEEP], 3, None, [0, 2]),
        ([5], 3, None, [0]),
        ([IGNORE, 0, 0], 1, None, [0, 1, 0]),  # token id 0 is a token
        ([IGNORE, IGNORE, KEEP], 1, IGNORE, [0, 0, 2]),  # an absurd EOS changes no other label
    ],
)
def test_roles_by_hand(row, prefix_length, eos, expected):
    assert token_roles(torch.tensor([row]), prefix_length, eos).tolist() == [expected]


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0, 0)])
def test_no_labels(shape):
    roles = token_roles(torch.zeros(shape, dtype=torch.int64), 3)
    assert roles.shape == shape and roles.dtype == torch.int8


def test_rows_are_independent():
    row = torch.tensor([IGNORE, 5, 5, KEEP, 5, 5, 5])
    alone = token_roles(row[None], 2)
    other = torch.full_like(row, 7)
    together = token_roles(torch.stack([other, row, other]), 2)
    assert torch.equal(together[1:2], alone)


def test_strided_labels():
    labels = torch.tensor([[IGNORE, 5], [5, 5], [5, KEEP], [5, 5]]).T
    assert token_roles(labels, 1).tolist() == [[0, 1, 0, 0], [0, 1, 2, 1]]


def test_traces_without_a_graph_break():
    # The whole graph, one trace: data-dependent control flow or a host synchronisation would break
    # it.
    traced = torch.compile(token_roles, backend="eager", fullgraph=True)
    labels = torch.tensor([[IGNORE, 5, 9, 5, 5]])
    assert traced(labels, 1, 9).tolist() == [[0, 1, 2, 1, 0]]


@pytest.mark.parametrize(
    ("labels", "prefix_length", "eos", "kind", "words"),
    [
        ([[1, 2]], 3, None, TypeError, "labels must be a torch.Tensor"),
        (torch.zeros(1, 2), 3, None, TypeError, "labels must hold integers, got torch.float32"),
        (torch.zeros(1, 2, dtype=torch.bool), 3, None, TypeError, "labels must hold integers"),
        (torch.zeros(2, dtype=torch.int64), 3, None, ValueError, r"\[B, T\], got shape \(2,\)"),
        (torch.zeros(1, 2, dtype=torch.int64), 1.5, None, TypeError, "prefix_length .* got 1.5"),
        (torch.zeros(1, 2, dtype=torch.int64), 3, "2", TypeError, "eos_token_id .* got '2'"),
        (torch.zeros(1, 2, dtype=torch.int64), 3, [True], TypeError, "eos_token_id .* got True"),
    ],
)
def test_bad_input(labels, prefix_length, eos, kind, words):
    with pytest.raises(kind, match=words):
        token_roles(labels, prefix_length, eos)
