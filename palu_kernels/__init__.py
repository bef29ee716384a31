"""Fused losses for unlearning and distillation: tensors in, tensors out."""

from palu_kernels.operators import cross_entropy_loss, kl_loss, local_entropy_loss, topk_indices

__all__ = ["cross_entropy_loss", "kl_loss", "local_entropy_loss", "topk_indices"]
