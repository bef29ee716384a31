"""The router loss (load balancing) of a mixture of experts, which the model's own loss adds to
its cross-entropy where `config.output_router_logits` is true: the retain term has it too."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from palu.models.wrappers import unwrap

logger = logging.getLogger(__name__)


class RouterLoss:
    """Compute the router loss of the retain rows from the model's outputs.

    The model's own function and coefficient are used, over the real tokens of the retain rows of a
    micro-batch. Micro-batches count by their answer tokens. The function multiplies means over
    tokens: unlike the other terms it depends on how a step is split into micro-batches and
    processes, as in the model's own training.
    """

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[list[Any]]:
        """Collect the model's outputs inside; nothing for models whose config does not ask for
        the loss."""
        outputs: list[Any] = []
        if not wanted(model):
            yield outputs
            return
        handle = unwrap(model).register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            yield outputs
        finally:
            handle.remove()

    def of(
        self, model: nn.Module, outputs: list[Any], mask: Tensor | None, forget_rows: int
    ) -> Tensor:
        """Return coefficient times loss, a float32 scalar, of the rows after the forget rows.

        Args:
            outputs: of `watching`, whose last one counts (the original with the adapter off is
                called before the model).
            mask: `[B, T]`, the attention mask of the call.
            forget_rows: of the call.

        Raises:
            ValueError: the model gives no such loss, or none of some of its rows.
        """
        inner = unwrap(model)
        loss = getattr(outputs[-1] if outputs else None, "aux_loss", None)
        coefficient = _coefficient(inner)
        if not isinstance(loss, Tensor) or coefficient is None:
            raise ValueError(
                f"config.output_router_logits is True, and {type(inner).__name__} gives no router "
                "loss (aux_loss and router_aux_loss_coef) to add to the retain term; set it to "
                "False to train without"
            )
        if forget_rows:
            loss = _of_rows(inner, outputs[-1], mask, forget_rows, loss)
        if model.training:
            self._seen.append(loss.detach().float())
        return coefficient * loss.float()

    def take_mean(self) -> Tensor | None:
        """Return the mean of the losses of training since the last call, without the
        coefficient; None where there was none."""
        seen, self._seen = self._seen, []
        return torch.stack(seen).mean() if seen else None


def wanted(model: nn.Module) -> bool:
    """Return whether the model's own loss has a router loss."""
    one, text = _configs(unwrap(model))
    name = "output_router_logits"
    return getattr(one, name, False) is True or getattr(text, name, False) is True


def warn_if_left_out(model: nn.Module, reason: str | None) -> None:
    """Warn where the config asks for a router loss and the run has no place for it."""
    if reason is not None and wanted(model):
        logger.warning(
            "config.output_router_logits is True; the router loss (router_aux_loss_coef) is not "
            "part of the loss here: %s",
            reason,
        )


def _configs(inner: nn.Module) -> list[Any]:
    config = getattr(inner, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config, text]


def _coefficient(inner: nn.Module) -> float | None:
    holders = [inner, *reversed(_configs(inner))]
    values = (getattr(holder, "router_aux_loss_coef", None) for holder in holders)
    return next((value for value in values if isinstance(value, (int, float))), None)


def _of_rows(
    inner: nn.Module, output: Any, mask: Tensor | None, first_row: int, whole: Tensor
) -> Tensor:
    """Call the model's function on the rows from `first_row` on; it must give `whole` for all
    rows."""
    function = getattr(sys.modules[type(inner).__module__], "load_balancing_loss_func", None)
    gates = getattr(output, "router_logits", None)
    experts = next(
        (
            getattr(holder, name)
            for holder in [inner, *reversed(_configs(inner))]
            for name in ("num_experts_per_tok", "moe_top_k", "moe_k")
            if isinstance(getattr(holder, name, None), int)
        ),
        None,
    )
    if function is not None and gates and experts is not None and mask is not None:
        gates = [gate.reshape(*mask.shape, -1) for gate in gates]

        def of(first: int) -> Tensor:
            parts = tuple(gate[first:].flatten(0, 1) for gate in gates)
            return function(parts, gates[0].shape[-1], experts, mask[first:])

        if torch.allclose(of(0).float(), whole.float(), rtol=1e-3):
            return of(first_row)
    raise ValueError(
        f"config.output_router_logits is True, and the router loss of {type(inner).__name__} is "
        "not known for the retain rows of a batch alone; set it to False to train without"
    )
