"""`palu plan`: what fits on a GPU, or on each of several, before a run."""

from __future__ import annotations

import itertools
from dataclasses import MISSING, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from palu.cli.options import with_options
from palu.errors import user_errors
from palu.terminal import bars, out
from palu.training.options import option

if TYPE_CHECKING:
    from palu.planning.model import ModelSizes
    from palu.planning.step import Setup


LENGTHS = (256, 1024, 4096)  # of the columns beside the length that is asked for

NOTE = (
    "Predicted from the config: the tensors of a step, checked within 10% on small models on a CPU "
    "and on no GPU. What a GPU needs besides (context, workspaces, fragments) must fit in the "
    "--headroom. Weights of 16 bits that train have float32 masters."
)
NOTE_OF_DEVICES = (
    "Predicted from the config: the tensors of a step on the device that holds most, checked "
    "within 10% on small models of 2 and 4 processes on a CPU and on no GPU. FSDP2: a decoder "
    "layer is a group, what remains is the root's, and --batch-size is of a data-parallel rank; "
    "bfloat16 weights that train have no float32 masters there (autocast, --bf16, has float32 "
    "shards). "
    "What a GPU needs besides (context, workspaces, fragments) must fit in the --headroom."
)
SHARDED = "sharded over data-parallel ranks"
SPLIT, WHOLE = "split over tensor-parallel ranks", "whole on every tensor-parallel rank"
PARTLY = "outputs of split products split, others whole"
# How a device holds what is alive at the peak.
HELD = {
    "master weights": "in float32",
    "whole root": "gathered: embedding, last norm, head",
    "whole layers": "gathered: a layer, and its neighbour or a buffer",
    "reference head": "copied whole",
    "reductions": "gradients of a group, and their buffer",
    "head gradient": "until backward ends",
    "embedding gradient": "until backward ends",
    "chunk buffers": "logits of a chunk, or their gradient until backward",
    "exchange": "gradient of the hidden rows, summed over tensor-parallel ranks",
    **dict.fromkeys(("weights", "optimizer state", "reference", "gradients"), SHARDED),
}
HELD_BY_SPLIT = {
    **dict.fromkeys(("norms", "layer inputs", "attention masks", "reference rows"), WHOLE),
    **dict.fromkeys(("attention", "attention scores", "mlp"), SPLIT),
    **dict.fromkeys(("linear inputs", "layer gradients", "passing"), PARTLY),
}


@dataclass(kw_only=True)
class PlanOptions:
    """A model, GPUs and a batch."""

    model: str = option(
        MISSING,
        "Model folder, a name on the hub, or Llama-3.1-8B, Llama-3.1-70B, Llama-3.2-1B, "
        "gemma-2-9b, Qwen2.5-7B.",
    )
    gpu_memory: float = option(MISSING, "Memory of the GPU, or of each, in GiB.")
    devices: int = option(1, "GPUs of the run: FSDP2 shards the model over them.")
    tensor_parallel: int = option(
        1, "Of the devices: so many share the vocabulary and every layer's matrices."
    )
    batch_size: int = option(8, "Forget examples, and as many retain examples.")
    length: int = option(512, "Tokens of a padded example.")
    dtype: str | None = option(
        None,
        "float32, bfloat16, or autocast (bfloat16 over float32 weights).",
        shown="the config's",
    )
    lora_rank: int = option(16, "Of adapters on all linear layers.")
    headroom: float = option(0.1, "Share of the memory that is left for what is not predicted.")


