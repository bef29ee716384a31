"""What the ranks of a sharded step exchange, by its shapes: collectives, and the bytes that a rank
sends where the ranks form a ring.

Of `n` ranks one sends `(n - 1) / n` of what all have together when they gather it or reduce it to
shares, and twice that when all get the sum. `benchmarks/memory/ranks.py` counts both in real steps;
`tests/benchmarks/test_ranks.py` compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from palu.planning.model import ModelSizes
from palu.planning.one_device import Step
from palu.planning.setup import ANSWER_SHARE, NO_REFERENCE, PRESERVE_SHARE, Setup
from palu.planning.sharded import ShardedStep
from palu_kernels.roles import chunk_shape
from palu_kernels.slices import DIGIT, GATHERED_K

MICRO_BATCHES = 2  # to forget and to retain, a forward and a backward each
# Split products of a layer that read the residual stream: each sums the gradient of its input.
READERS = 5  # queries, keys, values, gate, up
# Bytes that a rank hands to the others of a row: docs/distributed.md.
KL, CROSS_ENTROPY, FLATTEN = 24, 16, 40


class Exchange(NamedTuple):
    """Collectives of one kind and purpose."""

    kind: str  # all-gather, reduce-scatter, all-reduce
    purpose: str
    calls: int
    sent: int  # bytes


def exchanges(sizes: ModelSizes, setup: Setup, top_k: int) -> list[Exchange]:
    """Return what a rank exchanges in a step."""
    found = list(_of_shards(sizes, setup)) if setup.data_parallel > 1 else []
    if setup.tensor_parallel > 1:
        found += [*_of_layers(sizes, setup), *_of_losses(sizes, setup, top_k)]
    return found


def _of_shards(sizes: ModelSizes, setup: Setup) -> Iterator[Exchange]:
    step, layers = ShardedStep(sizes.tensor_parallel(setup.tensor_parallel), setup), sizes.layers
    share = (setup.data_parallel - 1) / setup.data_parallel
    roots, times = MICRO_BATCHES, 2 * MICRO_BATCHES  # that are gathered, and layers
    if setup.reference == "live":
        roots, times = roots + 2, times + 1  # for its forward, and for its head
    elif setup.reference == "adapter_off":  # the root stays whole until the forward that follows
        times += 1
    whole = roots * step.whole_root + times * layers * step.whole_layer
    yield Exchange("all-gather", "weights", roots + times * layers, int(share * whole))
    whole = step.root_gradient + layers * step.layer_gradient
    calls = MICRO_BATCHES * (layers + bool(step.root_gradient))
    yield Exchange("reduce-scatter", "gradients", calls, int(share * MICRO_BATCHES * whole))


def _of_layers(sizes: ModelSizes, setup: Setup) -> Iterator[Exchange]:
    """Sums of the residual stream: after the embedding, attention and MLP, and of gradients."""
    forwards = MICRO_BATCHES + (setup.reference in ("live", "adapter_off"))
    calls = forwards * (1 + 2 * sizes.layers) + MICRO_BATCHES * READERS * sizes.layers
    if setup.checkpointing:
        calls += MICRO_BATCHES * 2 * sizes.layers
    step = Step(sizes, setup)  # results of products, in their dtype
    residual = step.layer.positions * sizes.hidden * step.precision.products
    yield Exchange("all-reduce", "residual stream", calls, calls * _summed(setup, residual))


def _of_losses(sizes: ModelSizes, setup: Setup, top_k: int) -> Iterator[Exchange]:
    """Of the rows with a loss: see docs/distributed.md. Ranks that compare their calls exchange 4
    KiB more a call."""
    positions, others = setup.batch_size * setup.length, setup.tensor_parallel - 1
    entry = Step(sizes, setup).precision.products
    answers, kept = (round(share * positions) for share in (ANSWER_SHARE, PRESERVE_SHARE))
    forget = answers - kept
    columns = -(-sizes.vocab // setup.tensor_parallel)
    chunks = max(1, -(-answers // chunk_shape(answers, columns, entry)[0]))
    none = setup.reference == NO_REFERENCE
    bytes_of_rows = forget * FLATTEN + answers * CROSS_ENTROPY + (0 if none else kept * KL)
    calls = chunks * (2 if none else 3)
    yield Exchange("all-gather", "statistics", calls, others * bytes_of_rows)
    if top_k <= GATHERED_K:
        yield Exchange("all-gather", "select", chunks, others * forget * 4 * top_k)
    elif setup.reference != "cached":  # which brings S
        rounds = 8 * entry // DIGIT
        counts = forget * 4 * (2**DIGIT - 1)
        yield Exchange("all-reduce", "select", chunks * rounds, rounds * _summed(setup, counts))
        yield Exchange("all-gather", "select", chunks, others * forget * 8)
    hidden = 4 * sizes.hidden * (answers + (forget if none else answers))
    yield Exchange("all-reduce", "hidden gradient", MICRO_BATCHES, _summed(setup, hidden))


def _summed(setup: Setup, size: int) -> int:
    return 2 * (setup.tensor_parallel - 1) * size // setup.tensor_parallel
