"""Call a causal language model for what a loss needs: logits at selected positions, or the hidden
states that enter the output embedding.

Most positions of a batch (prompts, padding, answer tokens without a loss) never need logits, and
with a large vocabulary the logits are the largest tensors of a step.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from palu.models.wrappers import (
    UnsupportedHead,
    incompatible_wrapper,
    is_tensor_parallel,
    output_embedding,
    refuse_compiled,
    refuse_wrapper,
    text_only_inputs,
    unwrap,
    wants_token_types,
)

# Per model class: does its `logits_to_keep` take a 2-D boolean mask? Filled by the first real call.
_TAKES_MASK: dict[type, bool] = {}


def shift_to_logits(at_labels: Tensor) -> Tensor:
    """Shift a mask of labels, bool `[B, T]`, to the positions whose logits predict them: `t` to `t
    - 1`.

    Position 0 is never predicted. Row-major order is kept, so `x[:, 1:][at_labels[:, 1:]]` lines up
    with `logits[shift_to_logits(at_labels)]`.
    """
    positions = torch.zeros_like(at_labels)
    positions[:, :-1] = at_labels[:, 1:]
    return positions


def logits_at(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    **model_inputs: Any,
) -> Tensor:
    """Return the logits at the positions of a mask, in row-major order.

    The module that the caller holds is the one that is called, so hooks of DDP, FSDP and PEFT run.
    Where the installed transformers takes a boolean mask as `logits_to_keep` (5.23 does, 5.17 does
    not) only these positions go through the output head, elsewhere all do: slower, same numbers.
    The first call for a model class finds out which.

    Args:
        model: a causal language model, wrapped or not.
        input_ids: int64 `[B, T]`.
        attention_mask: `[B, T]`, 1 for real tokens, or None when nothing is padded.
        positions: bool `[B, T]` on the same device; `(b, t)` predicts the token at `(b, t + 1)`.
        **model_inputs: more arguments of the model's forward (`position_ids`, ...); no `labels`.

    Returns:
        `[positions.sum(), V]` in the model's logits dtype, differentiable.

    Raises:
        TypeError: `positions` is not boolean.
        ValueError: `positions` has another shape than `input_ids`.
    """
    if positions.dtype != torch.bool:
        raise TypeError(f"positions must be a bool tensor, not {positions.dtype}")
    if positions.shape != input_ids.shape:
        raise ValueError(
            f"positions must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"not {tuple(positions.shape)}"
        )
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    inputs |= text_only_inputs(model, input_ids) | model_inputs
    kind = type(unwrap(model))
    takes_mask = _TAKES_MASK.get(kind)
    if takes_mask is None and "logits_to_keep" not in _parameters(unwrap(model)):
        takes_mask = _TAKES_MASK[kind] = False
    if takes_mask:
        return model(**inputs, logits_to_keep=positions).logits
    if takes_mask is None:
        logits = _probe(model, inputs, positions)
        _TAKES_MASK[kind] = logits is not None and logits.dim() == 2
        if logits is not None:
            # A model may accept the argument and ignore it; then all logits came back.
            return logits if logits.dim() == 2 else logits[positions]
    return model(**inputs).logits[positions]


def model_hidden_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **model_inputs: Any
) -> Tensor:
    """Return the hidden states that enter the output embedding (after the final norm), `[B, T, D]`,
    without computing logits.

    The module that the caller holds is the one that is called, in its own mode, so hooks of DDP and
    PEFT run and gradients flow. A hook takes the rows for the time of the call and hands none on,
    so the product with the head is empty. The rows have the dtype in which they enter the head:
    under autocast the product with the head belongs under the same autocast.

    Args:
        model, input_ids, attention_mask, **model_inputs: as for `logits_at`.

    Raises:
        UnsupportedHead: the model is compiled (compiled code does not see the hook), has no output
            embedding, does not call it exactly once with `[B, T, D]`, switches gradients on or off
            before it does, or fails when no row reaches it; or gradients are on and a wrapper waits
            for them at the model's outputs (FSDP, DDP with `static_graph`): `palu.loss_in_head`.
    """
    return HiddenStates(model)(input_ids, attention_mask, **model_inputs)


class HiddenStates:
    """`model_hidden_states` of one model, whose modules are looked through once and not at every
    call.

    Raises:
        UnsupportedHead: as `model_hidden_states`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.head = output_embedding(model)
        self.inner = unwrap(model)
        self.incompatible = incompatible_wrapper(model)
        self.wants_token_types = wants_token_types(model)
        refuse_compiled(model, self.head)
        self.in_head = None  # DTensors of no row have no product
        if is_tensor_parallel(self.head):
            from palu.models.in_head import LossInHead

            self.in_head = LossInHead(model, takes_head=False)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **model_inputs: Any
    ) -> Tensor:
        """Return `[B, T, D]`; see `model_hidden_states`."""
        self._refuse()
        entered: list[Tensor] = []
        with_grad = torch.is_grad_enabled()
        if self.in_head is not None:
            return self.in_head(lambda rows, _: rows, input_ids, attention_mask, **model_inputs)

        def take(module: nn.Module, args: tuple) -> tuple | None:
            if not args:
                return None
            # Under a checkpoint around the whole model the rows would come without a gradient.
            if torch.is_grad_enabled() != with_grad:
                raise UnsupportedHead("the model switches gradients on or off inside its forward")
            entered.append(args[0])
            return args[0][..., :0, :], *args[1:]

        if self.wants_token_types and self.inner.training:
            model_inputs.setdefault("token_type_ids", torch.zeros_like(input_ids))
        hook = self.head.register_forward_pre_hook(take)
        try:
            self.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **model_inputs
            )
        except (UnsupportedHead, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not entered:
                raise  # the model's own fault
            line = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise UnsupportedHead(
                f"the model fails when no row enters its output embedding ({line})"
            ) from error
        finally:
            hook.remove()
        if len(entered) != 1:
            raise UnsupportedHead(
                f"the model calls its output embedding {len(entered)} times, not once"
            )
        (hidden,) = entered
        if hidden.dim() != 3 or hidden.shape[:2] != input_ids.shape:
            raise UnsupportedHead(
                f"rows of shape {list(hidden.shape)} enter the output embedding for input_ids of "
                f"shape {list(input_ids.shape)}"
            )
        return hidden

    def _refuse(self) -> None:
        """Raise UnsupportedHead for what may have been done to the model since it was looked
        through, and where gradients would not be reduced."""
        if self.model._compiled_call_impl or self.inner._compiled_call_impl:
            refuse_compiled(self.model, self.head)
        if torch.is_grad_enabled() and self.incompatible is not None:
            refuse_wrapper(self.model)


def _parameters(model: nn.Module) -> Any:
    return inspect.signature(model.forward).parameters


def _probe(model: nn.Module, inputs: dict, positions: Tensor) -> Tensor | None:
    """Call with the mask: `[N, V]` if it was taken, `[B, T, V]` if ignored, None if refused."""
    try:
        logits = model(**inputs, logits_to_keep=positions).logits
    except torch.OutOfMemoryError:
        raise
    except (IndexError, TypeError, ValueError, RuntimeError):
        # Older versions index `hidden[:, mask, :]`, which fails. Any other fault comes back in the
        # call without a mask.
        return None
    if logits.dim() == 2 and logits.shape[0] == int(positions.sum()):
        return logits
    return logits if logits.shape[:-1] == positions.shape else None
