"""Models sharded by FSDP under accelerate: turning it on, also on CPUs, and making them whole.

accelerate turns FSDP on for accelerators alone: on CPUs a run that asks for it would be DDP, with
the whole model in every process, and without a word.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

_ENVIRONMENT = "ACCELERATE_USE_FSDP"  # set by `accelerate launch --use_fsdp`
_START = "start it with `torchrun --nproc-per-node N` or `accelerate launch --use_fsdp`"


def asked_by(args: Any) -> str | None:
    """Return what asks for FSDP, in words; None where nothing does.

    Args:
        args: a `PALUConfig`.
    """
    config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    if args.fsdp and not config.get("xla"):
        return f"fsdp={args.fsdp!r}"
    if os.environ.get(_ENVIRONMENT, "false").lower() == "true":
        return f"{_ENVIRONMENT}=true"
    return None


def check_launch(args: Any) -> None:
    """Check, before anything is loaded, that a run which asks for FSDP can be sharded.

    Raises:
        ValueError: it is one process that no launcher started; or it is to run on CPUs, with FSDP1,
            or beside an accelerator that PyTorch would shard on.
    """
    asked = asked_by(args)
    if asked is None or args.deepspeed:
        return
    # The reference, a cache and the checks before training need the weights in every process.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    device = args.device  # makes the process group
    if PartialState().distributed_type == DistributedType.NO:
        raise ValueError(
            f"{asked} and there is one process without a process group, whose model cannot be "
            f"sharded: {_START}, or leave FSDP out"
        )
    if device.type != "cpu":
        return
    if _version(args) == 1:
        raise ValueError(
            f"{asked} with version 1 of FSDP, which accelerate has for accelerators alone; on CPUs "
            "set fsdp_config={'version': 2}, or start with `accelerate launch --use_fsdp "
            "--fsdp_version 2`"
        )
    if torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator().type
        raise ValueError(
            f"{asked} on the CPU, and PyTorch would shard on the {name} device of this machine: "
            "hide it (CUDA_VISIBLE_DEVICES='' for NVIDIA and AMD), or leave use_cpu out"
        )


def _version(args: Any) -> int:
    given = (args.fsdp_plugin_args or {}).get("fsdp_version")
    return int(given or os.environ.get("FSDP_VERSION", 1))


@contextmanager
def on_cpus_too(args: Any) -> Iterator[None]:
    """Let accelerate turn FSDP on for CPUs while its `Accelerator` is made inside the block.

    `AcceleratorState` looks at FSDP where its processes have GPUs; for that moment those of a CPU
    are named so. Whatever it makes of them, it is an error if that is not FSDP.

    Raises:
        RuntimeError: this accelerate has other ways, and the model would not be sharded.
    """
    asked = asked_by(args)
    state = PartialState()
    if asked is None or args.deepspeed or state.distributed_type != DistributedType.MULTI_CPU:
        yield
        return
    shared = PartialState._shared_state
    try:
        # Anything else would be a state of accelerate that is laid out in another way.
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        yield
    finally:
        if shared.get("distributed_type") == DistributedType.MULTI_GPU:
            shared["distributed_type"] = DistributedType.MULTI_CPU
    made = AcceleratorState()
    if made.distributed_type != DistributedType.FSDP or made.device.type != "cpu":
        import accelerate

        raise RuntimeError(
            f"{asked}, and accelerate {accelerate.__version__} cannot be told to shard on CPUs (it "
            f"made {made.distributed_type.value} of it, every process with the whole model): leave "
            "FSDP out, or use another version of accelerate (1.15 can)"
        )


# ---- weights -------------------------------------------------------------------------------------


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 keeps whole after a forward pass, so that all parameters are shards."""
    for module in model.modules():
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            module.reshard()


def gather(tensor: Tensor) -> Tensor:
    """Return a whole tensor; of a shard (a DTensor) all processes have to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def spread(target: Tensor, whole: Tensor | None) -> None:
    """Write the main process's tensor into a parameter, or a shard of one, of every process.

    Args:
        target: the parameter.
        whole: its new value in the main process; None elsewhere.
    """
    value = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    if whole is not None:
        value.copy_(whole)
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(value, 0)
    target.copy_(value)


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a whole model, whose tensors are shapes without memory.

    Parameters that are one stay one.
    """
    tensors = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        tensors[id(tensor)] = empty
    return copy.deepcopy(model, tensors)


def fill(bare: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a `skeleton` the tensors of a state dict.

    Raises:
        ValueError: the state dict lacks a parameter.
    """
    made: dict[int, nn.Parameter] = {}
    for prefix, module in bare.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            if id(parameter) not in made:
                if full not in state:
                    raise ValueError(f"the weights that were gathered lack {full}")
                made[id(parameter)] = nn.Parameter(state[full], parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            if full in state:
                module._buffers[name] = state[full].to(buffer.dtype)


class ShardingTrainer(Trainer):
    """A Trainer that shards on CPUs too where FSDP is asked for, and evaluates before training."""

    def create_accelerator_and_postprocess(self) -> None:
        """Hugging Face's, within `on_cpus_too`."""
        with on_cpus_too(self.args):
            super().create_accelerator_and_postprocess()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's. accelerate shards a model together with its optimizer alone, so before
        training every process evaluates the whole model, which is sharded later."""
        prepared = self.accelerator._models
        if not self.is_fsdp_enabled or prepared:
            return super().evaluation_loop(*args, **kwargs)
        prepared.append(self.model.to(self.args.device))
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            prepared.clear()

    def shard_frozen(self, model: nn.Module) -> nn.Module:
        """Shard a frozen model as the one that trains is going to be, in place; FSDP2 alone."""
        if self.sharding is None or not self.accelerator.is_fsdp2:
            return model.to(self.args.device)
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(self.accelerator, model)

    @property
    def sharding(self) -> str | None:
        """How checkpoints of this run are sharded, in words; None without FSDP."""
        if not self.is_fsdp_enabled:
            return None
        plugin = self.accelerator.state.fsdp_plugin
        return f"FSDP{plugin.fsdp_version}, {plugin.state_dict_type.name}"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Hugging Face's. What PyTorch broadcasts needs a tensor, and SGD's state has none."""
        path = Path(checkpoint or "", "optimizer.bin")
        whole = self.sharding == "FSDP2, FULL_STATE_DICT" and path.is_file()
        saved = torch.load(path, "cpu", weights_only=True, mmap=True) if whole else {"state": True}
        if saved["state"]:
            return super()._load_optimizer_and_scheduler(checkpoint)
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(self.model, self.optimizer, saved)
        schedule = torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True)
        return self.lr_scheduler.load_state_dict(schedule)

    def gather_into(self, bare: nn.Module) -> nn.Module:
        """Return the sharded model as a whole, on the CPU, in the main process; all have to ask.

        Args:
            bare: `skeleton` of the model as it was before it was sharded. It is filled and
                returned; in other processes it stays empty.
        """
        state = self.accelerator.get_state_dict(self.model)
        if self.is_world_process_zero():
            fill(bare, state)
        return bare
