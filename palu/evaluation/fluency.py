"""Fluency of generated text: a classifier's probability that it is no gibberish."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from palu.evaluation.inference import in_batches
from palu.models.folders import check_loaded, check_weights_files, reading
from palu.models.loading import load_tokenizer, model_folder

MAX_LENGTH = 32  # tokens looked at, as in open-unlearning


class FluencyClassifier:
    """A sequence classifier from a local folder (safetensors only) whose class 0 is fluent text.

    open-unlearning takes madhurjindal/autonlp-Gibberish-Detector-492513457, on the first 32 tokens.

    Args:
        folder: a Hugging Face folder with a classification head.
        device: where to run it.

    Raises:
        FileNotFoundError: no such model folder.
        ValueError: it holds no classifier, or not all of its weights.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification

        folder = model_folder(folder)
        self.tokenizer: Any = load_tokenizer(folder)
        check_weights_files(folder)
        failed = f"could not load a classifier from {str(folder)!r}"
        with reading(failed, folder):
            self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(
                f"{str(folder)!r} is no trained classifier: its weights lack {missing[0]!r}"
            )
        check_loaded(self.model, loading, folder)
        self.model.to(device).eval()

    @torch.no_grad()
    def scores(self, texts: Sequence[str], *, batch_size: int, **sharing: Any) -> list[float]:
        """Return the probability of class 0 for each text, in order.

        Args:
            batch_size: texts a forward pass.
            **sharing: `processes` and `report` of `in_batches`.
        """

        def work(chosen: list[int]) -> list[float]:
            inputs = self.tokenizer(
                [texts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=MAX_LENGTH,
            ).to(self.model.device)
            return self.model(**inputs).logits.float().softmax(-1)[:, 0].tolist()

        return in_batches([len(text) for text in texts], batch_size, work, **sharing)
