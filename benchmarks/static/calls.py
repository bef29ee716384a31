"""How many Python calls of ours, boolean gathers and host waits does one training step make?

    python -m benchmarks.static.calls
    PYTHONPATH=OTHER_CHECKOUT python benchmarks/static/calls.py     # the same of another checkout

A tiny Llama is trained by `PALUTrainer` on forget and retain examples with a live reference. The
second `training_step` runs under `sys.setprofile`: calls into files of `palu` and `palu_kernels`
(every call event, so a comprehension is one and a generator one for each item; and those of named
functions alone), how many functions and files they are in, and how deep they nest. The third runs
under a dispatch mode, which also looks into custom operators: gathers by a boolean mask (`index`
and `index_put` with a mask, `nonzero`, `masked_select`; on an accelerator each one waits for the
host) and reads of a number by the host (`_local_scalar_dense`). In brackets are the same numbers
with `get_batch_samples`, which builds the step's batches.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

VOCAB = 101
WARM_UP = 1  # steps before the one that is counted
MASKS = ("aten::nonzero", "aten::masked_select")


class Calls:
    """Count the calls into files of the packages `folders` inside `with`."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = tuple(folders)
        self.calls: Counter[tuple[str, str, int]] = Counter()
        self.depth = self._now = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self.folders):
            return
        self._now += 1 if event == "call" else -1
        self.depth = max(self.depth, self._now)
        if event == "call":
            self.calls[code.co_filename, code.co_name, code.co_firstlineno] += 1


class Waits(TorchDispatchMode):
    """Count operators that wait for the host on an accelerator, those inside custom ones too.

    What would stay on the host there (a batch's `RowRoles`, and what is made of it or of no tensor
    and for no device) waits for nothing.

    Args:
        inputs: of `training_step`.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.gathers = self.reads = 0
        batches = [inputs, inputs.get("palu_retain") or {}]
        roles = [batch["palu_roles"].at for batch in batches if "palu_roles" in batch]
        self._host = {id(tensor): tensor for tensor in roles}

    def __torch_dispatch__(
        self, func: Any, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if all(id(value) in self._host for value in given) and kwargs.get("device") is None:
            result = func(*args, **kwargs)
            made = [value for value in tree_iter(result) if isinstance(value, Tensor)]
            self._host |= {id(value): value for value in made}
            return result
        masked = name.startswith("aten::index") and any(
            isinstance(value, Tensor) and value.dtype == torch.bool
            for value in tree_iter(args[1] if len(args) > 1 else ())
        )
        self.gathers += masked or name.startswith(MASKS)
        self.reads += name == "aten::_local_scalar_dense"
        if (custom := OPDEFS.get(name)) is not None:
            with self:
                return custom._init_fn(*args, **kwargs)
        return func(*args, **kwargs)


class Count(NamedTuple):
    calls: int
    named: int
    functions: int
    files: int
    depth: int

    @classmethod
    def of(cls, *parts: Calls) -> Count:
        calls = sum((part.calls for part in parts), Counter())
        named = sum(n for (_, name, _), n in calls.items() if not name.startswith("<"))
        files = len({file for file, _, _ in calls})
        return cls(calls.total(), named, len(calls), files, max(part.depth for part in parts))


def examples(count: int, forget: bool) -> list[dict[str, list[int]]]:
    """Ten tokens each: three of the prompt, seven of the answer, three of those to be forgotten."""
    rows = []
    for start in range(count):
        ids = [3 + (7 * start + 5 * n) % (VOCAB - 3) for n in range(10)]
        answer = [-200, -200, *(ids[5:8] if forget else [-200] * 3), -200, -200]
        row = {"input_ids": ids, "labels": [-100] * 3 + answer, "attention_mask": [1] * 10}
        rows.append(row)
    return rows


def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"vocab_size": VOCAB, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens))


def trainer(folder: str) -> tuple[Any, list[Calls], list[Calls], list[Waits]]:
    """-> (a trainer that counts, what it counts in `training_step` and in `get_batch_samples`)."""
    from palu import Collator, PALUConfig, PALUTrainer

    packages = [importlib.import_module(name) for name in ("palu", "palu_kernels")]
    folders = [str(Path(package.__file__).parent) + "/" for package in packages]
    steps, batches, waits = [], [], []

    class Counting(PALUTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == WARM_UP:
                steps.append(Calls(folders))
                with steps[-1]:
                    return super().training_step(*args, **kwargs)
            if self.state.global_step == WARM_UP + 1:
                waits.append(Waits(args[1]))
                with waits[-1]:
                    return super().training_step(*args, **kwargs)
            return super().training_step(*args, **kwargs)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == WARM_UP:
                batches.append(Calls(folders))
                with batches[-1]:
                    return super().get_batch_samples(*args, **kwargs)
            return super().get_batch_samples(*args, **kwargs)

    args = PALUConfig(
        output_dir=folder,
        per_device_train_batch_size=2,
        max_steps=WARM_UP + 2,
        top_k=7,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    counting = Counting(
        model(),
        args,
        train_dataset=examples(6, forget=True),
        retain_dataset=examples(4, forget=False),
        data_collator=Collator(0),
    )
    return counting, steps, batches, waits


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory() as folder,
            redirect_stdout(StringIO()),
        ):
            warnings.simplefilter("ignore")
            counting, steps, batches, waits = trainer(folder)
            counting.train()
    finally:
        logging.disable(disabled)
    step, whole = Count.of(*steps), Count.of(*steps, *batches)
    numbers = [f"{a} {n} [{b}]" for n, a, b in zip(Count._fields, step, whole, strict=True)]
    numbers.append(f"{sum(w.gathers for w in waits)} boolean gathers")
    print(*numbers, f"{sum(w.reads for w in waits)} reads by the host", sep=", ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
