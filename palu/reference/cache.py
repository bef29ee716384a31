"""`ReferenceCache`: what the losses need of the frozen starting model, computed once and read back.

The reference and the data never change while training, so neither does what the reference says of
them: the indices of the k largest logits of every forget row, and the last hidden states of every
preserve row (D numbers, where its logits are V). With a cache no second model is in the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import palu_kernels
from palu.data.collator import Collator
from palu.loss import PALULoss
from palu.models.checks import check_causal, first_texts
from palu.models.wrappers import eval_mode, unwrap
from palu.reference.build import ReferencePass, Source, check_options
from palu.reference.manifest import (
    data_differences,
    describe,
    label_differences,
    model_differences,
    unlike,
)
from palu.reference.model import token_count
from palu.reference.rows import head_may_train
from palu.reference.store import (
    MANIFEST,
    CacheDamaged,
    CacheError,
    CacheMismatch,
    CacheWriteError,
    check_file,
    partial_cache,
    read_sealed,
)
from palu.storage.fingerprint import model_fingerprint, tokenizer_fingerprint
from palu.storage.output import check_output, versions

__all__ = [
    "CacheDamaged",
    "CacheError",
    "CacheMismatch",
    "CacheWriteError",
    "ReferenceCache",
    "cache_info",
]

SHARD_BYTES = 64 * 2**20


class ReferenceCache:
    """A folder with `manifest.json` and safetensors files, memory-mapped for reading.

    Rows are found by the id of their example (`palu.storage.fingerprint.example_ids` gives those of
    a batch). They are in the order of their positions, examples in the order of the batch, whatever
    the padding, as in `hidden[shift_to_logits(...)]`.

    The numbers are those of the batches the cache was built in. Other batches and other padding
    change them by roundings; a model with absolute positions and no position_ids (GPT-2) by more
    when it is padded on the left. So a cache is built with the collator that training uses.

    Make one with `build`, `open` or `open_or_build`.

    Attributes:
        path: the folder.
        manifest: everything that decided the numbers, as JSON values.
        head: the frozen output head where it is stored (training may change the head), else None.
        device: where rows are returned; the CPU until `to`.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Open the files that the manifest names, which must have been checked."""
        self.path, self.manifest = path, manifest
        self.device = torch.device("cpu")
        self.head: palu_kernels.LMHead | None = None
        if manifest["head_file"] is not None:
            tensors = _tensors(path / manifest["head_file"]["file"])
            scale, cap = (manifest["head"][name] for name in ("logit_scale", "softcap"))
            self.head = palu_kernels.LMHead(tensors["weight"], tensors.get("bias"), scale, cap)
        # The rows of each example, in the mapped files, by data set and kind.
        self._pieces: dict[tuple[str, str], dict[int, Tensor]] = {}
        for record in manifest["shards"]:
            self._add(record["source"], _tensors(path / record["file"]))

    def _add(self, source: str, shard: Mapping[str, Tensor]) -> None:
        ids = shard["example_ids"].tolist()
        for kind, counts in (("indices", "index_rows"), ("hidden", "hidden_rows")):
            if kind in shard:
                pieces = shard[kind].split(shard[counts].tolist())
                self._pieces.setdefault((source, kind), {}).update(zip(ids, pieces, strict=True))

    @classmethod
    def build(
        cls,
        model: nn.Module,
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        loss: PALULoss,
        collator: Callable | None = None,
        retain_dataset: Any = None,
        tokenizer: Any = None,
        template: Any = None,
        batch_size: int = 8,
        autocast_dtype: torch.dtype | None = None,
        train_head: bool | None = None,
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
        notes: Mapping[str, Any] | None = None,
        report: Callable[..., None] | None = None,
    ) -> ReferenceCache:
        """Run the model over the data once and write what the loss will ask for.

        The model runs as it is now (an active adapter counts), in eval mode without gradients; its
        modes and the random state are restored. The folder is written beside its place
        (`.NAME.partial`) and renamed when it is whole. An interrupted build goes on after its last
        whole shard if everything that decides the numbers is the same, and starts anew if not.

        Args:
            model: the starting model, in wrappers or not.
            dataset: the forget set: a sequence of mappings with `input_ids` and `labels`.
            path: the folder.
            loss: says which rows matter and what of them is needed.
            collator: pads a list of examples, as in training; default `palu.Collator`.
            retain_dataset: the retain set when its term is a KL.
            tokenizer: its fingerprint is remembered; its padding token is used.
            template: remembered by its repr.
            batch_size: examples a forward pass, of like length together.
            autocast_dtype: run under autocast with this dtype, as training will; None: without.
            train_head: whether training may change the output head: then a frozen copy is stored.
                None: whether its weight (tied to the embedding or not) or bias wants a gradient.
            shard_bytes: a file is closed after the batch that brings it to this size.
            overwrite: whether a folder that is not empty is replaced.
            notes: JSON values to keep in the manifest; they are never compared on opening.
            report: called with (examples done, examples).

        Raises:
            CacheError: the data holds two examples with one id, an input or a label that is no
                token, no row; the model's head is none that can be cached; another process builds
                here.
            FileExistsError: the folder is not empty.
            CacheWriteError: a fault of the file system; what was finished is kept for the next
                build.
            FloatingPointError: the model's hidden states are not finite.
            ValueError: the model is not causal.
        """
        path = Path(path)
        check_options(loss, retain_dataset, autocast_dtype, batch_size, shard_bytes)
        check_output(path, overwrite=overwrite)
        count = token_count(unwrap(model))
        sources = [Source("forget", dataset, count)]
        sources += [] if retain_dataset is None else [Source("retain", retain_dataset, count)]
        if collator is None:
            collator = Collator(tokenizer if tokenizer is not None else 0)
        with eval_mode(model, autocast=autocast_dtype or False):
            check_causal(model, first_texts(dataset))
            run = ReferencePass(model, sources, loss, collator)
            if train_head is None:
                train_head = head_may_train(model)
            content = describe(run, tokenizer, template, autocast_dtype)
            content["head"]["stored"] = train_head
            content |= {"batch_size": batch_size, "shard_bytes": shard_bytes}
            content |= {"versions": versions(), "notes": dict(notes or {})}
            with partial_cache(path, content) as partial:
                if train_head:
                    partial.store_head(run.head)
                run.store(partial, report)
                partial.finish()
        return cls.open(path)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        dataset: Any = None,
        retain_dataset: Any = None,
        loss: PALULoss | None = None,
        tokenizer: Any = None,
        template: Any = None,
        autocast_dtype: torch.dtype | None = None,
        train_head: bool | None = None,
        starting_model: str | None = None,
    ) -> ReferenceCache:
        """Open a cache after reading every byte of it once and comparing it with what is given.

        Args:
            path: the folder.
            model: the starting model: weights, settings, dtype and `autocast_dtype` as at the
                build.
            dataset, retain_dataset: the same examples as at the build, in any order.
            loss: `prefix_length` and `eos_token_id` as at the build; what it needs must be there.
            tokenizer, template: compared when the cache remembers one.
            autocast_dtype: what the model will be run under; compared when `model` is given.
            train_head: whether training may change the head, so that a frozen one must be stored.
                None: as the parameters of `model` say.
            starting_model: the `starting_model` of the cache that a checkpoint remembers, compared
                instead of the weights of `model`, which training has changed since.

        Raises:
            CacheMismatch: something differs; names all that does, with both values.
            CacheDamaged: a file is missing, truncated or changed; names it.
        """
        path = Path(path)
        manifest = _checked_manifest(path)
        differences = [] if loss is None else label_differences(manifest, loss)
        for name, rows in (("forget", dataset), ("retain", retain_dataset)):
            if rows is not None:
                differences += data_differences(manifest, name, rows)
        if tokenizer is not None and manifest["tokenizer"] is not None:
            present = tokenizer_fingerprint(tokenizer)
            differences += unlike("tokenizer", manifest["tokenizer"][:12], present[:12])
        if template is not None and manifest["template"] is not None:
            differences += unlike("template", manifest["template"], repr(template))
        if model is not None:
            differences += model_differences(manifest, model, autocast_dtype, starting_model)
            train_head = head_may_train(model) if train_head is None else train_head
        elif starting_model is not None:
            differences += unlike("model", manifest["model"][:12], starting_model[:12])
        if train_head and not manifest["head"]["stored"]:
            differences.append(
                "head: training may change the output head (or the embedding tied to it), and the "
                "cache was built without a frozen copy of it (--no-train-head, train_head=False)"
            )
        if differences:
            raise CacheMismatch(
                f"reference cache {str(path)!r} does not fit: {'; '.join(differences)}. Use the "
                "model, data and settings it was built with, name another folder, or delete this "
                "one and have it built anew (`palu cache build` and `palu unlearn --reference "
                "cached` do so)"
            )
        return cls(path, manifest)

    @classmethod
    def open_or_build(
        cls,
        model: nn.Module,
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        starting_model: str | None = None,
        **options: Any,
    ) -> ReferenceCache:
        """`open` the cache, or `build` it (with `options`, but for `overwrite`) where there is
        none.

        Raises:
            CacheMismatch: the cache belongs to something else; or there is none, and the model is
                not the `starting_model` any more from which it would have to be built.
            CacheError, CacheWriteError, FloatingPointError: as `build`.
        """
        folder = Path(path)
        if not folder.is_dir() or not any(folder.iterdir()):
            if starting_model is not None and model_fingerprint(model) != starting_model:
                raise CacheMismatch(
                    f"there is no reference cache at {str(path)!r}, and it cannot be built from "
                    f"this model: it is not the starting model {starting_model[:12]}. Build it "
                    "from the starting model (`palu cache build`)"
                )
            return cls.build(model, dataset, path, **options)
        names = ("loss", "retain_dataset", "tokenizer", "template", "autocast_dtype", "train_head")
        given = {name: options[name] for name in names if name in options}
        return cls.open(path, model=model, dataset=dataset, starting_model=starting_model, **given)

    @property
    def starting_model(self) -> str:
        """The fingerprint of the model the cache was built from, for checkpoints to remember."""
        return self.manifest["model"]

    def to(self, device: torch.device | str) -> ReferenceCache:
        """Return rows on `device` from now on and move the frozen head there; returns self."""
        self.device = torch.device(device)
        if self.head is not None:
            tensors = {"weight": self.head.weight, "bias": self.head.bias}
            moved = {name: x if x is None else x.to(self.device) for name, x in tensors.items()}
            self.head = replace(self.head, **moved)
        return self

    def forget_indices(self, example_ids: Tensor | Iterable[int]) -> Tensor:
        """Return the indices of the k largest reference logits: int32 `[forget rows of these
        examples, k]`, ascending along a row.

        Args:
            example_ids: int64 `[B]`, or integers: the examples of a batch, in its order.

        Raises:
            CacheMismatch: an example is not in the cache, or no indices are (it was built with
                `select_from="current"`).
        """
        return self._rows("forget", "indices", example_ids)

    def preserve_hidden(self, example_ids: Tensor | Iterable[int]) -> Tensor:
        """Return the reference's last hidden states: `[preserve rows of these examples, D]`, in the
        dtype of their product with the head. Arguments and errors as `forget_indices`."""
        return self._rows("forget", "hidden", example_ids)

    def retain_hidden(self, example_ids: Tensor | Iterable[int]) -> Tensor:
        """Return `[answer rows of these retain examples, D]`; see `preserve_hidden`."""
        return self._rows("retain", "hidden", example_ids)

    def info(self) -> dict[str, Any]:
        """Return `cache_info` of this cache."""
        return cache_info(self.path)

    def _rows(self, source: str, kind: str, example_ids: Tensor | Iterable[int]) -> Tensor:
        pieces = self._pieces.get((source, kind))
        if pieces is None:
            what = {"indices": "top-k indices", "hidden": f"{source} rows"}[kind]
            raise CacheMismatch(
                f"reference cache {str(self.path)!r} holds no {what}: it was built with "
                f"select_from={self.manifest['select_from']!r}, "
                f"preserve={self.manifest['preserve']!r} and "
                f"{'a' if 'retain' in self.manifest['data'] else 'no'} retain set"
            )
        names = example_ids.tolist() if isinstance(example_ids, Tensor) else list(example_ids)
        for number, name in enumerate(names):
            if name not in pieces:
                raise CacheMismatch(
                    f"example {number} of the batch (id {name}) is not in the {source} set of "
                    f"reference cache {str(self.path)!r}: the data is not what it was built from"
                )
        # An empty batch still has a width and a dtype.
        nothing = next(iter(pieces.values()))[:0]
        return torch.cat([nothing, *(pieces[name] for name in names)]).to(self.device)


def cache_info(path: Path) -> dict[str, Any]:
    """Describe a cache from its manifest alone (no shard is read).

    Returns:
        the manifest's settings and fingerprints; `rows`: how many forget rows have indices, how
        many preserve and retain rows have hidden states; `bytes` of all files; and the files.

    Raises:
        CacheDamaged, CacheMismatch: the manifest is missing, damaged or of another version.
    """
    content = read_sealed(path / MANIFEST)
    shards, head_file = content.pop("shards"), content.pop("head_file")
    files = shards if head_file is None else [head_file, *shards]

    def total(source: str, name: str) -> int:
        return sum(record[name] for record in shards if record["source"] == source)

    rows = {
        "forget": total("forget", "index_rows"),
        "preserve": total("forget", "hidden_rows"),
        "retain": total("retain", "hidden_rows"),
    }
    size = sum(record["bytes"] for record in files)
    return {"path": str(path), **content, "rows": rows, "bytes": size, "files": files}


def _checked_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest; check that every file it names is as it was written."""
    manifest = read_sealed(path / MANIFEST)
    if manifest["head_file"] is not None:
        check_file(path, manifest["head_file"])
    for record in manifest["shards"]:
        check_file(path, record)
    return manifest


def _tensors(path: Path) -> dict[str, Tensor]:
    """Map all tensors of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CacheDamaged(f"{str(path)!r} cannot be read: {error}") from error