@with_options(PlanOptions)
def plan(context: typer.Context, options: SimpleNamespace) -> None:
    """Print which ways of unlearning fit on a GPU, or on each of several, and with how many
    examples a batch.

    Reads the model's config and no weights. Status 1 if not even one example fits.
    """
    with user_errors(), bars.status("Reading the config"):
        from palu.planning.model import ModelSizes, read_config
        from palu.planning.step import GIB, REFERENCES, Setup

        gpu_memory, headroom, dtype = options.gpu_memory, options.headroom, options.dtype
        lora_rank, devices = options.lora_rank, options.devices
        split = options.tensor_parallel

        if devices < 1:
            raise ValueError(f"--devices must be at least 1, not {devices}")
        if split < 1 or devices % split:
            raise ValueError(f"--tensor-parallel must divide --devices, {devices}; it is {split}")
        if not 0 < gpu_memory < float("inf"):
            raise ValueError(f"--gpu-memory must be a number of GiB above 0, not {gpu_memory}")
        if not 0 <= headroom < 1:
            raise ValueError(f"--headroom must be at least 0 and below 1, not {headroom}")
        if lora_rank < 1:
            raise ValueError(f"--lora-rank must be at least 1, not {lora_rank}")
        config = read_config(options.model)
        sizes = ModelSizes.from_config(config)
        if dtype is None:  # `load_to_train` makes float16 float32
            widened = str(config.dtype) in ("torch.float32", "torch.float16")
            dtype = "float32" if widened else "bfloat16"
        sizes.tensor_parallel(split)  # or say why not
        shape = options.batch_size, options.length
        setups = [
            Setup(*shape, dtype, rank, reference, checkpointing, devices, split)
            for rank, reference, checkpointing in itertools.product(
                (0, lora_rank), REFERENCES, (False, True)
            )
            if rank or reference != "adapter_off"
        ]
    limit = int(gpu_memory * (1 - headroom) * GIB)
    over = f" over {_ranks(setups[0])}" if devices > 1 else ""
    of_each = " of each" if devices > 1 else ""
    _say(
        f"{options.model}: {sizes.parameters:,} parameters, {dtype}{over}; {limit / GIB:.1f} of "
        f"{gpu_memory:g} GiB{of_each} to use. GiB: at {options.batch_size} x {options.length}. "
        "Then the largest batch by tokens an example:"
    )
    out.print(_table(sizes, setups, limit))
    fits, advice, advised = _advice(sizes, setups, limit, asked=options.dtype)
    _say(advice)
    if devices > 1:
        _say(_whole(sizes, advised))
        out.print(_held(sizes, advised))
    _say(NOTE_OF_DEVICES if devices > 1 else NOTE)
    if not fits:
        raise typer.Exit(1)


def _table(sizes: ModelSizes, setups: list[Setup], limit: int) -> Table:
    """Return the peak of every setup, and the largest batch by length."""
    from palu.planning.step import GIB, largest_batch, predict

    lengths = sorted({*LENGTHS, setups[0].length})
    table = Table(box=None, pad_edge=False)
    for name in ("trains", "reference", "checkpointing"):
        table.add_column(name)
    for name in ("GiB", *(f"{n}" for n in lengths)):
        table.add_column(name, justify="right")
    for setup in setups:
        most = (largest_batch(sizes, replace(setup, length=n), limit) for n in lengths)
        peak = predict(sizes, setup).peak / GIB
        table.add_row(*_words(setup), f"{peak:.1f}", *(f"{rows or '-'}" for rows in most))
    return table


