"""Fused losses for unlearning and distillation: tensors in, tensors out."""

from importlib import metadata

from palu_kernels.functional import cross_entropy_loss, kl_loss, local_entropy_loss, topk_indices
from palu_kernels.linear.functional import (
    linear_cross_entropy_loss,
    linear_kl_loss,
    linear_local_entropy_loss,
)
from palu_kernels.linear.head import LMHead

__all__ = [
    "LMHead",
    "cross_entropy_loss",
    "kl_loss",
    "linear_cross_entropy_loss",
    "linear_kl_loss",
    "linear_local_entropy_loss",
    "local_entropy_loss",
    "topk_indices",
]

try:
    __version__ = metadata.version("palu-unlearning")
except metadata.PackageNotFoundError:  # imported from a clone that is not installed
    __version__ = "0+unknown"
