"""The base of the unlearning trainers: weights, a frozen copy, the retain loss."""

import copy

import torch
from transformers import Trainer


class GradDiff(Trainer):
    def __init__(
        self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, template_args=None, **kwargs
    ):
        self.template_args = template_args
        super().__init__(*args, **kwargs)
        self.gamma = gamma
        self.alpha = alpha
        self.retain_loss_type = retain_loss_type
        self.ref_model = self._prepare_ref_model(self.model) if retain_loss_type == "KL" else None

    def _prepare_ref_model(self, model):
        return copy.deepcopy(model).eval()

    def compute_retain_loss(self, model, retain_inputs):
        outputs = model(**retain_inputs)
        if self.retain_loss_type == "NLL":
            return outputs.loss
        with torch.no_grad():
            reference = self.ref_model(**retain_inputs).logits.log_softmax(-1)
        current = outputs.logits.log_softmax(-1)
        return (reference.exp() * (reference - current)).sum(-1).mean()
