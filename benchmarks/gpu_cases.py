"""What ``gpu.py`` measures: which operator on which sizes, and the time no kernel can go below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

ITEM_BYTES = 2  # bfloat16
TOP_K = 1000
# V, and D of a model that has it: Llama-3.1-8B, Llama-2-7B, Gemma-3-4B. The first matters most.
VOCABULARIES = ((128256, 4096), (32000, 4096), (262144, 2560))
TINY = ((1003, 24), (257, 16))
# Rows of one batch of 8 questions that forget or preserve, and of a long one.
FORGET_ROWS, OTHER_ROWS = (50, 4096), (226, 4096)
TINY_ROWS = (5, 300)
# Transfers of a row of logits, forward plus backward, as the kernels' docstrings count them for
# 16-bit types: `select` reads two rows, a bitmap of S is a sixteenth of one.
BITS = 1 / 16
_FORGET = {  # by what chooses S
    "reference": 2 + (2 + BITS) + (2 + BITS),
    "indices": (1 + BITS) + (2 + BITS),
    "current": 2 + 1 + 2,
}
TRANSFERS = {
    ("topk_indices", ""): 3,
    **{(name, by): n for name in ("flatten", "entropy") for by, n in _FORGET.items()},
    ("kl", "reverse"): 2 + 3,
    ("kl", "forward"): 2 + 3,
    ("cross_entropy", ""): 1 + 2,
}
LINEAR = (
    ("linear_flatten", "dense"),
    ("linear_flatten", "sparse"),
    ("linear_kl", "reverse"),
    ("linear_cross_entropy", ""),
)
HEADS = ("frozen", "trained")


class Case(NamedTuple):
    """An operator on rows of one size. ``option``: what chooses S, the direction of a KL, or by
    which road a linear loss goes. A linear operator has a D and a head, the others have neither."""

    operator: str
    option: str
    vocab: int
    rows: int
    k: int = 0
    hidden: int = 0
    head: str = ""

    @property
    def kernel(self) -> str:
        name = " ".join(filter(None, (self.operator, self.option)))
        return f"{name}, {self.head} head" if self.head else name


class Rates(NamedTuple):
    """What the card was measured to do."""

    bytes_per_second: float  # of a copy, read plus written
    flops_per_second: float  # of a product of large bfloat16 matrices


def logits_cases(tiny: bool) -> Iterator[Case]:
    for vocab, _ in TINY if tiny else VOCABULARIES:
        for operator, option in TRANSFERS:
            k = _k(operator, tiny)
            for rows in _rows(operator, tiny):
                yield Case(operator, option, vocab, rows, k)


def linear_cases(tiny: bool) -> Iterator[Case]:
    for vocab, hidden in TINY if tiny else VOCABULARIES:
        for operator, option in LINEAR:
            k = _k(operator, tiny)
            for head in HEADS:
                for rows in _rows(operator, tiny):
                    yield Case(operator, option, vocab, rows, k, hidden, head)


def _k(operator: str, tiny: bool) -> int:
    if operator.endswith(("kl", "cross_entropy")):
        return 0
    return 9 if tiny else TOP_K


def _rows(operator: str, tiny: bool) -> tuple[int, ...]:
    if tiny:
        return TINY_ROWS
    return OTHER_ROWS if operator.endswith(("kl", "cross_entropy")) else FORGET_ROWS


def floor_seconds(case: Case, rates: Rates) -> float:
    """The bandwidth floor of an operator on logits; of a linear one the matrix floor, that is every
    product at the card's rate of arithmetic or of memory, whichever is slower, and nothing beside
    them; of a sparse one the time to read the chosen rows of the head twice, and where the head
    trains to read all of it once (for its mean row) and to write its gradient."""
    entries = case.rows * case.vocab
    if not case.hidden:
        transfers = TRANSFERS[case.operator, case.option]
        return transfers * entries * ITEM_BYTES / rates.bytes_per_second
    trained = case.head == "trained"
    weight = case.vocab * case.hidden
    if case.option == "sparse":
        moved = 2 * case.rows * case.k * case.hidden + trained * 2 * weight
        return moved * ITEM_BYTES / rates.bytes_per_second
    # logits, the reference's logits (for a KL), the gradients of hidden rows and weight
    products = 2 + (case.operator == "linear_kl") + trained
    arithmetic = 2 * entries * case.hidden / rates.flops_per_second
    operands = weight + case.rows * case.hidden + entries
    return products * max(arithmetic, operands * ITEM_BYTES / rates.bytes_per_second)
