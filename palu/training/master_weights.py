"""Half-precision weights that train keep float32 masters, so that no step is rounded away.

A step of AdamW at 1e-5 is smaller than half the spacing of nearly all bfloat16 weights: taken on
them it leaves most of them as they were. Here the optimizer steps on a float32 copy. A whole run at
such a rate moves most weights by less than half a spacing too, which rounding to the nearest would
hide from the forward pass and from the saved model. So the weight is the copy rounded up or down at
random, by how near it is to either: right in the mean, and exact where nothing has changed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from palu.training.checkpoints import CheckpointError
from palu.training.sharding import gather

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
# From this share on it is said aloud that rounding takes a part of what training changed back.
LOUD = 0.05
_PIECE = 2**22  # entries that are rounded at a time
_STATE = "palu_master_weights"
SAMPLE = 2**16  # entries of a weight that are remembered: a share is exact within half a percent


def trains_in_half(model: nn.Module) -> list[str]:
    """Names of the parameters that train and have 16 bits."""
    return [n for n, p in model.named_parameters() if p.requires_grad and p.dtype in HALF]


class MasterWeights:
    """Put float32 masters into an optimizer, in place of its bfloat16 and float16 parameters.

    Works through the hooks of `torch.optim.Optimizer`, so that any optimizer that does nothing but
    read `param.grad` and change `param` will do. The masters are part of its state dict. Gradients
    add up in float32 where PyTorch can do that (2.11 and newer) and no other process has a share in
    them, else in the weight's dtype.

    Args:
        optimizer: as it was made, before its first step.
        seed: of the rounding, the same in every process. It depends on the number of the step
            beside, so that a resumed run rounds as the unbroken one.
        sum_in_float32: whether a parameter's gradient may be of another dtype than the parameter.

    Attributes:
        of: the master of each parameter.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, sum_in_float32: bool, seed: int = 0
    ) -> None:
        self._seed, self._steps = seed, 0
        self.of: dict[nn.Parameter, nn.Parameter] = {}
        for group in optimizer.param_groups:
            group["params"] = [self._master(p, sum_in_float32) for p in group["params"]]
        for parameter, master in self.of.items():
            if parameter in optimizer.state:  # some make it at once: Adagrad
                state = optimizer.state.pop(parameter)
                optimizer.state[master] = {n: _widened(v) for n, v in state.items()}
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def _master(self, parameter: nn.Parameter, sum_in_float32: bool) -> nn.Parameter:
        if parameter.dtype not in HALF:
            return parameter
        if sum_in_float32 and hasattr(parameter, "grad_dtype"):
            parameter.grad = None
            parameter.grad_dtype = torch.float32
        self.of[parameter] = nn.Parameter(parameter.detach().float())
        return self.of[parameter]

    def _before_step(self, *_: Any) -> None:
        for parameter, master in self.of.items():
            master.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self._steps += 1
        self._round()

    def _round(self) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for parameter, master in self.of.items():
            master.grad = None
            where = master.device
            if where not in generators:
                generators[where] = torch.Generator(where).manual_seed(self._seed + self._steps)
            round_into(parameter, master, generators[where])

    def _save(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        masters = [master.detach() for master in self.of.values()]
        return {**state, _STATE: {"steps": self._steps, "weights": masters}}

    @torch.no_grad()
    def _load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state = dict(state)
        found = state.pop(_STATE, None)
        saved = None if found is None else found["weights"]
        if saved is None or len(saved) != len(self.of):
            raise CheckpointError(
                f"the optimizer's state has {'no' if saved is None else len(saved)} float32 master "
                f"weights, and {len(self.of)} parameters of 16 bits train: it was saved by a run "
                "that rounded its steps, or of another model; begin anew"
            )
        for master, value in zip(self.of.values(), saved, strict=True):
            master.copy_(value)
        self._steps = found["steps"]
        self._round()
        return state


@torch.no_grad()
def round_into(out: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Write float32 values into a tensor of another dtype: bfloat16 at random, up with the
    probability of how near the upper neighbour is; others to the nearest. Of DTensors each process
    rounds its own shards."""
    if hasattr(out, "to_local") and hasattr(values, "to_local"):
        out, values = out.to_local(), values.to_local()
    if out.dtype != torch.bfloat16 or values.dtype != torch.float32:
        out.copy_(values)
        return
    if not out.is_contiguous():
        whole = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        round_into(whole, values, generator)
        out.copy_(whole)
        return
    given, taken = values.detach().reshape(-1), out.detach().view(-1)
    for start in range(0, given.numel(), _PIECE):
        piece = slice(start, start + _PIECE)
        bits = given[piece].view(torch.int32)
        noise = torch.randint(
            0, 2**16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device
        )
        # Noise in the bits that bfloat16 has not carries into those that it has.
        rounded = noise.add_(bits).bitwise_and_(-(2**16)).view(torch.float32)
        taken[piece].copy_(torch.where(given[piece].isfinite(), rounded, given[piece]))


class StartingWeights:
    """A sample of the weights that train, as they were: what rounding takes back is seen by it."""

    def __init__(self, model: nn.Module) -> None:
        self._taken = {n: _sample(p) for n, p in model.named_parameters() if p.requires_grad}

    def rounded_back(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        masters: Mapping[nn.Parameter, nn.Parameter] | None = None,
    ) -> float:
        """Of the change that training made, the share (0 to 1) that rounding loses: one minus the
        projection of the change that is left on the change that was made.

        Args:
            model: the same model, now.
            dtype: what its weights are going to be rounded to; None: they are rounded already.
            masters: see `MasterWeights.of`.
        """
        made = left = 0.0
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if name not in self._taken:
                continue
            was = self._taken[name].float()
            now = _sample((masters or {}).get(parameter, parameter)).float()
            rounded = _sample(parameter)
            if dtype is not None:
                rounded = torch.empty_like(now, dtype=dtype)
                round_into(rounded, now, generator)
            change = (now - was).double()
            made += float(change.square().sum())
            left += float((change * (rounded.float() - was)).sum())
        return min(max(1 - left / made, 0.0), 1.0) if made else 0.0


def warn_rounded_back(share: float, dtype: torch.dtype) -> None:
    """One warning, from LOUD on."""
    if share > LOUD:
        warnings.warn(
            f"rounding to {str(dtype).removeprefix('torch.')} takes back {share:.0%} of the change "
            "that training made: most weights moved by less than half a spacing. float32 weights "
            "keep it, and so does an adapter (LoRA)",
            stacklevel=3,
        )


def warn_without_masters(accelerator: Any) -> None:
    """Warn that 16-bit weights train as they are, where a wrapper owns the optimizer's weights.

    Args:
        accelerator: of DeepSpeed, which makes masters of its own, of Megatron-LM, or of FSDP, which
            trains in float32 where the products are 16-bit ones.
    """
    kind = accelerator.distributed_type
    mixed = kind == DistributedType.FSDP and accelerator.mixed_precision != "no"
    if kind != DistributedType.DEEPSPEED and not mixed:
        logger.warning(
            "weights of 16 bits train under %s, without float32 masters: small steps are rounded "
            "away; load the model with dtype float32 and set bf16=True",
            kind.value,
        )


def refuse_optimizer(optimizer: Any, optim: Any) -> None:
    """Raise ValueError for an optimizer that steps by other ways than `step()` on its parameters.

    Args:
        optimizer: what the Trainer made or was given.
        optim: its name there.
    """
    name = str(getattr(optim, "value", optim))
    swaps = callable(getattr(optimizer, "train", None))  # schedule-free ones move their parameters
    inside = any(word in name for word in ("layerwise", "lomo"))  # in backward
    if swaps or inside or not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer {type(optimizer).__name__} (optim={name!r}) cannot work on float32 masters "
            "of bfloat16 or float16 weights, whose steps would be rounded away; load the model "
            "with dtype float32 (and set bf16=True for the products), or use optim='adamw_torch'"
        )


def _sample(values: Tensor) -> Tensor:
    values = gather(values.detach()).reshape(-1)
    return values[:: max(1, values.numel() // SAMPLE)].cpu().clone()


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