def _advice(
    sizes: ModelSizes, setups: list[Setup], limit: int, asked: str | None
) -> tuple[bool, str, Setup]:
    """Return whether anything fits, what to take or to change, and the setup that this is of."""
    from palu.planning.step import largest_batch, predict

    shape = f"{setups[0].batch_size} x {setups[0].length}"
    fitting = [setup for setup in setups if predict(sizes, setup).peak <= limit]
    if fitting:
        text = f"{len(fitting)} of {len(setups)} ways fit at {shape}. The first:"
        return True, f"{text} {_described(sizes, fitting[0], asked)}", fitting[0]
    most, setup = max(
        ((largest_batch(sizes, setup, limit), setup) for setup in setups), key=lambda pair: pair[0]
    )
    if most:
        text = f"Nothing fits at {shape}. Take smaller batches, and --gradient-accumulation:"
        setup = replace(setup, batch_size=most)
        return True, f"{text} {_described(sizes, setup, asked)}", setup
    alone = [replace(setup, batch_size=1) for setup in setups]
    least = min(alone, key=lambda setup: predict(sizes, setup).peak)
    shorter = (least.length >> n for n in range(1, least.length.bit_length() - 1))
    length = next(
        (n for n in shorter if predict(sizes, replace(least, length=n)).peak <= limit), None
    )
    times = predict(sizes, least).peak / limit
    text = f"Nothing fits, not even one example of {least.length} tokens. "
    text += (
        f"Take examples of at most {length} tokens, or " if length else "Take a smaller model, or "
    )
    text += f"a GPU with {times:.2f} times the memory. The least:"
    return False, f"{text} {_described(sizes, least, asked)}", least


def _described(sizes: ModelSizes, setup: Setup, asked: str | None) -> str:
    from palu.planning.step import GIB, predict

    moment = predict(sizes, setup)
    options = f"--batch-size {setup.batch_size} --max-length {setup.length}"
    options += f" --reference {setup.reference}"
    options += f" --lora-rank {setup.lora_rank}" if setup.lora_rank else ""
    options += " --bf16" if setup.dtype == "autocast" else f" --dtype {asked}" if asked else ""
    options += " --gradient-checkpointing" if setup.checkpointing else ""
    largest = sorted(moment.items.items(), key=lambda item: -item[1])[:5]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    peak = f"{moment.peak / GIB:.1f} GiB, most in the {moment.moment}: {parts}."
    if setup.tensor_parallel > 1:
        return f"a training loop of your own, as by palu unlearn {options}\n{peak}"
    launched = "" if setup.devices == 1 else f"accelerate launch --use_fsdp on {setup.devices}: "
    return f"{launched}palu unlearn {options}\n{peak}"


def _ranks(setup: Setup) -> str:
    text = f"{setup.devices} devices"
    if setup.tensor_parallel > 1:
        text += f" ({setup.tensor_parallel} tensor-parallel x {setup.data_parallel} data-parallel)"
    return text


def _whole(sizes: ModelSizes, setup: Setup) -> str:
    """Return how much of the model is whole at once."""
    from palu.planning.step import GIB, predict

    most = {"forward": 0, "backward": 0}
    for name, items in predict(sizes, setup).moments.items():
        part = "backward" if name.startswith(("backward", "reduction")) else "forward"
        whole = items.get("whole root", 0) + items.get("whole layers", 0)
        most[part] = max(most[part], whole)
    parts = ", ".join(f"{size / GIB:.1f} GiB in {part}" for part, size in most.items())
    return f"Gathered at once: {parts}. At the peak a device holds:"


def _held(sizes: ModelSizes, setup: Setup) -> Table:
    """Return what is alive at the peak, and how a device holds it."""
    from palu.planning.step import GIB, predict

    table = Table(box=None, pad_edge=False)
    table.add_column("tensors")
    table.add_column("GiB", justify="right")
    table.add_column("held")
    items = predict(sizes, setup).items
    for name, size in sorted(items.items(), key=lambda item: -item[1]):
        by_split = HELD_BY_SPLIT if setup.tensor_parallel > 1 else {}
        held = by_split.get(name) or HELD.get(name, "of this device's batch")
        if name == "reference" and setup.reference == "cached":
            held = "the cache's frozen head, whole"
        table.add_row(name, f"{size / GIB:.2f}", held)
    return table


def _words(setup: Setup) -> tuple[str, str, str]:
    trains = f"LoRA {setup.lora_rank}" if setup.lora_rank else "every weight"
    return trains, setup.reference, "yes" if setup.checkpointing else "no"


def _say(text: str) -> None:
    out.print(text, highlight=False)
