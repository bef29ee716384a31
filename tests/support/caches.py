"""Small reference caches and batches, for the tests of the cache."""

from pathlib import Path

import torch

from palu.data.roles import IGNORE
from palu.data.template import Template
from palu.loss import PALULoss
from palu.reference.cache import ReferenceCache
from tests.support import small


def loss_of(tok, **changes):
    return PALULoss(**{"top_k": 7, "prefix_length": 2, "eos_token_id": tok.eos_token_id, **changes})


def builder(tok, folder):
    """Builds a cache of the first four examples in shards of one batch each, with changes."""
    rows = small.rows(tok)

    def build(model, path="cache", loss=None, data=None, **changes):
        options = {"batch_size": 2, "shard_bytes": 1, "tokenizer": tok, "template": Template()}
        return ReferenceCache.build(
            model,
            rows[:4] if data is None else data,
            folder / path,
            loss=loss_of(tok) if loss is None else loss,
            **{**options, **changes},
        )

    return build


def padded(rows, length, left=False, pad=3):
    """A batch of our own making: any width, either side, and a padding token with a meaning."""
    batch = {}
    for key, fill in (("input_ids", pad), ("labels", IGNORE), ("attention_mask", 0)):
        fills = [[fill] * (length - len(row[key])) for row in rows]
        lists = [f + row[key] if left else row[key] + f for f, row in zip(fills, rows, strict=True)]
        batch[key] = torch.tensor(lists)
    return batch


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
