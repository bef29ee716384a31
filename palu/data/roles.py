"""Labels of tokens and the roles they play in the loss: forgotten, preserved or left alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from palu.data.spans import integer

IGNORE = -100  # label of prompt and padding: no loss
# Label of an answer token that is not sensitive. Never hand it to a model's own loss, which would
# index with it.
KEEP = -200

NONE, FORGET, PRESERVE = 0, 1, 2  # roles, as `token_roles` returns them


def token_roles(
    labels: torch.Tensor, prefix_length: int, eos_token_id: int | Iterable[int] | None = None
) -> torch.Tensor:
    """Return the role of every label: `NONE`, `FORGET` or `PRESERVE`.

    A run is a maximal stretch of consecutive sensitive labels (>= 0 and not EOS). The first
    `prefix_length` labels of a run are to be forgotten, the later ones get no loss. An EOS label is
    an answer token that is never sensitive: it ends a run and is preserved, as `KEEP` is. Position
    0 is never predicted: its role is `NONE` and a run that reaches it starts at position 1.

    Args:
        labels: integers [B, T], on any device: `IGNORE`, `KEEP` or a token id. Other negative
            values count as `IGNORE`.
        prefix_length: how many labels of each run to forget; 0 or less takes whole runs.
        eos_token_id: one id, several, or None.

    Returns:
        int8 [B, T] on the device of `labels`.

    Raises:
        TypeError: `labels` is not an integer tensor, or an id or the prefix length is not an
            integer.
        ValueError: `labels` is not two-dimensional.
    """
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must hold integers, got {labels.dtype}")
    if labels.dim() != 2:
        raise ValueError(f"labels must be [B, T], got shape {tuple(labels.shape)}")
    prefix_length = integer("prefix_length", prefix_length)
    ids = eos_ids(eos_token_id)
    if labels.numel() == 0:
        return torch.zeros(labels.shape, dtype=torch.int8, device=labels.device)

    position = torch.arange(labels.shape[1], device=labels.device)
    predicted = position > 0
    # A comparison per id rather than `isin`: building a tensor of ids would be a copy to the device
    # in every step.
    is_eos = torch.zeros_like(labels, dtype=torch.bool)
    for eos in ids:
        is_eos = is_eos | (labels == eos)
    is_eos = is_eos & (labels >= 0)
    sensitive = (labels >= 0) & ~is_eos & predicted
    preserve = ((labels == KEEP) | is_eos) & predicted
    forget = sensitive
    if prefix_length > 0:
        # The last position outside any run, so far: the distance to it is a label's rank in its
        # run, from 1. Position 0 is outside every run, so there always is one.
        outside = torch.where(sensitive, torch.zeros_like(position), position)
        rank = position - outside.cummax(dim=1).values
        forget = sensitive & (rank <= prefix_length)
    return forget.to(torch.int8) * FORGET + preserve.to(torch.int8) * PRESERVE


def eos_ids(eos_token_id: int | Iterable[int] | None) -> tuple[int, ...]:
    """Return one id, several or None as a tuple. Raises TypeError for what is no integer."""
    if eos_token_id is None:
        return ()
    if isinstance(eos_token_id, Iterable) and not isinstance(eos_token_id, str):
        return tuple([integer("eos_token_id", eos) for eos in eos_token_id])
    return (integer("eos_token_id", eos_token_id),)


def check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """Raise ValueError for a label that is neither -100, nor -200, nor a token id."""
    wrong = (labels >= vocab_size) | ((labels < 0) & (labels != IGNORE) & (labels != KEEP))
    if bool(wrong.any()):
        worst = int(labels[wrong].flatten()[0])
        raise ValueError(
            f"labels holds {worst}; a label must be {IGNORE} (no loss), {KEEP} (preserve) "
            f"or a token id in 0..{vocab_size - 1}"
        )


def check_roles(roles: torch.Tensor) -> None:
    """Raise ValueError for a role that is none: labels may have been given for them."""
    wrong = (roles < NONE) | (roles > PRESERVE)
    if bool(wrong.any()):
        raise ValueError(
            f"row_roles holds {int(roles[wrong].flatten()[0])}; a role must be {NONE} (nothing), "
            f"{FORGET} (forget) or {PRESERVE} (preserve): roles(labels) makes them of labels"
        )


def check_tokens(ids: torch.Tensor, vocab_size: int) -> None:
    """Raise ValueError for an input that is no token id: an embedding would not say which."""
    wrong = (ids >= vocab_size) | (ids < 0)
    if bool(wrong.any()):
        raise ValueError(
            f"input_ids holds {int(ids[wrong].flatten()[0])}; a token id must be in "
            f"0..{vocab_size - 1}, the model's vocabulary"
        )
